"""`make scaling`: seconds and memory of influence for a million rows, and for a million parameters.

A logistic head on d = 2,048 float32 features, seeded and memory-mapped, up to a million rows on
disk: one pass for the gradient; H and s_test of 10 test points; the top 50 of each of them.

A softmax head of MNIST's size, 55,000 rows of 784 in ten classes: the fit, all influences on 15
test points, the Newton step without each of 500 rows.

All parameters of whole backbones on a few small pictures (random weights: the cost is the same):
s_test of 2 test points by CG with the Gauss-Newton matrix, EK-FAC's factors and solve for all
Dense and Conv2D layers, the influences.

Each row is a process of its own; memory is the peak of anonymous pages above the state after
imports. Writes figures/demo/scaling.json. One row alone (20000, digits, MobileNetV2@96, ...) is
measured and printed only. `--folder` needs 8.2 GB for the largest n and is left empty.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
sys.path[:0] = [str(Path(__file__).resolve().parents[2] / part) for part in (".", "notebooks")]

import keras
import numpy as np

from helpers import (
    CG,
    Cholesky,
    GaussNewton,
    Objective,
    Removals,
    fit_head,
    most_influential,
    predicted_loss_change,
    s_test,
)
from helpers.ekfac import Blocks
from helpers.gradients import per_example_gradients
from support import models
from support.stored import ROOT

D, M, K, ILSVRC = 2048, 10, 50, 1_281_167
ROWS = 5_000  # written at a time
SIZES = [2_000, 20_000, 200_000, 1_000_000]
OTHERS = ["digits", "MobileNetV2@96", "InceptionV3@96", "InceptionV3@299"]
PICTURES = {96: 16, 299: 4}  # of a side, how many


def write(path, n):
    """Write n seeded rows of features (n, D) float32 and return their labels (n,)."""
    rng, truth = np.random.default_rng(n), np.random.default_rng(0).normal(size=D) / np.sqrt(D)
    stored, labels = np.lib.format.open_memmap(path, "w+", np.float32, (n, D)), []
    for start in range(0, n, ROWS):
        part = rng.standard_normal((min(ROWS, n - start), D), np.float32)
        stored[start : start + ROWS] = part
        labels.append(part @ truth + rng.normal(size=len(part)) > 0)
    return np.concatenate(labels).astype(np.int32)


def anonymous():
    """Return the anonymous resident memory of this process in MB."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.split("RssAnon:")[1].split()[0]) / 1e3


@contextmanager
def peak_memory():
    """Yield a list that will hold the peak of anonymous memory above the start, in MB."""
    base, found, done = anonymous(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.002):
            found[0] = max(found[0], anonymous() - base)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def timed(works):
    """Return {name: result} of functions called in turn, and {name_seconds: time}."""
    results, seconds = {}, {}
    for name, work in works.items():
        started = time.perf_counter()
        results[name] = work(results)
        seconds[f"{name}_seconds"] = round(time.perf_counter() - started, 2)
    return results, seconds


def measure(n, path):
    """Return seconds of each pass, and the megabytes that all of them peaked at, for n rows."""
    keras.config.set_dtype_policy("float64")
    y, rng = write(path, n), np.random.default_rng(1)
    x, x_test, y_test = np.load(path, mmap_mode="r"), rng.normal(size=(M, D)), np.arange(M) % 2
    with peak_memory() as peak:
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
        options = {"weight_decay": 1e-2, "batch_size": ROWS, "memory_budget": 2**24}
        objective = Objective(models.linear_head(D), loss, x, y, **options)
        objective.theta = 0.1 * rng.normal(size=D) / np.sqrt(D)
        works = {
            "gradient": lambda _: objective.gradient(),
            "s_test": lambda _: s_test(objective, x_test, y_test, damping=0.0),
            "top": lambda done: most_influential(objective, done["s_test"], K),
        }
        results, seconds = timed(works)
    assert results["s_test"].converged.all()
    assert results["top"].helpful.shape == (M, K)
    return {"n": n} | seconds | {"megabytes": round(peak[0])}


