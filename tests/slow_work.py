"""Long work in miniature, to be killed in the middle: `python slow_work.py KIND FOLDER SECONDS`.

KIND is features or refits; every step waits SECONDS. The result goes to FOLDER/result.npy.
"""

import os
import sys
import time
from functools import partial
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

kind, folder, wait = sys.argv[1], Path(sys.argv[2]), {"seconds": float(sys.argv[3])}
print("ready", flush=True)


def slow_features():
    inputs = keras.Input((16, 16, 3))
    outputs = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(inputs))
    model = keras.Model(inputs, outputs)
    predict = model.predict_on_batch

    def slowly(batch):
        time.sleep(wait["seconds"])
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
    removals, keep = Removals(objective), stored.checkpoint(folder)

    def slowly(rows):
        time.sleep(wait["seconds"])
        return removals.exact(rows)

    parts = np.split(np.arange(40), 20)
    return np.hstack([keep([x, y, loss, part], partial(slowly, part)) for part in parts])


work = {"features": slow_features, "refits": slow_refits}[kind]
np.save(folder / f"result{os.getpid()}.npy", work())
