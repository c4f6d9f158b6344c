"""Print the peak anonymous memory (MB above the state after imports) of products on n examples.

The inputs are memory-mapped: what grows with n is only what the code itself keeps.
`python memory_of_streaming.py N FOLDER`.
"""

import os
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np

from helpers import Hessian, Objective
from tests.benchmark.scaling import peak_memory

n, folder = int(sys.argv[1]), Path(sys.argv[2])
D, BATCH = 256, 2000


rng = np.random.default_rng(0)
stored = np.lib.format.open_memmap(folder / f"{n}.npy", "w+", "float32", (n, D))
labels = np.lib.format.open_memmap(folder / f"{n}_y.npy", "w+", "int32", (n,))
for start in range(0, n, BATCH):
    stored[start : start + BATCH] = rng.normal(size=(BATCH, D))
    labels[start : start + BATCH] = rng.integers(0, 3, BATCH)
del stored, labels
x, y = (np.load(folder / name, mmap_mode="r") for name in (f"{n}.npy", f"{n}_y.npy"))
model = keras.Sequential([keras.Input((D,)), keras.layers.Dense(32, "tanh"), keras.layers.Dense(3)])
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model(np.zeros((BATCH, D), "float32"))
with peak_memory() as peak:
    objective = Objective(model, loss, x, y, weight_decay=1e-3, batch_size=BATCH)
    for _ in range(2):
        Hessian(objective) @ (np.ones((objective.p, 4)))
        objective.gradient()
print(f"{peak[0]:.1f}")
