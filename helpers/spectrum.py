"""The spectrum of H from Hessian-vector products, and what follows from it: how much to damp.

Lanczos' smallest value is an upper bound of lambda_min, its largest a lower bound of lambda_max;
both are margins away from the truth until the run is long enough.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg
import tensorflow as tf
from tqdm.auto import tqdm

from .hessian import as_operator, operator_of_model
from .keras_facts import traced


class Spectrum(NamedTuple):
    """What Lanczos saw: `values` and their `weights`, (steps,), which sum to one.

    The weights are the share of a random vector along each value: a picture of the spectral density
    (stochastic Lanczos quadrature).
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


def spectrum(H, *, steps=40, seed=0, rows=None):
    """Return the Spectrum of H from `steps` products.

    Lanczos with full reorthogonalisation, vectors in float64, without the directions in which a
    head's loss is flat. `rows` takes H of those training examples only.
    """
    H = as_operator(H)
    p, product = H.shape[0], products_of_rows(H, rows)
    start, head = np.random.default_rng(seed).normal(size=(p, 1)), H.objective and H.objective.head
    flat = head.flat if head else np.zeros((p, 0))
    start -= flat @ (flat.T @ start)
    alphas, betas = _lanczos(product, start, min(steps, p - flat.shape[1]), flat)
    values, vectors = scipy.linalg.eigh_tridiagonal(alphas, betas)  # from the smallest on
    return Spectrum(values, vectors[0] ** 2, values[0], values[-1], len(alphas))


def products_of_rows(H, rows):
    """Return V -> H V on float64 tensors (p, k), with H of some training examples or of all."""
    if rows is None:
        return lambda v: H.damped(v, tf.zeros((), tf.float64))
    precision = H.precision

    def product(v, rows):
        return tf.cast(H.product(rows)(tf.cast(v, precision)), tf.float64)

    graph = H.compiled.setdefault("rows", traced(product))
    return lambda v: graph(v, tf.constant(rows))


def _lanczos(product, start, steps, without):
    """Return the diagonal and off-diagonal of the tridiagonal matrix of one Lanczos run.

    It stays orthogonal to the columns of `without`, as its start is.
    """
    q = tf.constant(start / np.linalg.norm(start))
    basis, alphas, betas = [tf.constant(without), q], [], []
    for _ in tqdm(range(steps), "Lanczos", unit="product", delay=2, leave=False):
        w = product(q)
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


def choose_damping(H, *, steps=40, seed=0):
    """Return the Damping that makes H + damping I positive definite, with the reason.

    H : a `Hessian` or `GaussNewton`, or an Objective for its Hessian.

    Zero for a convex head, unless Lanczos finds it singular where parameters do not decay (where it
    does not see that, `solve` damps by 0.001 lambda_max after all); zero too where lambda_min is
    clearly positive; else 1.5 |lambda_min| + 0.001 lambda_max. Koh & Liang damp by about the size
    of the most negative eigenvalue; the margins are ours, since Lanczos sees lambda_min from above.
    It can miss a lone negative eigenvalue; conjugate gradients then report negative curvature.
    """
    H = operator_of_model(H)
    head, decay = H.objective.head, H.objective.decay.min()
    convex = bool(head) and _is_convex(head, H.objective.theta)
    if convex and decay > 0:
        reason = f"none needed: a convex head, every eigenvalue is at least the decay {decay:g}"
        return Damping(0.0, reason, None)
    seen = spectrum(H, steps=steps, seed=seed)
    low, high = seen.lambda_min, seen.lambda_max
    where = f"Lanczos saw eigenvalues from {low:.3g} to {high:.3g} in {seen.steps} products"
    if low > (1e-13 if convex else 1e-3) * high:
        return Damping(0.0, f"none needed: {'a convex head; ' * convex}{where}", seen)
    value = 1.5 * max(0.0, -low) + 1e-3 * high
    kind = "negative" if low < -1e-6 * high else "almost zero"
    return Damping(float(f"{value:.2g}"), f"{where}; the smallest is {kind}", seen)


def _is_convex(head, theta):
    """Return whether the loss of every training example bends upwards in the outputs."""
    if head.objective.loss.is_cross_entropy:
        return True  # C^3 an example need not be spent on what is known
    parts = (a for block in head.blocks() for _, a in block.curvatures_in_parts(theta))
    return all(np.linalg.eigvalsh(a).min() >= -1e-12 for a in parts)
