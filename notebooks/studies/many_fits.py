"""Many fits of one convex head at once: other labels, other weights, or a few other features.

Newton's method on every fit, the directions by conjugate gradients on all columns together: a
product of k columns is one GEMM, where k single fits need k matrix-vector products.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse
from sklearn.utils import gen_batches
from tqdm.auto import tqdm

from helpers import checks
from helpers.fit import DENSE_FIT, head_of
from helpers.linalg import Factor, damped, gemm, gram

TINY = np.finfo(float).tiny


class Fits(NamedTuple):
    """The ends of many fits: theta (p, k), gradient norms (k,)."""

    theta: np.ndarray
    gradient_norm: np.ndarray


def fit_many(objective, labels, *, weight=None, start=None, tol=1e-8, batch=32):
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
    labels, given = np.asarray(labels).astype(head.y.dtype), np.asarray(labels)
    if (labels != given).any():
        raise ValueError(f"Labels of type {given.dtype} are cut to the objective's {head.y.dtype}.")
    checks.labels(objective.loss.object, labels.ravel(), (labels.size, head.c))
    theta = np.zeros((len(head.decay), k)) if start is None else np.array(start, np.float64)
    share = np.repeat(head.weight[:, None], k, 1) / n if weight is None else weight / weight.sum(0)
    norms, basis = np.zeros(k), _basis(head, labels, share, theta)
    for part in tqdm([*gen_batches(k, batch)], desc="fits", unit="batch", leave=False):
        columns = _Columns(head, basis, labels[:, part], share[:, part])
        theta[:, part], norms[part] = columns.fit(theta[:, part], tol)
    return Fits(theta, norms)


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
    factor: Factor | None

    def enter(self, theta):
        return self._turned(theta, lambda b: self.factor.lower.T @ b)

    def leave(self, u):
        return self._turned(u, lambda b: self.factor.unwhiten(b))

    def gradient(self, g):
        return self._turned(g, lambda b: self.factor.lower @ b)

    def _turned(self, columns, turn):
        if self.factor is None:
            return columns
        return turn(columns.reshape(self.psi.shape[1], -1)).reshape(columns.shape)


def _basis(head, labels, share, theta):
    if np.count_nonzero(head.phi) < 0.1 * head.phi.size:
        phi = scipy.sparse.csr_array(head.phi)
        return _Basis(phi, phi.T.tocsr(), head.decay, np.zeros(head.n), None)
    some = slice(None, None, -(-labels.shape[1] // 32))
    return _whitened(head, labels[:, some], share[:, some], theta[:, some])


def _whitened(head, labels, share, theta):
    a = _Columns(head, None, labels, share).curvatures(head.outputs(head.phi, theta))
    pull = np.maximum(np.einsum("naak->n", a), 0) / (head.c * a.shape[-1])
    factor = Factor(damped(gram(head.phi, pull), head.decay[:: head.c]))
    psi = np.ascontiguousarray(factor.whiten(head.phi.T).T)
    return _Basis(psi, psi.T, np.ones(len(theta)), pull, factor)


class _Columns:
    """A head with labels (n, k) and shares (n, k) of its own in each of k columns."""

    def __init__(self, head, basis, labels, share):
        self.head, self.basis, self.labels, self.share = head, basis, labels, share

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
        moved = moved - self.basis.pull[:, None, None] * outputs
        data = _product(self.basis.psi_t, moved.reshape(len(moved), -1)).reshape(u.shape)
        data += self.basis.decay[:, None] * u
        return data

    def _loss(self, u, outputs):
        data = (self.share * self._each(self.head.losses, outputs)).sum(0)
        return data + 0.5 * (self.basis.decay @ u**2 - self.basis.pull @ (outputs**2).sum(1))

    def fit(self, theta, tol):
        """Return the Fits that at most 100 steps of Newton's method on every column reach."""
        u = self.basis.enter(theta).copy()
        outputs = self.outputs(u)
        loss = self._loss(u, outputs)
        for _ in range(100):
            residual = self._each(self.head.residuals, outputs) * self.share[:, None]
            gradient = self._back(residual, u, outputs)
            norms = np.linalg.norm(self.basis.gradient(gradient), axis=0)
            left = np.flatnonzero(norms > tol)
            if not len(left):
                break
            some = _Columns(self.head, self.basis, self.labels[:, left], self.share[:, left])
            g = gradient[:, left]
            rtol = np.minimum(0.1, np.sqrt(np.linalg.norm(g, axis=0)))
            direction, moved = some.solve(outputs[..., left], g, rtol)
            now = u[:, left], outputs[..., left], loss[left]
            u[:, left], outputs[..., left], loss[left] = some._armijo(*now, direction, moved, g)
        return Fits(self.basis.leave(u), norms)

    def solve(self, outputs, gradient, rtol):
        """Return H_k^-1 g_k by at most 1,000 conjugate gradients, and its outputs (n, C, k)."""
        a, norms = self.curvatures(outputs), np.linalg.norm(gradient, axis=0)
        direction, moved = np.zeros_like(gradient), np.zeros_like(outputs)
        at = np.arange(len(norms))  # the columns at work: now and then the finished ones leave
        x, out, r, d = direction.copy(), moved.copy(), gradient.copy(), gradient.copy()
        rr = (r * r).sum(0)
        for _ in range(1000):
            live = np.sqrt(rr) > (rtol * norms)[at]
            if live.sum() <= 0.75 * len(at):
                direction[:, at], moved[..., at] = x, out
                at, rr = at[live], rr[live]
                x, out, r, d, a = (v[..., live] for v in (x, out, r, d, a))
                live = live[live]
            if not len(at):
                break
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
        direction[:, at], moved[..., at] = x, out
        return direction, moved

    def _armijo(self, u, outputs, loss, direction, moved, gradient):
        """Return u, outputs, loss after each column's step: halved until its loss falls enough."""
        decrease, length = (gradient * direction).sum(0), np.ones(len(loss))
        for _ in range(40):
            trial = u - length * direction, outputs - length * moved
            value = self._loss(*trial)
            short = (value > loss - 1e-4 * length * decrease) & (decrease > 1e-14)
            if not short.any():
                break
            length[short] /= 2
        return *trial, value


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
        self.basis = _whitened(head, *one)

    def fit(self, rows, owner, phi, *, start=None, tol=1e-10):
        """Return the Fits of k = max(owner) + 1 refits, and solve(g, rtol) -> H_k^-1 g_k, (p, k).

        Training point rows[j] has the features phi[j] in refit owner[j]: rows, owner (K,), phi
        (K, d). start : theta (p, k) to begin at, by default the clean fit's.
        """
        head, k, rows = self.head, int(np.max(owner)) + 1, checks.rows(rows, self.head.n)
        every = np.r_[: head.n, rows]  # a replaced point stays where it was, with no share
        labels, share = (np.repeat(a[every, None], k, 1) for a in (head.y.ravel(), self.share))
        share[rows, owner] = 0
        share[head.n :] *= np.equal.outer(owner, np.arange(k))
        psi = np.concatenate([self.basis.psi, self.basis.factor.whiten(phi.T).T])
        pull = np.concatenate([self.basis.pull, np.zeros(len(rows))])
        basis = self.basis._replace(psi=psi, psi_t=psi.T, pull=pull)
        columns = _Columns(head, basis, labels, share)
        begin = np.repeat(self.theta[:, None], k, 1) if start is None else start
        fits = columns.fit(begin, tol)

        def solve(g, rtol=1e-6):
            outputs = columns.outputs(basis.enter(fits.theta))
            white = basis.factor.whiten(g)
            return basis.leave(columns.solve(outputs, white, rtol)[0])

        return fits, solve


def _product(matrix, columns):
    return matrix @ columns if scipy.sparse.issparse(matrix) else gemm(matrix, columns)
