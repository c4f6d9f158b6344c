"""Figures with the numbers behind them, picture grids, and verdict tables.

Every notebook ends in verdicts: a claim, a criterion, a value, and one of the four words below.
A run writes them to runs/<profile>/figures/NN_verdicts.json, beside the figures. figures/<profile>/
holds the committed ones, from which the README's table and the pages of verdicts are made.
"""

import io
import json
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from helpers.runtime import ROOT, folder

WORDS = ("reproduced", "partly", "not reproduced", "not run")


class Verdict(NamedTuple):
    """One claim and what became of it; `verdict` is one of WORDS, `interval` a 95 % one."""

    id: str
    claim: str
    criterion: str
    value: float | None
    verdict: str
    interval: list | None = None


def verdict(id, claim, criterion, value, holds, *, partly=False, interval=None):
    """Return a Verdict: `holds` True, else `partly`; `holds` None means it was not run.

    value : a number, or what has a `mean` and an `interval`, as `evaluation.mean_of` returns.
    interval : (low, high) of a number at 95 %, where repetitions or test points give one.
    """
    if hasattr(value, "interval"):
        value, interval = value.mean, value.interval
    word = "not run" if holds is None else WORDS[0 if holds else 1 if partly else 2]
    value = None if value is None else float(value)
    known = interval is not None and np.isfinite(interval).all()
    return Verdict(id, claim, criterion, value, word, [*map(float, interval)] if known else None)


def show_number(value):
    """Return a number as text with three digits; rounding noise (below 1e-9) is said to be that."""
    if value is None or np.isnan(value):
        return "-"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:,.0f}"
    if value != 0 and abs(value) < 1e-9:
        return "below 1e-9"
    return f"{value:.3g}"


def show_value(v):
    """Return a verdict's value as text, with its interval where it has one."""
    if not isinstance(v.interval, list):  # None, or NaN where a table has filled a gap
        return show_number(v.value)
    return f"{show_number(v.value)} ({' to '.join(map(show_number, v.interval))})"


def verdict_table(verdicts):
    """Return the verdicts as a table to show."""
    table = pd.DataFrame(verdicts, columns=Verdict._fields)
    table["value"] = [show_value(v) for v in verdicts]
    pd.set_option("display.max_colwidth", 80, "display.width", 200)
    return table[["id", "claim", "criterion", "value", "verdict"]].set_index("id")


def write_verdicts(notebook, profile, parameters, verdicts):
    """Write runs/<profile>/figures/NN_verdicts.json and return the table to show.

    `real` and `thesis` results carry the commit, versions and date they were made with; `demo`
    results are the same wherever the locked packages run, so they carry the versions only.
    """
    import keras
    import tensorflow as tf

    record = {
        "notebook": notebook,
        "profile": profile,
        "parameters": parameters,
        "verdicts": [_without_empty_interval(v) for v in verdicts],
        "versions": {
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
        },
        "command": f"make {'reproduce' if profile == 'demo' else profile}",
    }
    if profile != "demo":
        record |= {
            "commit": _commit(),
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
        }
    path = folder("runs", profile, "figures") / f"{notebook[:2]}_verdicts.json"
    path.write_text(json.dumps(_plain(record), indent=1) + "\n", encoding="utf-8")
    return verdict_table(verdicts)


def _without_empty_interval(v):
    return {key: value for key, value in v._asdict().items() if key != "interval" or value}


def _commit():
    """Return the commit that made a result, "-dirty" if its code had uncommitted changes."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", "helpers", "notebooks", "params")
    return f"{commit or 'unknown'}{'-dirty' if changed else ''}"


def _git(*words):
    try:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def save_figure(figure, name, profile, **numbers):
    """Write runs/<profile>/figures/<name>.png and the plotted numbers as <name>.json; return it.

    What a notebook shows is the file itself, so the two can not differ. A palette of 128 colours
    keeps sheets of pictures small.
    """
    import matplotlib.pyplot as plt
    from IPython.display import Image
    from PIL import Image as Raster

    path = folder("runs", profile, "figures") / f"{name}.png"
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=getattr(figure, "file_dpi", 100))
    plt.close(figure)
    Raster.open(buffer).convert("RGB").quantize(128).save(path, optimize=True)
    if numbers:
        path.with_suffix(".json").write_text(json.dumps(_plain(numbers)) + "\n", encoding="utf-8")
    return Image(path)


def _plain(value):
    """Return JSON types, floats with six significant digits (arrays become lists)."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray, pd.Series, pd.Index)):
        return [_plain(v) for v in list(value)]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value


