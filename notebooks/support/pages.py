"""Pages: the README's table and figures/*/VERDICTS.md from what is committed, notebooks as HTML."""

import html
import json
import re
from pathlib import Path

import pandas as pd
import yaml
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from PIL import Image, UnidentifiedImageError

from support import stored
from support.claims import OWN, PUBLISHED, committed, show_number, written
from support.stored import ROOT, folder

OPEN = ("not run", "not applicable")


def notebooks():
    """Return the committed notebooks as a table: their question (the title) and their answer.

    Column `answer` is what holds of all profiles, `demo` and `real` what the numbers of one say.
    """
    rows = []
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        title = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        row = {"notebook": path.stem, "question": title.partition(" · ")[2].partition("\n")[0]}
        leads = {"answer": "Answer", "demo": "Answer (`demo`)", "real": "Answer (`real`)"}
        for name, lead in leads.items():
            text = title.partition(f"**{lead}.**")[2].partition("\n\n")[0]
            row[name] = " ".join(text.split())
        rows.append(row)
    return pd.DataFrame(rows)


def fared(claims):
    """Return two texts on a table of claims: how many published ones, and how many of ours, hold.

    Counted are those that were put to the test.
    """
    texts = []
    for own in (False, True):
        asked = claims[(claims["of"] == "here") == own].query("verdict not in @OPEN")
        met = asked["verdict"].isin([PUBLISHED[0], OWN[0]])
        texts.append(f"{met.sum()} of {len(asked)}" if len(asked) else "-")
    return texts


def summary_page():
    """Return the README's table: one line a notebook, how its claims fared in demo and real."""
    tables = [written(committed(profile)) for profile in ("demo", "real")]
    columns = ["notebook", "question", "in short", "drawn: published", "drawn: ours"]
    lines = [_markdown_row([*columns, "real: published", "real: ours"]), "|" + " --- |" * 7]
    for row in notebooks().itertuples():
        told = [text for t in tables for text in fared(t[t["notebook"] == row.notebook])]
        cells = [_link(row.notebook, row.notebook[:2]), row.question, in_short(row.answer), *told]
        lines.append(_markdown_row(cells))
    return "\n".join(lines)


def published_page():
    """Return the README's table of published figures: their numbers, and ours on real data.

    figures/published.yaml says of each what it shows, which claims decide, and why ours differs.
    """
    claims = written(committed("real")).set_index("id")
    columns = ["figure", "shows", "published", "ours, real data; bound", "verdict", "why"]
    lines = [_markdown_row(columns), "|" + " --- |" * len(columns)]
    for row in yaml.safe_load((ROOT / "figures" / "published.yaml").read_text(encoding="utf-8")):
        own = claims.loc[list(row["claims"])]
        cells = [_link(own["notebook"].iloc[0], row["figure"]), row["shows"]]
        known = own["published"].notna().any()
        cells += ["\n".join(map(show_number, own["published"])) if known else "-"]
        words = [f"{word}: " for word in row["claims"].values()] if len(own) > 1 else [""]
        told = words + own["shown"] + "; " + own["criterion"].map(_three_digits)
        cells += ["\n".join(told)]
        outcomes = own["verdict"].value_counts()
        told = [f"{name} ({k} of {len(own)})" for name, k in outcomes.items()]
        cells += [outcomes.index[0] if len(outcomes) == 1 else ", ".join(told), row["why"]]
        lines.append(_markdown_row(cells))
    return "\n".join(lines)


def verdict_page(profile):
    """Return figures/<profile>/VERDICTS.md: of every notebook its answer, claims and figures."""
    claims, lines = written(committed(profile)), [f"# Every claim of the profile `{profile}`", ""]
    for row in notebooks().to_dict("records"):
        name = row["notebook"]
        own = claims[claims["notebook"] == name]
        title = _link(name, f"{name[:2]} · {row['question']}", up="../../")
        answer = f"{row['answer']} {row[profile]}".strip()
        lines += [f"## {title}", "", answer if len(own) else "Not run yet."]
        if len(own):
            lines += ["", "| claim | whose | criterion | value | outcome |", "|" + " --- |" * 5]
        for c in own.itertuples():
            whose = "ours" if c.of == "here" else c.of
            cells = [f"{c.claim} (`{c.id}`)", whose, c.criterion, c.shown, c.verdict]
            lines.append(_markdown_row(cells))
        lines += [*figures_of(profile, name), ""]
    return "\n".join(lines)


def figures_of(profile, notebook, up=""):
    """Return the committed figures of a notebook as Markdown; of `demo` all, else the plots."""
    paths = sorted(committed(profile).glob(f"{notebook[:2]}_*.png"))
    shown = [path for path in paths if profile == "demo" or is_plot(path)]
    return [f"\n![{path.stem.replace('_', ' ')}]({up}{path.name})" for path in shown]


def is_plot(path):
    """Return whether a PNG says of itself, as `figures.save` wrote, that it shows no picture.

    Photographs are not ours to publish: of profiles other than `demo` only plots are committed.
    """
    try:
        with Image.open(path) as image:
            return image.info.get("shows") == "plot"
    except UnidentifiedImageError:
        return False


def _three_digits(text):
    return re.sub(r"\d*\.\d{4,}", lambda number: f"{float(number[0]):.3g}", text)


def _markdown_row(cells):
    cells = [cell.replace("<", "&lt;").replace("|", r"\|").replace("\n", "<br>") for cell in cells]
    return f"| {' | '.join(cells)} |"


def _link(notebook, text, up=""):
    return f"[{text}]({up}notebooks/{notebook}.ipynb)"


def in_short(answer):
    """Return an answer's first sentence, and the next where the first has under 50 letters."""
    ends = [m.end() for m in re.finditer(r"[.](?= [A-Z*]|$)", answer)]
    return answer[: next((end for end in ends if end >= 50), None)]


def update_readme(path=None):
    """Rewrite the README's two tables between their markers, and figures/<profile>/VERDICTS.md."""
    path = Path(path or ROOT / "README.md")
    text = path.read_text(encoding="utf-8")
    for name, table in {"published": published_page, "notebooks": summary_page}.items():
        start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        head, rest = text.split(start)
        text = f"{head}{start}\n{table()}\n{end}{rest.split(end)[1]}"
    stored.write(path, text)
    for profile in ("demo", "real"):
        page = folder("figures", profile) / "VERDICTS.md"
        stored.write(page, verdict_page(profile))


# ---------------------------------------------------------------- notebooks as HTML

OFFLINE = """{%- extends "lab/index.html.j2" -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
"""


def of_notebook(notebook):
    """Return an executed notebook as one HTML page that asks no other host for anything.

    Formulas are MathML, which browsers draw by themselves.
    """
    exporter = HTMLExporter(raw_template=OFFLINE)
    exporter.register_filter("markdown2html", MarkdownWithMath(renderer=_MathML(escape=False)))
    return exporter.from_notebook_node(notebook)[0]


class _MathML(IPythonRenderer):
    def block_math(self, body):
        return _formula(body, as_block=True)

    def inline_math(self, body):
        return _formula(body, as_block=False)


def _formula(body, as_block):
    try:
        return tex2mathml(body, as_block=as_block)
    except MathError:  # shown as it is written
        return f"<code>{html.escape(body)}</code>"


if __name__ == "__main__":
    update_readme()
