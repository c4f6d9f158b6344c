"""Solves of (H + damping I) x = b, each with a certificate that says how good it is.

    solution = solve(Hessian(objective), b, CG(damping=0.01, rtol=1e-6))

One convention: `damping` is added to the diagonal once, by every solver, LiSSA included.
Right-hand sides are columns, (p,) or (p, k). The residual of a certificate is the true one:
b - (H + damping I) x from a fresh product at the end, subtracted and normed in float64.
"""

import itertools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import tensorflow as tf
from tqdm.auto import tqdm

from . import checks, derivatives, keras_facts
from .fit import factor_of
from .gradients import by_differences, has_rows
from .hessian import GaussNewton, as_operator
from .keras_facts import traced
from .linalg import Factor, damped
from .spectrum import choose_damping, spectrum

DENSE_LIMIT = 5_000  # parameters up to which a dense matrix is formed by default: 200 MB


def solve(H, b, solver=None, *, damping="auto"):
    """Return the Solution of (H + damping I) x = b, with its certificate.

    H : a `Hessian` or `GaussNewton`, an Objective for its Hessian, or a symmetric array (p, p).
    b : (p,) or columns (p, k).
    solver : one of the solver objects below; by default `Cholesky` for a head of up to 5,000
        parameters and for an array, else `CG`, and `Eigh` where that met negative curvature among
        up to 1,000 parameters: then x solves the equations, but minimises nothing.
    damping : of the default solver: a number, or "auto" for `spectrum.choose_damping` (0 for an
        array, which is taken as it is).
    """
    H, chosen = as_operator(H), solver is None
    if chosen:
        dense = not H.objective or (H.objective.head and H.shape[0] <= DENSE_LIMIT)
        solver = Cholesky(damping) if dense else CG(damping)
    elif not isinstance(solver, Solver):
        raise TypeError(f"A solver object is needed, such as CG(damping=0.01), not {solver!r}.")
    elif damping != "auto":
        solver = replace(solver, damping=damping)
    b, single = columns_of(b)
    if len(b) != H.shape[0]:
        raise ValueError(f"b has {len(b)} rows, the operator {H.shape[0]} parameters.")
    seen = None
    if solver.damping == "auto":
        value, _, seen = choose_damping(H) if H.objective else (0.0, "", None)
        solver = replace(solver, damping=value)
    rtol = solver.usual_rtol(H) if solver.rtol is None else solver.rtol
    numbers = {"damping": solver.damping, "rtol": rtol}
    solver = replace(solver, **{name: checks.number(name, a) for name, a in numbers.items()})
    if H.objective:
        derivatives.warn_of_doubts(H.objective)
    size = np.abs(b).max(0, initial=0)
    size[size == 0] = 1.0  # squares of 1e-170 would be zero
    try:
        x, known = solver.run(H, b / size)
    except np.linalg.LinAlgError:
        if seen is None or solver.damping:
            raise
        # a convex head is singular, and Lanczos did not see it
        solver = replace(solver, damping=float(f"{1e-3 * seen.lambda_max:.2g}"))
        x, known = solver.run(H, b / size)
    found = _certified(H, b / size, x, size, single, solver, known)
    if chosen and isinstance(solver, CG) and found.negative_curvature.any() and len(b) <= 1000:
        return solve(H, b[:, 0] if single else b, Eigh(solver.damping, solver.rtol))
    return found


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
    the probe of the objective's derivatives found, in words; theta : (p,) where H was taken.
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
    theta: np.ndarray | None = None

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
    if np.iscomplexobj(b):
        raise ValueError("A right-hand side is complex: solve for its two parts.")
    b = np.asarray(b, np.float64)
    if b.ndim not in (1, 2):
        raise ValueError(f"Right-hand sides are (p,) or columns (p, k), not shape {b.shape}.")
    if not np.isfinite(b).all():
        raise ValueError("A right-hand side holds NaN or infinity; look at the model's losses.")
    if b.shape[-1] == 0:
        raise ValueError("There is no right-hand side.")
    return (b[:, None], True) if b.ndim == 1 else (b, False)


