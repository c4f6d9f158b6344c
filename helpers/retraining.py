"""Exact fits of convex heads, and what leaving one training point out really does to them.

The left-out objective keeps the weight decay and averages over n - 1 points (C' = 1/((n-1) wd) in
scikit-learn's terms). With K = H - diag(decay)/n its Hessian at theta is

    H_-i = n/(n-1) (K - (w_i/n) (phi_i phi_i') (x) A_i),

one factorisation of K and a rank-C correction a point (Sherman-Morrison-Woodbury), and its gradient
at the optimum is -(w_i grad loss_i + decay theta)/(n-1). One Newton step from there is the Newton
prediction (Pregibon 1981; Rad & Maleki 2020); repeating it with the same factor to a zero gradient
is the exact refit, all points at once.
"""

from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from tqdm.auto import tqdm

from helpers.head import gemm, gram
from helpers.solvers import Cholesky

TINY = np.finfo(float).tiny
DENSE_FIT = 3_000  # parameters up to which a fit factorises H; beyond, Newton's method uses CG


class Fit(NamedTuple):
    """The end of a fit: gradient norm of L at theta, Newton steps, training loss, and verdict."""

    gradient_norm: float
    steps: int
    training_loss: float
    converged: bool

    def __str__(self):
        word = "converged" if self.converged else "NOT CONVERGED"
        return (
            f"{word}: gradient norm {self.gradient_norm:.1e} after {self.steps} Newton steps, "
            f"training loss {self.training_loss:.6g} nats"
        )


def head_of(objective):
    """Return the objective's head; ValueError where its parameters are no last Dense layer."""
    if objective.head is None:
        raise ValueError(
            "Exact fits need a convex head: bind the objective with parameters='last_layer' to a "
            "Sequential or functional model whose last layer is Dense."
        )
    return objective.head


def fit_head(objective, *, tol=1e-10, max_steps=100):
    """Set the head's parameters to the minimum of L and return a Fit.

    Newton's method with an Armijo line search, float64, until the gradient norm is <= tol. A model
    stored in float32 keeps only 7 digits of it, and the gradient norm says so.
    """
    head = head_of(objective)
    if not (objective.decay > 0).any():
        raise ValueError(
            "Without weight decay a separable problem has no minimum: pass "
            "weight_decay > 0 (the thesis uses 1e-3)."
        )
    theta, steps = newton(head, objective.theta, tol, max_steps)
    objective.theta = theta
    norm = float(np.linalg.norm(head.gradient(objective.theta)))
    return Fit(norm, steps, head.loss(objective.theta), norm <= max(tol, 1e-10))


def newton(head, theta, tol, max_steps, **left_out):
    """Return the theta (p,) that Newton's method reaches from `theta`, and the steps it took.

    `weight` (n,) and `n` replace the head's own, for a fit that leaves points out.
    """
    loss = head.loss(theta, **left_out)
    for step in range(max_steps):
        gradient = head.gradient(theta, **left_out)
        if np.linalg.norm(gradient) <= tol:
            return theta, step
        rtol = min(0.1, np.sqrt(np.linalg.norm(gradient)))  # tighter as the gradient falls
        direction = _newton_direction(head, theta, gradient, left_out, rtol)
        theta, loss = _armijo(head, theta, loss, direction, gradient @ direction, left_out)
    return theta, max_steps


def _newton_direction(head, theta, gradient, left_out, rtol):
    """Return H^-1 g: by Cholesky, or for many parameters by CG to a relative residual of rtol."""
    if len(theta) <= DENSE_FIT:
        return Cholesky(head.hessian(theta, **left_out)).solve(gradient)
    product, p = head.product(theta, **left_out), len(theta)
    operator = scipy.sparse.linalg.LinearOperator((p, p), product, dtype=np.float64)
    return scipy.sparse.linalg.cg(operator, gradient, rtol=rtol)[0]


def _armijo(head, theta, loss, direction, decrease, left_out):
    length = 1.0
    while True:
        trial = theta - length * direction
        trial_loss = head.loss(trial, **left_out)
        # below 1e-14 the loss no longer resolves the step, and Newton's own step is the best one
        if trial_loss <= loss - 1e-4 * length * decrease or decrease < 1e-14 or length < 1e-8:
            return trial, trial_loss
        length /= 2


