"""Solves of (H + damping I) x = b, each with a certificate that says how good it is.

One convention: `damping` is added to the diagonal once, by every solver here, LiSSA included.
Right-hand sides are columns, (p,) or (p, k). The residual of a certificate is the true one:
b - (H + damping I) x from a fresh product at the end, subtracted and normed in float64.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.linalg.blas
import tensorflow as tf

from helpers import checks


class Solution(NamedTuple):
    """What a solve returns: the solution and its certificate (k right-hand sides).

    x : (p,) or (p, k) float64; relative_residual : (k,) ||b - (H + damping I) x|| / ||b||;
    steps : (k,) products spent on each column; converged : (k,); negative_curvature : (k,), met a
    direction d with d'(H + damping I)d <= 0, somewhere in the block; lambda_min, lambda_max : of
    H + damping I, exact for `eigh`, estimates from inside the spectrum (lambda_min from above,
    lambda_max from below) for plain CG, else NaN;
    history : (steps + 1, k), CG's own running relative residuals from the start on, NaN in a
    restart without the column; else empty; floor : about the relative residual that rounding in the
    products' dtype leaves whatever the solver does, NaN where it is not known; derivatives : what
    the probe of the objective's derivatives found, in words.
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
    history: np.ndarray
    floor: float = np.nan
    derivatives: str = ""

    def warn_unless_solved(self, stacklevel=3):
        """Warn, for whoever uses x without printing this, where it does not solve the system."""
        if not self.converged.all():
            warnings.warn(f"A solution that is none is used. {self}", stacklevel=stacklevel)

    def __str__(self):
        good, k = int(self.converged.sum()), len(self.converged)
        text = (
            f"{self.method}: {good} of {k} right-hand sides solved, largest relative residual "
            f"{self.relative_residual.max(initial=0):.1e} ({self.dtype} products)"
        )
        if self.steps.any():
            text += f", {self.steps.min()}-{self.steps.max()} steps"
        text += f"; damping {self.damping:.3g}"
        if np.isfinite(self.lambda_min):
            text += f", eigenvalues about {self.lambda_min:.3g} to {self.lambda_max:.3g}"
        if self.negative_curvature.any():
            text += (
                f"; NEGATIVE CURVATURE met in {int(self.negative_curvature.sum())} columns: H + "
                "damping I has an eigenvalue <= 0. Raise the damping above -lambda_min, or use "
                "the Gauss-Newton matrix"
            )
        elif good < k:
            text += "; NOT CONVERGED: allow more steps, raise rtol, or add damping"
            if self.dtype == "float32" and self.floor > 1e-6:
                text += (
                    f". Rounding of float32 products alone leaves about {self.floor:.0e}: build "
                    "the model in float64"
                )
        if self.derivatives and not self.derivatives.startswith("derivatives checked"):
            text += f"; {self.derivatives}"
        return text + "."


def columns_of(b):
    """Return b as finite float64 columns (p, k), and whether it was a single vector."""
    b = np.asarray(b, np.float64)
    if b.ndim not in (1, 2):
        raise ValueError(f"Right-hand sides are (p,) or columns (p, k), not shape {b.shape}.")
    if not np.isfinite(b).all():
        raise ValueError("A right-hand side holds NaN or infinity; look at the model's losses.")
    if b.shape[-1] == 0:
        raise ValueError("There is no right-hand side.")
    return (b[:, None], True) if b.ndim == 1 else (b, False)


