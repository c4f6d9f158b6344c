"""The papermill front end: strict parameters, no false 'done', repeatable files."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from support import claims, pages, run, stored
from support.stored import ROOT


def write(path, *sources, parameters="n = 3\nrate = 0.5\nname = 'a=b'\nfast = False"):
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbformat.write(notebook, path)
    return notebook


def test_declared_parameters_are_literals(tmp_path):
    notebook = write(tmp_path / "a.ipynb")
    assert run.declared_parameters(notebook) == {"n": 3, "rate": 0.5, "name": "a=b", "fast": False}
    for bad in ("half = n // 2", "import os", "x += 1"):
        with pytest.raises(ValueError, match="parameters cell"):
            run.declared_parameters(write(tmp_path / "b.ipynb", parameters=bad))


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
        run.checked(given, run.declared_parameters(notebook))


def test_an_int_may_stand_for_a_float(tmp_path):
    declared = run.declared_parameters(write(tmp_path / "a.ipynb"))
    assert run.checked({"rate": 1}, declared) == {"rate": 1}


def test_a_run_writes_the_notebook_and_its_html(tmp_path):
    write(tmp_path / "a.ipynb", "print(n * 2)", "import sys; print('noise', file=sys.stderr)")
    run.run(tmp_path / "a.ipynb", tmp_path / "out.ipynb", {"n": 21})
    executed = nbformat.read(tmp_path / "out.ipynb", 4)
    assert executed.cells[2].outputs[0].text == "42\n"
    assert executed.cells[3].outputs == []
    assert "papermill" not in executed.metadata
    assert "42" in (tmp_path / "out.html").read_text(encoding="utf-8")
    assert not list(tmp_path.glob("partial_*.ipynb")) + list(tmp_path.glob("*.log"))


@pytest.mark.parametrize("disable", ["1", ""])
def test_bars_are_shown_to_a_person_and_not_stored(tmp_path, monkeypatch, disable):
    monkeypatch.setenv("TQDM_DISABLE", disable)
    lines = ["from support.start import start", "start('demo')", "from tqdm.auto import tqdm"]
    folder = str(ROOT / "notebooks")
    start = "\n".join([f"import sys; sys.path.insert(0, {folder!r})", *lines])
    cells = [nbformat.v4.new_code_cell(s) for s in (start, "for _ in tqdm(range(2)): pass")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, kernel_name="python3").execute()
    assert bool(cells[1].outputs) == (not disable)
    notebook = run.tidy(notebook, injected=False)
    assert not notebook.cells[1].outputs
    assert "widgets" not in notebook.metadata


def test_a_failed_run_leaves_no_done_file(tmp_path):
    write(tmp_path / "a.ipynb", "raise RuntimeError('no data')")
    with pytest.raises(Exception, match="no data"):
        run.run(tmp_path / "a.ipynb", tmp_path / "out.ipynb")
    assert not (tmp_path / "out.ipynb").exists()
    assert (tmp_path / "partial_out.ipynb").exists()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with five small notebooks, which say when they began and ended."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "demo.yaml").touch()
    for number in ("00", "02", "03", "04", "16"):
        put(tmp_path, number, "import time; began = time.time()", "print(began, time.time())")
    for module in (run, claims, pages, stored):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.delenv("THESIS_RUNS", raising=False)
    (tmp_path / "README.md").write_text(
        "".join(f"<!-- {name} --><!-- end {name} -->" for name in ("published", "notebooks")),
        encoding="utf-8",
    )
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "published.yaml").write_text("[]", encoding="utf-8")
    return tmp_path


def put(project, number, *sources):
    parameters = "profile = 'demo'\nn = 3"
    write(project / "notebooks" / f"{number}_a.ipynb", *sources, parameters=parameters)


def test_a_failure_is_named_and_so_is_what_was_not_run(project, capsys):
    put(project, "02", "raise RuntimeError('no data')")
    write(project / "notebooks" / "partial_00_a.ipynb", "print(0)")  # not one to run
    runs = project / "runs" / "demo"
    (runs / "figures").mkdir(parents=True)
    stale = [runs / "02_a.ipynb", runs / "02_a.html", runs / "figures" / "02_verdicts.json"]
    for path in stale:
        path.write_text("of an earlier run", encoding="utf-8")
    assert run.main(["--jobs", "2"]) == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: no data" in printed
    assert f"The cells that ran are in {runs / 'partial_02_a.ipynb'}" in printed
    assert "Not run: 03_a 04_a 16_a" in printed
    assert "partial_00_a " not in printed
    assert not any(path.exists() for path in stale)
    assert {path.name for path in (runs / "earlier").iterdir()} == {path.name for path in stale}


def test_no_partial_notebook_is_promised_where_there_is_none(project, monkeypatch, capsys):
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    monkeypatch.setattr(run, "_attempt", lambda *_: (False, "FAILED at once"))
    assert run.main(["00"]) == 1
    assert "The cells that ran" not in capsys.readouterr().out


def test_what_others_read_runs_first_and_the_summary_last(project):
    wait = "import pathlib, time; began = time.time(); pathlib.Path({!r}).touch()\n"
    wait += "while not pathlib.Path({!r}).exists() and time.time() < began + 100: time.sleep(0.1)"
    for mine, other in (("03", "04"), ("04", "03")):  # each waits for the other
        put(project, mine, wait.format(mine, other), "print(began, time.time())")
    assert run.main(["--jobs", "2"]) == 0
    times = {}
    for path in (project / "runs" / "demo").glob("*.ipynb"):
        text = nbformat.read(path, 4).cells[-1].outputs[0].text
        times[path.stem[:2]] = [float(t) for t in text.split()]
    assert times["00"][1] < times["02"][0] < times["02"][1] < min(times["03"][0], times["04"][0])
    assert max(times["03"][0], times["04"][0]) < min(times["03"][1], times["04"][1])
    assert max(times["03"][1], times["04"][1]) < times["16"][0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["16", "99"], "there is no notebook 99; there are 00 02 03 04 16"),
        (["1"], "there is no notebook 1;"),
        ([], "params/demo.yaml names no notebook: 3_a"),
        (["--profile", "real", "02"], r"real.yaml needs a line for 02_a .*; it says nothing"),
        (["--profile", "real", "00"], r"a line for 00_a .*; it says thesis"),
        (["--profile", "real", "03"], "unknown parameter 'm'"),
        (["--profile", "thesis"], r"params/thesis.yaml needs a line for 00_a"),
        (["--profile", "real", "04"], r"a line for 04_a .*; it says demo"),
    ],
)
def test_what_can_not_be_run_is_said_in_one_sentence(project, capsys, arguments, words):
    lines = "00_a: {profile: thesis}\n03_a: {profile: real, m: 1}\n"
    lines += "04_a: [{profile: real}, {profile: demo}]\n"
    (project / "params" / "real.yaml").write_text(lines, encoding="utf-8")
    (project / "params" / "thesis.yaml").write_text("", encoding="utf-8")
    (project / "params" / "demo.yaml").write_text("3_a: {n: 4}", encoding="utf-8")
    assert run.main(arguments) == run.NOT_RUN
    assert re.search(words, capsys.readouterr().err)
    assert not list(project.glob("runs/*/*"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2]", "gives no parameters"),
        ("03_a: {n: 4", "can not be read"),
        ("3: {n: 4}", "names no notebook: 3"),
        ("03_a:", "gives 03_a no parameters, .* but None"),
        ("03_a: []", r"gives 03_a no parameters, .* but \[\]"),
        ("03_a: [{n: 4}, 5]", "gives 03_a no parameters, .* but 5"),
        ("03_a: [{n: 4}, {n: 5}]", "gives 03_a two sets of parameters"),
    ],
)
def test_a_file_of_parameters_that_means_nothing_is_said(project, capsys, content, words):
    (project / "params" / "demo.yaml").write_text(content, encoding="utf-8")
    assert run.main(["03"]) == run.NOT_RUN
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["THESIS_DATA", "KERAS_HOME"])
def test_folders_named_by_the_environment(project, monkeypatch, capsys, name):
    monkeypatch.setenv(name, "my data")
    assert run.main(["00"]) == run.NOT_RUN
    assert capsys.readouterr().err == f"{name} names {project / 'my data'}, which is no folder.\n"
    (project / "my data").mkdir()
    assert stored.named_folder(name) == project / "my data"
    monkeypatch.setenv(name, "")
    assert stored.named_folder(name) is None
    assert run.main(["00"]) == 0


def test_parameters_arrive_as_they_were_given(tmp_path):
    names = "n = 3\nsome = [1]\nwhere = ''\nany_ = None"
    write(tmp_path / "a.ipynb", "print(n, some, where, any_)", parameters=names)
    folder = tmp_path / "{n} and {none}"
    folder.mkdir()
    given = {"n": np.int64(5), "some": (1, np.float64(0.5)), "where": folder, "any_": np.eye(1)}
    run.run(tmp_path / "a.ipynb", folder / "out.ipynb", given)
    executed = nbformat.read(folder / "out.ipynb", 4)
    assert executed.cells[-1].outputs[0].text == f"5 [1, 0.5] {folder} [[1.0]]\n"
    with pytest.raises(ValueError, match=r"a number, text, a list or a dict, not \{1\}"):
        run.run(tmp_path / "a.ipynb", folder / "out.ipynb", {"any_": {1}})


def test_a_notebook_of_two_data_sets_runs_once_for_each(project):
    source = f"""import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "notebooks")!r}]
