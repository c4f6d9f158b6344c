"""`make gpu`: what it writes where TensorFlow sees a GPU, and that it writes nothing elsewhere."""

import json

import numpy as np
import pytest

from tests.benchmark import gpu


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "visible", lambda: None)
    gpu.main()
    assert "no GPU" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


def test_gpu_and_cpu_are_held_against_float64(monkeypatch, tmp_path):
    def run(command, where):
        if command[0] == gpu.__file__:
            wrong = {"float64": 0.0, "float32": 0.01 if where == "GPU" else 0.0}[command[1]]
            np.save(command[2], np.ones(4) + wrong)
        return {"first": 2.0, "warm": [1.0]}

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "visible", lambda: "a card")
    monkeypatch.setattr("tasks.load", lambda task: None)
    (tmp_path / "figures" / "benchmark").mkdir(parents=True)
    gpu.main()
    record = json.loads(
        (tmp_path / "figures" / "benchmark" / "gpu.json").read_text(encoding="utf-8")
    )
    assert record["card"] == "a card"
    assert [row["task"] for row in record["rows"][:-2:2]] == ["t1", "t3", "t4"]
    assert [row["error"] for row in record["rows"][-2:]] == pytest.approx([0.01, 0.0])
