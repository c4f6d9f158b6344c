"""What a user does without make: papermill, nbval and JupyterLab, as one finds them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from support.stored import ROOT

BIN = Path(sys.executable).parent


def by_hand(tmp_path, *command, cwd=ROOT):
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    environment = {**clean, "THESIS_RUNS": str(tmp_path / "runs")}
    run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


@pytest.mark.parametrize("cwd", [".", "notebooks"])
def test_papermill_from_the_root_and_from_the_notebooks(tmp_path, cwd):
    out = tmp_path / "out.ipynb"
    notebook = os.path.relpath(ROOT / "notebooks" / "16_summary.ipynb", ROOT / cwd)
    command = [BIN / "papermill", notebook, out, "-p", "profile", "real"]
    by_hand(tmp_path, *command, cwd=ROOT / cwd)
    assert "injected-parameters" in nbformat.read(out, 4).cells[2].metadata["tags"]
    assert (tmp_path / "runs" / "real" / "figures" / "16_verdicts.json").exists()


def test_nbval_from_the_root(tmp_path):
    by_hand(tmp_path, BIN / "pytest", "--nbval", "notebooks/16_summary.ipynb")


def test_a_notebook_opened_before_those_it_reads_says_which_to_run(tmp_path):
    """As JupyterLab does it, in a project where nothing was run yet."""
    notebook = nbformat.read(ROOT / "notebooks" / "04_influence.ipynb", 4)
    elsewhere = f"from support import stored; stored.ROOT = stored.Path({str(tmp_path)!r})"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code.insert(2, nbformat.v4.new_code_cell(elsewhere))
    notebook.cells = code[:4]
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    client = NotebookClient(notebook, kernel_name="python3", resources=resources, timeout=300)
    with pytest.raises(CellExecutionError, match="run notebook 00_data_curation first"):
        client.execute()


def test_conda_and_pip_install_one_list():
    text = {
        name: (ROOT / name).read_text(encoding="utf-8")
        for name in ("environment.yml", "requirements.in", "requirements.lock")
    }
    assert "- -r requirements.lock" in text["environment.yml"]
    wanted = set(re.findall(r"^([A-Za-z][\w.-]*)", text["requirements.in"], re.M))
    locked = set(re.findall(r"^([A-Za-z][\w.-]*)==", text["requirements.lock"], re.M))
    assert len(wanted) > 20
    assert wanted <= locked
