"""The methods that run in this project's own environment: ours, NumPy, and the naive way."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import numpy as np
import scipy.linalg
import tasks
import tensorflow as tf

from helpers import CG, Cholesky, predicted_loss_change, s_test

tf.get_logger().setLevel("ERROR")


def prepare(method, task, data, rtol=1e-3):
    """Return a callable () -> predicted loss changes (m, n), and its settings in words."""
    library, kind, *dtype = method.split()
    dtype = dtype[0] if dtype else "float32"
    if library == "NumPy":
        return lambda: closed_form(data, dtype), dtype
    objective = tasks.bind(task, data, dtype)
    x, y = data["x_test"].astype(dtype), data["y_test"]
    y = y.astype(dtype) if task == "t1" else y
    if library == "naive":
        return naive(objective, x, y, data, kind)
    damping = float(data["damping"])
    solver = CG(damping, rtol=float(rtol)) if kind == "cg" else Cholesky(damping)

    def run():
        return predicted_loss_change(objective, s_test(objective, x, y, solver))

    return run, f"{dtype} products, vectors in float64, {solver}"


def closed_form(data, dtype):
    """Return the influence of a logistic head as one writes it in NumPy and SciPy."""
    x, xt, theta = (data[k].astype(dtype) for k in ("x_train", "x_test", "theta"))
    y, yt, wd, n = data["y_train"], data["y_test"], float(data["weight_decay"]), len(x)
    p, pt = (1 / (1 + np.exp(-a @ theta)) for a in (x, xt))
    half = x * np.sqrt(p * (1 - p) / n).astype(dtype)[:, None]
    h = half.T @ half
    h.flat[:: len(h) + 1] += wd
    factor = scipy.linalg.cho_factor(h, lower=True, overwrite_a=True, check_finite=False)
    rhs = (xt * (pt - yt).astype(dtype)[:, None]).T
    s = scipy.linalg.cho_solve(factor, rhs, check_finite=False)
    return ((x @ s).T * (p - y) + (wd * theta @ s)[:, None]) / n


def naive(objective, x, y, data, kind, few=2):
    """Return the influence by one solve a test point and one gradient a training point.

    `eager` is how most scripts do it; `compiled` keeps one traced product and one traced gradient.
    Run on a few test points and scaled.
    """
    tensors, damping = objective.tensors, float(data["damping"])
    decay = tf.constant(objective.decay, objective.dtype)
    theta = tf.constant(objective.theta, objective.dtype)
    xs, ys, _ = objective.data.first(objective.n)

    def gradient(x_one, y_one):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(objective.loss(x_one, y_one))
        return objective.flatten(tape.gradient(loss, tensors))

    def product(v):
        with tf.GradientTape() as outer:
            dot = tf.reduce_sum(gradient_of_all() * v)
        return objective.flatten(outer.gradient(dot, tensors)) + (decay + damping) * v

    def gradient_of_all():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(objective.loss(xs, ys))
        return objective.flatten(tape.gradient(loss, tensors))

    if kind == "compiled":
        gradient, product = tf.function(gradient), tf.function(product)

    def one(x_one, y_one):
        b = gradient(x_one, y_one)
        v, r, d = tf.zeros_like(b), b, b
        for _ in range(int(data["cg_steps"])):
            ad = product(d)
            alpha = tf.tensordot(r, r, 1) / tf.tensordot(d, ad, 1)
            v, new = v + alpha * d, r - alpha * ad
            d = new + tf.tensordot(new, new, 1) / tf.tensordot(r, r, 1) * d
            r = new
        dots = [
            float(tf.tensordot(gradient(xs[i : i + 1], ys[i : i + 1]) + decay * theta, v, 1))
            for i in range(objective.n)
        ]
        return np.array(dots) / objective.n

    def run():
        return np.stack([one(x[j : j + 1], y[j : j + 1]) for j in range(few)])

    return run, f"{kind} TensorFlow, {int(data['cg_steps'])} steps of CG, {few} test points, scaled"
