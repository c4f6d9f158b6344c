"""`make crosscheck`: our influence and EK-FAC beside dattri's and kronfluence's, same weights.

Two models on the 8 x 8 digits: a softmax head (p 650) and a perceptron of two layers (p 1,210).
dattri's explicit influence is the exact Hessian's. kronfluence estimates the Fisher from labels
sampled from the model; "every label" gives it each example once a label, its loss times
sqrt(C p), which is our sum over all labels without sampling. Everything in float64. Writes
figures/benchmark/crosscheck.json.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import tasks

from helpers import EKFAC, Cholesky, predicted_loss_change, solve
from helpers.gradients import per_example_gradients

PAIRS = {"softmax": ["dattri explicit"], "mlp": ["kronfluence ekfac", "kronfluence every-label"]}


def ours(task, data, ekfac):
    """Return the predicted loss changes (m, n) without the regulariser's share, as the peers do."""
    objective = tasks.bind(task, data, "float64")
    x, y = data["x_test"].astype(float), data["y_test"]
    g, damping = per_example_gradients(objective, x, y).T, float(data["damping"])
    s = solve(objective, g, (EKFAC if ekfac else Cholesky)(damping)).x
    share = (objective.decay * objective.theta @ s)[:, None] / objective.n
    return predicted_loss_change(objective, s) - share


def theirs(python, method, task):
    """Return the same from a library, in a process of its own."""
    script, data = Path(__file__).with_name("peers.py"), tasks.FOLDER / f"{task}.npz"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "changes.npy"
        subprocess.run([python, script, method, task, data, output], check=True)
        return np.load(output)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", required=True, help="Python with the PyTorch libraries")
    python, rows = parser.parse_args().peers, []
    for task, methods in PAIRS.items():
        data = tasks.load(task)
        for method in methods:
            a, b = ours(task, data, method.startswith("kron")), theirs(python, method, task)
            row = {"task": task, "p": len(data["theta"]), "method": method}
            row |= {"r": np.corrcoef(a.ravel(), b.ravel())[0, 1]}
            row |= {"ratio": (a * b).sum() / (b * b).sum()}
            row |= {"relative_difference": np.linalg.norm(a - b) / np.linalg.norm(b)}
            rows.append(row)
            print(row, flush=True)
    path = Path(__file__).resolve().parents[2] / "figures" / "benchmark" / "crosscheck.json"
    path.write_text(json.dumps(rows, indent=1, default=float) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
