"""What goes wrong on a real machine, done for real: nothing is lost, and no number is wrong.

Data that a model can not be fitted to are refused in words, or give the right answer.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import nbformat
import numpy as np
import pytest
from conftest import BINARY, SOFTMAX

from helpers import Objective, Removals, fit_head, s_test
from support import datasets, features, models, run, stored

SCRIPT = Path(__file__).with_name("slow_work.py")
PATH = os.pathsep.join([str(stored.ROOT), str(stored.ROOT / "notebooks")])
RUNNING = {**os.environ, "PYTHONPATH": PATH}


def work(kind, folder, seconds=0.0):
    command = [sys.executable, str(SCRIPT), kind, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process, folder):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return np.load(folder / f"result{process.pid}.npy")


@pytest.mark.parametrize("kind", ["features", "refits"])
def test_killed_in_the_middle(kind, tmp_path):
    """kill -9, and the next run goes on to the same numbers."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    expected = finished(work(kind, whole), whole)
    victim = work(kind, killed, seconds=0.5)
    assert victim.stdout.readline() == "ready\n"
    deadline = time.time() + 200
    while not len(list(killed.glob("*.json"))) > 1 and time.time() < deadline:
        time.sleep(0.05)
    victim.kill()
    victim.communicate()
    assert not list(killed.glob("result*"))
    kept = {path: path.stat().st_mtime_ns for path in killed.glob("*.npz")}
    assert 1 < len(kept) < len(list(whole.glob("*.npz")))
    np.testing.assert_array_equal(finished(work(kind, killed), killed), expected)
    assert {p.name for p in killed.glob("*.npz")} == {p.name for p in whole.glob("*.npz")}
    whole_ones = [p for p in kept if p.with_suffix(".json").stat().st_mtime_ns >= kept[p]]
    assert sum(p.stat().st_mtime_ns == kept[p] for p in whole_ones) >= len(kept) - 1


def test_two_runs_that_draw_at_once(tmp_path):
    code = "from pathlib import Path; from support import datasets, stored; import hashlib\n"
    code += f"stored.ROOT = Path({str(tmp_path)!r})\n"
    code += "rows = datasets.rendered(n_train=60, n_test=30, size=32)\n"
    code += "print(len(rows), datasets.fingerprint(rows))"
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": RUNNING}
    both = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    first, second = (process.communicate(timeout=200)[0] for process in both)
    assert first == second
    assert first.startswith("180 ")


def test_two_runs_at_once_on_one_cache(tmp_path):
    both = [work("features", tmp_path, seconds=0.2) for _ in range(2)]
    first, second = (finished(process, tmp_path) for process in both)
    np.testing.assert_array_equal(first, second)
    assert not list(tmp_path.rglob("*.partial*"))