def certify(matvec, b, x, single, *, rtol, damping, method, **known):
    """Return a Solution: what is `known` about the solve, completed by its true residual."""
    damping, rtol = checks.number("damping", damping), checks.number("rtol", rtol)
    size = np.abs(b).max(0, initial=0)
    size[size == 0] = 1.0  # squares of 1e-170 would be zero
    residual = np.linalg.norm(b / size - np.asarray(matvec(x / size), np.float64), axis=0)
    norms, k = np.linalg.norm(b / size, axis=0), b.shape[1]
    relative = np.divide(residual, norms, out=np.zeros_like(residual), where=norms > 0)
    negative = known.get("negative", np.zeros(k, bool))
    low, high = known.get("spectrum", (np.nan, np.nan))
    dtype, largest = known.get("dtype", "float64"), known.get("largest", high)
    grown = np.linalg.norm(x / size, axis=0)[norms > 0] / norms[norms > 0]
    floor = np.finfo(dtype).eps * largest * grown.max(initial=0)
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
        dtype=dtype,
        history=known.get("history", np.zeros((0, k))),
        floor=float(floor),
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

    def unwhiten(self, b):
        """Return L^-T b: the coordinates in which the matrix is the identity, turned back."""
        return scipy.linalg.solve_triangular(
            self._factor, b, lower=True, trans="T", check_finite=False
        )

    def product(self, b):
        """Return L b."""
        return scipy.linalg.blas.dtrmm(1.0, self._factor, b, lower=True)

    def transposed_product(self, b):
        """Return L' b, the inverse of `unwhiten`."""
        return scipy.linalg.blas.dtrmm(1.0, self._factor, b, lower=True, trans_a=True)


def damped(matrix, damping):
    """Return matrix + damping I as a new array."""
    matrix = matrix.copy()
    matrix[np.diag_indices_from(matrix)] += damping
    return matrix


def solve_cholesky(matrix, b, *, damping=0.0, rtol=1e-8, product=None, dtype="float64"):
    """Return the solution of (A + damping I) x = b by one Cholesky factorisation.

    matrix : A (p, p), symmetric; b : (p,) or (p, k). product : X -> (A + damping I) X, what the
    certificate is taken of where the matrix was rounded, in `dtype`; by default the matrix. Raises
    LinAlgError where A + damping I is not positive definite.
    """
    damping, (b, single) = checks.number("damping", damping), columns_of(b)
    a = damped(matrix, damping)
    x = Cholesky(a).solve(b)
    known = {"method": "Cholesky", "dtype": dtype, "largest": np.abs(a).sum(0).max()}
    return certify(product or a.__matmul__, b, x, single, rtol=rtol, damping=damping, **known)


def solve_eigh(matrix, b, dampings, *, rtol=1e-8, product=None, dtype="float64"):
    """Return one Solution a damping from a single eigendecomposition: every damping for free.

    x = Q (Lambda + damping I)^-1 Q' b. Negative eigenvalues are no obstacle to the formula; the
    certificate reports them. product : X -> A X, what certificates are taken of, in `dtype`.
    """
    b, single = columns_of(b)
    dampings = [checks.number("damping", damping) for damping in np.atleast_1d(dampings)]
    values, q = scipy.linalg.eigh(matrix)
    projected = q.T @ b
    solutions = []
    for damping in dampings:
        shifted = values + damping
        known = {
            "negative": np.full(b.shape[1], shifted[0] <= 0),
            "spectrum": (shifted[0], shifted[-1]),
            "dtype": dtype,
        }
        inverse = np.divide(1.0, shifted, out=np.zeros_like(shifted), where=shifted != 0)
        x = q @ (projected * inverse[:, None])
        whole = partial(_damped_product, product or matrix.__matmul__, damping)
        solution = certify(whole, b, x, single, rtol=rtol, damping=damping, method="eigh", **known)
        solutions.append(solution)
    return solutions


class Preconditioner(NamedTuple):
    """R -> function(R, *arrays), an approximation of (A + damping I)^-1 R, R (p, k) float64.

    The arrays are arguments and not part of the function, so that a traced loop fits every one of
    them: the same loop serves other weights, dampings and right-hand sides.
    """

    function: Callable
    arrays: tuple = ()

    def __call__(self, r):
        return self.function(r, *self.arrays)


def _damped_product(product, damping, x):
    return product(x) + damping * x


