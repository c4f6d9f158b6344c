"""Solves of (H + damping I) x = b, each with a certificate that says how good it is.

One convention: `damping` is added to the diagonal once, by every solver here, LiSSA included.
Right-hand sides are columns, (p,) or (p, k). The residual of a certificate is the true one:
b - (H + damping I) x from a fresh product at the end, subtracted and normed in float64.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import tensorflow as tf

from helpers.curvature import dense_gauss_newton, dense_hessian, hessian_operator, is_vectorisable
from helpers.spectrum import choose_damping, spectrum

DENSE_LIMIT = 5_000  # parameters up to which a dense matrix is formed by default: 200 MB


class Solution(NamedTuple):
    """What a solve returns: the solution and its certificate (k right-hand sides).

    x : (p,) or (p, k) float64; relative_residual : (k,) ||b - (H + damping I) x|| / ||b||;
    steps : (k,) products spent on each column; converged : (k,); negative_curvature : (k,), met a
    direction d with d'(H + damping I)d <= 0; lambda_min, lambda_max : of H + damping I, exact for
    `eigh`, else estimates from inside the spectrum (lambda_min from above, lambda_max from below).
    """

    x: np.ndarray
    relative_residual: np.ndarray
    steps: np.ndarray
    converged: np.ndarray
    negative_curvature: np.ndarray
    lambda_min: float
    lambda_max: float
    damping: float
    method: str
    dtype: str

    def __str__(self):
        good, k = int(self.converged.sum()), len(self.converged)
        text = (
            f"{self.method}: {good} of {k} right-hand sides solved, largest relative residual "
            f"{self.relative_residual.max(initial=0):.1e} ({self.dtype} products)"
        )
        if self.steps.any():
            text += f", {self.steps.min()}-{self.steps.max()} steps"
        text += f"; damping {self.damping:.3g}"
        if np.isfinite(self.lambda_max):
            text += f", eigenvalues about {self.lambda_min:.3g} to {self.lambda_max:.3g}"
        if self.negative_curvature.any():
            text += (
                f"; NEGATIVE CURVATURE met in {int(self.negative_curvature.sum())} columns: H + "
                "damping I has an eigenvalue <= 0. Raise the damping above -lambda_min, or use "
                "the Gauss-Newton matrix"
            )
        elif good < k:
            text += "; NOT CONVERGED: allow more steps, raise rtol, or add damping"
        return text + "."


def columns_of(b):
    """Return b as finite float64 columns (p, k), and whether it was a single vector."""
    b = np.asarray(b, np.float64)
    if b.ndim not in (1, 2):
        raise ValueError(f"Right-hand sides are (p,) or columns (p, k), not shape {b.shape}.")
    if not np.isfinite(b).all():
        raise ValueError("A right-hand side holds NaN or infinity; look at the model's losses.")
    return (b[:, None], True) if b.ndim == 1 else (b, False)


def _certify(matvec, b, x, single, *, rtol, damping, method, **known):
    """Return a Solution: what is `known` about the solve, completed by its true residual."""
    residual = np.linalg.norm(b - np.asarray(matvec(x), np.float64), axis=0)
    norms, k = np.linalg.norm(b, axis=0), b.shape[1]
    relative = np.divide(residual, norms, out=np.zeros_like(residual), where=norms > 0)
    negative = known.get("negative", np.zeros(k, bool))
    low, high = known.get("spectrum", (np.nan, np.nan))
    return Solution(
        x=x[:, 0] if single else x,
        relative_residual=relative,
        steps=known.get("steps", np.zeros(k, int)),
        converged=(relative <= rtol) & ~negative,
        negative_curvature=negative,
        lambda_min=float(low),
        lambda_max=float(high),
        damping=float(damping),
        method=method,
        dtype=known.get("dtype", "float64"),
    )


class Cholesky:
    """A factorisation of a symmetric positive definite matrix (p, p), used for many solves.

    Raises
    ------
    np.linalg.LinAlgError
        if the matrix has an eigenvalue that is not positive.
    """

    def __init__(self, matrix):
        try:
            self._factor = scipy.linalg.cholesky(matrix, lower=True, check_finite=False)
        except np.linalg.LinAlgError as error:
            raise np.linalg.LinAlgError(
                "The matrix is not positive definite, so it has no Cholesky factor: add damping "
                "above minus its smallest eigenvalue, or use the Gauss-Newton matrix."
            ) from error

    def solve(self, b):
        """Return the solution for b, (p,) or (p, k)."""
        return scipy.linalg.cho_solve((self._factor, True), b, check_finite=False)

    def whiten(self, b):
        """Return L^-1 b, whose squared column norms are b' A^-1 b."""
        return scipy.linalg.solve_triangular(self._factor, b, lower=True, check_finite=False)


