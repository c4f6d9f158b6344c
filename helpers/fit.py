"""Exact fits of convex heads: Newton's method to a gradient of zero, in float64."""

from typing import NamedTuple

import numpy as np
import scipy.sparse.linalg

from . import checks, derivatives
from .linalg import Factor, damped

DENSE_FIT = 3_000  # parameters up to which a fit factorises H; beyond, Newton's method uses CG


class Fit(NamedTuple):
    """The end of a fit: gradient norm of L at theta, Newton steps, training loss, and verdict.

    gradient_norm : at the theta that the model stores; exact_norm : before it was stored, where
    a float32 model rounds it; last_step : norm of the Newton step that would come next, which stays
    large where there is no minimum and theta runs off to infinity.
    """

    gradient_norm: float
    steps: int
    training_loss: float
    converged: bool
    exact_norm: float = np.nan
    last_step: float = np.nan

    def __str__(self):
        word = "converged" if self.converged else "NOT CONVERGED"
        text = (
            f"{word}: gradient norm {self.gradient_norm:.1e} after {self.steps} Newton steps, "
            f"training loss {self.training_loss:.6g} nats"
        )
        if self.converged and self.gradient_norm > 2 * max(self.exact_norm, 1e-10):
            text += f" (before the model rounded the parameters: {self.exact_norm:.1e})"
        elif not self.converged and self.exact_norm <= 1e-10:
            text += (
                f"; the next step would still be {self.last_step:.1e} long: there is no minimum, "
                "let what runs away decay too (decayed='all')"
            )
        return text


def head_of(objective):
    """Return the objective's head; ValueError where its parameters are no last Dense layer."""
    head = objective.checked_head()
    if head is None:
        raise ValueError(
            "Exact fits need a convex head: bind the objective with parameters='last_layer' to a "
            "Sequential or functional model whose last layer is Dense."
        )
    return head


def fit_head(objective, *, tol=1e-10, max_steps=100):
    """Set the head's parameters to the minimum of L and return a Fit.

    Newton's method with an Armijo line search, float64, until the gradient norm is <= tol, or what
    rounding leaves of it, and converged only if the next step is short too. Directions in which L
    is flat (the shift of a softmax's biases together) are left as they are. A model stored in
    float32 keeps only 7 digits of the minimum: the Fit has the gradient norm before and after.
    """
    head, tol = head_of(objective), checks.number("tol", tol)
    if objective.loss.is_cross_entropy and not (objective.decay > 0).any():
        raise ValueError(
            "Without weight decay a separable problem has no minimum: pass "
            "weight_decay > 0 (the thesis uses 1e-3)."
        )
    theta, steps = newton(head, objective.theta, tol, max_steps)
    if not np.isfinite(theta).all():
        raise FloatingPointError(
            "Newton's method met NaN or infinity; theta is as it was before. Scale the features "
            "(keras.layers.Normalization), or take more weight decay."
        )
    gradient = head.gradient(theta)
    exact = float(np.linalg.norm(gradient))
    step = float(np.linalg.norm(newton_direction(head, theta, gradient, {}, 1e-2)))
    objective.theta = theta
    derivatives.warn_of_doubts(objective)
    norm = float(np.linalg.norm(head.gradient(objective.theta)))
    settled = step <= 1e-3 * max(1.0, np.linalg.norm(theta))
    small = exact <= max(tol, 1e-10) or (np.abs(gradient) <= head.rounding(theta)).all()
    converged = small and settled
    return Fit(norm, steps, head.loss(objective.theta), bool(converged), exact, step)


@np.errstate(over="ignore", invalid="ignore")  # of steps that are too long, and then halved
def newton(head, theta, tol, max_steps, **left_out):
    """Return the theta (p,) that Newton's method reaches from `theta`, and the steps it took.

    `weight` (n,) and `n` replace the head's own, for a fit that leaves points out.
    """
    loss, last = head.loss(theta, **left_out), np.inf
    if not np.isfinite(loss):
        theta = np.zeros_like(theta)
        loss = head.loss(theta, **left_out)
    for step in range(max_steps):
        gradient = head.gradient(theta, **left_out)
        norm = np.linalg.norm(gradient)
        if norm <= tol:
            return theta, step
        if norm > 0.9 * last and (np.abs(gradient) <= head.rounding(theta, **left_out)).all():
            return theta, step
        last = norm
        rtol = min(0.1, np.sqrt(norm))  # tighter as the gradient falls
        try:
            direction = newton_direction(head, theta, gradient, left_out, rtol)
        except np.linalg.LinAlgError:  # unscaled features saturate all outputs of a random start
            zeros = np.zeros_like(theta)
            if (lower := head.loss(zeros, **left_out)) < loss:
                theta, loss = zeros, lower
                continue
            direction = _downhill(head, theta, gradient, left_out)
        if not gradient @ direction > 0:  # of CG, where H has directions that do not bend
            direction = gradient
        theta, loss = _armijo(head, theta, loss, direction, gradient @ direction, left_out)
    return theta, max_steps


def newton_direction(head, theta, gradient, left_out, rtol):
    """Return H^-1 g: by Cholesky, or for many parameters by CG to a relative residual of rtol."""
    if len(theta) <= DENSE_FIT:
        return factor_of(head, head.hessian(theta, **left_out)).solve(gradient)
    product, p = head.product(theta, **left_out), len(theta)
    operator = scipy.sparse.linalg.LinearOperator((p, p), product, dtype=np.float64)
    return scipy.sparse.linalg.cg(operator, gradient, rtol=rtol)[0]


def _downhill(head, theta, gradient, left_out):
    """Return (H + mu I)^-1 g, mu the least power of ten that makes it positive definite."""
    h = head.hessian(theta, **left_out)
    for mu in np.abs(np.diag(h)).mean() * 10.0 ** np.arange(-3, 9):
        try:
            return Factor(damped(h, mu)).solve(gradient)
        except np.linalg.LinAlgError:
            continue
    return gradient


def factor_of(head, matrix):
    """Return a Cholesky factor of a Hessian, with the flat directions filled up.

    No gradient has a component along them, so that no solution gets one.
    """
    flat = head.flat
    return Factor(matrix + np.abs(np.diag(matrix)).mean() * flat @ flat.T if flat.size else matrix)


def _armijo(head, theta, loss, direction, decrease, left_out):
    length = 1.0
    while True:
        trial = theta - length * direction
        trial_loss = head.loss(trial, **left_out)
        # below 1e-14 the loss no longer resolves the step, and Newton's own step is the best one
        if trial_loss <= loss - 1e-4 * length * decrease or decrease < 1e-14 or length < 1e-8:
            return trial, trial_loss
        length /= 2
