"""Influence of training points on test losses, in nats, with one sign.

`predicted_loss_change` > 0: removing the training point is predicted to raise the test loss, so the
point is helpful. `influence_on_loss` is Koh & Liang's I_up,loss = -n times that.
"""

import numpy as np
import tensorflow as tf

from helpers.curvature import compiled, dense_hessian, gradient_dots, per_example_gradients
from helpers.solvers import Cholesky, Solution, damped, solve


def s_test(
    objective,
    x_test,
    y_test,
    *,
    solver="auto",
    damping="auto",
    rtol=1e-8,
    max_steps=1000,
    **options,
):
    """Return s_test = (H + damping I)^-1 grad loss(z_test), one column a test point, as a Solution.

    Koh & Liang 2017, section 3. The test gradients carry no regulariser; H is of the whole
    objective. `x` of the Solution is (p, m); a zero test gradient has a zero column.
    """
    gradients = per_example_gradients(objective, x_test, y_test)
    return solve(
        objective, gradients.T, solver=solver, damping=damping, rtol=rtol, max_steps=max_steps
    )


def predicted_loss_change(objective, s):
    """Return the predicted change of every test loss if a training point is removed, (m, n) nats.

    +(1/n) s_j . (w_i grad loss(z_i) + decay * theta): Koh & Liang 2017, equation 2, for removal.
    A removed point takes its share of the regulariser along, so each row sums to n s . grad L,
    zero at the optimum. `s`: what `s_test` returned, or an array (p,) or (p, m).
    """
    s = s.x if isinstance(s, Solution) else np.asarray(s)
    s = s[:, None] if s.ndim == 1 else s
    changes = gradient_dots(objective, s)
    changes += (objective.decay * objective.theta @ s)[:, None]
    changes /= objective.n
    return changes


def influence_on_loss(objective, s):
    """Return I_up,loss (m, n), the derivative of test loss j in the weight of training point i.

    Koh & Liang 2017, equation 2, with the regulariser's share: -n `predicted_loss_change`.
    """
    return -objective.n * predicted_loss_change(objective, s)


def self_influence(objective, x, y, *, damping=0.0):
    """Return grad loss_i' (H + damping I)^-1 grad loss_i of each given example, (m,), >= 0.

    The data gradient on both sides, no 1/n. For a binary logistic head this is sigma_i^2 x'H^-1 x;
    the code released with Koh & Liang 2017 had sigma_i instead of its square.
    """
    factor = Cholesky(damped(dense_hessian(objective), damping))
    step = objective.affordable_batch(16 * objective.p)
    values = []
    for start in range(0, len(y), step):
        rows = slice(start, start + step)
        x_part = tf.nest.map_structure(lambda a, r=rows: a[r], x)
        gradients = per_example_gradients(objective, x_part, y[rows])
        values.append((factor.whiten(gradients.T) ** 2).sum(0))
    return np.concatenate(values)


def influence_wrt_input(objective, s, x, y):
    """Return d(s . grad loss(z_i)) / d x_i of each given example, shaped like x.

    Koh & Liang 2017, section 2.2: I_pert,loss up to its sign. A step of x_i along this makes the
    example more helpful for the test point of `s`, a step against it more harmful. s : (p,).
    """
    s = tf.constant(np.ravel(s.x if isinstance(s, Solution) else s), objective.dtype)
    if not tf.as_dtype(np.asarray(x).dtype).is_floating:
        raise ValueError(
            "influence_wrt_input needs real-valued inputs: integers have no gradient. For text "
            "take the output of the embedding as input."
        )
    batches = objective.batches_of(np.asarray(x), np.asarray(y))
    parts = [_input_gradients(objective, s, xb, yb).numpy() for xb, yb, _ in batches]
    return np.concatenate(parts)


@compiled
def _input_gradients(objective, s, x, y):
    parts = objective.unflatten(s)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            loss = tf.reduce_sum(objective.example_losses(x, y))
        gradient = inner.gradient(loss, objective.tensors)
        terms = [
            tf.reduce_sum(tf.convert_to_tensor(g) * v)
            for g, v in zip(gradient, parts, strict=True)
            if g is not None
        ]
        dot = tf.add_n(terms)
    return outer.gradient(dot, x)
