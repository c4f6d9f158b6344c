"""Retraining any Keras model without a training point, from where it stands.

A network has many minima: what leaving a point out means is a convention. Here: the minimum of the
left-out objective that descent reaches from theta (warm start), or the minimum of the proximal
Bregman objective (Bae et al. 2022), which holds the network near theta.

Descent is L-BFGS in coordinates whitened by one factorisation, so that curvature that is known is
not learnt again. Decay stays and the average is over n - 1 points, as in `helpers.removals`.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import scipy.optimize
import tensorflow as tf
from tqdm.auto import tqdm

from helpers import GaussNewton, Hessian, checks
from helpers.gradients import output_slopes, per_example_gradients
from helpers.hessian import curvature_factors
from helpers.linalg import Factor, damped
from helpers.objective import compiled
from helpers.spectrum import products_of_rows
from support.stored import keep_nothing, key


class Refits(NamedTuple):
    """Retrained parameters (p, k), the gradient norm of each (k,), and the one asked for."""

    thetas: np.ndarray
    gradient_norms: np.ndarray
    tol: float

    def __str__(self):
        k, reached = len(self.gradient_norms), (self.gradient_norms <= self.tol).sum()
        return (
            f"{reached} of {k} refits reached a gradient norm of {self.tol:.0e}, the "
            f"largest is {self.gradient_norms.max(initial=0):.1e}."
        )


def polish(objective, *, tol=1e-8):
    """Train on to a stationary point of L, leave the model there, and return its theta (p,).

    Up to 30 rounds of at most 100 steps of L-BFGS, whitened by the Gauss-Newton matrix at the start
    of each. Early stopping, dropout or a decoupled decay leave a model elsewhere; the theory of
    influence needs a gradient of zero.
    """
    bar = tqdm(range(30), "polish", unit="round", leave=False)
    objective.theta, _ = _settle(objective, _target(objective), objective.theta, None, tol, bar)
    return objective.theta


class NetworkRemovals:
    """One factorisation of a model's Hessian, for leaving any of its training points out.

    hessian : (p, p), H at theta (`Hessian.dense`) or, for a larger model, G; `damping` is added.
    """

    def __init__(self, objective, hessian, *, damping=0.0):
        self.objective, self.theta = objective, objective.theta
        shift = checks.number("damping", damping) - objective.decay / objective.n
        self.hessian, self.factor = hessian, Factor(damped(hessian, shift))
        self.gradient = objective.gradient()

    def newton_steps(self, rows):
        """Return theta_-i - theta by one Newton step on the left-out objective, (p, k).

        The point's own curvature is removed as far as it is Gauss-Newton's, J_i' A_i J_i, by a
        rank-C correction (Sherman-Morrison-Woodbury).
        """
        n, steps = self.objective.n, []
        rows = checks.rows(rows, n)
        x, y, weight = self.objective.data.gather(rows)
        own = per_example_gradients(self.objective, x, y).T * weight.numpy()
        share = (self.objective.decay * self.theta)[:, None]
        gradient = self.gradient[:, None] - (own + share) / n
        for g, row in zip(gradient.T, rows, strict=True):
            x, y, weight = self.objective.data.gather([row])
            u, signs = (part[0] for part in curvature_factors(self.objective, x, y))
            u *= np.sqrt(float(weight[0]))
            both = self.factor.solve(np.column_stack([g, u]))
            middle = np.diag(np.where(signs < 0, -1.0, 1.0)) - u.T @ both[:, 1:] / n
            bent = np.linalg.solve(middle, u.T @ both[:, 0] / n)
            steps.append(-(both[:, 0] + both[:, 1:] @ bent))
        return np.stack(steps, axis=1)

    def newton(self, rows):
        """Return theta_-i (p, k) after one step of Newton's method with the exact left-out Hessian.

        In a trust region of radius 1, cut until the left-out objective falls by at least 15 % of
        what its quadratic says (Nocedal & Wright 2006, algorithm 4.1): the Hessian without a point
        need not be positive, and the whole step may lead anywhere. H must be the exact one.
        """
        n, thetas, decay = self.objective.n, [], np.diag(self.objective.decay)
        for row in tqdm(checks.rows(rows, n), "Newton steps", unit="removal", leave=False):
            own = self._own_hessian(row)
            left_out = (n * (self.hessian - decay) - own) / (n - 1) + decay

            def stop(intermediate_result):
                if (intermediate_result.x != self.theta).any():
                    raise StopIteration

            how = {"method": "trust-exact", "jac": True, "hess": lambda _, h=left_out: h}
            target = _target(self.objective, without=row)
            found = scipy.optimize.minimize(target, self.theta, callback=stop, **how)
            thetas.append(found.x)
        self.objective.theta = self.theta
        return np.stack(thetas, axis=1)

    def _own_hessian(self, row):
        """Return the Hessian of one training point's weighted loss alone, (p, p), at theta."""
        self.objective.theta = self.theta
        product = products_of_rows(Hessian(self.objective), [row])
        parts = np.array_split(np.eye(len(self.theta)), -(-len(self.theta) // 256), axis=1)
        columns = [product(tf.constant(part)) for part in parts]
        return np.concatenate(columns, axis=1) - np.diag(self.objective.decay)

    def retrain(self, rows, *, fraction=1.0, tol=1e-8, checkpoint=keep_nothing):
        """Return the Refits that descent reaches from theta without each point: warm start.

        With a `fraction` below 1 only that share of the point's weight is taken away (the average
        is then over n - fraction): the limit towards 0 is what influence is the derivative of. The
        first of ten rounds uses the one factorisation, later ones their own, as in `polish`;
        `gradient_norms` says what was reached.
        """
        target = partial(_target, self.objective, fraction=fraction)
        return self._refits(rows, target, tol, checkpoint, "part", fraction)

    def proximal(self, rows, damping, *, tol=1e-8, checkpoint=keep_nothing):
        """Return the Refits of the proximal Bregman objective without each point.

        Bae et al. 2022, equation 5, with eps = -1/n: outputs are held by the Bregman divergence of
        the loss, parameters by (damping/2) ||t - theta||^2 and the decay. Its first order is the
        influence with the Gauss-Newton matrix and the same damping, the best matrix to start from.
        """
        batches = self.objective.data.each()
        slopes = np.concatenate([output_slopes(self.objective, x, y) for x, y, _ in batches])
        target = partial(_target, self.objective, anchor=_Anchor(self.theta, damping, slopes))
        return self._refits(rows, target, tol, checkpoint, "proximal", damping)

    def _refits(self, rows, target, tol, checkpoint, *numbers):
        rows, tol = checks.rows(rows, self.objective.n), checks.number("tol", tol)
        x, y, weight = self.objective.data.gather(np.arange(self.objective.n))
        data = [np.asarray(a) for a in (*tf.nest.flatten(x), y, weight)]
        made_of = key(self.objective.model, self.objective.loss.object)  # which moves on the way
        same = [made_of, self.theta, self.objective.decay, tol, *numbers, *data]

        def one(row):
            start = self.objective, target(without=row), self.theta, self.factor
            return np.append(*_settle(*start, tol, range(10)))

        bar = tqdm(rows, "retraining", unit="removal", leave=False)
        try:
            ends = [checkpoint([*same, row], partial(one, row)) for row in bar]
        finally:
            self.objective.theta = self.theta
        ends = np.stack(ends, axis=1)
        return Refits(ends[:-1], ends[-1], tol)

    def loss_change(self, thetas, x_test, y_test):
        """Return loss(z_test, theta_k) - loss(z_test, theta) for parameters (p, k), (m, k) nats."""
        return loss_change(self.objective, thetas, self.theta, x_test, y_test)


def loss_change(objective, thetas, before, x, y):
    """Return loss(z, theta_k) - loss(z, before) for parameters (p, k), (m, k); ends at `before`."""
    losses = []
    for objective.theta in (*thetas.T, before):
        losses.append(objective.losses(x, y))
    return np.stack(losses[:-1], axis=1) - losses[-1][:, None]


class _Anchor(NamedTuple):
    """Where a proximal objective holds: parameters, their damping, slopes of the losses there."""

    theta: np.ndarray
    damping: float
    slopes: np.ndarray


def _target(objective, without=None, fraction=1.0, anchor=None):
    """Return theta -> (value, gradient (p,)) of L, or of L without a point, or near an anchor."""
    decay, n = objective.decay, objective.n
    weight = np.array(objective.data.gather(np.arange(n))[2])
    slopes = np.zeros((n, 1)) if anchor is None else anchor.slopes * weight[:, None]
    left = n
    if without is not None:
        weight[without] *= 1 - fraction
        left = n - fraction
    weight, slopes = (tf.constant(a, objective.dtype) for a in (weight, slopes))

    def target(theta):
        objective.theta = theta
        sums = _value_and_gradient(objective, weight, slopes).numpy().astype(np.float64)
        if anchor is None:
            value, gradient = sums[0] / left, sums[1:] / left
            return value + decay @ theta**2 / 2, gradient + decay * theta
        held, away = decay + anchor.damping, theta - anchor.theta
        quadratic = held @ away**2 / 2 - decay @ theta**2 / (2 * n)
        return sums[0] / n + quadratic, sums[1:] / n + held * away - decay * theta / n

    return target


@compiled
def _value_and_gradient(objective, weight, slopes):
    """Return sum_i w_i loss_i - slopes_i . outputs_i and its gradient as one vector (1 + p,)."""

    def one_batch(x, y, _, weight, slopes):
        with tf.GradientTape() as tape:
            outputs = objective.loss.outputs(x)
            value = tf.tensordot(weight, objective.loss.of_outputs(y, outputs), 1)
            flat = tf.reshape(outputs, (tf.shape(outputs)[0], -1))
            value -= tf.reduce_sum(slopes * flat)
        gradient = objective.flatten(tape.gradient(value, objective.tensors))
        return tf.concat([value[None], gradient], 0)

    zeros = tf.zeros(objective.p + 1, objective.dtype)
    return objective.data.accumulate(one_batch, zeros, extra=(weight, slopes))


def _settle(objective, target, theta, factor, tol, rounds):
    """Return where rounds of `_descend` end, each after the first with a factor of its own."""
    for _ in rounds:
        if factor is None:
            objective.theta = theta
            g = GaussNewton(objective).dense()
            factor = Factor(damped(g, max(objective.decay.max(), 1e-6 * np.trace(g) / len(g))))
        theta, norm = _descend(target, theta, factor, tol)
        factor = None
        if norm <= tol:
            break
    return theta, norm


def _descend(target, theta, factor, tol):
    """Return theta and its gradient norm after L-BFGS in coordinates that make `factor`'s matrix I.

    They are scaled so that the first step of the method is the Newton step with that matrix.
    """
    _, gradient = target(theta)
    end = theta, np.linalg.norm(gradient)
    if end[1] <= tol:
        return end
    scale = np.linalg.norm(factor.whiten(gradient))

    def whitened(phi):
        nonlocal end
        there = theta + scale * factor.unwhiten(phi)
        value, gradient = target(there)
        end = there, np.linalg.norm(gradient)
        return value / scale**2, factor.whiten(gradient) / scale

    def stop(intermediate_result):
        if end[1] <= tol:
            raise StopIteration

    options = {"maxiter": 100, "maxfun": 1000, "maxcor": 100, "ftol": 0, "gtol": 0}
    how = {"jac": True, "method": "L-BFGS-B", "callback": stop, "options": options}
    found = scipy.optimize.minimize(whitened, np.zeros_like(theta), **how)
    if end[1] > tol:
        whitened(found.x)
    return end
