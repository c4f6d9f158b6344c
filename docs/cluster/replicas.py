"""One objective shared among machines: every process holds a share of the examples.

Start the same script on every machine, RANK counting them from 0; two on one machine to try it:

    ADDRESSES=127.0.0.1:2222,127.0.0.1:2223 RANK=1 python docs/cluster/replicas.py &
    ADDRESSES=127.0.0.1:2222,127.0.0.1:2223 RANK=0 python docs/cluster/replicas.py

Edit what is marked EDIT. A product with the Hessian is a pass over the own share and one all-reduce
of p numbers a column.
"""

import json
import os
import time

addresses = os.environ.get("ADDRESSES", "127.0.0.1:2222").split(",")  # EDIT: one a machine
rank = int(os.environ.get("RANK", 0))  # EDIT: the number of this machine, SLURM_PROCID for example
task = {"type": "worker", "index": rank}
os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})

import keras
import numpy as np
import tensorflow as tf

threads = int(os.environ.get("THREADS", 0))
tf.config.threading.set_intra_op_parallelism_threads(threads)
tf.config.threading.set_inter_op_parallelism_threads(threads)
strategy = tf.distribute.MultiWorkerMirroredStrategy()  # before anything else of TensorFlow

from helpers import CG, Objective, predicted_loss_change, s_test

layers, rng = keras.layers, np.random.default_rng(0)
n = int(os.environ.get("EXAMPLES", 4000))
# EDIT: your arrays, np.load(path, mmap_mode="r") where they are large
x, y = rng.normal(size=(n, 16, 16, 1)).astype("float32"), rng.integers(0, 10, n)
with strategy.scope():  # EDIT: your trained model, built or loaded in this block
    body = [layers.Conv2D(8, 3, activation="tanh") for _ in range(3)]
    body += [layers.Conv2D(10, 1), layers.GlobalAveragePooling2D()]
    model = keras.Sequential([keras.Input((16, 16, 1)), *body])
    model.set_weights([0.5 * np.random.default_rng(1).normal(size=w.shape) for w in model.weights])

loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
objective = Objective(model, loss, x, y, weight_decay=1e-2, strategy=strategy)
for call in ("first call", "repeated"):
    started = time.perf_counter()
    solution = s_test(objective, x[:4], y[:4], CG(1.0, rtol=1e-3, precondition=None))
    changes = predicted_loss_change(objective, solution)
    seconds = time.perf_counter() - started
    if rank == 0:
        print(f"{len(addresses)} processes, {call}: {seconds:.2f} s", flush=True)
if rank == 0:
    print(solution)
    print(f"sum of the absolute changes {np.abs(changes).sum():.6e}")