def _certified(H, b, x, size, single, solver, known):
    """Return the Solution x * size: what is `known` about the solve, and its true residual."""
    k, norms = b.shape[1], np.linalg.norm(b, axis=0)
    residual = known.get("residual")
    if residual is None:
        residual = _residual(H, solver.damping, b, x, known.get("matrix"))
    residual = np.linalg.norm(residual, axis=0)
    relative = np.divide(residual, norms, out=np.zeros_like(residual), where=norms > 0)
    negative = known.get("negative", np.zeros(k, bool))
    low, high = known.get("spectrum", (np.nan, np.nan))
    grown = np.linalg.norm(x, axis=0)[norms > 0] / norms[norms > 0]
    floor = np.finfo(H.precision).eps * known.get("largest", high) * grown.max(initial=0)
    x = x * size
    return Solution(
        x=x[:, 0] if single else x,
        relative_residual=relative,
        steps=known.get("steps", np.zeros(k, int)),
        converged=(relative <= solver.rtol) & ~negative,
        negative_curvature=negative,
        lambda_min=float(low),
        lambda_max=float(high),
        damping=solver.damping,
        method=known.get("method", type(solver).__name__)
        + " of the Gauss-Newton matrix" * isinstance(H, GaussNewton),
        dtype=H.precision,
        history=known.get("history", np.zeros((0, k))),
        floor=float(floor),
        derivatives=H.objective.derivatives.words if H.objective else "",
        theta=H.objective.theta if H.objective else None,
    )


def _residual(H, damping, b, x, matrix=None):
    """Return b - (H + damping I) x from a product of its own, or of the matrix if that is exact."""
    exact = matrix is not None and (not H.objective or H.objective.head)
    return b - (matrix @ x if exact else H @ x + damping * x)


@dataclass(frozen=True)
class Solver:
    """What all solvers have.

    damping : added to the diagonal; a number, or "auto" for `spectrum.choose_damping`.
    rtol : the relative residual to reach, or to be judged by; None for 1e-8, or 1e-4 for float32
        products and for differences of gradients, or what the solver says of itself.
    """

    damping: float | str = "auto"
    rtol: float | None = None

    approximate: ClassVar[float | None] = None  # the rtol of a solver that is no exact one

    def usual_rtol(self, H):
        o, rounded = H.objective, H.precision == "float32"
        if o and not o.head:  # LoRA's variables are float32 in a float64 model
            rounded |= by_differences(o) or "float32" in {v.dtype for v in o.variables}
        return self.approximate or (1e-4 if rounded else 1e-8)

    def run(self, H, b):
        """Return x (p, k), and what is known about the solve: a dict for the certificate."""
        raise NotImplementedError


@dataclass(frozen=True)
class Cholesky(Solver):
    """One factorisation of the dense H + damping I.

    np.linalg.LinAlgError where it is not positive definite. A matrix of a network is rounded as its
    products are: it is certified by a fresh one.
    """

    def run(self, H, b):
        a, factor = factored(H, self.damping)
        return factor.solve(b), {"largest": np.abs(a).sum(0).max(), "matrix": a}


def factored(H, damping):
    """Return H + damping I as a matrix (p, p), and its Cholesky factor.

    Undamped, what is flat in a head's loss is filled up: no gradient has a component there.
    """
    a, head = damped(H.dense(), damping), H.objective and H.objective.head
    return a, factor_of(head, a) if head and not damping else Factor(a)


@dataclass(frozen=True)
class Eigh(Solver):
    """x = Q (Lambda + damping)^-1 Q' b from all eigenvalues of the dense H that are not zero.

    Negative ones are no obstacle to the formula; the certificate reports them.
    """

    def run(self, H, b):
        a = damped(H.dense(), self.damping)
        values, q = scipy.linalg.eigh(a)
        zero = len(values) * np.finfo(float).eps * np.abs(values).max()
        inverse = np.divide(1.0, values, out=np.zeros_like(values), where=np.abs(values) > zero)
        known = {"negative": np.full(b.shape[1], values[0] < -zero), "matrix": a}
        return q @ ((q.T @ b) * inverse[:, None]), known | {"spectrum": (values[0], values[-1])}


class Preconditioner(NamedTuple):
    """R -> function(R, *arrays), an approximation of (A + damping I)^-1 R, R (p, k) float64.

    The arrays are arguments and not part of the function, so that a traced loop fits every one of
    them: the same loop serves other weights, dampings and right-hand sides.
    """

    function: Callable
    arrays: tuple = ()

    def __call__(self, r):
        return self.function(r, *self.arrays)


