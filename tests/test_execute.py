"""The papermill front end: strict parameters, no false 'done', repeatable files."""

import nbformat
import pytest
from nbclient import NotebookClient

from helpers import execute
from helpers.runtime import ROOT


def write(path, *sources, parameters="n = 3\nrate = 0.5\nname = 'a=b'\nfast = False"):
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbformat.write(notebook, path)
    return notebook


def test_declared_parameters_are_literals(tmp_path):
    notebook = write(tmp_path / "a.ipynb")
    assert execute.declared_parameters(notebook) == {
        "n": 3,
        "rate": 0.5,
        "name": "a=b",
        "fast": False,
    }
    for bad in ("half = n // 2", "import os", "x = y = 1"):
        with pytest.raises(ValueError, match="parameters cell"):
            execute.declared_parameters(write(tmp_path / "b.ipynb", parameters=bad))


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"nn": 4}, "unknown parameter 'nn'"),
        ({"n": "4"}, "is a int"),
        ({"n": 4.5}, "is a int"),
        ({"rate": "1e-2"}, "YAML floats need a dot"),
        ({"fast": 1}, "is a bool"),
        ({"n": True}, "is a int"),
    ],
)
def test_wrong_names_and_types_are_refused(tmp_path, given, word):
    notebook = write(tmp_path / "a.ipynb")
    with pytest.raises(ValueError, match=word):
        execute.checked(given, execute.declared_parameters(notebook))


def test_an_int_may_stand_for_a_float(tmp_path):
    declared = execute.declared_parameters(write(tmp_path / "a.ipynb"))
    assert execute.checked({"rate": 1}, declared) == {"rate": 1}


def test_a_run_writes_the_notebook_and_its_html(tmp_path):
    write(tmp_path / "a.ipynb", "print(n * 2)", "import sys; print('noise', file=sys.stderr)")
    execute.run(tmp_path / "a.ipynb", tmp_path / "out.ipynb", {"n": 21})
    executed = nbformat.read(tmp_path / "out.ipynb", 4)
    assert executed.cells[2].outputs[0].text == "42\n"
    assert executed.cells[3].outputs == []
    assert "papermill" not in executed.metadata
    assert "42" in (tmp_path / "out.html").read_text(encoding="utf-8")
    assert not list(tmp_path.glob("partial_*.ipynb")) + list(tmp_path.glob("*.log"))


def test_running_in_place_twice_gives_the_same_bytes(tmp_path):
    path = tmp_path / "a.ipynb"
    write(path, "print(n)")
    execute.run(path, path)
    first = path.read_bytes()
    execute.run(path, path)
    assert path.read_bytes() == first


@pytest.mark.parametrize("disable", ["1", ""])
def test_bars_are_shown_to_a_person_and_not_stored(tmp_path, monkeypatch, disable):
    monkeypatch.setenv("TQDM_DISABLE", disable)
    lines = ["from helpers import runtime", "runtime.start('demo')", "from tqdm.auto import tqdm"]
    start = "\n".join([f"import sys; sys.path.insert(0, {str(ROOT)!r})", *lines])
    cells = [nbformat.v4.new_code_cell(s) for s in (start, "for _ in tqdm(range(2)): pass")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, kernel_name="python3").execute()
    assert bool(cells[1].outputs) == (not disable)
    notebook = execute.tidy(notebook, in_place=True)
    assert not notebook.cells[1].outputs
    assert "widgets" not in notebook.metadata


def test_a_failed_run_leaves_no_done_file(tmp_path):
    write(tmp_path / "a.ipynb", "raise RuntimeError('no data')")
    with pytest.raises(Exception, match="no data"):
        execute.run(tmp_path / "a.ipynb", tmp_path / "out.ipynb")
    assert not (tmp_path / "out.ipynb").exists()
    assert (tmp_path / "partial_out.ipynb").exists()


def test_the_command_line_stops_at_the_first_failure(tmp_path, monkeypatch, capsys):
    (tmp_path / "notebooks").mkdir()
    write(tmp_path / "notebooks" / "00_a.ipynb", "raise RuntimeError('no data')")
    write(tmp_path / "notebooks" / "partial_00_a.ipynb", "print(0)")  # not one to run
    write(tmp_path / "notebooks" / "01_b.ipynb", "print(1)")
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    monkeypatch.setattr(execute, "folder", lambda *parts: _made(tmp_path.joinpath(*parts)))
    assert execute.main(["--profile", "demo"]) == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: no data" in printed
    assert "01_b" not in printed
    assert "partial_00_a " not in printed


def _made(path):
    path.mkdir(parents=True, exist_ok=True)
    return path
