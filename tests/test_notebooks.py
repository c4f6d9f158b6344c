"""Hygiene of the committed notebooks. nbval compares outputs; these are the ways it would not."""

import ast
import re

import nbformat
import numpy as np
import pytest
import yaml

from support import claims, pages, run
from support.run import declared_parameters
from support.stored import ROOT

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NOTEBOOKS = {path.stem: nbformat.read(path, 4) for path in PATHS}
every = pytest.mark.parametrize("name", NOTEBOOKS)


def code(name):
    return [c for c in NOTEBOOKS[name].cells if c.cell_type == "code"]


def test_the_notebooks_are_found():
    assert [name[:2] for name in NOTEBOOKS] == [f"{number:02}" for number in range(17)]
    assert all(re.fullmatch(r"\d\d_[a-z_]+", name) for name in NOTEBOOKS)


@every
def test_executed_top_to_bottom(name):
    """nbval compares nothing in a cell without a count, and does not mind the order."""
    assert [c.execution_count for c in code(name)] == list(range(1, len(code(name)) + 1))


@every
def test_no_widget_that_captures_outputs(name):
    """nbclient, and so papermill, answers an Output widget and now and then never goes on."""
    for cell in code(name):
        assert not re.search(r"\b(interact\w*|Output)\(", cell.source), cell.source


@every
def test_no_errors_no_stderr_and_no_widgets(name):
    outputs = [o for c in code(name) for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not [o for o in outputs if any("widget" in kind for kind in o.get("data", {}))]


@every
def test_one_question_and_one_parameters_cell(name):
    title, parameters = NOTEBOOKS[name].cells[:2]
    assert re.match(rf"# {name[:2]} · .*\?$", title.source.splitlines()[0])
    assert "**Answer.**" in title.source
    declared = declared_parameters(NOTEBOOKS[name])
    assert "parameters" in parameters.metadata.tags
    assert declared["profile"] == "demo"


@every
def test_the_last_code_cell_shows_the_committed_claims(name):
    cell = code(name)[-1]
    assert "claims.write(" in cell.source
    assert "nbval-ignore-output" not in cell.metadata.get("tags", [])
    record = claims.read_record(claims.committed("demo") / f"{name[:2]}_verdicts.json")
    shown = cell.outputs[-1]["data"]["text/plain"]
    for claim in record["verdicts"]:
        assert claim["id"] in shown or "dataset" in claim
        assert claim["verdict"] in (claims.outcome(claim), "not applicable")


@every
def test_cells_and_functions_are_short_and_files_small(name):
    assert max(len(c.source.splitlines()) for c in code(name)) <= 25
    ignored = [c for c in code(name) if "nbval-ignore-output" in c.metadata.get("tags", [])]
    assert len(ignored) <= 3
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size <= 1_000_000
    assert not [c for c in code(name) if re.search(r"^[%!]", c.source, re.M)]
    nodes = [node for c in code(name) for node in ast.walk(ast.parse(c.source))]
    assert not [node.name for node in nodes if isinstance(node, ast.ClassDef)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    assert not [f.name for f in functions if f.end_lineno - f.lineno >= 10]


def test_the_notebooks_together_are_no_longer_than_they_need_be():
    assert sum(len(c.source.splitlines()) for name in NOTEBOOKS for c in code(name)) <= 5000


@every
def test_at_least_as_much_prose_as_a_cell_in_three(name):
    cells = NOTEBOOKS[name].cells
    assert sum(c.cell_type == "markdown" for c in cells) >= len(cells) / 3


@pytest.mark.parametrize("profile", ["real", "thesis"])
def test_profiles_have_checked_parameters_for_every_notebook(profile):
    jobs = run.jobs_of(profile, PATHS)
    assert [job.path for job in jobs if job.dataset in (None, claims.DEFAULT)] == PATHS
    given = yaml.safe_load((ROOT / "params" / f"{profile}.yaml").read_text(encoding="utf-8"))
    assert set(given) == set(NOTEBOOKS)


def test_readme_and_verdict_pages_are_those_of_the_committed_verdicts():
    """`make readme` writes them."""
    assert pages.summary_page() in (ROOT / "README.md").read_text(encoding="utf-8")
    for profile in ("demo", "real"):
        page = ROOT / "figures" / profile / "VERDICTS.md"
        assert page.read_text(encoding="utf-8") == pages.verdict_page(profile)


def numbers_of(verdicts):
    """Return the numbers that a text on some verdicts may name, (k,), and in percent."""
    known = [0.95]  # of the intervals
    for c in verdicts:
        values = [c["value"], *c.get("interval", ()), c.get("published"), claims.bound_of(c)[1]]
        known += [abs(v) for value in values if value is not None for v in np.atleast_1d(value)]
        known += map(float, re.findall(r"\d+\.\d+", c["claim"]))  # "r at t = 0.1"
    return np.r_[known, 100 * np.array(known)]


def unknown_numbers(text, profile, notebook):
    """Return the decimals and percentages of a text that are no rounded number of the verdicts."""
    path = claims.committed(profile) / f"{notebook[:2]}_verdicts.json"
    known, unknown = numbers_of(claims.read_record(path)["verdicts"]), []
    for number in re.findall(r"\d+\.\d+|\d+(?= %)", text):
        half = 0.5 * 10.0 ** -len(number.partition(".")[2]) * (1 + 1e-9)
        unknown += [number] * bool(np.abs(known - float(number)).min() > half)
    return unknown


@pytest.mark.parametrize("profile", ["demo", "real"])
def test_an_answer_names_the_numbers_of_its_own_profile(profile):
    for row in pages.notebooks().to_dict("records"):
        assert not re.search(r"\d\.\d|\d %", row["answer"]), row["notebook"]
        assert not unknown_numbers(row[profile], profile, row["notebook"]), row["notebook"]


def test_the_readme_names_the_numbers_of_the_demo():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = text.partition("## What holds")[2].partition("![")[0]
    assert "times as much as predicted" in text
    assert not unknown_numbers(text, "demo", "04_influence")


def imported(path):
    """Return the modules that a file imports from this project, as helpers.x, support.x, ..."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = ".".join([*[path.parent.name] * node.level, *filter(None, [node.module])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("helpers", "support", "studies")}


def test_the_floors_of_the_house():
    """Notebooks stand on studies, studies on support, support on helpers; never the other way."""
    below = {"helpers": [], "notebooks/support": ["helpers"]}
    below["notebooks/studies"] = ["helpers", "support"]
    for folder, allowed in below.items():
        own = folder.rpartition("/")[2]
        for path in (ROOT / folder).glob("*.py"):
            used = {name.split(".")[0] for name in imported(path)}
            assert used <= {own, *allowed}, f"{path} imports {used - {own, *allowed}}"


def test_imports_between_helpers_only_point_down():
    layers = [
        {"validate"},
        {"influence", "removals", "ekfac"},
        {"solvers"},
        {"spectrum", "fit"},
        {"hessian"},
        {"gradients"},
        {"objective"},
        {"head", "loss"},
        {"batches", "parameters"},
        {"checks", "derivatives"},
        {"keras_facts", "linalg"},
    ]
    level = {module: k for k, layer in enumerate(layers) for module in layer}
    for path in (ROOT / "helpers").glob("[a-z]*.py"):
        for name in {name.split(".")[1] for name in imported(path) if "." in name}:
            assert level[name] > level[path.stem], f"{path.stem} imports {name}"


def test_mathematics_touches_no_files():
    for path in (ROOT / "helpers").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"open\(|pathlib|matplotlib|import json|import os", text), path.stem
