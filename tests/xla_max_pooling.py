"""Print the error of an XLA product through max-pooling, and whether the guard believes it."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in (".", "notebooks")]
from support.start import start

start("real")
import keras
import numpy as np
import tensorflow as tf

from helpers import Hessian, Objective
from helpers.gradients import agrees

keras.config.set_dtype_policy("float32")
keras.utils.set_random_seed(5)
layers = keras.layers
model = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        layers.Conv2D(4, 3, activation="tanh"),
        layers.MaxPooling2D(),
        layers.Conv2D(4, 2, activation="tanh"),
        layers.Flatten(),
        layers.Dense(3),
    ]
)
rng = np.random.default_rng(0)
x, y = rng.normal(size=(200, 8, 8, 1)), rng.integers(0, 3, 200)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
objective = Objective(model, loss, x, y, weight_decay=0.01)
v = tf.constant(rng.normal(size=(objective.p, 1)), "float32")
H = Hessian(objective)
plain = (H @ v.numpy()).astype("float32")
under_xla = tf.function(H.product(), jit_compile=True)(v).numpy()
error = np.linalg.norm(under_xla - plain) / np.linalg.norm(plain)
print(f"{error:.2e} {agrees(under_xla, plain)}")
