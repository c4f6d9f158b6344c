"""`make gpu`: the benchmark's tasks and products of Inception-v3 on the GPU that TensorFlow sees.

Every measurement is a process of its own, on the GPU and then on the CPU, and is held against
float64 on the CPU: the references of `tasks.py`, and for Inception-v3 (21.8 million parameters, 16
pictures of 96 pixels, random weights and pictures) the same products of its Gauss-Newton matrix.
Float32 products keep full precision (TensorFloat-32 is off); XLA is not used;
sums are not forced into one order. Writes figures/benchmark/gpu.json; without a GPU it says so.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks"), str(Path(__file__).parent)]
COLUMNS, SETTINGS = 4, {"TensorFloat-32": False, "op determinism": False, "XLA": False}
ON = {"GPU": {"NVIDIA_TF32_OVERRIDE": "0"}, "CPU": {"CUDA_VISIBLE_DEVICES": "-1"}}


def visible():
    """Return the name of the first GPU that TensorFlow sees, or None."""
    import tensorflow as tf

    devices = tf.config.list_physical_devices("GPU")
    about = tf.config.experimental.get_device_details(devices[0]) if devices else {}
    return about.get("device_name", "a GPU without a name") if devices else None


def products(dtype, path, repeats=5):
    """Write products of Inception-v3's Gauss-Newton matrix with random columns; print seconds."""
    import keras
    import numpy as np

    from helpers import GaussNewton, Objective

    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(dtype)
    rng, shape = np.random.default_rng(0), (96, 96, 3)
    body = keras.applications.InceptionV3(
        include_top=False, weights=None, input_shape=shape, pooling="avg"
    )
    model = keras.Model(body.input, keras.layers.Dense(2)(body.output))
    x, y = rng.normal(size=(16, *shape)).astype(dtype), np.arange(16) % 2
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    objective = Objective(model, loss, x, y, weight_decay=1e-3)
    G, v, seconds = GaussNewton(objective), rng.normal(size=(objective.p, COLUMNS)), []
    for _ in range(1 if dtype == "float64" else repeats):
        started = time.perf_counter()
        made = G @ v
        seconds.append(time.perf_counter() - started)
    np.save(path, made)
    print(json.dumps({"first": seconds[0], "warm": seconds[1:], "p": objective.p}))


def run(command, where):
    """Return the last line that a process printed on the GPU or the CPU, read as JSON."""
    env = os.environ | ON[where]
    done = subprocess.run(
        [sys.executable, *command], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    card = visible()
    if card is None:
        print("TensorFlow sees no GPU here: nothing is measured, nothing is written.")
        return
    import numpy as np
    import tasks

    from tests.benchmark.run import OURS, processor

    rows, worker = [], str(Path(__file__).with_name("worker.py"))
    for task in OURS:
        tasks.load(task)
        for where in ON:
            found = run([worker, OURS[task][0], task, str(tasks.FOLDER / f"{task}.npz")], where)
            rows.append({"task": task, "on": where} | found)
            print(rows[-1], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        exact = str(Path(folder) / "exact.npy")
        run([__file__, "float64", exact], "CPU")
        for where in ON:
            path = str(Path(folder) / f"{where}.npy")
            found = run([__file__, "float32", path], where)
            error = np.linalg.norm(np.load(path) - np.load(exact)) / np.linalg.norm(np.load(exact))
            rows.append({"task": f"Inception-v3, {COLUMNS} products", "on": where, "error": error})
            rows[-1] |= found
            print(rows[-1], flush=True)
    record = {"card": card, "CPU": processor(), "settings": SETTINGS, "rows": rows}
    path = ROOT / "figures" / "benchmark" / "gpu.json"
    path.write_text(json.dumps(record, indent=1, default=float) + "\n", encoding="utf-8")


if __name__ == "__main__":
    products(*sys.argv[1:]) if sys.argv[1:] else main()
