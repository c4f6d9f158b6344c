"""Approximate solves and preconditioners: what the field uses where an exact solve is too dear.

Each returns the same certificate as an exact solve, so it shows how approximate it is.
"""

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import tensorflow as tf

from helpers.curvature import dense_gauss_newton, hessian_operator
from helpers.solvers import Preconditioner, certify, columns_of, damped, in_float64
from helpers.spectrum import spectrum


def numpy_product(objective, damping):
    """Return V -> (H + damping I) V from NumPy to NumPy, and the dtype it computes in."""
    dtype = "float64" if objective.head else objective.dtype
    matvec = tf.function(in_float64(hessian_operator(objective), dtype), reduce_retracing=True)
    shift = tf.constant(float(damping), tf.float64)
    return lambda v: matvec(tf.constant(v, tf.float64), shift).numpy(), dtype


def gauss_newton_preconditioner(objective, damping):
    """Return (G + damping I)^-1 as a Preconditioner: a Cholesky factor of dense Gauss-Newton.

    It cuts the steps of CG on H several-fold; `conjugate_gradient` still solves with H itself.
    """
    g = dense_gauss_newton(objective)
    floor = 1e-6 * np.trace(g) / len(g)
    factor = tf.constant(np.linalg.cholesky(damped(g, max(damping, floor))))
    return Preconditioner(_cholesky_solve, (factor,))


def _cholesky_solve(r, factor):
    return tf.linalg.cholesky_solve(factor, r)


def nystroem_preconditioner(objective, damping, *, rank=50, seed=0):
    """Return a Preconditioner from a rank-`rank` sketch of the Gauss-Newton matrix, for large p.

    Frangella, Tropp & Udell 2023: P^-1 = (l_r + damping) U (L + damping)^-1 U' + (I - U U'), at the
    cost of `rank` products and p x rank numbers.
    """
    product = tf.function(hessian_operator(objective, gauss_newton=True))
    dtype = "float64" if objective.head else objective.dtype
    rank = min(rank, objective.p)
    omega, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(objective.p, rank)))
    y = product(tf.constant(omega, dtype)).numpy().astype(np.float64)
    shift = 1e-7 * np.linalg.norm(y)  # keeps the small core positive definite
    y += shift * omega
    core = np.linalg.cholesky((omega.T @ y + y.T @ omega) / 2)
    u, singular, _ = np.linalg.svd(scipy.linalg.solve_triangular(core, y.T, lower=True).T, False)
    values = np.maximum(singular**2 - shift, 0) + max(damping, 1e-12 * singular[0] ** 2)
    basis, scale = tf.constant(u), tf.constant((values[-1] / values - 1)[:, None])
    return Preconditioner(_rescale_inside, (basis, scale))


def _rescale_inside(r, basis, scale):
    return r + tf.matmul(basis, scale * tf.matmul(basis, r, transpose_a=True))


def solve_lissa(
    objective,
    b,
    *,
    damping=0.0,
    scale=None,
    depth=None,
    batch_size=None,
    samples=1,
    rtol=1e-2,
    seed=0,
):
    """Return the LiSSA estimate of (H + damping I)^-1 b (Agarwal et al. 2017).

    x_0 = b, x_{j+1} = b + x_j - (H_B + damping I) x_j / scale, result x / scale averaged over
    `samples` runs, B a random batch a step. Its limit in the mean is the same as every other
    solver's. (The code released with Koh & Liang 2017 multiplies its damping by scale.)

    scale : must exceed half the largest eigenvalue of *any sampled batch*; by default 1.1 times the
        largest seen by Lanczos over 20 batches (over the whole data for a full batch).
    depth : by default ln(1/rtol) scale / lambda_min, at most 20,000.
    """
    b, single = columns_of(b)
    batch_size = min(batch_size or objective.n, objective.n)
    rng = np.random.default_rng(seed)
    seen = spectrum(objective, steps=30)
    if scale is None:
        scale = 1.1 * _largest_batch_eigenvalue(objective, batch_size, rng, seen) + damping
    low = max(seen.lambda_min + damping, 1e-6 * scale)
    depth = depth or int(np.clip(np.log(1 / rtol) * scale / low, 10, 20_000))
    product, dtype = numpy_product(objective, damping)
    total = np.zeros_like(b)
    for _ in range(samples):
        rows = None
        if batch_size < objective.n:
            rows = tf.constant(rng.integers(0, objective.n, (depth, batch_size)))
        x = _lissa(objective, tf.constant(b, dtype), rows, float(damping), float(scale), depth)
        total += x.numpy() / scale / samples
    if not np.isfinite(total).all():
        raise FloatingPointError(
            f"LiSSA diverged: scale {scale:.3g} is below half the largest eigenvalue of a sampled "
            "batch. Raise scale, or leave it out to have it chosen."
        )
    method = f"LiSSA (scale {scale:.3g}, depth {depth}, {samples} x batch {batch_size})"
    known = {"steps": np.full(b.shape[1], depth * samples), "dtype": dtype}
    return certify(product, b, total, single, rtol=rtol, damping=damping, method=method, **known)


def _largest_batch_eigenvalue(objective, batch_size, rng, seen):
    if batch_size == objective.n:
        return seen.lambda_max
    largest = seen.lambda_max
    for _ in range(20):
        part = objective.subset(rng.integers(0, objective.n, batch_size))
        largest = max(largest, spectrum(part, steps=10).lambda_max)
    return 2 * largest  # 20 batches are a sample, and the largest of all is what counts


def _lissa(objective, b, rows, damping, scale, depth):
    """Run the recursion in one `tf.while_loop`; `rows` (depth, batch), or None for all of it."""

    @tf.function
    def loop():
        def step(j, x):
            hx = hessian_operator(objective, rows=None if rows is None else rows[j])(x)
            return j + 1, b + x - (hx + damping * x) / scale

        return tf.while_loop(lambda j, x: j < depth, step, (0, b))[1]

    return loop()


def solve_low_rank(objective, b, *, damping=0.0, rank=100, rtol=1e-2):
    """Return (H + damping I)^-1 b from the `rank` largest eigenpairs and a remainder, never bare.

    x = Q (L + damping)^-1 Q'b + (I - QQ') b / (damping + decay): outside the eigenpairs H is taken
    to be the weight decay alone. Truncation without that remainder loses what the small eigenvalues
    carry. Eigenpairs by ARPACK (`scipy.sparse.linalg.eigsh`).
    """
    b, single = columns_of(b)
    rest = damping + objective.decay.min()
    if rest <= 0:
        raise ValueError(
            "Low rank needs weight decay on every parameter, or damping: without them nothing is "
            "known of the directions left out."
        )
    product, dtype = numpy_product(objective, damping)
    shape, rank = (objective.p, objective.p), min(rank, objective.p - 1)
    operator = scipy.sparse.linalg.LinearOperator(
        shape, lambda v: product(v.reshape(-1, 1))[:, 0], dtype=np.float64
    )
    start = np.random.default_rng(0).normal(size=objective.p)
    values, q = scipy.sparse.linalg.eigsh(operator, rank, which="LA", v0=start)
    inside = q.T @ b
    x = q @ (inside / values[:, None]) + (b - q @ inside) / rest
    known = {"dtype": dtype, "spectrum": (np.nan, values.max())}
    return certify(
        product, b, x, single, rtol=rtol, damping=damping, method=f"low rank ({rank})", **known
    )
