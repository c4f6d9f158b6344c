"""Write what an objective gives under a strategy: `python over_replicas.py FILE REPLICAS`.

REPLICAS virtual CPU devices of one process, 0 for no strategy at all; with TF_CONFIG set, one
device in each process of the cluster that it describes.
"""

import os
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in (".", "notebooks")]

import contextlib

import keras
import numpy as np
import tensorflow as tf

file, k = sys.argv[1], int(sys.argv[2])
strategy = None
if "TF_CONFIG" in os.environ:
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
elif k:
    cpu = tf.config.list_physical_devices("CPU")[0]
    devices = [tf.config.LogicalDeviceConfiguration()] * k
    tf.config.set_logical_device_configuration(cpu, devices)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(k)])

from helpers import CG, GaussNewton, Hessian, Objective, predicted_loss_change, s_test
from helpers.gradients import gradient_dots
from support import features

keras.config.set_dtype_policy("float64")
rng = np.random.default_rng(0)
x, y, weight = rng.normal(size=(53, 6, 6, 1)), rng.integers(0, 3, 53), rng.uniform(0.5, 2, 53)
x_test, y_test = rng.normal(size=(3, 6, 6, 1)), rng.integers(0, 3, 3)
with strategy.scope() if strategy else contextlib.nullcontext():
    layers = [keras.layers.Conv2D(4, 3, activation="tanh"), keras.layers.Flatten()]
    model = keras.Sequential([keras.Input((6, 6, 1)), *layers, keras.layers.Dense(3)])
    pooled = keras.layers.GlobalAveragePooling2D()(model.layers[0].output)
    backbone = features.Backbone("small", keras.Model(model.inputs, pooled), lambda x: x / 255, 6)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
objective = Objective(
    model, loss, x, y, weight_decay=0.1, sample_weight=weight, batch_size=5, strategy=strategy
)
objective.theta = 0.3 * rng.normal(size=objective.p)
solution = s_test(objective, x_test, y_test, CG(1.0, rtol=1e-12, precondition=None))
vectors = rng.normal(size=(objective.p, 3))
pictures = rng.integers(0, 256, (53, 6, 6, 1))
results = {
    "features": features.measure(pictures, backbone, batch_size=7),
    "gradient": objective.gradient(),
    "hvp": Hessian(objective) @ vectors,
    "gauss_newton": GaussNewton(objective) @ vectors,
    "dots": gradient_dots(objective, vectors),
    "s_test": solution.x,
    "predicted": predicted_loss_change(objective, solution),
    "subset": (objective.subset(np.arange(0, 53, 3))).gradient(),
}
assert solution.converged.all()
np.savez(file, **results)
