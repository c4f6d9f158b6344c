"""What goes wrong on a real machine, done for real: nothing is lost, and no number is wrong.

Data that a model can not be fitted to are refused in words, or give the right answer.
"""

import os
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
from support import features, models, run, stored

SCRIPT = Path(__file__).with_name("slow_work.py")
PATH = os.pathsep.join([str(stored.ROOT), str(stored.ROOT / "notebooks")])
RUNNING = {**os.environ, "PYTHONPATH": PATH}


def work(kind, folder, seconds=0.0):
    command = [sys.executable, str(SCRIPT), kind, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process, folder):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return np.load(folder / "result.npy")


@pytest.mark.parametrize("kind", ["features", "refits"])
def test_killed_in_the_middle(kind, tmp_path):
    """kill -9, and the next run goes on to the same numbers."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    expected = finished(work(kind, whole), whole)
    victim = work(kind, killed, seconds=0.5)
    assert victim.stdout.readline() == "ready\n"
    pieces = "*.npz" if kind == "refits" else "*.progress"
    deadline = time.time() + 200
    while not (len(list(killed.glob(pieces))) > (kind == "refits")) and time.time() < deadline:
        time.sleep(0.05)
    victim.kill()
    victim.communicate()
    assert not (killed / "result.npy").exists()
    assert list(killed.glob(pieces))
    np.testing.assert_array_equal(finished(work(kind, killed), killed), expected)


def test_two_runs_at_once_on_one_cache(tmp_path):
    both = [work("features", tmp_path, seconds=0.2) for _ in range(2)]
    first, second = (finished(process, tmp_path) for process in both)
    np.testing.assert_array_equal(first, second)
    assert not list(tmp_path.glob("*.partial*"))


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


@pytest.mark.parametrize("damage", ["cut off", "one bit"])
def test_a_damaged_checkpoint_is_computed_again(damage, tmp_path, capsys):
    values = np.random.default_rng(0).normal(size=500)
    stored.checkpoint(tmp_path)([1, 2], lambda: values)
    path = next(tmp_path.glob("*.npz"))
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data[:1500] if damage == "cut off" else data)
    np.testing.assert_array_equal(stored.checkpoint(tmp_path)([1, 2], lambda: values), values)
    assert "damaged" in capsys.readouterr().out
    again = stored.checkpoint(tmp_path)([1, 2], lambda: pytest.fail("it was stored"))
    np.testing.assert_array_equal(again, values)


def test_nothing_from_others_is_unpickled(tmp_path):
    """A cache or a data file that holds pickled objects is refused, not run."""
    stored.checkpoint(tmp_path)([1], lambda: np.zeros(3))
    path = next(tmp_path.glob("*.npz"))
    np.savez(path, values=np.array([{"a": 1}], dtype=object))
    np.testing.assert_array_equal(stored.checkpoint(tmp_path)([1], lambda: np.ones(2)), [1, 1])
    lam = keras.Sequential([keras.Input((16, 16, 3)), keras.layers.Lambda(lambda x: x[:, 0, 0])])
    lam.save(tmp_path / "theirs.keras")
    with pytest.raises(ValueError, match="safe_mode"):
        features.load_backbone(str(tmp_path / "theirs.keras"))
    sources = [p.read_text(encoding="utf-8") for p in (stored.ROOT / "helpers").glob("*.py")]
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


def test_a_full_disk(small_disk):
    """Refits go on without their checkpoint; features say what they need before they begin."""
    (small_disk / "filler").write_bytes(bytes(2**20 - 3 * 4096))
    big = np.random.default_rng(0).normal(size=10_000)
    with pytest.warns(UserWarning, match=r"not kept \(No space left"):
        values = stored.checkpoint(small_disk)([1], lambda: big)
    np.testing.assert_array_equal(values, big)
    assert [p.name for p in small_disk.iterdir()] == ["filler"]
    process = work("features", small_disk)
    _, errors = process.communicate(timeout=300)
    assert process.returncode
    assert "MB free, the features need" in errors


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
