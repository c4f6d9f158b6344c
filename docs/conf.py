"""The static site (`make site`): README, notebooks with their stored outputs, verdicts, API.

The source folder is the root of the repository, so that the links people follow on disk work here.
"""

import re
import shutil
import sys
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]
import nbformat  # noqa: E402

from support import pages  # noqa: E402
from support.start import start  # noqa: E402

start("demo")

project = "Influence functions, reproduced"
author = "the contributors"
extensions = ["myst_nb", "sphinx.ext.autodoc"]
root_doc = "README"
include_patterns = ["*.md", "notebooks/*.ipynb", "figures/*/*.md", "data/README.md", "docs/*.md"]
exclude_patterns = ["**/.ipynb_checkpoints", "**/partial_*.ipynb", "runs"]
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "html_image"]
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]
html_theme = "furo"
html_title = project
html_math_renderer = "mathml"
html_show_copyright = False
html_copy_source = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
templates_path = []

CONTENTS = """
```{{toctree}}
:hidden:

All notebooks at a glance <docs/notebooks>
docs/own_model
```

```{{toctree}}
:hidden:
:caption: Notebooks
:maxdepth: 1

{notebooks}
```

```{{toctree}}
:hidden:
:caption: Reference

Every verdict and figure: drawn <figures/demo/VERDICTS>
Every verdict: real data <figures/real/VERDICTS>
docs/api
docs/tried
docs/cost
data/README
figures/benchmark/benchmark
CHANGELOG
CONTRIBUTING
```
"""

REAL = """## The same figures on real data

Everything above is of drawn pictures and few digits. Below are the plots of the profile `real`,
without those that show pictures; [its claims](../figures/real/VERDICTS.md) have every number.
"""


def add_contents(app, name, text):
    """Append the list of pages to the README, and to a notebook what real data gave.

    The benchmark's table gets a title, the page on a model of your own that section of the README.
    """
    if name == "figures/benchmark/benchmark":
        text[0] = f"# How fast\n\n{text[0]}"
    if name == "README":
        paths = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
        names = "\n".join(f"notebooks/{p.stem}" for p in paths)
        text[0] += CONTENTS.format(notebooks=names)

    if name == "docs/own_model":
        own = (
            (ROOT / "README.md").read_text(encoding="utf-8").partition("## With your own model")[2]
        )
        own = own.partition("\n## ")[0]
        text[0] += re.sub(r"\]\((?!http|#)", "](../", own)
    if name.startswith("notebooks/"):
        shown = pages.figures_of("real", name.partition("/")[2], up="../figures/real/")
        if shown:
            notebook = nbformat.reads(text[0], 4)
            more = "\n".join([REAL, *shown])
            notebook.cells.append(nbformat.v4.new_markdown_cell(more, id="real"))
            text[0] = nbformat.writes(notebook)


def as_written(app, what, name, obj, options, lines):
    """Keep a docstring's lines as they are written, with nothing but `names` marked."""
    block = []
    for line in lines[1:]:
        block.append(f"| {' ' * (len(line) - len(line.lstrip()))}{_escaped(line.strip())}")
    lines[:] = [_escaped(line) for line in lines[:1]] + ["", *block, ""]


def _escaped(line):
    parts = line.split("`")
    if len(parts) % 2 == 0:  # an unpaired backtick
        return re.sub(r"([\\*`|_])", r"\\\1", line)
    plain = [re.sub(r"([\\*|_])", r"\\\1", part) for part in parts]
    plain[1::2] = [f"``{part}``" for part in parts[1::2]]
    return "".join(plain)


def math(visitor, node, display):
    """Write a formula as MathML, which browsers draw without a script from elsewhere."""
    visitor.body.append(tex2mathml(node.astext(), as_block=display))
    raise SkipNode


def finish(app, error):
    """Make index.html the README's page."""
    if error is None:
        shutil.copy(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


class Cards(SphinxDirective):
    """A card a notebook: its question, a figure (the published one's, if any), its answer."""

    def run(self):
        cards = []
        for row in pages.notebooks().itertuples():
            figures = pages.figures_of("demo", row.notebook, up="../figures/demo/")
            figure = sorted(figures, key=lambda text: "fig" not in text.split("](")[0])[:1]
            title = f"## [{row.notebook[:2]} · {row.question}](../notebooks/{row.notebook}.ipynb)"
            cards += [title, *figure, "", pages.in_short(row.answer), ""]
        return self.parse_text_to_nodes("\n".join(cards), allow_section_headings=True)


class Modules(SphinxDirective):
    """Every module of `helpers`, by name."""

    def run(self):
        lines = []
        for path in sorted((ROOT / "helpers").glob("[a-z]*.py")):
            lines += [
                f"### {path.stem}",
                "",
                "```{eval-rst}",
                f".. automodule:: helpers.{path.stem}",
            ]
            lines += ["   :members:", "```", ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def setup(app):
    """Connect the functions above."""
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", as_written)
    app.connect("build-finished", finish)
    app.add_directive("cards", Cards)
    app.add_directive("modules", Modules)
    app.add_html_math_renderer(
        "mathml", (lambda v, n: math(v, n, False), None), (lambda v, n: math(v, n, True), None)
    )
