"""Influence of training points on test losses, in nats, with one sign.

`predicted_loss_change` > 0: removing the training point is predicted to raise the test loss, so the
point is helpful. `influence_on_loss` is Koh & Liang's I_up,loss = -n times that.
"""

import warnings
from functools import partial
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from . import checks, derivatives, keras_facts
from .gradients import (
    along,
    blocks_of_dots,
    by_differences,
    per_example_gradients,
    recorded_gradient,
    second_derivative,
)
from .hessian import operator_of_model
from .objective import compiled
from .solvers import Solution, factored, solve


def s_test(H, x_test, y_test, solver=None, *, damping="auto"):
    """Return s_test = (H + damping I)^-1 grad loss(z_test), one column a test point, as a Solution.

    Koh & Liang 2017, section 3. The test gradients carry no regulariser; H is of the whole
    objective. `x` of the Solution is (p, m); a zero test gradient has a zero column, and one that
    is zero but for rounding raises a UserWarning, as does a system that was not solved.

    H : an Objective, for its Hessian, or a `Hessian` or `GaussNewton` of one.
    solver, damping : as `solve` takes them.
    """
    H = operator_of_model(H)
    gradients = per_example_gradients(H.objective, x_test, y_test)
    _warn_of_zeros(np.linalg.norm(gradients, axis=1), gradients.dtype)
    found = solve(H, gradients.T, solver, damping=damping)
    found.warn_unless_solved()
    return found


def _warn_of_zeros(norms, dtype):
    none = int((norms <= 10 * np.finfo(dtype).eps * max(1.0, norms.max(initial=0))).sum())
    if none:
        warnings.warn(
            f"{none} of {len(norms)} test gradients are zero but for rounding: the model is so "
            "sure of these points that no training point has a meaningful influence on them.",
            stacklevel=3,
        )


def predicted_loss_change(objective, s, *, out=None):
    """Return the predicted change of every test loss if a training point is removed, (m, n) nats.

    +(1/n) s_j . (w_i grad loss(z_i) + decay * theta): Koh & Liang 2017, equation 2, for removal.
    A removed point takes its share of the regulariser along, so each row sums to n s . grad L,
    zero at the optimum. (Where Keras masks, the share is what counts of the point over the mean.)

    s : what `s_test` returned at this theta (ValueError at another), or an array (p,) or (p, m).
    out : array (m, n) to write to, block by block: `np.lib.format.open_memmap` makes one on disk.
    """
    s = _columns(objective, s)
    shape = s.shape[1], objective.n
    out = np.empty(shape) if out is None else out
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}, the influences {shape}.")
    for rows, block in _blocks_of_changes(objective, s):
        out[:, rows] = block
    return out


def _blocks_of_changes(objective, s):
    """Yield slices of consecutive training points and `predicted_loss_change` of them, (m, b)."""
    counted, stop = objective.loss.counted, 0
    share = (objective.decay * objective.theta @ s)[:, None]
    for block in blocks_of_dots(objective, s):
        rows = slice(stop, stop := stop + block.shape[1])
        block += share * (1.0 if counted is None else counted[rows])
        block /= objective.n
        yield rows, block


def _columns(objective, s):
    """Return s as columns (p, m), to be called by what users call."""
    if isinstance(s, Solution):
        s.warn_unless_solved(stacklevel=4)
        s, theta = s.x, s.theta
    else:
        s, theta = np.asarray(s), None
    if s.ndim > 2 or len(s) != objective.p:
        raise ValueError(f"s has shape {s.shape}, the objective {objective.p} parameters.")
    if theta is not None and not np.array_equal(theta, objective.theta):
        raise ValueError("theta has moved since this s was solved (more training?): solve anew.")
    return s[:, None] if s.ndim == 1 else s


class Extremes(NamedTuple):
    """The k most helpful and most harmful training points of each test point, strongest first.

    helpful, harmful : (m, k) numbers of training points; helpful_change, harmful_change : (m, k)
    their `predicted_loss_change`, in nats.
    """

    helpful: np.ndarray
    helpful_change: np.ndarray
    harmful: np.ndarray
    harmful_change: np.ndarray


def most_influential(objective, s, k):
    """Return the Extremes of `predicted_loss_change`, in one pass and without its matrix.

    Of equal changes the earlier training point comes first. s : as there.
    """
    if not 1 <= k <= objective.n:
        raise ValueError(f"k must be from 1 to n = {objective.n}, got {k}.")
    s, found = _columns(objective, s), {1: [], -1: []}
    for rows, block in _blocks_of_changes(objective, s):
        ids = np.broadcast_to(np.arange(rows.start, rows.stop), block.shape)
        found = {sign: [_first([*best, (ids, block)], sign, k)] for sign, best in found.items()}
    return Extremes(*found[1][0], *found[-1][0])