def damped(matrix, damping):
    """Return matrix + damping I as a new array."""
    matrix = matrix.copy()
    matrix[np.diag_indices_from(matrix)] += damping
    return matrix


def solve_cholesky(matrix, b, *, damping=0.0, rtol=1e-8):
    """Return the solution of (A + damping I) x = b by one Cholesky factorisation.

    matrix : A (p, p), symmetric; b : (p,) or (p, k). Raises LinAlgError where A + damping I is not
    positive definite.
    """
    b, single = columns_of(b)
    a = damped(matrix, damping)
    x = Cholesky(a).solve(b)
    return _certify(a.__matmul__, b, x, single, rtol=rtol, damping=damping, method="Cholesky")


def solve_eigh(matrix, b, dampings, *, rtol=1e-8):
    """Return one Solution a damping from a single eigendecomposition: every damping for free.

    x = Q (Lambda + damping I)^-1 Q' b. Negative eigenvalues are no obstacle to the formula; the
    certificate reports them.
    """
    b, single = columns_of(b)
    values, q = scipy.linalg.eigh(matrix)
    projected = q.T @ b
    solutions = []
    for damping in np.atleast_1d(dampings):
        shifted = values + damping
        known = {
            "negative": np.full(b.shape[1], shifted[0] <= 0),
            "spectrum": (shifted[0], shifted[-1]),
        }
        x, a = q @ (projected / shifted[:, None]), damped(matrix, damping)
        solution = _certify(
            a.__matmul__, b, x, single, rtol=rtol, damping=damping, method="eigh", **known
        )
        solutions.append(solution)
    return solutions


def conjugate_gradient(
    product, b, *, damping=0.0, rtol=1e-8, max_steps=1000, precondition=None, dtype="float64"
):
    """Return the solution of (A + damping I) X = B by conjugate gradients, all columns at once.

    Hestenes & Stiefel 1952, preconditioned; one `tf.while_loop`, one product of k columns a step.
    How this differs from a textbook loop:
    1. vectors and dot products are float64, whatever `dtype` the product computes in;
    2. each column stops by itself, on ||r|| <= rtol ||b||, and then no longer changes;
    3. d'Ad <= 0 stops a column and is reported as negative curvature, never divided by;
    4. when all columns have stopped the true residual is computed; columns that missed it (the
       recursive residual drifts in float32) are restarted from it, at most twice.

    Parameters
    ----------
    product : callable, V (p, k) -> A V, on tensors of `dtype`, usable inside a `tf.function`
    b : (p,) or (p, k)
    precondition : callable R (p, k) float64 -> M^-1 R, optional; M symmetric positive definite
    """
    b, single = columns_of(b)
    matvec = _in_float64(product, damping, dtype)
    run, fresh = tf.function(partial(_cg_loop, matvec, precondition)), tf.function(matvec)
    x, rhs, norms = np.zeros_like(b), b, np.linalg.norm(b, axis=0)
    steps, negative, ritz = np.zeros(b.shape[1], int), np.zeros(b.shape[1], bool), []
    for _ in range(3):
        left = tf.constant(max_steps - int(steps.max(initial=0)))
        correction, taken, met, alphas, betas = [
            t.numpy() for t in run(tf.constant(rhs), tf.constant(rtol * norms), left)
        ]
        x, steps, negative = x + correction, steps + taken, negative | met
        ritz += [_ritz_values(alphas[:s, j], betas[:s, j]) for j, s in enumerate(taken) if s]
        residual = b - fresh(tf.constant(x)).numpy()
        missed = (np.linalg.norm(residual, axis=0) > rtol * norms) & ~negative
        if not missed.any() or steps.max() >= max_steps:
            break
        rhs = residual * missed
    known = {"steps": steps, "negative": negative, "dtype": dtype}
    if ritz and precondition is None:  # else they are eigenvalues of M^-1 A
        known["spectrum"] = min(r[0] for r in ritz), max(r[-1] for r in ritz)
    return _certify(
        lambda v: fresh(tf.constant(v)),
        b,
        x,
        single,
        rtol=rtol,
        damping=damping,
        method="CG",
        **known,
    )