class Fits(NamedTuple):
    """The ends of many fits: theta (p, k), gradient norms (k,), products spent on each (k,)."""

    theta: np.ndarray
    gradient_norm: np.ndarray
    products: np.ndarray


def fit_many(objective, labels, *, weight=None, start=None, tol=1e-8, batch=32, max_steps=100):
    """Return the Fits of an objective's head to k columns of labels at once.

    Newton's method on every column, each with its own Hessian and Armijo step, the directions by
    conjugate gradients on all columns together: one product of k columns a step, a GEMM where k
    single fits need k matrix-vector products. Features that are mostly zero are multiplied as
    sparse ones; others are whitened first (`_Basis`), which takes a fifth of the products.

    labels : (n, k). weight : (n, k), in the place of the head's own, each column averaged over its
        sum, so that 0 leaves a point out. start : theta (p, k) to begin at, by default zero;
        neighbouring fits of a path are good ones. batch : columns that work together.
    """
    head, (n, k) = head_of(objective), np.shape(labels)
    if n != head.n:
        raise ValueError(f"labels has {n} rows, the objective {head.n} examples.")
    if not (head.decay > 0).all():
        raise ValueError("Fits by conjugate gradients need a weight decay on every parameter.")
    labels = np.asarray(labels, head.y.dtype)
    theta = np.zeros((len(head.decay), k)) if start is None else np.array(start, np.float64)
    share = np.repeat(head.weight[:, None], k, 1) / n if weight is None else weight / weight.sum(0)
    norms, products = np.zeros(k), np.zeros(k, int)
    basis = _basis(head, labels, share, theta)
    bar = tqdm(range(0, k, batch), desc="fits", unit="batch", leave=False)
    for part in (slice(first, first + batch) for first in bar):
        columns = _Columns(head, basis, labels[:, part], share[:, part])
        theta[:, part], norms[part], products[part] = columns.fit(theta[:, part], tol, max_steps)
    return Fits(theta, norms, products)


class _Basis(NamedTuple):
    """Coordinates u of theta in which conjugate gradients work, and the features psi in them.

    Plain: u = theta. Whitened: theta = L^-T u with L L' = phi' diag(pull) phi + decay I, where
    `pull` (n,) is the mean curvature of the columns at their start. There decay theta'theta =
    u'u - sum_i pull_i o_i^2, so a Hessian is the identity plus what its curvature differs by.
    """

    psi: np.ndarray | scipy.sparse.csr_array
    psi_t: np.ndarray | scipy.sparse.csr_array
    decay: np.ndarray
    pull: np.ndarray
    factor: Cholesky | None

    def enter(self, theta):
        return self._turned(theta, "transposed_product")

    def leave(self, u):
        return self._turned(u, "unwhiten")

    def gradient(self, g):
        return self._turned(g, "product")

    def _turned(self, columns, how):
        if self.factor is None:
            return columns
        wide = columns.reshape(self.psi.shape[1], -1)
        return getattr(self.factor, how)(wide).reshape(columns.shape)