from support.start import start
from support import stored
from support import claims
stored.ROOT = claims.ROOT = stored.Path({str(project)!r})
(stored.folder("runs", profile, "figures") / f"03_{{dataset}}_{{n}}.json").touch()
found = [claims.claim("r", "", n, above=4)]
claims.write("03_a", profile, {{}}, found, dataset=dataset)"""
    parameters = "profile = 'demo'\nn = 3\ndataset = 'vehicles'"
    write(project / "notebooks" / "03_a.ipynb", source, parameters=parameters)
    demo = project / "params" / "demo.yaml"
    demo.write_text("03_a: [{}, {dataset: digits, n: 5}]", encoding="utf-8")
    runs = project / "runs" / "demo"
    assert run.main(["03"]) == 0
    record = claims.read_record(runs / "figures" / "03_verdicts.json")
    assert list(record["runs"]) == ["vehicles", "digits"]
    assert [(c["id"], c["verdict"]) for c in record["verdicts"]] == [
        ("r", "does not hold"),
        ("digits_r", "holds"),
    ]
    assert {path.name for path in runs.glob("*.ipynb")} == {"03_a.ipynb", "03_a_digits.ipynb"}
    demo.write_text("03_a: [{dataset: digits, n: 2}]", encoding="utf-8")
    assert run.main(["03"]) == 0  # replaces its own claims and figures only
    record = claims.read_record(runs / "figures" / "03_verdicts.json")
    assert [(c["id"], c["value"]) for c in record["verdicts"]] == [("r", 3), ("digits_r", 2)]
    figures = {path.name for path in (runs / "figures").glob("03_*_[0-9].json")}
    assert figures == {"03_vehicles_3.json", "03_digits_2.json"}


# ---------------------------------------------------------------- what is committed


def ends_in_a_verdict(project, number, profile, value=1):
    """Write a notebook whose run leaves a verdict, a figure's numbers and a picture."""
    source = f"""import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "notebooks")!r}]
from support.start import start
from support import stored
from support import claims
stored.ROOT = claims.ROOT = stored.Path({str(project)!r})
figures = stored.folder("runs", profile, "figures")
(figures / "{number}_new.json").touch()
import matplotlib.pyplot as plt
from support.figures import save
for name, draw in (("plot", "scatter"), ("picture", "imshow")):
    figure, axis = plt.subplots()
    getattr(axis, draw)(*(([1], [2]) if draw == "scatter" else ([[0, 1], [1, 0]],)))
    save(figure, f"{number}_{{name}}", profile)
claims.write("{number}_a", profile, {{}}, [claims.claim("a", "", {value}, above=0)])"""
    if profile != "demo":
        line = f"{number}_a: {{profile: {profile}}}"
        (project / "params" / f"{profile}.yaml").write_text(line, encoding="utf-8")
    put(project, number, source)