def conjugate_gradient(
    product,
    b,
    *,
    damping=0.0,
    rtol=1e-8,
    max_steps=1000,
    precondition=None,
    dtype="float64",
    compiled=None,
):
    """Return the solution of (A + damping I) X = B by block conjugate gradients.

    O'Leary 1980 in the form of Dubrulle 2001, preconditioned; one `tf.while_loop`, one product of k
    columns a step. All columns search the space that all of them span, so k right-hand sides take
    no more steps together than the slowest takes alone, and usually fewer. One column is Hestenes &
    Stiefel's CG.
    How this differs from a textbook loop:
    1. vectors and dot products are float64, whatever `dtype` the product computes in;
    2. directions that depend on others (equal, zero or surplus right-hand sides) are dropped;
    3. d'Ad <= 0 stops the solve and is reported as negative curvature, never divided by;
    4. when every ||r|| <= rtol ||b|| the true residual is computed; columns that missed it (the
       recursive residual drifts in float32) are restarted from it, at most twice.

    Parameters
    ----------
    product : callable, V (p, k) -> A V, on tensors of `dtype`, usable inside a `tf.function`
    b : (p,) or (p, k)
    precondition : Preconditioner, or callable R (p, k) float64 -> M^-1 R, optional; M symmetric
        positive definite
    compiled : a dict that keeps the traced loop for the next call with the same product
    """
    damping, rtol = checks.number("damping", damping), checks.number("rtol", rtol)
    b, single = columns_of(b)
    size = np.abs(b).max(0, initial=0)
    b = b / np.where(size > 0, size, 1)
    shift, compiled = tf.constant(damping, tf.float64), {} if compiled is None else compiled
    matvec = in_float64(product, dtype, compiled)
    if not isinstance(precondition, Preconditioner):
        precondition = Preconditioner(precondition or unchanged)
    loop = partial(_cg_loop, matvec, precondition.function)
    run = compiled.setdefault(
        ("CG", dtype, precondition.function), tf.function(loop, reduce_retracing=True)
    )

    def fresh(v):
        return matvec(tf.constant(v), shift).numpy()

    x, rhs, norms = np.zeros_like(b), b, np.linalg.norm(b, axis=0)
    steps, negative = np.zeros(b.shape[1], int), np.zeros(b.shape[1], bool)
    history, known = [], {"dtype": dtype}
    for _ in range(3):
        scale = np.linalg.norm(rhs, axis=0)
        scale[scale == 0] = 1
        left = tf.constant(max_steps - int(steps.max(initial=0)))
        start = tf.constant(rhs / scale), shift, tf.constant(rtol * norms / scale), left
        found = [t.numpy() for t in run(*start, *precondition.arrays)]
        correction, taken, met, residuals, curvatures, factors = found
        x, steps, negative = x + correction * scale, steps + taken, negative | met
        seen = residuals * scale / np.where(norms > 0, norms, 1)
        history.append(np.where(rhs.any(0), seen, np.nan)[bool(history) :])
        if "spectrum" not in known and precondition.function is unchanged:
            known["spectrum"] = _ritz_ends(curvatures, factors)  # else they are those of M^-1 A
        residual = b - fresh(x)
        if not np.isfinite(residual).all():
            raise FloatingPointError("A product is NaN or infinite: look at the model's losses.")
        missed = (np.linalg.norm(residual, axis=0) > rtol * norms) & ~negative
        if not missed.any() or steps.max() >= max_steps:
            break
        rhs = residual * missed
    known |= {"steps": steps, "negative": negative, "history": np.concatenate(history)}
    method = "CG" if b.shape[1] == 1 else "block CG"
    b, x = b * size, x * size
    return certify(fresh, b, x, single, rtol=rtol, damping=damping, method=method, **known)


def in_float64(product, dtype, compiled):
    """Return (V, damping) -> (A + damping I) V on float64 tensors, A V computed in `dtype`.

    One `tf.function`, kept in the dict `compiled` for every solver of the same product.
    """

    def matvec(v, damping):
        return tf.cast(product(tf.cast(v, dtype)), tf.float64) + damping * v

    return compiled.setdefault(("product", dtype), tf.function(matvec, reduce_retracing=True))


def unchanged(r):
    return r


