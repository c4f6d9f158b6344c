"""Hygiene of the committed notebooks. nbval compares outputs; these are the ways it would not."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from helpers import reporting
from helpers.execute import checked, declared_parameters
from helpers.runtime import ROOT

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NOTEBOOKS = {path.stem: nbformat.read(path, 4) for path in PATHS}
every = pytest.mark.parametrize("name", NOTEBOOKS)


def code(name):
    return [c for c in NOTEBOOKS[name].cells if c.cell_type == "code"]


def test_the_notebooks_are_found():
    assert {
        "00_data_curation",
        "01_feature_extraction",
        "02_training",
        "03_curvature",
        "04_influence",
        "05_loo_validation",
        "07_smooth_hinge",
        "08_model_comparison",
        "09_influential_subset",
        "10_mislabel_study",
        "11_attack_study",
        "12_shifted_tests",
        "13_domain_mismatch",
        "14_method_comparison",
        "15_your_own_model",
    } <= set(NOTEBOOKS)
    assert all(re.fullmatch(r"\d\d_[a-z_]+", name) for name in NOTEBOOKS)


@every
def test_executed_top_to_bottom(name):
    """nbval compares nothing in a cell without a count, and does not mind the order."""
    assert [c.execution_count for c in code(name)] == list(range(1, len(code(name)) + 1))


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
def test_the_last_code_cell_is_the_verdict(name):
    cell = code(name)[-1]
    assert "write_verdicts" in cell.source
    assert "nbval-ignore-output" not in cell.metadata.get("tags", [])
    record = json.loads(
        (ROOT / "figures" / "demo" / f"{name[:2]}_verdicts.json").read_text(encoding="utf-8")
    )
    shown = cell.outputs[0]["data"]["text/plain"]
    for verdict in record["verdicts"]:
        assert verdict["id"] in shown
        assert verdict["verdict"] in reporting.WORDS


@every
def test_cells_are_short_and_files_small(name):
    assert max(len(c.source.splitlines()) for c in code(name)[:-1]) <= 25
    ignored = [c for c in code(name) if "nbval-ignore-output" in c.metadata.get("tags", [])]
    assert len(ignored) <= 3
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size <= 1_000_000
    magics = [c for c in code(name) if re.search(r"^[%!]", c.source, re.M)]
    assert not magics


@every
def test_at_least_as_much_prose_as_a_cell_in_three(name):
    cells = NOTEBOOKS[name].cells
    assert sum(c.cell_type == "markdown" for c in cells) >= len(cells) / 3


@pytest.mark.parametrize("profile", ["real", "thesis"])
def test_profiles_override_parameters_that_exist(profile):
    overrides = yaml.safe_load((ROOT / "params" / f"{profile}.yaml").read_text(encoding="utf-8"))
    assert set(overrides) <= set(NOTEBOOKS)
    for name, given in overrides.items():
        checked(given, declared_parameters(NOTEBOOKS[name]))
        assert given["profile"] == profile
    uses_profile = {n for n in NOTEBOOKS if "profile" in declared_parameters(NOTEBOOKS[n])}
    assert uses_profile == set(overrides)


def test_readme_and_verdict_pages_are_those_of_the_committed_verdicts():
    """`make readme` writes them."""
    assert reporting.summary_page() in (ROOT / "README.md").read_text(encoding="utf-8")
    for profile in ("demo", "real"):
        page = ROOT / "figures" / profile / "VERDICTS.md"
        assert page.read_text(encoding="utf-8") == reporting.verdict_page(profile)


def test_imports_between_helpers_only_point_down():
    layers = [
        {"cluster"},
        {"execute"},
        {"reporting"},
        {"evaluation"},
        {"attacks", "corruptions", "vehicles"},
        {"many_fits"},
        {"attribution", "influence", "retraining", "network_retraining"},
        {"approximations"},
        {"solvers"},
        {"spectrum"},
        {"curvature"},
        {"objective"},
        {"head"},
        {"checks"},
        {"keras_facts"},
        {"features"},
        {"backbone", "models"},
        {"datasets"},
        {"rendering"},
        {"runtime"},
    ]
    level = {module: k for k, layer in enumerate(layers) for module in layer}
    for path in (ROOT / "helpers").glob("[a-z]*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helpers"):
                names = (
                    [node.module.partition(".")[2]]
                    if "." in node.module
                    else [a.name for a in node.names]
                )
            for name in names:
                assert level[name] > level[path.stem], f"{path.stem} imports {name}"


def test_mathematics_touches_no_files():
    for module in (
        "attribution",
        "objective",
        "head",
        "checks",
        "keras_facts",
        "curvature",
        "spectrum",
        "solvers",
        "approximations",
        "influence",
        "retraining",
        "network_retraining",
    ):
        text = Path(ROOT / "helpers" / f"{module}.py").read_text(encoding="utf-8")
        assert not re.search(r"open\(|Path\(|matplotlib|import json|datasets", text), module
