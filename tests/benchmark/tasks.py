"""The tasks of `make benchmark` with their float64 references: data/derived/benchmark/<task>.npz.

All of them ask for the influence of every training point on m test losses (no bias in T1):

T1  logistic head, n 2,000, d = p = 2,048, m 600, weight decay 0.01, skewed features, at the optimum
T3  small convolutional network on the 8 x 8 digits, tanh, p 1,338, n 1,500, m 10, damping 0.01
T4  multilayer perceptron on the same digits, p 112,810: too large for any dense matrix, m 10

References: T1 the closed form; T3 a dense Hessian made by TensorFlow's own `GradientTape.jacobian`,
column by column, without any product of ours; T4 conjugate gradients in float64 to a true residual
of 1e-10, since nothing dense fits.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import keras
import numpy as np
import scipy.linalg
import scipy.optimize
import tensorflow as tf
from sklearn.datasets import load_digits

from helpers import CG, Hessian, Objective, fit_head, predicted_loss_change, solve, spectrum
from helpers.gradients import per_example_gradients
from support import models, stored

FOLDER = stored.folder("data", "derived", "benchmark")
LOSSES = {
    "t1": keras.losses.BinaryCrossentropy(from_logits=True),
    "t3": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "t4": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
}
LOSSES |= dict.fromkeys(("softmax", "mlp"), LOSSES["t4"])


def network(task):
    """Return the Keras model of a task, built, in the current dtype policy."""
    layers = keras.layers
    if task == "t1":
        return models.linear_head(2048)
    if task == "t3":
        body = [layers.Conv2D(8, 3, activation="tanh") for _ in range(3)]
        tail = [layers.Conv2D(10, 1), layers.GlobalAveragePooling2D()]
        return keras.Sequential([keras.Input((8, 8, 1)), *body, *tail])
    if task in ("softmax", "mlp"):
        hidden = [layers.Dense(16, activation="tanh")] if task == "mlp" else []
        return keras.Sequential([keras.Input((64,)), *hidden, layers.Dense(10)])
    hidden = [layers.Dense(300, activation="tanh") for _ in range(2)]
    return keras.Sequential([keras.Input((64,)), *hidden, layers.Dense(10)])


def bind(task, data, dtype):
    """Return the Objective of a task in `dtype`, with the stored weights."""
    keras.config.set_dtype_policy(dtype)
    model = network(task)
    objective = Objective(
        model,
        LOSSES[task],
        data["x_train"].astype(dtype),
        data["y_train"].astype(dtype) if task == "t1" else data["y_train"],
        weight_decay=float(data["weight_decay"]),
        decayed="all",
    )
    if "theta" in data:
        objective.theta = data["theta"]
    return objective


def load(task):
    """Return the arrays of a task; they are made on the first call."""
    path = FOLDER / f"{task}.npz"
    if not path.exists():
        make = {"t1": _t1, "t3": _t3, "t4": _t4}.get(task, lambda: _small(task))
        np.savez(path, **make())
    with np.load(path) as stored:
        return dict(stored)


def _t1(n=2000, m=600, d=2048, rank=96):
    rng = np.random.default_rng(20_240_601)
    strength = 1 / np.sqrt(1 + np.arange(rank) / 6)
    direction = rng.normal(size=rank)
    direction /= np.linalg.norm(direction)
    side = rng.choice([-1, 1], n + m)
    z = rng.normal(size=(n + m, rank)) * strength + 0.8 * side[:, None] * direction
    mixing = rng.normal(size=(rank, d)) / np.linalg.norm(strength)
    gain, shift = 0.66 * np.exp(0.35 * rng.normal(size=d)), 0.25 + 0.3 * rng.normal(size=d)
    x = z @ mixing + 0.2 * rng.normal(size=(n + m, d)) + shift
    x = np.maximum(0, x * gain).astype(np.float32)
    margin = z @ direction
    y = (margin / margin.std() + 0.1 * rng.normal(size=n + m) > 0).astype(np.int64)
    y[rng.choice(n, 12, replace=False)] ^= 1  # wrong labels
    data = {"x_train": x[:n], "y_train": y[:n], "x_test": x[n:], "y_test": y[n:]}
    data |= {"weight_decay": 0.01, "damping": 0.0}
    objective = bind("t1", data, "float64")
    fit = fit_head(objective)
    data |= {"theta": objective.theta, "gradient_norm": fit.gradient_norm}
    g = per_example_gradients(objective, x[n:].astype(float), y[n:].astype(float))
    return data | _reference(objective, data, objective.head.hessian(objective.theta), g)


def _digits():
    digits = load_digits()
    order = np.random.default_rng(11).permutation(len(digits.target))
    x, y = (digits.data[order] / 16).astype(np.float32), digits.target[order].astype(np.int64)
    return {"x_train": x[:1500], "y_train": y[:1500], "x_test": x[1500:], "y_test": y[1500:]}


def _trained(task, data, rounds):
    """Train by Adam, then L-BFGS, in float64; keep 10 test points: the 5 hardest, 5 at random."""
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(3)
    objective = bind(task, data, "float64")
    adam = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.01, 900))
    tensors = [v.value for v in objective.model.trainable_variables]

    @tf.function(reduce_retracing=True)
    def loss_and_gradient():
        with tf.GradientTape() as tape:
            total = tf.reduce_mean(objective.loss(*objective.data.first(objective.n)[:2]))
            total += objective.decay[0] / 2 * tf.add_n([tf.reduce_sum(t**2) for t in tensors])
        return total, tape.gradient(total, tensors)

    for _ in range(rounds):
        adam.apply(loss_and_gradient()[1], objective.model.trainable_variables)

    def function(theta):
        objective.theta = theta
        value, gradient = loss_and_gradient()
        return float(value), objective.flatten(gradient).numpy()

    options = {"maxiter": 700, "maxcor": 40}
    objective.theta = scipy.optimize.minimize(
        function, objective.theta, jac=True, method="L-BFGS-B", options=options
    ).x
    losses = objective.losses(data["x_test"].astype(float), data["y_test"])
    hardest = np.argsort(-losses)[:5]
    others = np.setdiff1d(np.arange(len(losses)), hardest)
    chosen = np.concatenate([hardest, np.random.default_rng(5).choice(others, 5, replace=False)])
    data |= {"x_test": data["x_test"][chosen], "y_test": data["y_test"][chosen]}
    norm = np.linalg.norm(objective.gradient())
    data |= {"theta": objective.theta, "gradient_norm": norm}
    x_test = data["x_test"].astype(float)
    return objective, per_example_gradients(objective, x_test, data["y_test"])


def _t3():
    data = _digits() | {"weight_decay": 0.001, "damping": 0.01}
    for name in ("x_train", "x_test"):
        data[name] = data[name].reshape(-1, 8, 8, 1)
    objective, gradients = _trained("t3", data, 300)

    @tf.function
    def hessian_rows(block):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                loss = tf.reduce_mean(objective.loss(*objective.data.first(objective.n)[:2]))
            gradient = objective.flatten(inner.gradient(loss, objective.tensors))
            picked = tf.gather(gradient, block)
        rows = outer.jacobian(picked, objective.tensors, experimental_use_pfor=False)
        return tf.concat([tf.reshape(r, (len(block), -1)) for r in rows], 1)

    blocks = np.array_split(np.arange(objective.p), 20)
    h = np.concatenate([hessian_rows(tf.constant(b)).numpy() for b in blocks])
    h = (h + h.T) / 2 + np.diag(objective.decay)
    return data | _reference(objective, data, h, gradients)


def _small(task):
    """Return a task of `crosscheck.py`, which has no reference: libraries are compared."""
    data = _digits() | {"weight_decay": 0.001, "damping": 0.01}
    _trained(task, data, 300)  # adds theta and its test points to data
    return data


def _t4():
    data = _digits() | {"weight_decay": 0.001}
    objective, gradients = _trained("t4", data, 300)
    damping = max(0.01, spectrum.choose_damping(objective).value)
    data["damping"] = damping
    solved = solve(Hessian(objective), gradients.T, CG(damping=damping, rtol=1e-10, max_steps=3000))
    print(f"T4: {solved}")
    assert solved.converged.all()
    return data | _dots(objective, solved.x) | {"cg_steps": _steps(objective, gradients, damping)}


def _steps(objective, gradients, damping, few=5):
    """Return the steps that plain CG needs, alone, for a relative residual of 1e-3 in float64."""
    how = CG(damping=damping, rtol=1e-3, precondition=None)
    return max(int(solve(Hessian(objective), g, how).steps.max()) for g in gradients[:few])


def _reference(objective, data, h, gradients):
    factor = scipy.linalg.cho_factor(h + data["damping"] * np.eye(len(h)))
    s = scipy.linalg.cho_solve(factor, gradients.T)
    return _dots(objective, s) | {"cg_steps": _steps(objective, gradients, data["damping"])}


def _dots(objective, s):
    """Return the predicted loss changes (m, n), with and without the regulariser's share."""
    change = predicted_loss_change(objective, s)
    share = (objective.decay * objective.theta @ s)[:, None] / objective.n
    return {"change": change, "change_without_share": change - share}
