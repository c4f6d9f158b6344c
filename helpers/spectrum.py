"""The spectrum of H from Hessian-vector products, and what follows from it: how much to damp.

Lanczos' smallest value is an upper bound of lambda_min, its largest a lower bound of lambda_max;
both are margins away from the truth until the run is long enough.
"""

import time
from typing import NamedTuple

import numpy as np
import scipy.linalg
import tensorflow as tf

from helpers.curvature import compiled, hessian_operator


class Spectrum(NamedTuple):
    """What Lanczos saw: `values` and their `weights`, (steps x starts,), which sum to one.

    The weights are the share of a random vector along each value: with several starts, a picture of
    the spectral density (stochastic Lanczos quadrature).
    """

    values: np.ndarray
    weights: np.ndarray
    lambda_min: float
    lambda_max: float
    steps: int


class Damping(NamedTuple):
    """A damping chosen from the spectrum, and why."""

    value: float
    reason: str
    spectrum: Spectrum | None


def spectrum(objective, *, steps=40, starts=1, seed=0, rows=None):
    """Return the Spectrum of H from steps x starts products.

    Lanczos with full reorthogonalisation, vectors in float64. `rows` takes H of those training
    examples only.
    """
    rng = np.random.default_rng(seed)
    product = _hessian_columns
    if rows is not None:
        chosen = tf.constant(rows)

        def product(objective, q):
            return _some_hessian_columns(objective, q, chosen)

    values, weights = [], []
    for _ in range(starts):
        alphas, betas = _lanczos(objective, product, min(steps, objective.p), rng)
        ritz, vectors = scipy.linalg.eigh_tridiagonal(alphas, betas)
        values.append(ritz)
        weights.append(vectors[0] ** 2 / starts)
    values, weights = np.concatenate(values), np.concatenate(weights)
    order = np.argsort(values)
    return Spectrum(values[order], weights[order], values.min(), values.max(), len(alphas))


def _lanczos(objective, product, steps, rng):
    """Return the diagonal and off-diagonal of the tridiagonal matrix of one Lanczos run."""
    q = tf.constant(rng.normal(size=(objective.p, 1)))
    q /= tf.norm(q)
    basis, alphas, betas = [q], [], []
    for _ in range(steps):
        w = product(objective, q)
        alphas.append(float(tf.reduce_sum(q * w)))
        every = tf.concat(basis, 1)
        for _ in range(2):  # once is not enough in floating point (Parlett 1998, 6.9)
            w -= tf.matmul(every, tf.matmul(every, w, transpose_a=True))
        betas.append(float(tf.norm(w)))
        if betas[-1] <= 1e-12 * max(1e-300, abs(alphas[0])):
            break  # an invariant subspace: the values found are exact
        q = w / betas[-1]
        basis.append(q)
    return np.array(alphas), np.array(betas[: len(alphas) - 1])


@compiled
def _hessian_columns(objective, vectors):
    return _columns(objective, hessian_operator(objective), vectors)


@compiled
def _some_hessian_columns(objective, vectors, rows):
    return _columns(objective, hessian_operator(objective, rows=rows), vectors)


def _columns(objective, product, vectors):
    dtype = "float64" if objective.head else objective.dtype
    return tf.cast(product(tf.cast(vectors, dtype)), tf.float64)


def choose_damping(objective, *, steps=40, seed=0):
    """Return the Damping that makes H + damping I positive definite, with the reason.

    Zero for a convex head whose every parameter decays. Otherwise from Lanczos: zero where
    lambda_min is clearly positive; else 1.5 |lambda_min| + 0.001 lambda_max. Koh & Liang damp by
    about the size of the most negative eigenvalue; the margins are ours, since Lanczos sees
    lambda_min from above. It can miss a lone negative eigenvalue; conjugate gradients then report
    negative curvature.
    """
    decay = objective.decay.min()
    if objective.head and decay > 0 and _is_convex(objective.head, objective.theta):
        reason = f"none needed: a convex head, every eigenvalue is at least the decay {decay:g}"
        return Damping(0.0, reason, None)
    seen = spectrum(objective, steps=steps, seed=seed)
    low, high = seen.lambda_min, seen.lambda_max
    where = f"Lanczos saw eigenvalues from {low:.3g} to {high:.3g} in {seen.steps} products"
    if low > 1e-3 * high:
        return Damping(0.0, f"none needed: {where}", seen)
    value = 1.5 * max(0.0, -low) + 1e-3 * high
    kind = "negative" if low < -1e-6 * high else "almost zero"
    return Damping(float(f"{value:.2g}"), f"{where}; the smallest is {kind}", seen)


def _is_convex(head, theta):
    """Return whether the loss of every training example bends upwards in the outputs."""
    blocks = (head.curvatures(b.y, b.outputs(b.phi, theta)) for b in head.blocks())
    return all(np.linalg.eigvalsh(a).min() >= -1e-12 for a in blocks)


def estimate_cost(objective, columns, *, steps=50):
    """Return the seconds `steps` of conjugate gradients on that many columns would take here.

    One compiled product of `columns` vectors is timed after a warm-up, times `steps`; what making a
    preconditioner costs is not in it.
    """
    vectors = tf.zeros((objective.p, columns), tf.float64)
    _hessian_columns(objective, vectors)
    started = time.perf_counter()
    float(tf.reduce_sum(_hessian_columns(objective, vectors)))
    return steps * (time.perf_counter() - started)