def test_a_killed_notebook_leaves_no_finished_file(tmp_path):
    cells = ["n = 1", "import time; open('started', 'w').close(); time.sleep(0 if n else 60)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, tmp_path / "a.ipynb")
    code = "from support import run; run.run('{0}/a.ipynb', '{0}/out.ipynb', {{'n': 0}})"
    victim = subprocess.Popen(
        [sys.executable, "-c", code.format(tmp_path)], env=RUNNING, start_new_session=True
    )
    deadline = time.time() + 100
    while not (tmp_path / "started").exists() and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert (tmp_path / "started").exists()
    assert not (tmp_path / "out.ipynb").exists()
    run.run(tmp_path / "a.ipynb", tmp_path / "out.ipynb")
    assert (tmp_path / "out.ipynb").exists()


def test_two_runs_of_one_notebook(tmp_path):
    """One waits for the other; both write it."""
    (tmp_path / "notebooks").mkdir()
    cells = ["n = 1", "import time; time.sleep(1)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, tmp_path / "notebooks" / "03_a.ipynb")
    code = f"from pathlib import Path; from support import run; home = Path({str(tmp_path)!r})\n"
    code += "job = run.Job(home / 'notebooks' / '03_a.ipynb', '03_a', None, {})\n"
    code += "print(run._attempt(job, home))"
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": RUNNING}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    told = [process.communicate(timeout=200)[0] for process in both]
    assert all(text.startswith("(True") for text in told), told
    assert (tmp_path / "03_a.ipynb").exists()
    assert (tmp_path / "earlier" / "03_a.ipynb").exists()


# -------------------------------------------------------------------- the store


def of_another(path):
    """Put the bytes of another, whole result under this name."""
    stored.put(path.with_name("other.npz"), {"values": np.ones(3)})
    os.replace(path.with_name("other.npz"), path)
    path.with_name("other.json").unlink()


def flip(path):
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)


def record(text):
    return lambda path: path.with_suffix(".json").write_text(text, encoding="utf-8")


DAMAGE = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:1500]),
    "one bit": flip,
    "empty": lambda path: path.write_bytes(b""),
    "of another": of_another,
    "no record": lambda path: path.with_suffix(".json").unlink(),
    "record cut": record('{"sha256": "ab'),
    "record empty": record(""),
    "record of something else": record("[1]"),
    "record without checksum": record("{}"),
    "record in no text": lambda path: path.with_suffix(".json").write_bytes(b"\xff\xfe{"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_result_is_computed_again(damage, tmp_path, capsys):
    values, done = np.random.default_rng(0).normal(size=500), []

    def compute():
        done.append(1)
        return values

    stored.checkpoint(tmp_path)([1, 2], compute)
    path = next(tmp_path.glob("*.npz"))
    DAMAGE[damage](path)
    np.testing.assert_array_equal(stored.checkpoint(tmp_path)([1, 2], compute), values)
    assert "damaged" in capsys.readouterr().out
    np.testing.assert_array_equal(stored.checkpoint(tmp_path)([1, 2], compute), values)
    assert len(done) == 2
    assert {p.suffix for p in tmp_path.iterdir()} == {".npz", ".json"}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_one_notebook_hands_to_another_is_checked(damage, tmp_path):
    """No damaged number is read: the error names the notebook to run again."""
    path = tmp_path / "01_features.npz"
    stored.put(path, {"values": np.random.default_rng(0).normal(size=500)}, pictures="abc")
    assert stored.get(path, "notebook 01")[1]["pictures"] == "abc"
    DAMAGE[damage](path)
    with pytest.raises(ValueError, match=r"01_features.npz is damaged .*: run notebook 01 again"):
        stored.get(path, "notebook 01")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="run notebook 01 first"):
        stored.get(path, "notebook 01")


