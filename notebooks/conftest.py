"""nbval in this project: where runs write, what they are held against, a line a notebook.

Outputs are compared within the tolerances of tests/tolerances.py, and behind a notebook's last cell
its claims too, number by number.
"""

import os
from collections import Counter
from functools import cache

import nbformat
import pytest
import tolerances
from nbval.plugin import IPyNbCell

from support import claims, run, stored

os.environ.setdefault("THESIS_RUNS", "runs/test")
os.environ["TQDM_DISABLE"] = "1"
run.share_cores(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
DONE, STARTED = Counter(), {}  # of each notebook: cells that ran, when its first one began


class Output(str):
    """A stored or fresh output of a notebook; equal where they differ by no more than allowed."""

    notebook = ""

    def __ne__(self, fresh):
        return tolerances.text_difference(self.notebook, str(self), str(fresh)) is not None

    __hash__ = str.__hash__


def sanitize(cell, text, original=IPyNbCell.sanitize):
    """Return what nbval compares: texts as an Output of their notebook."""
    text = original(cell, text)
    if isinstance(text, str):
        text = Output(text)
        text.notebook = cell.parent.path.stem[:2]
    return text


IPyNbCell.sanitize = sanitize


def pytest_collectstart(collector):
    """Compare the text of tables, not their HTML."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("text/html",)


def pytest_collection_modifyitems(items):
    """Wait a minute for a slow cell's output."""
    for item in items:
        if isinstance(item, IPyNbCell):
            item.output_timeout = 60


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """After a notebook's last cell, hold its claims against the committed ones."""
    yield
    if isinstance(item, IPyNbCell) and "claims.write(" in item.cell.source:
        name = f"{item.path.stem[:2]}_verdicts.json"
        fresh = stored.folder("runs", "demo", "figures") / name
        old, new = (claims.read_record(p) for p in (claims.committed("demo") / name, fresh))
        differences = tolerances.claim_differences(old, new)
        if differences:
            item.raise_cell_error("Claims differ", "\n".join(differences))


def pytest_runtest_logreport(report):
    """Print a line for each notebook whose last cell has run."""
    path = stored.ROOT / report.nodeid.partition("::")[0]
    if path.suffix == ".ipynb" and "PYTEST_XDIST_WORKER" not in os.environ:
        STARTED.setdefault(path, report.start)
        DONE[path] += report.when == "teardown"
        if report.when == "teardown" and DONE[path] == code_cells(path):
            print(f"\n{path.stem:24s} {report.stop - STARTED[path]:5.0f} s")


@cache
def code_cells(path):
    """Return how many cells nbval runs of a notebook."""
    return sum(cell.cell_type == "code" for cell in nbformat.read(path, 4).cells)