def _basis(head, labels, share, theta):
    phi, decay, none = head.phi, head.decay.reshape(head.d, head.c), np.zeros(head.n)
    if np.count_nonzero(phi) < 0.1 * phi.size:
        phi = scipy.sparse.csr_array(phi)
        return _Basis(phi, phi.T.tocsr(), head.decay, none, None)
    if head.d > DENSE_FIT or np.ptp(decay, axis=1).any():
        return _Basis(phi, phi.T, head.decay, none, None)
    some = slice(None, None, -(-labels.shape[1] // 32))
    plain = _Basis(phi, phi.T, head.decay, none, None)
    return _whitened(head, plain, labels[:, some], share[:, some], theta[:, some])


def _whitened(head, plain, labels, share, theta):
    columns = _Columns(head, plain, labels, share)
    a = columns.curvatures(columns.outputs(theta))
    pull = np.maximum(np.einsum("naak->n", a), 0) / (head.c * a.shape[-1])
    matrix = gram(plain.psi, pull)
    matrix[np.diag_indices_from(matrix)] += head.decay[:: head.c]
    factor = Cholesky(matrix)
    psi = np.ascontiguousarray(factor.whiten(plain.psi.T).T)
    return _Basis(psi, psi.T, np.ones(len(theta)), pull, factor)


class _Columns:
    """A head with labels (n, k) and shares (n, k) of its own in each of k columns."""

    def __init__(self, head, basis, labels, share):
        self.head, self.basis, self.labels, self.share = head, basis, labels, share

    def _take(self, columns):
        return _Columns(self.head, self.basis, self.labels[:, columns], self.share[:, columns])

    def _each(self, function, outputs):
        """Return function(y, outputs) (n, ..., k) at the columns' own labels."""
        n, c, k = outputs.shape
        values = function(self.labels.ravel(), np.moveaxis(outputs, 2, 1).reshape(n * k, c))
        return np.moveaxis(values.reshape(n, k, *values.shape[1:]), 1, -1)

    def curvatures(self, outputs):
        return self._each(self.head.curvatures, outputs) * self.share[:, None, None]

    def outputs(self, u):
        (n, d), k = self.basis.psi.shape, u.shape[1]
        return _product(self.basis.psi, u.reshape(d, -1)).reshape(n, self.head.c, k)

    def _back(self, moved, u, outputs):
        """Return psi' (moved - pull outputs) + decay u, (p, k)."""
        if self.basis.factor is not None:
            moved = moved - self.basis.pull[:, None, None] * outputs
        data = _product(self.basis.psi_t, moved.reshape(len(moved), -1)).reshape(u.shape)
        data += self.basis.decay[:, None] * u
        return data

    def _loss(self, u, outputs):
        data = (self.share * self._each(self.head.losses, outputs)).sum(0)
        pulled = self.basis.pull @ (outputs**2).sum(1) if self.basis.factor is not None else 0
        return data + 0.5 * (self.basis.decay @ u**2 - pulled)

    def fit(self, theta, tol, max_steps):
        """Return theta, gradient norms and products of Newton's method on every column."""
        u, products = self.basis.enter(theta).copy(), np.zeros(theta.shape[1], int)
        outputs = self.outputs(u)
        loss = self._loss(u, outputs)
        for _ in range(max_steps):
            residual = self._each(self.head.residuals, outputs) * self.share[:, None]
            gradient = self._back(residual, u, outputs)
            norms = np.linalg.norm(self.basis.gradient(gradient), axis=0)
            left = np.flatnonzero(norms > tol)
            if not len(left):
                break
            some, g = self._take(left), gradient[:, left]
            rtol = np.minimum(0.1, np.sqrt(np.linalg.norm(g, axis=0)))
            direction, moved, spent = some.solve(outputs[..., left], g, rtol)
            length = some._armijo(u, outputs, loss, left, direction, moved, g)
            u[:, left] -= length * direction
            outputs[..., left] -= length * moved
            loss[left] = some._loss(u[:, left], outputs[..., left])
            products[left] += spent
        return self.basis.leave(u), norms, products

    def solve(self, outputs, gradient, rtol):
        """Return H_k^-1 g_k by conjugate gradients, its outputs (n, C, k), and the products."""
        a, norms = self.curvatures(outputs), np.linalg.norm(gradient, axis=0)
        direction, moved = np.zeros_like(gradient), np.zeros_like(outputs)
        stop, spent = rtol * norms, np.zeros(len(norms), int)
        at = np.arange(len(norms))  # the columns at work: now and then the finished ones leave
        x, out, r, d = direction.copy(), moved.copy(), gradient.copy(), gradient.copy()
        rr = (r * r).sum(0)
        while True:
            live = (np.sqrt(rr) > stop[at]) & (spent[at] < 1000)
            if live.sum() <= 0.75 * len(at):
                direction[:, at], moved[..., at] = x, out
                at, rr = at[live], rr[live]
                if not len(at):
                    return direction, moved, spent
                x, out, r, d, a = (v[..., live] for v in (x, out, r, d, a))
                continue
            spent[at] += live
            od = self.outputs(d)
            bent = a[:, 0] * od if self.head.c == 1 else np.einsum("nabk,nbk->nak", a, od)
            hd = self._back(bent, d, od)
            alpha = np.where(live, rr, 0) / np.maximum((d * hd).sum(0), TINY)
            x += alpha * d
            out += alpha * od
            r -= alpha * hd
            new = (r * r).sum(0)
            d *= new / np.maximum(rr, TINY)
            d += r
            rr = new

    def _armijo(self, u, outputs, loss, left, direction, moved, gradient):
        """Return the length (k,) of each column's step: halved until its loss falls enough."""
        decrease, length = (gradient * direction).sum(0), np.ones(len(left))
        for _ in range(40):
            trial = u[:, left] - length * direction
            value = self._loss(trial, outputs[..., left] - length * moved)
            short = (value > loss[left] - 1e-4 * length * decrease) & (decrease > 1e-14)
            if not short.any():
                break
            length[short] /= 2
        return length


class Replacements:
    """Refits of a fitted head after some training points got other features, many at once.

    In each of k refits points of its own have new features; labels stay. What all refits share is
    kept: the features in the coordinates that whiten the clean Hessian, where every refit's Hessian
    is the identity but for its own few points and for the change of curvature.
    """

    def __init__(self, objective):
        head, self.theta = head_of(objective), objective.theta
        if head.d > DENSE_FIT or head.c > 1:
            raise ValueError(f"Replacements need one output and at most {DENSE_FIT} features.")
        self.head, self.share = head, head.weight / head.n
        one = head.y.reshape(-1, 1), self.share[:, None], self.theta[:, None]
        plain = _Basis(head.phi, head.phi.T, head.decay, np.zeros(head.n), None)
        self.basis = _whitened(head, plain, *one)

    def fit(self, rows, owner, phi, *, start=None, tol=1e-10):
        """Return the Fits of k = max(owner) + 1 refits, and solve(g, rtol) -> H_k^-1 g_k, (p, k).

        Training point rows[j] has the features phi[j] in refit owner[j]: rows, owner (K,), phi
        (K, d). start : theta (p, k) to begin at, by default the clean fit's.
        """
        head, k = self.head, int(np.max(owner)) + 1
        labels = np.repeat(np.concatenate([head.y.ravel(), head.y.ravel()[rows]])[:, None], k, 1)
        share = np.repeat(self.share[:, None], k, 1)
        share[rows, owner] = 0
        own = np.zeros((len(rows), k))
        own[np.arange(len(rows)), owner] = self.share[rows]
        psi = np.concatenate([self.basis.psi, self.basis.factor.whiten(phi.T).T])
        pull = np.concatenate([self.basis.pull, np.zeros(len(rows))])
        basis = self.basis._replace(psi=psi, psi_t=psi.T, pull=pull)
        columns = _Columns(head, basis, labels, np.concatenate([share, own]))
        begin = np.repeat(self.theta[:, None], k, 1) if start is None else start
        fits = Fits(*columns.fit(begin, tol, 100))

        def solve(g, rtol=1e-6):
            outputs = columns.outputs(basis.enter(fits.theta))
            white = basis.factor.whiten(g)
            return basis.leave(columns.solve(outputs, white, rtol)[0])

        return fits, solve


def _product(matrix, columns):
    return matrix @ columns if scipy.sparse.issparse(matrix) else gemm(matrix, columns)


class Removals:
    """One factorisation of an objective's head, for every left-out fit of it.

    Attributes
    ----------
    leverage : (n,) largest eigenvalue of (w_i/n) A_i phi_i' K^-1 phi_i, in [0, 1): first-order
        predictions understate the effect of a point by about 1/(1 - leverage).
    """

    def __init__(self, objective):
        self.objective, self.head = objective, head_of(objective)
        head, self.theta = self.head, objective.theta
        k = head.hessian(self.theta)
        k[np.diag_indices_from(k)] -= head.decay / head.n
        self.factor = Cholesky(k)
        self.outputs = head.outputs(head.phi, self.theta)
        self.residual = head.residuals(head.y, self.outputs) * head.weight[:, None]
        self.curvature = head.curvatures(head.y, self.outputs) * head.weight[:, None, None]
        self._decay_theta = head.decay * self.theta
        if head.c == 1:
            self._white = self.factor.whiten(head.phi.T)  # (p, n): L^-1 phi_i
            self._q = (self._white**2).sum(0)  # phi_i' K^-1 phi_i
            self._shift_i = gemm(self._white.T, self.factor.whiten(self._decay_theta))

    @property
    def leverage(self):
        if self.head.c == 1:
            return self.curvature[:, 0, 0] * self._q / self.head.n
        return np.linalg.eigvals(self.curvature @ self.own / self.head.n).real.max(1)

    @cached_property
    def own(self):
        """Q_i = phi_i' K^-1 phi_i of each training point, (n, C, C)."""
        head = self.head
        if head.c == 1:
            return self._q[:, None, None]
        blocks = []
        for rows in np.array_split(np.arange(head.n), -(-head.n // 256)):
            wide = head.phi[rows].T[:, None, :, None] * np.eye(head.c)[None, :, None, :]
            white = self.factor.whiten(wide.reshape(head.d * head.c, -1))
            white = white.reshape(-1, len(rows), head.c).transpose(1, 2, 0)
            blocks.append(white @ white.transpose(0, 2, 1))
        return np.concatenate(blocks)

    def self_influence(self):
        """Return r_i' Q_i r_i (n,): `influence.self_influence` of every point from this factor.

        K lacks 1/n of the weight decay that H has, so the two agree to a relative 1/n.
        """
        return np.einsum("na,nab,nb->n", self.residual, self.own, self.residual)

    def left_out_losses(self):
        """Return the loss of each training point after a Newton step that leaves it out, (n,).

        In closed form: the point's own output moves by (own + Q middle)/n with own = Q r + phi'
        K^-1 decay theta and middle = (I - A Q/n)^-1 A own/n.
        """
        head, eye = self.head, np.eye(self.head.c)
        own = (self.own @ self.residual[..., None])[..., 0]
        own += head.outputs(head.phi, self.factor.solve(self._decay_theta))
        bent = (self.curvature @ own[..., None]) / head.n
        middle = np.linalg.solve(eye - self.curvature @ self.own / head.n, bent)
        shift = (own + (self.own @ middle)[..., 0]) / head.n
        return head.losses(head.y, self.outputs + shift)

    def _pieces(self, rows):
        """Return Z = K^-1 (phi_i (x) I) and the coupling (w_i/n) A_i phi_i' Z, (k, C, C)."""
        head, k = self.head, len(rows)
        blocks = head.phi[rows].T[:, None, :, None] * np.eye(head.c)[None, :, None, :]
        z = self.factor.solve(blocks.reshape(head.d * head.c, -1)).reshape(-1, k, head.c)
        q = np.einsum("kd,dckb->kcb", head.phi[rows], z.reshape(head.d, head.c, k, head.c))
        return _Pieces(z, self.curvature[rows] @ q / head.n)

    def _solve_left_out(self, g, rows, pieces):
        """Return (K - (w_i/n) phi_i A_i phi_i')^-1 g_i for the columns g (p, k)."""
        head, k = self.head, len(rows)
        x = self.factor.solve(g)
        own = np.einsum("kd,dck->kc", head.phi[rows], x.reshape(head.d, head.c, k))
        bent = np.einsum("kab,kb->ka", self.curvature[rows], own)[..., None] / head.n
        middle = np.linalg.solve(np.eye(head.c) - pieces.coupling, bent)[..., 0]
        return x + np.einsum("pkc,kc->pk", pieces.z, middle)

    def newton_steps(self, rows):
        """Return theta_-i - theta by one Newton step on the left-out objective, (p, k)."""
        rows = np.asarray(rows)
        return self._newton_steps(rows, self._pieces(rows))

    def _newton_steps(self, rows, pieces):
        own = self.head.gradients(self.head.phi[rows], self.residual[rows]).T
        return self._solve_left_out(own + self._decay_theta[:, None], rows, pieces) / self.head.n

    def newton_loss_change(self, x_test, y_test, rows=None):
        """Return loss(z_test, theta + Newton step_i) - loss(z_test, theta) in nats, (m, k).

        For the given rows (k,), by default all n training points. Evaluated, not linearised. For
        one output every shift of every test output comes from one GEMM: no solve a point.
        """
        head, every = self.head, rows is None
        rows = np.arange(head.n) if every else np.asarray(rows)
        phi = head.features(x_test, y_test)
        base = head.outputs(phi, self.theta)
        if head.c == 1:
            white = self.factor.whiten(phi.T)
            shift_t = gemm(white.T, self.factor.whiten(self._decay_theta))
            residual = self.residual[rows, 0]
            own = residual * self._q[rows] + self._shift_i[rows]
            bend = self.curvature[rows, 0, 0] / head.n * own / (1 - self.leverage[rows])
            towards = self._white if every else self._white[:, rows]  # no copy of them all
            shift = (gemm(white.T, towards) * (residual + bend) + shift_t[:, None]) / head.n
            moved = base[:, :, None] + shift[:, None, :]
            return head.losses(y_test, moved) - head.losses(y_test, base)[:, None]
        changes = np.empty((len(phi), len(rows)))
        for part in np.array_split(np.arange(len(rows)), max(1, -(-len(rows) // 64))):
            moved = head.outputs(phi, self.theta[:, None] + self.newton_steps(rows[part]))
            changes[:, part] = head.losses(y_test, moved) - head.losses(y_test, base)[:, None]
        return changes

    def exact(self, rows, *, tol=1e-10, batch=None, max_steps=200, checkpoint=None):
        """Return theta_-i, the exact refits without each given training point, (p, k).

        Fixed-factor Newton steps from the Newton prediction, for a batch of points at once, until
        every left-out gradient norm is <= tol; points that contract too slowly get Newton's method
        of their own.

        batch : points at a time; by default what fits the objective's memory budget, at most 500.
        checkpoint : what `runtime.checkpoint(folder)` returned: finished batches are kept there and
            an interrupted run goes on where it was.
        """
        rows = np.asarray(rows)
        batch = batch or min(500, self.objective.affordable_batch(64 * self.head.n * self.head.c))
        head = self.head
        same = [self.theta, head.decay, head.phi.sum(0), head.y, head.weight, tol]
        keep = checkpoint or (lambda numbers, compute: compute())
        parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
        bar = tqdm(parts, desc="leave-one-out refits", unit="batch", leave=False)
        return np.concatenate(
            [keep([*same, p], partial(self._exact, p, tol, max_steps)) for p in bar], axis=1
        )

    def group_newton_step(self, rows):
        """Return theta_-G - theta by one Newton step on the objective without a group, (p,)."""
        left_out = self._without(rows)
        gradient = self.head.gradient(self.theta, **left_out)
        return -_newton_direction(self.head, self.theta, gradient, left_out, 1e-10)

    def exact_groups(self, groups, *, tol=1e-10):
        """Return theta_-G, the exact refit without each group of training points, (p, groups)."""
        bar = tqdm(groups, desc="leave-group-out refits", unit="group", leave=False)
        refits = [newton(self.head, self.theta, tol, 100, **self._without(g))[0] for g in bar]
        return np.stack(refits, axis=1)

    def _without(self, rows):
        weight = self.head.weight.copy()
        weight[rows] = 0.0
        return {"weight": weight, "n": self.head.n - len(np.atleast_1d(rows))}

    def _exact(self, rows, tol, max_steps):
        head, pieces = self.head, self._pieces(rows)
        theta = self.theta[:, None] + self._newton_steps(rows, pieces)
        left = np.arange(len(rows))
        last = np.full(len(rows), np.inf)
        for _ in range(max_steps):
            gradient = self._left_out_gradient(theta[:, left], rows[left])
            norms = np.linalg.norm(gradient, axis=0)
            slow = norms > 0.9 * last[left]
            go = (norms > tol) & ~slow
            for j in left[(norms > tol) & slow]:
                theta[:, j] = self._refit_alone(theta[:, j], rows[j], tol)
            last[left], left = norms, left[go]
            if not len(left):
                return theta
            some = _Pieces(pieces.z[:, left], pieces.coupling[left])
            step = self._solve_left_out(gradient[:, go], rows[left], some)
            theta[:, left] -= step * (head.n - 1) / head.n
        for j in left:
            theta[:, j] = self._refit_alone(theta[:, j], rows[j], tol)
        return theta

    def _left_out_gradient(self, theta, rows):
        """Return the gradient of the objective without point rows[j] at column j, (p, k)."""
        head, k = self.head, len(rows)
        r = head.residuals(head.y, head.outputs(head.phi, theta)) * head.weight[:, None, None]
        r[rows, :, np.arange(k)] = 0.0
        data = gemm(head.phi.T, r.reshape(head.n, -1)).reshape(theta.shape)
        return data / (head.n - 1) + head.decay[:, None] * theta

    def _refit_alone(self, theta, row, tol):
        return newton(self.head, theta, tol, 100, **self._without(row))[0]

    def loss_change(self, thetas, x_test, y_test):
        """Return loss(z_test, theta_k) - loss(z_test, theta) for refits (p, k), (m, k) nats."""
        phi = self.head.features(x_test, y_test)
        base = self.head.losses(y_test, self.head.outputs(phi, self.theta))
        return self.head.losses(y_test, self.head.outputs(phi, thetas)) - base[:, None]


class _Pieces(NamedTuple):
    z: np.ndarray
    coupling: np.ndarray