def test_a_line_says_what_is_used_from_where(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    for _ in range(2):
        keep = stored.checkpoint(tmp_path)
        for k in range(3):
            keep([k], lambda: np.zeros(2))
    assert capsys.readouterr().err == f"Using results that are stored in {tmp_path}.\n"


def dense(units, activation, **options):
    layer = keras.layers.Dense(units, activation, kernel_initializer="ones", **options)
    return keras.Sequential([keras.Input((3,)), layer])


X = np.arange(12.0).reshape(4, 3)
SMOOTHED = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.2)
DIFFERENT = {
    "label smoothing": (BINARY, SMOOTHED),
    "another loss": (BINARY, SOFTMAX),
    "a smooth hinge's temperature": (models.smooth_hinge(0.1), models.smooth_hinge(0.2)),
    "activation": (dense(2, "relu"), dense(2, "tanh")),
    "units": (dense(2, "relu"), dense(3, "relu")),
    "a bias": (dense(2, "relu"), dense(2, "relu", use_bias=False)),
    "dtype policy": (dense(2, "relu"), dense(2, "relu", dtype="float32")),
    "two rows exchanged": (X, X[[1, 0, 2, 3]]),
    "shape": (X, X.reshape(3, 4)),
    "dtype": (X, X.astype(np.float32)),
    "lengths": ([[1, 2], [3]], [[1], [2, 3]]),
    "lengths of arrays": ([X[:1], X[1:]], [X[:2], X[2:]]),
    "text and number": ("1", 1),
    "nothing and zero": (None, 0),
    "options": ({"step": 1, "box": 2}, {"step": 2, "box": 1}),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_decides_a_result_decides_its_name(what):
    one, other = DIFFERENT[what]
    assert stored.key(one) != stored.key(other)
    assert stored.key(one) == stored.key(one)


def test_equal_things_have_one_name():
    assert stored.key(X.copy()) == stored.key(X)
    assert stored.key(dense(2, "relu")) == stored.key(dense(2, "relu"))  # layers count names up
    assert stored.key(models.smooth_hinge(0.1)) == stored.key(models.smooth_hinge(0.1))
    moved = dense(2, "relu")
    moved.set_weights([w + 1 for w in moved.get_weights()])
    assert stored.key(moved) != stored.key(dense(2, "relu"))


def test_an_object_of_which_nothing_is_known_is_refused(tmp_path, binary):
    with pytest.raises(TypeError, match="what in an object decides"):
        stored.checkpoint(tmp_path)([binary.objective], lambda: np.zeros(2))
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        stored.checkpoint(tmp_path)([1], lambda: np.array([{}]))


EDITS = {  # of helpers/removals.py, which studies.network_retraining imports
    "a comment": (lambda text: f"# what this is about\n{text}  # and so on\n", True),
    "a docstring": (lambda text: text.replace('"""Return', '"""Give back', 1), True),
    "a blank line": (lambda text: text.replace("\n\n\n", "\n\n\n\n"), True),
    "a constant": (lambda text: text.replace("max_steps=200", "max_steps=199"), False),
    "a sign": (
        lambda text: text.replace("theta[:, left] -= step", "theta[:, left] += step"),
        False,
    ),
    "zeros": (lambda text: text.replace("return theta\n", "return 0 * theta\n", 1), False),
}


@pytest.mark.parametrize("edit", EDITS)
def test_code_decides_and_comments_do_not(edit, monkeypatch):
    from studies import methods

    before = stored.key(methods.left_out)
    change, same = EDITS[edit]
    text = stored.SOURCES["helpers.removals"]
    assert change(text) != text
    monkeypatch.setitem(stored.SOURCES, "helpers.removals", change(text))
    assert (stored.key(methods.left_out) == before) is same
    monkeypatch.setitem(stored.SOURCES, "helpers.removals", text)
    monkeypatch.setitem(stored.SOURCES, "support.figures", "nothing = 0")  # not imported there
    assert stored.key(methods.left_out) == before


IMPORTS = ["from helpers import other", "from helpers.other import f", "import helpers.other"]
IMPORTS += ["from . import other", "from .other import f"]


@pytest.mark.parametrize("line", IMPORTS)
def test_an_import_is_followed_however_it_is_written(line, monkeypatch):
    files = {"helpers.one": f"def work():\n    {line}", "helpers.other": "f = 1"}
    for name, text in {**files, "helpers.__init__": ""}.items():
        monkeypatch.setitem(stored.SOURCES, name, text)
    assert stored._trees("helpers.one").keys() - {"helpers.__init__"} == files.keys()


def test_the_code_of_a_cell_decides_with_what_it_names(tmp_path):
    """A function of a notebook or a test, replaced by zeros, does not return the old result."""
    work, factor, keep = "def work(x):\n    return {} * x\n", 2.0, stored.checkpoint(tmp_path)

    def cell(body, factor):
        names = {"np": np, "factor": factor}
        exec(work.format(body) + "def compute():\n    return factor * work(np.ones(2))", names)
        return keep([1], names["compute"])

    np.testing.assert_array_equal(cell(1, factor), [2, 2])
    np.testing.assert_array_equal(cell(0, factor), [0, 0])  # the function that it calls
    np.testing.assert_array_equal(cell(1, 3.0), [3, 3])  # a constant that it names
    assert len(list(tmp_path.glob("*.npz"))) == 3
    np.testing.assert_array_equal(cell(1, factor), [2, 2])
    assert len(list(tmp_path.glob("*.npz"))) == 3


def test_nothing_from_others_is_unpickled(tmp_path):
    """A cache or a data file that holds pickled objects is refused, not run."""
    stored.checkpoint(tmp_path)([1], lambda: np.zeros(3))
    path = next(tmp_path.glob("*.npz"))
    np.savez(path, values=np.array([{"a": 1}], dtype=object))
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    record(json.dumps({"sha256": checksum}))(path)  # by someone who knows how
    with pytest.raises(ValueError, match=r"damaged .*pickle"):
        stored.get(path, "it")
    lam = keras.Sequential([keras.Input((16, 16, 3)), keras.layers.Lambda(lambda x: x[:, 0, 0])])
    lam.save(tmp_path / "theirs.keras")
    with pytest.raises(ValueError, match="safe_mode"):
        features.load_backbone(str(tmp_path / "theirs.keras"))
    floors = [stored.ROOT / floor for floor in stored.FLOORS]
    sources = [p.read_text(encoding="utf-8") for floor in floors for p in floor.glob("*.py")]
    assert len(sources) > 30
    assert not [s for s in sources if "allow_pickle=True" in s or "safe_mode=False" in s]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can not be mounted here (root is needed)")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(place):
    """Leave no byte on a small disk."""
    with contextlib.suppress(OSError), (place / "filler").open("ab") as filler:
        while True:
            filler.write(bytes(4096))
            filler.flush()


def test_a_full_disk(small_disk):
    """Work goes on without what can not be kept, and says so; nothing half-written stays."""
    fill(small_disk)
    big = np.random.default_rng(0).normal(size=10_000)
    with pytest.warns(UserWarning, match=r"not kept \(No space left"):
        values = stored.checkpoint(small_disk)([1], lambda: big)
    np.testing.assert_array_equal(values, big)
    assert [p.name for p in small_disk.iterdir()] == ["filler"]


def test_a_disk_that_fills_up_between_two_runs(small_disk, tmp_path):
    """Features go on from the batches that were stored, without storing the others."""
    rows = datasets.rendered().iloc[::110].reset_index(drop=True)
    inputs = keras.Input((16, 16, 3))
    outputs = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(inputs))
    backbone = features.Backbone("tiny", keras.Model(inputs, outputs), lambda x: x / 255, 16)
    whole = features.extract(rows, backbone, batch_size=5, cache=tmp_path / "whole")
    features.extract(rows[:10], backbone, batch_size=5, cache=small_disk)
    fill(small_disk)
    with pytest.warns(UserWarning, match="not kept"):
        found = features.extract(rows, backbone, batch_size=5, cache=small_disk)
    np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("name", ["03_verdicts.json", "03_a.png", "03_a.html", "03_a.ipynb"])