def _in_float64(product, damping, dtype):
    def matvec(v):
        return tf.cast(product(tf.cast(v, dtype)), tf.float64) + damping * v

    return matvec


def _cg_loop(matvec, precondition, b, stop, max_steps):
    """Run CG from zero; return x, steps, negative curvature, and the coefficients of each step."""
    precondition = precondition or (lambda r: r)

    def step(i, x, r, d, rho, active, taken, negative, alphas, betas):
        ad = matvec(d)
        curvature = tf.reduce_sum(d * ad, 0)
        bad = active & (curvature <= 0)
        go = active & ~bad
        alpha = tf.where(go, rho / tf.where(go, curvature, 1.0), 0.0)
        x, r = x + alpha * d, r - alpha * ad
        z = precondition(r)
        rho_new = tf.reduce_sum(r * z, 0)
        beta = tf.where(go, rho_new / tf.where(go, rho, 1.0), 0.0)
        still = go & (tf.norm(r, axis=0) > stop)
        d = tf.where(still, z + beta * d, 0.0)
        taken, negative = taken + tf.cast(active, tf.int64), negative | bad
        return (
            i + 1,
            x,
            r,
            d,
            rho_new,
            still,
            taken,
            negative,
            alphas.write(i, alpha),
            betas.write(i, beta),
        )

    zero = tf.zeros_like(b)
    z, k = precondition(b), tf.shape(b)[1]
    active = (tf.norm(b, axis=0) > stop) & (tf.norm(b, axis=0) > 0)
    history = [tf.TensorArray(tf.float64, 0, dynamic_size=True, element_shape=(None,))] * 2
    state = (
        0,
        zero,
        b,
        tf.where(active, z, 0.0),
        tf.reduce_sum(b * z, 0),
        active,
        tf.zeros(k, tf.int64),
        tf.zeros(k, tf.bool),
        *history,
    )
    state = tf.while_loop(
        lambda i, x, r, d, rho, active, *rest: (i < max_steps) & tf.reduce_any(active), step, state
    )
    return state[1], state[6], state[7], state[8].stack(), state[9].stack()


def _ritz_values(alphas, betas):
    """Return the eigenvalues of the Lanczos matrix of CG's coefficients (Saad 2003, 6.7)."""
    ok = alphas > 0
    alphas, betas = alphas[ok], betas[ok]
    if not len(alphas):
        return np.array([np.nan])
    diagonal = 1 / alphas + np.concatenate([[0], betas[:-1] / alphas[:-1]])
    off = np.sqrt(np.maximum(betas[:-1], 0)) / alphas[:-1]
    return scipy.linalg.eigh_tridiagonal(diagonal, off, eigvals_only=True)


def gauss_newton_preconditioner(objective, damping):
    """Return R -> (G + damping I)^-1 R from a Cholesky factor of the dense Gauss-Newton matrix.

    It cuts the steps of CG on H several-fold; `conjugate_gradient` still solves with H itself.
    """
    g = dense_gauss_newton(objective)
    floor = 1e-6 * np.trace(g) / len(g)
    factor = tf.constant(np.linalg.cholesky(damped(g, max(damping, floor))))
    return lambda r: tf.linalg.cholesky_solve(factor, r)


