"""Approximate solves and preconditioners: what the field uses where an exact solve is too dear.

Each returns the same certificate as an exact solve, so it shows how approximate it is.
"""

import numpy as np
import scipy.sparse.linalg
import tensorflow as tf

from helpers import checks
from helpers.curvature import compiled, dense_gauss_newton, head_operator, hessian_operator
from helpers.solvers import Preconditioner, certify, columns_of, damped, in_float64, unchanged
from helpers.spectrum import spectrum


def numpy_product(objective, damping, *, gauss_newton=False):
    """Return V -> (H + damping I) V, or of G, from NumPy to NumPy, and the dtype it computes in."""
    dtype = "float64" if objective.head else objective.dtype
    own = objective.compiled.setdefault("gauss_newton", {}) if gauss_newton else objective.compiled
    matvec = in_float64(hessian_operator(objective, gauss_newton=gauss_newton), dtype, own)
    shift = tf.constant(float(damping), tf.float64)
    return lambda v: matvec(tf.constant(v, tf.float64), shift).numpy(), dtype


def gauss_newton_preconditioner(objective, damping):
    """Return (G + damping I)^-1 as a Preconditioner: a Cholesky factor of dense Gauss-Newton.

    It cuts the steps of CG on H several-fold; `conjugate_gradient` still solves with H itself.
    """
    g = dense_gauss_newton(objective)
    floor = 1e-6 * np.abs(np.diag(g)).mean()
    try:
        factor = np.linalg.cholesky(damped(g, max(damping, floor)))
    except np.linalg.LinAlgError:  # the loss is not convex in the outputs
        values, q = np.linalg.eigh(g)
        factor = np.linalg.cholesky((q * (np.abs(values) + max(damping, floor))) @ q.T)
    factor = tf.constant(factor)
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
    core, turn = np.linalg.eigh((omega.T @ y + y.T @ omega) / 2)
    keep = core > 100 * np.finfo(dtype).eps * max(core[-1], 0)  # what the product resolves
    if not keep.any():
        return Preconditioner(unchanged)
    u, singular, _ = np.linalg.svd(y @ (turn[:, keep] / np.sqrt(core[keep])), False)
    values = singular**2 + max(damping, 1e-12 * singular[0] ** 2)
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

    scale : must exceed half the largest eigenvalue (damping included) of *any sampled batch*; by
        default 1.1 times the largest seen by Lanczos, and for small batches twice the largest of
        20, since 20 are a sample.
    depth : by default ln(1/rtol) scale / lambda_min, at most 20,000.

    Raises
    ------
    FloatingPointError
        if it diverges: scale too small, or H + damping I not positive definite.
    """
    b, single = columns_of(b)
    damping, rtol = checks.number("damping", damping), checks.number("rtol", rtol, positive=True)
    batch_size = min(batch_size or objective.n, objective.n)
    rng = np.random.default_rng(seed)
    seen = spectrum(objective, steps=30)
    if scale is None:
        scale = 1.1 * _largest_batch_eigenvalue(objective, batch_size, rng, seen) + damping
    low = max(seen.lambda_min + damping, 1e-6 * scale)
    depth = depth or int(np.clip(np.log(1 / rtol) * scale / low, 10, 20_000))
    product, dtype = numpy_product(objective, damping)
    total, drawn = np.zeros_like(b), 0 if batch_size == objective.n else batch_size
    for _ in range(samples):
        rows = tf.constant(rng.integers(0, objective.n, (depth, drawn)))
        numbers = (tf.constant(float(a), dtype) for a in (damping, scale))
        x = _lissa(objective, tf.constant(b, dtype), rows, drawn == 0, *numbers)
        total += x.numpy() / scale / samples
    if not np.isfinite(total).all():
        raise FloatingPointError(
            f"LiSSA diverged. Either the scale, {scale:.3g}, is below half the largest eigenvalue "
            "of a sampled batch: raise it, or leave it out to have it chosen. Or H + damping I is "
            f"not positive definite: Lanczos saw {seen.lambda_min + damping:.3g}; raise damping."
        )
    method = f"LiSSA (scale {scale:.3g}, depth {depth}, {samples} x batch {batch_size})"
    known = {"steps": np.full(b.shape[1], depth * samples), "dtype": dtype}
    return certify(product, b, total, single, rtol=rtol, damping=damping, method=method, **known)


def _largest_batch_eigenvalue(objective, batch_size, rng, seen):
    if batch_size == objective.n:
        return seen.lambda_max
    largest = seen.lambda_max
    for _ in range(20):
        rows = rng.integers(0, objective.n, batch_size)
        largest = max(largest, spectrum(objective, steps=10, rows=rows).lambda_max)
    return 2 * largest  # 20 batches are a sample, and the largest of all is what counts


@compiled
def _lissa(objective, b, rows, full_batch, damping, scale):
    """Run the recursion in one `tf.while_loop`, step j on the examples `rows[j]` or on all."""
    whole = head_operator(objective) if objective.head else hessian_operator(objective)

    def step(j, x):
        product = whole if full_batch else hessian_operator(objective, rows=rows[j])
        return j + 1, b + x - (product(x) + damping * x) / scale

    return tf.while_loop(lambda j, x: j < tf.shape(rows)[0], step, (0, b))[1]


def solve_low_rank(objective, b, *, damping=0.0, rank=100, rtol=1e-2):
    """Return (H + damping I)^-1 b from the `rank` largest eigenpairs and a remainder, never bare.

    x = Q (L + damping)^-1 Q'b + (I - QQ') b / (damping + decay): outside the eigenpairs H is taken
    to be the weight decay of each parameter alone. Truncation without that remainder loses what the
    small eigenvalues carry. Eigenpairs by ARPACK (`scipy.sparse.linalg.eigsh`).
    """
    b, single = columns_of(b)
    damping = checks.number("damping", damping)
    rest = damping + objective.decay
    if rest.min() <= 0:
        raise ValueError(
            "Low rank needs weight decay on every parameter, or damping: without them nothing is "
            "known of the directions left out."
        )
    product, dtype = numpy_product(objective, damping)
    shape, rank = (objective.p, objective.p), min(rank, objective.p - 1)
    products = 0

    def one(v):
        nonlocal products
        products += 1
        return product(v.reshape(-1, 1))[:, 0]

    operator = scipy.sparse.linalg.LinearOperator(shape, one, dtype=np.float64)
    start = np.random.default_rng(0).normal(size=objective.p)
    values, q = scipy.sparse.linalg.eigsh(operator, rank, which="LA", v0=start)
    inside = q.T @ b
    x = q @ (inside / values[:, None]) + (b - q @ inside) / rest[:, None]
    known = {"dtype": dtype, "steps": np.full(b.shape[1], products)}
    return certify(
        product, b, x, single, rtol=rtol, damping=damping, method=f"low rank ({rank})", **known
    )