@dataclass(frozen=True)
class CG(Solver):
    """Block conjugate gradients: products with H alone.

    O'Leary 1980 in the form of Dubrulle 2001, preconditioned; one `tf.while_loop`, one product of k
    columns a step. All columns search the space that all of them span, so k right-hand sides take
    no more steps together than the slowest takes alone, and usually fewer. One column is Hestenes &
    Stiefel's CG.
    How this differs from a textbook loop:
    1. vectors and dot products are float64, whatever dtype the product computes in;
    2. directions that depend on others (equal, zero or surplus right-hand sides) are dropped;
    3. d'Ad <= 0 stops the solve and is reported as negative curvature, never divided by;
    4. when every ||r|| <= rtol ||b|| the true residual is computed; columns that missed it (the
       recursive residual drifts in float32) are restarted from it, at most twice.

    precondition : "gauss_newton" (a Cholesky factor of dense G), "nystroem" (a sketch of G, for
        large p), None, a Preconditioner, or a function R (p, k) -> M^-1 R on float64 tensors with M
        symmetric positive definite; "auto" takes Gauss-Newton where it is cheap beside a product.
    """

    max_steps: int = 1000
    precondition: Any = "auto"

    def run(self, H, b):
        precondition = self._preconditioner(H)
        loop = partial(_cg_loop, H.damped, precondition.function)
        run = H.compiled.setdefault(("CG", precondition.function), traced(loop))
        shift = tf.constant(self.damping, tf.float64)
        x, rhs, norms = np.zeros_like(b), b, np.linalg.norm(b, axis=0)
        steps, negative = np.zeros(b.shape[1], int), np.zeros(b.shape[1], bool)
        history, known = [], {"method": "CG" if b.shape[1] == 1 else "block CG"}
        with _bar(self.rtol) as bar:
            number = tf.constant(id(bar), tf.int64)
            for _ in range(3):
                scale = np.linalg.norm(rhs, axis=0)
                scale[scale == 0] = 1
                left = tf.constant(self.max_steps - int(steps.max(initial=0)))
                enough = tf.constant(self.rtol * np.where(norms > 0, norms, 1) / scale)
                start = tf.constant(rhs / scale), shift, enough, left, number
                found = [t.numpy() for t in run(*start, *precondition.arrays)]
                correction, taken, met, residuals, curvatures, factors = found
                x += correction * scale * (norms > 0)  # rounding may leave crumbs of other columns
                steps, negative = steps + taken, negative | met
                seen = residuals * scale / np.where(norms > 0, norms, 1)
                history.append(np.where(rhs.any(0), seen, np.nan)[bool(history) :])
                if "spectrum" not in known and precondition.function is unchanged:
                    known["spectrum"] = _ritz_ends(curvatures, factors)  # else those of M^-1 A
                residual = _residual(H, self.damping, b, x)
                if not np.isfinite(residual).all():
                    raise FloatingPointError(
                        "A product is NaN or infinite: look at the model's losses."
                    )
                missed = (np.linalg.norm(residual, axis=0) > self.rtol * norms) & ~negative
                if not missed.any() or steps.max() >= self.max_steps:
                    break
                rhs = residual * missed
        known |= {"steps": steps, "negative": negative, "history": np.concatenate(history)}
        return x, known | {"residual": residual}

    def _preconditioner(self, H):
        which = self.precondition
        if which == "auto":
            o = H.objective
            cheap = o and not o.head and o.loss.width <= o.p <= DENSE_LIMIT and has_rows(o)
            # a network that is not convolutional takes its products sooner than that matrix
            work = o.loss.width * o.p**2 if cheap else np.inf
            cheap = cheap and work <= 3000 * keras_facts.work_an_example(o.model)
            which = "gauss_newton" if cheap else None
        if which == "gauss_newton":
            which = gauss_newton_preconditioner(H.objective, self.damping)
        elif which == "nystroem":
            which = nystroem_preconditioner(H.objective, self.damping)
        return which if isinstance(which, Preconditioner) else Preconditioner(which or unchanged)


def unchanged(r):
    return r


_BARS = weakref.WeakValueDictionary()


