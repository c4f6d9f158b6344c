"""Work spread over processes equals work done in one, also when a worker is killed meanwhile."""

import http.client
import os
import signal
import threading
import time
import urllib.request

import nbformat
import numpy as np
import psutil
import pytest

from helpers import Objective, Removals, fit_head
from support import cluster, stored


@pytest.fixture(scope="module")
def client():
    with cluster.connect() as client:
        yield client


def removals():
    """Refits of a small head; the same wherever it is called."""
    import keras

    from support import models

    keras.config.set_dtype_policy("float64")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), rng.integers(0, 2, 60).astype(float)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    objective = Objective(models.linear_head(3), loss, x, y, weight_decay=0.1)
    fit_head(objective)
    return Removals(objective)


def refit(folder, seconds):
    """Return a task: exact refits of some rows, kept in `folder`, the work slowed down."""
    build = removals

    def task(rows):
        time.sleep(seconds)
        (folder / f"{rows[0]}.{os.getpid()}.tried").touch()
        return stored.checkpoint(folder)([rows], lambda: build().exact(rows))

    return task


def test_killing_a_worker_loses_nothing(client, tmp_path):
    blocks = np.array_split(np.arange(60), 8)
    victim = next(iter(client.run(os.getpid).values()))

    def kill():
        while not list(tmp_path.glob(f"*.{victim}.tried")):
            time.sleep(0.02)
        os.kill(victim, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    found = cluster.spread(client, refit(tmp_path, 0.3), blocks)
    killer.join(timeout=10)
    assert victim not in client.run(os.getpid).values()
    expected = removals().exact(np.arange(60))
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=0, atol=1e-12)
    before = len(list(tmp_path.glob("*.npz")))
    cluster.spread(client, refit(tmp_path, 0), blocks)
    assert len(list(tmp_path.glob("*.npz"))) == before == 8


def test_what_fails_is_tried_again_and_then_raised(client, tmp_path):
    def fails(piece):
        tried = len(list(tmp_path.glob(f"{piece}.*")))
        (tmp_path / f"{piece}.{tried}").touch()
        if piece == "always" or tried == 0:
            raise ValueError(f"{piece} failed")
        return piece.upper()

    assert cluster.spread(client, fails, ["a", "b"]) == ["A", "B"]
    with pytest.raises(ValueError, match="always failed"):
        cluster.spread(client, fails, ["always"], retries=3)
    assert len(list(tmp_path.glob("always.*"))) == 4


def test_a_sweep_runs_a_notebook_with_each_set_of_parameters_once(client, tmp_path):
    work = "from pathlib import Path\nprint('n is', n)\nPath(log).open('a').write(f'{n}\\n')\n"
    where = f"import sys\nsys.path.insert(0, {str(stored.ROOT / 'notebooks')!r})\n"
    where += "from support import stored\n"
    where += "(stored.folder('runs', 'demo') / f'{n}.json').touch()"
    log = str(tmp_path / "log")
    cells = [nbformat.v4.new_code_cell(text) for text in ("n = 1\nlog = ''", work, where)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "00_a.ipynb")
    settings = [{"n": n, "log": log} for n in (3, 5)]
    paths = cluster.sweep(client, tmp_path / "00_a.ipynb", settings, tmp_path / "runs")
    for n, path in zip((3, 5), paths, strict=True):
        outputs = [c.outputs for c in nbformat.read(path, 4).cells if c.get("outputs")]
        assert outputs[0][0].text.startswith(f"n is {n}")
        assert (path.with_suffix("") / "demo" / f"{n}.json").exists()
    settings.append({"n": 7, "log": log})
    again = cluster.sweep(client, tmp_path / "00_a.ipynb", settings, tmp_path / "runs")
    assert again[:2] == paths
    assert sorted((tmp_path / "log").read_text(encoding="utf-8").split()) == ["3", "5", "7"]
    with pytest.raises(ValueError, match="unknown parameter 'm'"):
        cluster.sweep(client, tmp_path / "00_a.ipynb", [{"m": 1}], tmp_path / "runs")


def test_an_address_without_a_scheduler_is_an_error():
    with pytest.raises(OSError, match="Timed out"):
        cluster.connect("tcp://127.0.0.1:9")


def test_a_cluster_of_this_machine_listens_to_it_alone_and_has_no_dashboard(client):
    def listening(pid=None):
        found = psutil.Process(pid).net_connections()
        return [c.laddr for c in found if c.status == "LISTEN"]

    addresses = [*listening(), *(a for own in client.run(listening).values() for a in own)]
    assert {address.ip for address in addresses} == {"127.0.0.1"}
    assert 8787 not in {address.port for address in addresses}
    for address in addresses:
        for page in ("status", "health", "metrics", "info/main/workers.html"):
            with pytest.raises((OSError, http.client.HTTPException)):
                urllib.request.urlopen(f"http://127.0.0.1:{address.port}/{page}", timeout=0.5)