def test_what_stood_there_stays_whole_on_a_full_disk(name, small_disk):
    stored.write(small_disk / name, "what stood there")
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        stored.write(small_disk / name, "new" * 10_000)
    assert (small_disk / name).read_text(encoding="utf-8") == "what stood there"
    assert sorted(p.name for p in small_disk.iterdir()) == sorted([name, "filler"])


def test_everything_is_written_whole_or_not_at_all():
    """No module beside the notebooks writes a file but through `stored.write`."""
    direct = re.compile(r"write_text\(|write_bytes\(|np\.save\(|shutil\.copy\(|nbformat\.write\(")
    found = []
    for path in (stored.ROOT / "notebooks").glob("s*/*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [(path.stem, line.strip()) for line in lines if direct.search(line)]
    assert [line for name, line in found if name == "stored"][1:] == []
    assert [line for name, line in found if name != "stored"] == [
        "nbformat.write(executed, partial)"  # which becomes the notebook once it is whole
    ]


# -------------------------------------------------------------------- data


def data(n=60, d=5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    y = (x[:, 0] + 0.5 * rng.normal(size=n) > 0).astype(float)
    return x, y, rng.normal(size=(4, d)), np.array([0.0, 1, 0, 1])


def check(x, y, x_test, y_test, atol=1e-9):
    """Compare the exact refits of five removals with scikit-learn's, and s_test with NumPy's."""
    x64, t64 = x.astype(float), x_test.astype(float)
    objective = Objective(models.linear_head(x.shape[1]), BINARY, x, y, weight_decay=1e-2)
    assert fit_head(objective).converged
    theta, n = objective.theta, len(y)
    p, p_test = (1 / (1 + np.exp(-a @ theta)) for a in (x64, t64))
    assert np.linalg.norm(x64.T @ (p - y) / n + 1e-2 * theta) <= 1e-9
    h = (x64.T * (p * (1 - p) / n)) @ x64 + 1e-2 * np.eye(len(theta))
    expected = np.linalg.solve(h, t64.T * (p_test - y_test))
    found = s_test(objective, x_test, y_test).x
    np.testing.assert_allclose(found, expected, atol=atol * np.abs(expected).max())
    removals = Removals(objective)
    for i, refit in enumerate(removals.exact(np.arange(5)).T):
        keep = np.arange(n) != i
        left = 1 / (1 + np.exp(-x64[keep] @ refit)) - y[keep]
        assert np.linalg.norm(x64[keep].T @ left / (n - 1) + 1e-2 * refit) <= 1e-9


def test_a_constant_feature():
    x, y, x_test, y_test = data()
    x[:, 1], x[:, 2] = 0, 7
    check(x, y, x_test, y_test)


def test_every_row_three_times():
    x, y, x_test, y_test = data()
    check(np.repeat(x, 3, 0), np.repeat(y, 3), x_test, y_test)


def test_a_class_of_one_and_a_class_of_none():
    x, y, x_test, y_test = data()
    check(x, np.eye(len(y))[0], x_test, y_test)
    check(x, np.zeros(len(y)), x_test, y_test)


def test_fewer_examples_than_parameters():
    x, y, x_test, y_test = data(n=20, d=50)
    check(x, y, x_test, y_test)


def test_half_precision_inputs():
    x, y, x_test, y_test = data()
    check(x.astype(np.float16), y, x_test.astype(np.float16), y_test)


@pytest.mark.parametrize("scale", [1e6, 1e-6])
def test_a_feature_on_another_scale(scale):
    x, y, x_test, y_test = data()
    x[:, 1] *= scale
    x_test[:, 1] *= scale
    check(x, y, x_test, y_test, atol=1e-6)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x, y: (np.where(x > 2, np.nan, x), y), "hold NaN or infinity, the first is number"),
        (lambda x, y: (x, np.where(y > 0, "car", "plane")), "labels are text"),
        (lambda x, y: (x, 2 * y - 1), r"from -1 to 1, but binary_crossentropy needs prob"),
        (lambda x, y: (x[1:], y), "differ in length"),
    ],
)
def test_data_that_no_model_can_be_fitted_to(spoil, words):
    x, y, *_ = data()
    x, y = spoil(x, y)
    with pytest.raises(ValueError, match=words):
        Objective(models.linear_head(x.shape[1]), BINARY, x, y, weight_decay=1e-2)


def test_a_class_number_too_many():
    x, y, *_ = data()
    with pytest.raises(ValueError, match="class numbers from 0 to 2"):
        Objective(models.linear_head(5, 3), SOFTMAX, x, (7 * y).astype(int), weight_decay=1e-2)


def test_separable_classes_without_weight_decay():
    x, *_ = data()
    objective = Objective(models.linear_head(5), BINARY, x, (x[:, 0] > 0) * 1.0, weight_decay=0.0)
    with pytest.raises(ValueError, match="weight_decay > 0"):
        fit_head(objective)
