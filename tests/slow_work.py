"""Long work in miniature, to be killed in the middle: `python slow_work.py KIND FOLDER SECONDS`.

KIND is features or refits; every step waits SECONDS. The result goes to FOLDER/result.npy.
"""

import os
import sys
import time
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in (".", "notebooks")]

from support.start import start
from support import stored

start("demo")
import keras
import numpy as np

from support import datasets, features, models
from helpers import Objective, Removals, fit_head
from studies import leave_one_out

kind, folder, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
print("ready", flush=True)


def slow_features():
    inputs = keras.Input((16, 16, 3))
    outputs = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(inputs))
    model = keras.Model(inputs, outputs)
    predict = model.predict_on_batch

    def slowly(batch):
        time.sleep(seconds)
        return predict(batch)

    model.predict_on_batch = slowly
    backbone = features.Backbone("tiny", model, lambda x: x / 255, 16)
    manifest = datasets.rendered().iloc[::110].reset_index(drop=True)
    return features.extract(manifest, backbone, batch_size=2, cache=folder)


def slow_refits():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)), rng.integers(0, 2, 40).astype(float)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    objective = Objective(models.linear_head(3), loss, x, y, weight_decay=0.1)
    fit_head(objective)
    removals = Removals(objective)
    exact = removals._exact

    def slowly(*arguments):
        time.sleep(seconds)
        return exact(*arguments)

    removals._exact = slowly
    return leave_one_out.refits(removals, np.arange(40), stored.checkpoint(folder), size=2)


np.save(folder / "result.npy", {"features": slow_features, "refits": slow_refits}[kind]())