def _bar(rtol):
    """Return a progress bar whose unit is a decade of the residual: CG's way there is about even.

    The number of steps that follows from where it stands after a third of them is right within
    about two. Restarts from the true residual begin where it is full.
    """
    total = -np.log10(np.clip(rtol, 1e-16, 1))
    bar = tqdm(
        total=total, desc="CG", unit="decade", unit_scale=True, smoothing=0, miniters=0, delay=2,
        leave=False,
    )  # fmt: skip
    _BARS[id(bar)] = bar
    return bar


def _advance(number, worst):
    bar = _BARS[int(number)]  # an array where functions run eagerly
    bar.update(max(0.0, bar.total - np.log10(max(1.0, worst)) - bar.n))


def _cg_loop(matvec, precondition, b, damping, stop, max_steps, bar, *arrays):
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
        t = tf.ensure_shape(matvec(s, damping), s.shape)  # of a graph made for any k columns
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
        tf.numpy_function(_advance, (bar, tf.reduce_max(norms / tf.maximum(stop, 1e-16))), ())
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

    It is B D B' with blocks D_i on the diagonal of D, I on that of B and -F_i below (Saad 2003,
    6.7, for one column); of a large one the leading part.
    """
    steps, k = curvatures.shape[:2]
    steps = min(steps, -(-largest // max(k, 1)))
    d, b = scipy.linalg.block_diag(*curvatures[:steps]), np.eye(steps * k)
    alive = np.flatnonzero(np.diag(d))[:largest]
    if not len(alive):
        return np.nan, np.nan
    b[k:, :-k] -= scipy.linalg.block_diag(*factors[: steps - 1])
    b = b[alive]
    values = np.linalg.eigvalsh(b @ d @ b.T)
    return values[0], values[-1]


def gauss_newton_preconditioner(objective, damping):
    """Return (G + damping I)^-1 as a Preconditioner: a Cholesky factor of dense Gauss-Newton.

    It cuts the steps of CG on H several-fold; CG still solves with H itself.
    """
    g = GaussNewton(objective).dense()
    floor = 1e-6 * np.abs(np.diag(g)).mean()
    # TensorFlow's, which other work on the machine slows down less than OpenBLAS's
    factor = tf.linalg.cholesky(damped(g, max(damping, floor)))
    if not np.isfinite(factor).all():  # it has none: the loss is not convex in the outputs
        values, q = np.linalg.eigh(g)
        factor = tf.linalg.cholesky((q * (np.abs(values) + max(damping, floor))) @ q.T)
    return Preconditioner(_cholesky_solve, (factor,))


def _cholesky_solve(r, factor):
    return tf.linalg.cholesky_solve(factor, r)


def nystroem_preconditioner(objective, damping, *, rank=50, seed=0):
    """Return a Preconditioner from a rank-`rank` sketch of the Gauss-Newton matrix, for large p.

    Frangella, Tropp & Udell 2023: P^-1 = (l_r + damping) U (L + damping)^-1 U' + (I - U U'), at the
    cost of `rank` products and p x rank numbers.
    """
    G, rank = GaussNewton(objective), min(rank, objective.p)
    omega, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(objective.p, rank)))
    y = G @ omega
    core, turn = np.linalg.eigh((omega.T @ y + y.T @ omega) / 2)
    keep = core > 100 * np.finfo(G.precision).eps * max(core[-1], 0)  # what the product resolves
    if not keep.any():
        return Preconditioner(unchanged)
    u, singular, _ = np.linalg.svd(y @ (turn[:, keep] / np.sqrt(core[keep])), False)
    values = singular**2 + max(damping, 1e-12 * singular[0] ** 2)
    basis, scale = tf.constant(u), tf.constant((values[-1] / values - 1)[:, None])
    return Preconditioner(_rescale_inside, (basis, scale))


def _rescale_inside(r, basis, scale):
    return r + tf.matmul(basis, scale * tf.matmul(basis, r, transpose_a=True))


@dataclass(frozen=True)
class LiSSA(Solver):
    """The stochastic recursion of Agarwal et al. 2017, with the same limit as every other solver.

    x_0 = b, x_{j+1} = b + x_j - (H_B + damping I) x_j / scale, result x / scale averaged over
    `samples` runs, B a random batch a step. (The code released with Koh & Liang 2017 multiplies its
    damping by scale.) FloatingPointError if it diverges: the scale is too small, or H + damping I
    is not positive definite.

    scale : must exceed half the largest eigenvalue (damping included) of *any sampled batch*; by
        default 1.1 times the largest seen by Lanczos, and for small batches twice the largest of
        20, since 20 are a sample.
    depth : by default ln(1/rtol) scale / lambda_min, at most 20,000.
    batch_size : examples a step; by default all.
    """

    scale: float | None = None
    depth: int | None = None
    batch_size: int | None = None
    samples: int = 1
    seed: int = 0

    approximate: ClassVar[float] = 1e-2

    def run(self, H, b):
        checks.number("rtol", self.rtol, positive=True)
        n = H.objective.n if H.objective else 1
        batch, rng = min(self.batch_size or n, n), np.random.default_rng(self.seed)
        seen = spectrum(H, steps=30)
        scale = self.scale or 1.1 * _largest_eigenvalue(H, batch, n, rng, seen) + self.damping
        low = max(seen.lambda_min + self.damping, 1e-6 * scale)
        depth = self.depth or int(np.clip(np.log(1 / self.rtol) * scale / low, 10, 20_000))
        x, full = np.zeros_like(b), batch == n
        loop = H.compiled.setdefault(("LiSSA", full), traced(partial(_lissa, H, full)))
        numbers = [tf.constant(float(a), H.precision) for a in (self.damping, scale)]
        for _ in range(self.samples):
            rows = tf.constant(rng.integers(0, n, (depth, 0 if full else batch)))
            found = loop(tf.constant(b, H.precision), rows, *numbers)
            x += found.numpy() / scale / self.samples
        if not np.isfinite(x).all():
            raise FloatingPointError(
                f"LiSSA diverged. Either the scale, {scale:.3g}, is below half the largest "
                "eigenvalue of a sampled batch: raise it, or leave it out to have it chosen. Or H "
                "+ damping I is not positive definite: Lanczos saw "
                f"{seen.lambda_min + self.damping:.3g}; raise damping."
            )
        method = f"LiSSA (scale {scale:.3g}, depth {depth}, {self.samples} x batch {batch})"
        return x, {"steps": np.full(b.shape[1], depth * self.samples), "method": method}


def _largest_eigenvalue(H, batch, n, rng, seen):
    """Return the largest eigenvalue of a batch's Hessian that is to be expected."""
    if batch == n:
        return seen.lambda_max
    draws = (rng.integers(0, n, batch) for _ in range(20))
    return 2 * max(
        seen.lambda_max, *(spectrum(H, steps=10, rows=rows).lambda_max for rows in draws)
    )


