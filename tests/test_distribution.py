"""Products, dots and solves under a `tf.distribute` strategy: what one device gives, to 1e-10."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("over_replicas.py")


def started(file, replicas=0, **variables):
    command = [sys.executable, str(SCRIPT), str(file), str(replicas)]
    environment = os.environ | variables
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def results(process, file):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return dict(np.load(file))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    file = tmp_path_factory.mktemp("alone") / "results.npz"
    return results(started(file), file)


def check(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        scale = np.abs(values).max()
        np.testing.assert_allclose(found[name], values, atol=1e-10 * scale, rtol=0, err_msg=name)


@pytest.mark.parametrize("replicas", [2, 4])
def test_replicas_of_one_process(alone, tmp_path, replicas):
    file = tmp_path / "results.npz"
    check(results(started(file, replicas), file), alone)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes(alone, tmp_path):
    workers = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    files = [tmp_path / f"{i}.npz" for i in range(2)]
    processes = []
    for i, file in enumerate(files):
        cluster = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": i}}
        processes.append(started(file, TF_CONFIG=json.dumps(cluster)))
    try:
        for process, file in zip(processes, files, strict=True):
            check(results(process, file), alone)
    finally:
        for process in processes:
            process.kill()


CLUSTER = Path(__file__).parents[1] / "docs" / "cluster"


def test_the_script_for_many_machines_gives_what_one_gives():
    """As its first lines say: the same script on every machine, here two of this one."""
    printed = {}
    for k in (1, 2):
        addresses = ",".join(f"127.0.0.1:{free_port()}" for _ in range(k))
        variables = {"ADDRESSES": addresses, "EXAMPLES": "61", "THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, str(CLUSTER / "replicas.py")],
                env=os.environ | variables | {"RANK": str(rank)},
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )
            for rank in range(k)
        ]  # fmt: skip
        try:
            texts = [process.communicate(timeout=300)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert not any(process.returncode for process in processes)
        assert texts[1:] == [""] * (k - 1)
        assert "4 of 4 right-hand sides solved" in texts[0]
        printed[k] = float(texts[0].split()[-1])
    assert printed[2] == pytest.approx(printed[1], rel=1e-4)


def test_the_script_for_dask_workers_runs():
    command = [sys.executable, "-c", "import workers; workers.main(pieces=2)"]
    done = subprocess.run(command, cwd=CLUSTER, capture_output=True, text=True, check=True)
    assert "2 pieces:" in done.stdout