def picture_grid(images, captions, *, columns=6, titles=None, size=1.5, title=None):
    """Return a figure with one captioned picture a cell, readable at page width.

    images : pictures (h, w, 3) uint8, or (h, w) grey; captions : text under each;
    titles : one a row, written at its left; None leaves them out.
    """
    import matplotlib.pyplot as plt

    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, squeeze=False, figsize=(size * columns, (size + 0.42) * rows)
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
        axis.grid(False)
    for axis, image, caption in zip(axes.flat, images, captions, strict=False):
        axis.imshow(image, cmap="gray_r" if image.ndim == 2 else None)
        axis.set_xlabel(caption, fontsize=8, labelpad=3)
    for axis, text in zip(axes[:, 0], titles or [], strict=False):
        axis.set_ylabel(text, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.file_dpi = 80  # pictures hold noise, which no compression makes small
    return figure


def captions(table, rows, nats):
    """Return captions for rows of a manifest: index and kind, below them the influence in nats."""
    kinds = table["subtype"].str.replace("_", " ").iloc[rows]
    return [f"{i} {k}\n{v:+.2g}" for i, k, v in zip(rows, kinds, nats, strict=True)]


def committed(profile):
    """Return the folder of a profile's committed verdicts and figures."""
    return ROOT / "figures" / profile


def results(profile):
    """Return the folder of a profile's last run; of the committed verdicts where none was made."""
    of_run = folder("runs", profile, "figures")
    others = [path for path in of_run.glob("[0-9][0-9]_verdicts.json") if path.name[:2] != "16"]
    return of_run if others else committed(profile)


def read_record(path):
    """Return what `write_verdicts` wrote."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def verdicts_of(where, chosen=None):
    """Return the verdicts in a folder, of all or of some notebooks, as one table in their order."""
    tables = []
    for path in sorted(where.glob("[0-9][0-9]_verdicts.json")):
        record = read_record(path)
        if chosen is None or record["notebook"] in {p.stem for p in chosen}:
            table = pd.DataFrame(record["verdicts"], columns=Verdict._fields)
            tables.append(table.assign(notebook=record["notebook"]))
    if not tables:
        return pd.DataFrame(columns=["notebook", *Verdict._fields])
    return pd.concat(tables, ignore_index=True)


def notebooks():
    """Return the committed notebooks as a table: their question (the title) and their answer."""
    rows = []
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        title = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        question = title.partition(" · ")[2].partition("\n")[0]
        answer = " ".join(title.partition("**Answer.**")[2].partition("\n\n")[0].split())
        rows.append((path.stem, question, answer))
    return pd.DataFrame(rows, columns=["notebook", "question", "answer"])


def counts(where):
    """Return how many verdicts of each word a notebook has: one row a notebook, columns WORDS."""
    table = verdicts_of(where)
    return pd.crosstab(table["notebook"], table["verdict"]).reindex(columns=WORDS, fill_value=0)


def summary_page():
    """Return the README's table: one line a notebook, how its claims fared in demo and real."""
    tables = [counts(committed(profile)) for profile in ("demo", "real")]
    lines = ["| notebook | question | in short | drawn | real |", "| --- | --- | --- | --- | --- |"]
    for row in notebooks().itertuples():
        fared = [
            " / ".join(map(str, t.loc[row.notebook])) if row.notebook in t.index else "-"
            for t in tables
        ]
        cells = [_link(row.notebook, row.notebook[:2]), row.question, _in_short(row.answer), *fared]
        lines.append(_markdown_row(cells))
    return "\n".join(lines)


def verdict_page(profile):
    """Return figures/<profile>/VERDICTS.md: every verdict, and of `demo` its answers and figures.

    The notebooks' answers are the demo's; those of photographs stand in the values alone.
    """
    where, drawn = committed(profile), profile == "demo"
    table, lines = verdicts_of(where), [f"# Every verdict of the profile `{profile}`", ""]
    for row in notebooks().itertuples():
        own = table[table["notebook"] == row.notebook]
        title = _link(row.notebook, f"{row.notebook[:2]} · {row.question}", up="../../")
        lines += [f"## {title}", ""]
        if drawn or not len(own):
            lines += [row.answer if len(own) else "Not run yet.", ""]
        if len(own):
            lines += ["| claim | criterion | value | verdict |", "| --- | --- | --- | --- |"]
        for v in own.itertuples():
            cells = [f"{v.claim} (`{v.id}`)", v.criterion, show_value(v), v.verdict]
            lines.append(_markdown_row(cells))
        if drawn:  # photographs are not ours to show
            figures = sorted(where.glob(f"{row.notebook[:2]}_*.png"))
            lines += [f"\n![{f.stem.replace('_', ' ')}]({f.name})" for f in figures]
        lines.append("")
    return "\n".join(lines)


def _markdown_row(cells):
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _link(notebook, text, up=""):
    return f"[{text}]({up}notebooks/{notebook}.ipynb)"


def _in_short(answer, least=50):
    """Return an answer's first sentence, and the next where the first says too little."""
    ends = [m.end() for m in re.finditer(r"[.](?= [A-Z*]|$)", answer)]
    return answer[: next((end for end in ends if end >= least), None)]


def update_readme(path=None):
    """Rewrite the README's table between its markers, and figures/<profile>/VERDICTS.md."""
    path = Path(path or ROOT / "README.md")
    start, end = "<!-- notebooks -->", "<!-- end notebooks -->"
    head, rest = path.read_text(encoding="utf-8").split(start)
    path.write_text(f"{head}{start}\n{summary_page()}\n{end}{rest.split(end)[1]}", encoding="utf-8")
    for profile in ("demo", "real"):
        page = folder("figures", profile) / "VERDICTS.md"
        page.write_text(verdict_page(profile), encoding="utf-8")


if __name__ == "__main__":
    update_readme()