def _lissa(H, full_batch, b, rows, damping, scale):
    """Run the recursion in one `tf.while_loop`, step j on the examples `rows[j]` or on all."""
    whole = H.product() if full_batch else None

    def step(j, x):
        product = whole if full_batch else H.product(rows[j])
        return j + 1, b + x - (product(x) + damping * x) / scale

    return tf.while_loop(lambda j, x: j < tf.shape(rows)[0], step, (0, b))[1]


@dataclass(frozen=True)
class LowRank(Solver):
    """The `rank` largest eigenpairs and a remainder, never bare.

    x = Q (L + damping)^-1 Q'b + (I - QQ') b / (damping + decay): outside the eigenpairs H is taken
    to be the weight decay of each parameter alone. Truncation without that remainder loses what the
    small eigenvalues carry. Eigenpairs by ARPACK (`scipy.sparse.linalg.eigsh`).
    """

    rank: int = 100

    approximate: ClassVar[float] = 1e-2

    def run(self, H, b):
        p, count = len(b), itertools.count()
        if self.rank >= p:  # nothing is left out
            return Eigh(self.damping).run(H, b)
        rest = self.damping + (H.objective.decay if H.objective else np.zeros(p))
        if rest.min() <= 0:
            raise ValueError(
                "Low rank needs weight decay on every parameter, or damping: without them nothing "
                "is known of the directions left out."
            )
        counted = scipy.sparse.linalg.LinearOperator(
            H.shape, lambda v: (H @ v, next(count))[0], dtype=H.dtype
        )
        start = np.random.default_rng(0).normal(size=p)
        values, q = scipy.sparse.linalg.eigsh(counted, self.rank, which="LA", v0=start)
        inside = q.T @ b
        x = q @ (inside / (values + self.damping)[:, None]) + (b - q @ inside) / rest[:, None]
        return x, {"steps": np.full(b.shape[1], next(count)), "method": f"low rank ({self.rank})"}