def _first(parts, sign, k):
    """Return the k first of the (ids, changes) of parts, ordered by sign * change from the top."""
    ids, changes = (np.hstack(part) for part in zip(*parts, strict=True))
    order = np.argsort(-sign * changes, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(changes, order, 1)


def influence_on_loss(objective, s):
    """Return I_up,loss (m, n), the derivative of test loss j in the weight of training point i.

    Koh & Liang 2017, equation 2, with the regulariser's share: -n `predicted_loss_change`.
    """
    return -objective.n * predicted_loss_change(objective, _columns(objective, s))


def self_influence(H, x, y, *, damping=0.0):
    """Return grad loss_i' (H + damping I)^-1 grad loss_i of each given example, (m,), >= 0.

    The data gradient on both sides, no 1/n. For a binary logistic head this is sigma_i^2 x'H^-1 x;
    the code released with Koh & Liang 2017 had sigma_i instead of its square. H : as in `s_test`.
    """
    H = operator_of_model(H)
    derivatives.warn_of_doubts(H.objective)
    rounded = H.precision == "float32"
    objective = (rounded and H.objective.in_float64()) or H.objective
    H = type(H)(objective)
    x, y = objective.examples(x, y)
    _, factor = factored(H, checks.number("damping", damping))
    step = objective.data.affordable(16 * objective.p)
    values = []
    for x_part, y_part, _ in objective.data.of(x, y, batch_size=step):
        gradients = per_example_gradients(objective, x_part, y_part)
        values.append((factor.whiten(gradients.T) ** 2).sum(0))
    return np.concatenate(values)


def influence_wrt_input(objective, s, x, y):
    """Return d(s . grad loss(z_i)) / d x_i of each given example, nested and shaped like x.

    Koh & Liang 2017, section 2.2: I_pert,loss up to its sign. A step of x_i along this makes the
    example more helpful for the test point of `s`, a step against it more harmful. s : (p,).

    Integers, texts and what the model makes integers of have no gradient: None beside other inputs,
    ValueError alone. But where one input is of integers or texts and the model has one Embedding,
    that of the Embedding's output stands there, (m, steps, width).
    """
    s = _columns(objective, s)
    if s.shape[1] != 1:
        raise ValueError(f"s has {s.shape[1]} columns: pass that of one test point.")
    s, (x, y) = tf.constant(s[:, 0], objective.dtype), objective.examples(x, y)
    real = [a.dtype.kind == "f" for a in keras.tree.flatten(x)]
    if real.count(False) == 1 and len(_embeddings(objective)) == 1:
        real = [True] * len(real)
    batches = objective.data.of(x, y) if any(real) else ()
    parts = [_input_gradients(objective, s, xb, yb) for xb, yb, _ in batches]
    every = [None if p[0] is None else np.concatenate(p) for p in zip(*parts, strict=True)]
    if all(part is None for part in every):
        raise ValueError(
            "influence_wrt_input needs real-valued inputs: integers and texts (and token ids that "
            "are floats, made integers by the model) have no gradient, unless the model has one "
            "Embedding and one input of integers or texts."
        )
    every = iter(every)
    return keras.tree.pack_sequence_as(x, [next(every) if r else None for r in real])


def _embeddings(objective):
    """Return the Embedding layers of a model that is differentiated twice."""
    layers = [] if by_differences(objective) else keras_facts.all_layers(objective.model)
    return [layer for layer in layers if isinstance(layer, keras.layers.Embedding)]


@compiled
def _input_gradients(objective, s, x, y):
    inputs, embeddings, seen = keras.tree.flatten(x), _embeddings(objective), {}
    real = [a for a in inputs if a.dtype.is_floating]
    if by_differences(objective):
        return [along(objective, s, partial(_slope_of_input, objective, x, y, a)) for a in real]
    parts = objective.unflatten(s)
    with tf.GradientTape() as outer:
        outer.watch(real)
        with tf.GradientTape() as inner, keras_facts.tapped(embeddings, seen):
            loss = tf.reduce_sum(objective.loss(x, y))
        gradient = recorded_gradient(inner, loss, objective.tensors)
    if len(inputs) - len(real) == len(embeddings) == 1:
        *more, (_, _, embedded) = seen[embeddings[0]]
        if more:
            raise ValueError("The Embedding is called more than once: no one output is its own.")
        real = [a if a.dtype.is_floating else embedded for a in inputs]
    return second_derivative(outer, gradient, parts, real)


def _slope_of_input(objective, x, y, one):
    with tf.GradientTape() as tape:
        tape.watch(one)
        loss = tf.reduce_sum(objective.loss(x, y))
    return tape.gradient(loss, one, unconnected_gradients=tf.UnconnectedGradients.ZERO)