def git(project, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(project)]
    subprocess.run(["git", *identity, *words], check=True, capture_output=True)


def test_a_refresh_of_the_demo_runs_it_and_copies_all_of_it(project):
    ends_in_a_verdict(project, "03", "demo")
    figures = project / "figures" / "demo"
    figures.mkdir(parents=True)
    (figures / "03_old.png").touch()
    (figures / "04_old.png").touch()
    assert run.main(["--promote", "03"]) == 0
    names = {path.name for path in figures.iterdir()} - {"VERDICTS.md"}
    new = {"03_plot.png", "03_picture.png", "03_new.json", "03_verdicts.json"}
    assert names == {*new, "04_old.png"}
    first = (project / "notebooks" / "03_a.ipynb").read_bytes()
    cells = nbformat.reads(first.decode(), 4).cells
    assert [c.execution_count for c in cells] == [1, 2]
    assert run.main(["--promote", "03"]) == 0
    assert (project / "notebooks" / "03_a.ipynb").read_bytes() == first


def test_a_refresh_of_photographs_copies_numbers_and_plots_of_committed_code(project, capsys):
    def refresh():
        status = run.main(["--profile", "real", "--promote", "03"])
        return status, capsys.readouterr().err

    ends_in_a_verdict(project, "03", "real")
    (project / ".gitignore").write_text("runs\n", encoding="utf-8")
    git(project, "init")
    git(project, "add", "-A")
    git(project, "commit", "-m", "first")
    assert refresh() == (
        2,
        f"Nothing was copied: {project}/runs/real holds no finished run of 03_a.\n",
    )
    assert run.main(["--profile", "real", "03"]) == 0
    notebook = (project / "notebooks" / "03_a.ipynb").read_bytes()
    (project / "new").touch()
    assert "uncommitted changes" in refresh()[1]
    git(project, "add", "-A")
    git(project, "commit", "-m", "what is no code")
    assert refresh() == (0, "")
    assert {path.name for path in (project / "figures" / "real").iterdir()} == {
        "03_new.json",
        "03_plot.png",
        "03_verdicts.json",
        "VERDICTS.md",
    }
    assert (project / "notebooks" / "03_a.ipynb").read_bytes() == notebook
    ends_in_a_verdict(project, "03", "real", value=2)
    git(project, "add", "-A")
    git(project, "commit", "-m", "other code")
    assert "03_a was run with other code" in refresh()[1]


def test_a_run_leaves_the_tree_as_it_was(tmp_path):
    """Said of a cheap notebook; what the others write goes through the same two functions."""

    def status():
        command = ["git", "-C", str(ROOT), "status", "--porcelain", "--ignored=no"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: git can not tell what a run changed")
    before = status()
    path = os.pathsep.join([str(ROOT), str(ROOT / "notebooks")])
    environment = {**os.environ, "THESIS_RUNS": str(tmp_path), "PYTHONPATH": path}
    command = [sys.executable, "-m", "support.run", "16"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert (tmp_path / "demo" / "figures" / "16_verdicts.json").exists()
    assert status() == before
