"""`make scaling`: seconds and memory of streamed influence against n, up to a million rows on disk.

A logistic head on d = 2,048 float32 features, seeded and memory-mapped, each n in a process of its
own: one pass for the gradient; H and s_test of 10 test points; the top 50 of each of them. Memory
is the peak of anonymous pages above the state after imports. Writes figures/demo/scaling.json.
`--folder` needs 8.2 GB for the largest n and is left empty; `--sizes` are other n.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras
import numpy as np

from helpers import curvature, influence, models
from helpers.objective import Objective
from helpers.runtime import ROOT

D, M, K, ILSVRC = 2048, 10, 50, 1_281_167
ROWS = 5_000  # written at a time


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
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) / 1e3


def measure(n, path):
    """Return seconds of each pass, and the megabytes that all of them peaked at, for n rows."""
    keras.config.set_dtype_policy("float64")
    y, rng = write(path, n), np.random.default_rng(1)
    x, x_test, y_test = np.load(path, mmap_mode="r"), rng.normal(size=(M, D)), np.arange(M) % 2
    peak, done = [0.0], threading.Event()

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous())

    base, found = anonymous(), {"n": n}
    watcher = threading.Thread(target=watch)
    watcher.start()
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model = models.linear_head(D)
    options = {"weight_decay": 1e-2, "batch_size": ROWS, "memory_budget": 2**24}
    objective = Objective(model, loss, x, y, **options)
    objective.theta = 0.1 * rng.normal(size=D) / np.sqrt(D)
    works = {
        "gradient": lambda: curvature.loss_gradient(objective),
        "s_test": lambda: influence.s_test(objective, x_test, y_test, damping=0.0),
        "top": lambda: influence.most_influential(objective, found["s_test"], K),
    }
    for name, work in works.items():
        started = time.perf_counter()
        found[name] = work()
        found[f"{name}_seconds"] = round(time.perf_counter() - started, 2)
    done.set()
    watcher.join()
    assert found.pop("s_test").converged.all()
    assert found.pop("top").helpful.shape == (M, K)
    del found["gradient"]
    return found | {"megabytes": round(peak[0] - base)}


def extrapolated(rows):
    """Return the seconds that ILSVRC's training pictures would take, from the largest n."""
    last = rows[-1]
    names = [name for name in last if name.endswith("_seconds")]
    return {"n": ILSVRC} | {name: round(last[name] * ILSVRC / last["n"]) for name in names}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", type=int, default=[2_000, 20_000, 200_000, 1_000_000])
    parser.add_argument("--folder", help="where the rows lie while they are measured")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "x.npy"
        if options.one:
            print(json.dumps(measure(options.one, path)))
            return
        rows = []
        for n in options.sizes:
            command = [sys.executable, __file__, "--one", str(n), "--folder", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    if options.sizes != parser.get_default("sizes"):
        return
    record = {"d": D, "test_points": M, "top": K, "threads": threads, "rows": rows}
    record["extrapolated"] = extrapolated(rows)
    path = ROOT / "figures" / "demo" / "scaling.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