def _cg_loop(matvec, precondition, b, damping, stop, max_steps, *arrays):
    """Run block CG from zero.

    The residual is kept as R = Q C with Q' M^-1 Q = I, the directions S are conjugate. Returns x,
    steps and negative curvature of each column; the residual norms at the start and after each
    step; and of each step S'AS, and the factor F of the next Q F = Q - A S (S'AS)^-1.
    """

    def orthonormal(w):
        z = precondition(w, *arrays)
        values, vectors = _small_eigh(w, z)
        alive = (values > 1e-13 * values[-1]) & (values > 0)
        root = tf.where(alive, tf.sqrt(tf.maximum(values, 0)), 0)
        back = vectors * tf.math.divide_no_nan(tf.ones_like(root), root)
        return tf.matmul(w, back), tf.matmul(z, back), root[:, None] * tf.transpose(vectors)

    def step(i, x, q, s, c, norms, taken, negative, history):
        active = norms > stop
        t = matvec(s, damping)
        dropped = tf.cast(tf.reduce_all(s == 0, 0), tf.float64)
        values, vectors = _small_eigh(s, t, dropped)
        bad = values[0] <= 0
        inverse = tf.where(bad, tf.zeros_like(values), 1 / values)
        inverse = tf.matmul(vectors * inverse, vectors, transpose_b=True)
        x += tf.matmul(s, tf.matmul(inverse, c))
        q, z, factor = orthonormal(q - tf.matmul(t, inverse))
        curvature = tf.matmul(vectors * values, vectors, transpose_b=True)
        s, c = z + tf.matmul(s, factor, transpose_b=True), tf.matmul(factor, c)
        norms = tf.norm(tf.matmul(q, c), axis=0)
        taken, negative = taken + tf.cast(active, tf.int64), negative | (active & bad)
        new = norms, curvature - tf.linalg.diag(dropped), factor
        history = [array.write(i + 1, value) for array, value in zip(history, new, strict=True)]
        return i + 1, x, q, s, c, norms, taken, negative, history

    k = tf.shape(b)[1]
    q, z, c = orthonormal(b)
    history = [
        tf.TensorArray(tf.float64, 0, dynamic_size=True, element_shape=shape)
        for shape in ((None,), (None, None), (None, None))
    ]
    norms, nothing = tf.norm(b, axis=0), tf.zeros_like(c)
    start = norms, nothing, nothing
    history = [array.write(0, value) for array, value in zip(history, start, strict=True)]
    counts = tf.zeros(k, tf.int64), tf.zeros(k, tf.bool)
    state = tf.while_loop(
        lambda i, x, q, s, c, norms, taken, negative, history: (
            (i < max_steps) & tf.reduce_any(norms > stop) & ~tf.reduce_any(negative)
        ),
        step,
        (0, tf.zeros_like(b), q, z, c, norms, *counts, history),
    )
    residuals, curvatures, factors = (array.stack() for array in state[8])
    return state[1], state[6], state[7], residuals, curvatures[1:], factors[1:]


def _small_eigh(a, b, diagonal=None):
    """Return the eigenvalues and eigenvectors of a'b, which is symmetric, plus a diagonal."""
    g = tf.matmul(a, b, transpose_a=True)
    g = (g + tf.transpose(g)) / 2
    return tf.linalg.eigh(g if diagonal is None else g + tf.linalg.diag(diagonal))


def _ritz_ends(curvatures, factors, largest=1000):
    """Return the ends of the spectrum of the block Lanczos matrix that the steps D_i, F_i imply.

    Its diagonal blocks are D_i + F_i D_i-1 F_i', below them -F_i+1 D_i (Saad 2003, 6.7, for one
    column); of a large one the leading part.
    """
    k = curvatures.shape[-1]
    curvatures = curvatures[: -(-largest // max(k, 1))]
    steps = len(curvatures)
    blocks = np.zeros((steps, k, steps, k))
    for i in range(steps):
        blocks[i, :, i] = curvatures[i]
        if i:
            f, d = factors[i - 1], curvatures[i - 1]
            blocks[i, :, i] += f @ d @ f.T
            blocks[i, :, i - 1] = -f @ d
            blocks[i - 1, :, i] = blocks[i, :, i - 1].T
    alive = np.flatnonzero(np.einsum("iaa->ia", curvatures).ravel())[:largest]
    if not len(alive):
        return np.nan, np.nan
    matrix = blocks.reshape(steps * k, -1)[np.ix_(alive, alive)]
    values = np.linalg.eigvalsh(matrix)
    return values[0], values[-1]
