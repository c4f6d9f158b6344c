"""`make site`, opened in headless Chromium at phone width: links, pictures, errors, overflow."""

import http.server
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from support.stored import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-sync", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--enable-logging=stderr"]
PHONE = 390

CHECK = """<!doctype html><title>check</title><iframe width=%d height=844></iframe><script>
const seen = [], frame = document.querySelector("iframe");
async function open_(page) {
  await new Promise(done => { frame.onload = done; frame.src = page; });
  const shown = frame.contentDocument;
  for (const image of shown.images) image.loading = "eager";
  await Promise.allSettled([...shown.images].map(image => image.decode()));
  const missing = [...shown.images].filter(i => !i.naturalWidth).map(i => i.src.slice(0, 200));
  const width = shown.documentElement.scrollWidth, text = shown.body.innerText.length;
  seen.push({page, width, text, missing});
}
(async () => {
  for (const page of %s) await open_(page);
  fetch("/", {method: "POST", body: JSON.stringify(seen)});
})();
</script>"""


class Page(HTMLParser):
    """What a page links to and shows, and the anchors it has."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name == "id":
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", "."]
    run = subprocess.run(
        [*command, str(folder)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


def test_every_link_leads_somewhere(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 20
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = pages[target].anchors if target in pages else {parts.fragment}
            if not target.exists() or unquote(parts.fragment) not in known:
                broken.append(f"{path.relative_to(site)}: {link[:100]}")
    assert not broken


@pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: the site is not opened in a browser"
)
def test_pages_open_on_a_phone_without_errors(site, tmp_path):
    documents = [ROOT / "README.md", *ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("figures/*/*.md")]
    names = [str(p.relative_to(ROOT).with_suffix(".html")) for p in documents if ".p" not in p.stem]
    own = [f"docs/{name}.html" for name in ("api", "notebooks", "own_model")]
    pages = ["index.html", *own, *names]
    (site / "check.html").write_text(CHECK % (PHONE, json.dumps(pages)), encoding="utf-8")
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server,
        open(tmp_path / "log", "w+", encoding="utf-8") as log,
    ):
        server.folder, server.seen = str(site), queue.Queue()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/check.html"
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}/user", address]
        with subprocess.Popen(command, stderr=log) as browser:
            try:
                seen = server.seen.get(timeout=300)
            finally:
                browser.terminate()
                server.shutdown()
    console = re.findall(r".*CONSOLE.*", (tmp_path / "log").read_text(encoding="utf-8"))
    assert [s["page"] for s in seen] == pages
    assert all(s["text"] > 200 for s in seen)
    assert not [s for s in seen if s["missing"]]
    assert not [(s["page"], s["width"]) for s in seen if s["width"] > PHONE]
    assert not console


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serve the site, keep what the page found, and do not log."""

    def translate_path(self, path):
        self.directory = self.server.folder
        return super().translate_path(path)

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        self.server.seen.put(json.loads(self.rfile.read(length)))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args):
        pass