def measure_digits():
    """Return the same for a softmax head on as many rows as MNIST has, of overlapping classes."""
    keras.config.set_dtype_policy("float64")
    rng, n = np.random.default_rng(0), 55_000
    centres, y = rng.normal(size=(10, 784)), rng.integers(0, 10, n)
    x = np.clip(0.1 * centres[y] + 0.3 * rng.normal(size=(n, 784)), 0, 1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with peak_memory() as peak:
        objective = Objective(models.linear_head(784, 10), loss, x, y, weight_decay=0.01)
        rows = np.arange(500)
        works = {
            "fit": lambda _: fit_head(objective),
            "s_test": lambda _: s_test(objective, x[:15], y[:15], Cholesky(0.0)),
            "influences": lambda done: predicted_loss_change(objective, done["s_test"]),
            "removals": lambda _: Removals(objective),
            "newton": lambda done: done["removals"].newton_loss_change(x[:15], y[:15], rows),
        }
        results, seconds = timed(works)
    assert results["fit"].converged
    assert results["s_test"].converged.all()
    return {"digits": n, "p": objective.p} | seconds | {"megabytes": round(peak[0])}


def measure_backbone(name):
    """Return the same for the parameters of a whole backbone with a head of two logits.

    name : of the backbone, "@", and the side of the pictures.
    """
    name, side = name.split("@")
    shape, n = (int(side), int(side), 3), PICTURES[int(side)]
    x, y = np.random.default_rng(0).normal(size=(n, *shape)).astype("float32"), np.arange(n) % 2
    build = getattr(keras.applications, name)
    body = build(include_top=False, weights=None, input_shape=shape, pooling="avg")
    model = keras.Model(body.input, keras.layers.Dense(2)(body.output))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    kinds = keras.layers.Conv2D, keras.layers.Dense
    layers = [layer.name for layer in model.layers if type(layer) in kinds]
    with peak_memory() as peak:
        whole = Objective(model, loss, x, y, weight_decay=1e-3)
        part = Objective(model, loss, x, y, weight_decay=1e-3, parameters=layers)
        gauss_newton, cg = GaussNewton(whole), CG(0.01, rtol=1e-3, precondition=None)
        b = per_example_gradients(part, x[:2], y[:2]).T
        works = {
            "cg": lambda _: s_test(gauss_newton, x[:2], y[:2], cg),
            "ekfac_factors": lambda _: Blocks(part, 0.01),
            "ekfac_solve": lambda done: done["ekfac_factors"].solve(b),
            "influences": lambda done: predicted_loss_change(part, done["ekfac_solve"]),
        }
        results, seconds = timed(works)
    assert results["cg"].converged.all()
    about = {"backbone": name, "p": whole.p, "p_ekfac": part.p, "pictures": n, "side": int(side)}
    steps = int(np.max(results["cg"].steps))
    return about | seconds | {"cg_steps": steps, "megabytes": round(peak[0])}


def extrapolated(rows):
    """Return the seconds that ILSVRC's training pictures would take, from the largest n."""
    last = rows[-1]
    names = [name for name in last if name.endswith("_seconds")]
    return {"n": ILSVRC} | {name: round(last[name] * ILSVRC / last["n"]) for name in names}


def measured(row, path):
    """Return the figures of one row of the table."""
    if row.isdigit():
        return measure(int(row), path)
    return measure_digits() if row == "digits" else measure_backbone(row)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", nargs="?", help="one row instead of all")
    parser.add_argument("--folder", help="where the rows lie while they are measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.row:
            print(json.dumps(measured(options.row, Path(folder) / "x.npy")))
            return
        rows = []
        for row in [*map(str, SIZES), *OTHERS]:
            command = [sys.executable, __file__, row, "--folder", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    threads, k = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())), len(SIZES)
    record = {"d": D, "test_points": M, "top": K, "threads": threads, "rows": rows[:k]}
    record |= {"extrapolated": extrapolated(rows[:k]), "softmax_and_backbones": rows[k:]}
    path = ROOT / "figures" / "demo" / "scaling.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
