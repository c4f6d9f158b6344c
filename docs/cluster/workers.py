"""Independent work handed out to Dask workers: here, training with other seeds.

    python docs/cluster/workers.py               # workers on this machine, one a core
    python docs/cluster/workers.py tcp://node1:8786

Edit what is marked EDIT. A worker gets one number and returns a few, so that many workers are
limited by the longest piece, and by their own start: about five seconds, TensorFlow's import and
the first tracing.
"""

import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / part) for part in (".", "notebooks")]

from support import cluster


def one_piece(seed):  # EDIT: what is to be done for one piece; it travels to the workers by value
    import os

    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import keras
    import numpy as np

    from helpers import CG, Objective, predicted_loss_change, s_test

    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(1000, 20)).astype("float32"), rng.integers(0, 3, 1000)
    model = keras.Sequential([keras.layers.Dense(32, "tanh"), keras.layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    model.fit(x, y, epochs=30, verbose=0)
    objective = Objective(model, loss, x, y, weight_decay=1e-2)
    solution = s_test(objective, x[:10], y[:10], CG(0.1, rtol=1e-3))
    return predicted_loss_change(objective, solution)


def main(address=None, pieces=8):
    import numpy as np

    client = cluster.connect(address)  # EDIT: the address of your scheduler
    started = time.perf_counter()
    changes = cluster.spread(client, one_piece, range(int(pieces)))  # EDIT: your pieces
    seconds = time.perf_counter() - started
    workers = len(client.scheduler_info()["workers"])
    client.close()
    spread = np.std(changes, axis=0).mean() / np.abs(np.mean(changes, axis=0)).mean()
    print(f"{workers} workers, {pieces} pieces: {seconds:.1f} s")
    print(f"between seeds a change varies by {spread:.1f} times its mean size")


if __name__ == "__main__":
    main(*sys.argv[1:])