def nystroem_preconditioner(objective, damping, *, rank=50, seed=0):
    """Return R -> P^-1 R from a rank-`rank` sketch of the Gauss-Newton matrix, for large p.

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
    return lambda r: r + tf.matmul(basis, scale * tf.matmul(basis, r, transpose_a=True))


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
    dtype = "float64" if objective.head else objective.dtype
    sampled = objective.n if batch_size == objective.n else batch_size
    total = np.zeros_like(b)
    for _ in range(samples):
        rows = None
        if sampled < objective.n:
            rows = tf.constant(rng.integers(0, objective.n, (depth, batch_size)))
        x = _lissa(objective, tf.constant(b, dtype), rows, float(damping), float(scale), depth)
        total += x.numpy() / scale / samples
    if not np.isfinite(total).all():
        raise FloatingPointError(
            f"LiSSA diverged: scale {scale:.3g} is below half the largest eigenvalue of a sampled "
            "batch. Raise scale, or leave it out to have it chosen."
        )
    matvec = tf.function(_in_float64(hessian_operator(objective), damping, dtype))
    return _certify(
        lambda v: matvec(tf.constant(v)),
        b,
        total,
        single,
        rtol=rtol,
        damping=damping,
        method=f"LiSSA (scale {scale:.3g}, depth {depth}, {samples} x batch {batch_size})",
        steps=np.full(b.shape[1], depth * samples),
        dtype=dtype,
    )


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
    dtype = "float64" if objective.head else objective.dtype
    product = tf.function(_in_float64(hessian_operator(objective), 0.0, dtype))
    rest = damping + objective.decay.min()
    if rest <= 0:
        raise ValueError(
            "Low rank needs weight decay on every parameter, or damping: without "
            "them nothing is known of the directions left out."
        )
    operator = scipy.sparse.linalg.LinearOperator(
        (objective.p, objective.p), lambda v: product(tf.constant(v.reshape(-1, 1))).numpy()[:, 0]
    )
    rank = min(rank, objective.p - 1)
    start = np.random.default_rng(0).normal(size=objective.p)
    values, q = scipy.sparse.linalg.eigsh(operator, rank, which="LA", v0=start)
    inside = q.T @ b
    x = q @ (inside / (values + damping)[:, None]) + (b - q @ inside) / rest
    return _certify(
        lambda v: product(tf.constant(v)).numpy() + damping * v,
        b,
        x,
        single,
        rtol=rtol,
        damping=damping,
        method=f"low rank ({rank})",
        dtype=dtype,
        spectrum=(np.nan, values.max() + damping),
    )


def solve(objective, b, *, solver="auto", damping="auto", rtol=1e-8, max_steps=1000, **options):
    """Return the solution of (H + damping I) x = b for an objective, with its certificate.

    solver : "auto" (Cholesky for a head of up to 5,000 parameters, else CG), "cholesky" or "eigh"
        (form H), "cg" (products only), "gauss_newton" (Cholesky of G + damping I in the place of
        H), "lissa", "low_rank"; `options` go to the solver.
    damping : a number, or "auto" for `spectrum.choose_damping`.
    """
    if len(b) != objective.p:
        raise ValueError(f"b has {len(b)} rows, the objective {objective.p} parameters.")
    columns_of(b)
    if damping == "auto":
        damping = choose_damping(objective).value
    if damping < 0:
        raise ValueError(f"damping must not be negative, got {damping}.")
    if solver == "auto":
        solver = "cholesky" if objective.head and objective.p <= DENSE_LIMIT else "cg"
    shared = {"damping": damping, "rtol": rtol, **options}
    if solver == "cholesky":
        return solve_cholesky(dense_hessian(objective), b, **shared)
    if solver == "gauss_newton":
        return solve_cholesky(dense_gauss_newton(objective), b, **shared)._replace(
            method="Cholesky of the Gauss-Newton matrix"
        )
    if solver == "eigh":
        return solve_eigh(dense_hessian(objective), b, damping, rtol=rtol)[0]
    if solver == "cg":
        return _solve_cg(objective, b, max_steps=max_steps, **shared)
    if solver == "lissa":
        return solve_lissa(objective, b, **shared)
    if solver == "low_rank":
        return solve_low_rank(objective, b, **shared)
    raise ValueError(
        f"solver='{solver}' is not known: 'auto', 'cholesky', 'eigh', 'cg', "
        "'gauss_newton', 'lissa' or 'low_rank'."
    )


def _solve_cg(objective, b, *, damping, precondition="auto", **options):
    dtype = "float64" if objective.head else objective.dtype
    if precondition == "auto":
        cheap = not objective.head and objective.p <= DENSE_LIMIT and is_vectorisable(objective)
        precondition = "gauss_newton" if cheap else None
    if precondition == "gauss_newton":
        precondition = gauss_newton_preconditioner(objective, damping)
    elif precondition == "nystroem":
        precondition = nystroem_preconditioner(objective, damping)
    return conjugate_gradient(
        hessian_operator(objective),
        b,
        damping=damping,
        precondition=precondition,
        dtype=dtype,
        **options,
    )
