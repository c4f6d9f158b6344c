"""What leaving a training point out really does to a convex head.

The left-out objective keeps the weight decay and averages over n - 1 points (C' = 1/((n-1) wd) in
scikit-learn's terms). With K = H - diag(decay)/n its Hessian at theta is

    H_-i = n/(n-1) (K - (w_i/n) (phi_i phi_i') (x) A_i),

one factorisation of K and a rank-C correction a point (Sherman-Morrison-Woodbury), and its gradient
at the optimum is -(w_i grad loss_i + decay theta)/(n-1). One Newton step from there is the Newton
prediction (Pregibon 1981; Rad & Maleki 2020); repeating it with the same factor to a zero gradient
is the exact refit, all points at once.
"""

import warnings
from functools import cached_property

import numpy as np
from tqdm.auto import tqdm

from . import checks, derivatives
from .fit import factor_of, head_of, newton, newton_direction
from .linalg import damped, gemm


class Removals:
    """One factorisation of an objective's head, for every left-out fit of it.

    Attributes
    ----------
    gradient_norms : of the refits that `exact` or `exact_groups` returned last, (k,).
    leverage : (n,) largest eigenvalue of (w_i/n) A_i phi_i' K^-1 phi_i, in [0, 1): first-order
        predictions understate the effect of a point by about 1/(1 - leverage).
    """

    def __init__(self, objective):
        self.objective, self.head = objective, head_of(objective)
        if objective.loss.counted is not None:
            raise ValueError(
                "The loss ignores some of the labels: leave those examples out of x and y, since "
                "refits average over all."
            )
        head, self.theta = self.head, objective.theta
        k = damped(head.hessian(self.theta), -head.decay / head.n)
        self.factor, self.gradient_norms = factor_of(head, k), np.zeros(0)
        derivatives.warn_of_doubts(objective)
        self.outputs = head.outputs(head.phi, self.theta)
        self.residual = head.residuals(head.y, self.outputs) * head.weight[:, None]
        self.curvature = np.concatenate([a for _, a in head.curvatures_in_parts(self.theta)])
        self.curvature *= head.weight[:, None, None]
        self._pull = self.factor.solve(head.decay * self.theta)  # K^-1 decay theta

    @cached_property
    def at_minimum(self):
        """Whether theta minimises L: its gradient is below a tenth of one point's largest share."""
        own = np.linalg.norm(self.head.phi, axis=1) * np.linalg.norm(self.residual, axis=1)
        return 10 * np.linalg.norm(self.head.gradient(self.theta)) <= own.max() / self.head.n

    @property
    def leverage(self):
        return np.linalg.eigvals(self.curvature @ self.own / self.head.n).real.max(1)

    @cached_property
    def own(self):
        """Q_i = phi_i' K^-1 phi_i of each training point, (n, C, C)."""
        return self._own_of(np.arange(self.head.n))

    def _own_of(self, rows):
        """Return Q_i of some training points, (k, C, C)."""
        blocks = []
        for part in np.array_split(rows, max(1, -(-len(rows) // 256))):
            white = self.factor.whiten(self._wide(self.head.phi[part]))
            white = white.reshape(len(white), len(part), self.head.c).transpose(1, 2, 0)
            blocks.append(white @ white.transpose(0, 2, 1))
        return np.concatenate(blocks)

    def _wide(self, phi):
        """Return phi_i (x) I of each row, side by side: (p, k C)."""
        wide = phi.T[:, None, :, None] * np.eye(self.head.c)[None, :, None, :]
        return wide.reshape(len(self.theta), -1)

    def _bent(self, rows, own, moved):
        """Return (I - A_i Q_i/n)^-1 A_i moved_i/n, (k, C): Woodbury's term for outputs moved."""
        a = self.curvature[rows] / self.head.n
        return np.linalg.solve(np.eye(self.head.c) - a @ own, a @ moved[..., None])[..., 0]

    def _directions(self, rows, own):
        """Return d_i (k, C): a Newton step without point i is K^-1 (phi_i (x) d_i + decay theta)/n.

        Without the term that its curvature adds, d_i would be its residual.
        """
        head, residual = self.head, self.residual[rows]
        moved = np.einsum("kab,kb->ka", own, residual) + head.outputs(head.phi[rows], self._pull)
        return residual + self._bent(rows, own, moved)

    def self_influence(self):
        """Return r_i' Q_i r_i (n,): `influence.self_influence` of every point from this factor.

        K lacks 1/n of the weight decay that H has, so the two agree to a relative 1/n.
        """
        residual = self.head.residuals(self.head.y, self.outputs)  # without the weights
        return np.einsum("na,nab,nb->n", residual, self.own, residual)

    def left_out_losses(self):
        """Return the loss of each training point after a Newton step that leaves it out, (n,)."""
        head, directions = self.head, self._directions(slice(None), self.own)
        shift = np.einsum("nab,nb->na", self.own, directions) + head.outputs(head.phi, self._pull)
        return head.losses(head.y, self.outputs + shift / head.n)

    def newton_steps(self, rows):
        """Return theta_-i - theta by one Newton step on the left-out objective, (p, k)."""
        rows = checks.rows(rows, self.head.n)
        return self._newton_steps(rows, self._own_of(rows))

    def _newton_steps(self, rows, own):
        gradients = self.head.gradients(self.head.phi[rows], self._directions(rows, own))
        return (self.factor.solve(gradients.T) + self._pull[:, None]) / self.head.n

    def newton_loss_change(self, x_test, y_test, rows=None):
        """Return loss(z_test, theta + Newton step_i) - loss(z_test, theta) in nats, (m, k).

        For the given rows (k,), by default all n training points. Evaluated, not linearised. K^-1
        is applied to the test features, so that there is no solve a training point.
        """
        head, every = self.head, rows is None
        rows = slice(None) if every else checks.rows(rows, head.n)  # no copy of them all
        directions = self._directions(rows, self.own if every else self._own_of(rows))
        x_test, y_test = self.objective.examples(x_test, y_test)
        phi, (k, c) = head.features(x_test, y_test), directions.shape
        changes = np.empty((len(phi), k))
        size = self.objective.data.affordable(24 * c * c * (head.d + k))
        for start in range(0, len(phi), size):
            part = slice(start, start + size)
            asked, y = phi[part], y_test[part]
            towards = self.factor.solve(self._wide(asked)).reshape(head.d, -1)
            towards = gemm(head.phi[rows], towards).reshape(k, c, len(asked), c)
            shift = np.einsum("ka,kamb->mbk", directions, towards)
            shift += head.outputs(asked, self._pull)[..., None]
            before = head.outputs(asked, self.theta)
            after = head.losses(y, before[..., None] + shift / head.n)
            changes[part] = after - head.losses(y, before)[:, None]
        return changes

    def exact(self, rows, *, tol=1e-10, batch=None, max_steps=200):
        """Return theta_-i, the exact refits without each given training point, (p, k).

        Fixed-factor Newton steps from the Newton prediction, for a batch of points at once, until
        every left-out gradient norm is <= tol; points that contract too slowly get Newton's method
        of their own.

        batch : points at a time; by default what fits the objective's memory budget, at most 500.
        """
        rows, tol = checks.rows(rows, self.head.n), checks.number("tol", tol)
        batch = batch or min(500, self.objective.data.affordable(64 * self.head.n * self.head.c))
        thetas = np.empty((len(self.theta), len(rows)))
        ends = []
        starts = range(0, len(rows), batch)
        for start in tqdm(starts, desc="leave-one-out refits", unit="batch", leave=False):
            part = slice(start, start + batch)
            thetas[:, part] = end = self._exact(rows[part], tol, max_steps)
            ends.append(self._judged(self._left_out_gradient(end, rows[part]), tol))
        self._keep(ends, tol)
        return thetas

    @cached_property
    def _rounding(self):
        return self.head.rounding(self.theta)[:, None]

    def _judged(self, gradients, tol):
        """Return the norms (k,) of left-out gradients (p, k), and which of them missed tol.

        A gradient that is no larger than what rounding leaves of it has not missed.
        """
        norms = np.linalg.norm(gradients, axis=0)
        missed = ~(norms <= tol)  # NaN has missed too
        if missed.any():
            missed &= ~(np.abs(gradients) <= self._rounding).all(0)
        return norms, missed

    def _keep(self, ends, tol):
        """Keep the gradient norms of refits, and warn of those that missed the tolerance.

        ends : what `_judged` returned of each batch.
        """
        nothing = np.zeros(0), np.zeros(0, bool)
        norms, missed = (np.concatenate(part) for part in zip(nothing, *ends, strict=True))
        self.gradient_norms = norms
        if not self.at_minimum:
            warnings.warn(
                "theta is not where the training loss is smallest, so a refit also does the rest "
                "of the training, whatever is left out: fit_head(objective) first.",
                stacklevel=3,
            )
        if missed.any():
            warnings.warn(
                f"{missed.sum()} of {len(norms)} refits did not reach the gradient norm {tol:.0e}: "
                f"the largest is {norms.max():.1e} (Removals.gradient_norms has all).",
                stacklevel=3,
            )

    def group_newton_step(self, rows):
        """Return theta_-G - theta by one Newton step on the objective without a group, (p,)."""
        left_out = self._without(rows)
        gradient = self.head.gradient(self.theta, **left_out)
        return -newton_direction(self.head, self.theta, gradient, left_out, 1e-10)

    def exact_groups(self, groups, *, tol=1e-10):
        """Return theta_-G, the exact refit without each group of training points, (p, groups).

        A group is numbers of training points, or a boolean mask (n,); a point counts once.
        """
        left_out, tol = [self._without(g) for g in groups], checks.number("tol", tol)
        bar = tqdm(left_out, desc="leave-group-out refits", unit="group", leave=False)
        thetas, ends = np.empty((len(self.theta), len(left_out))), []
        for k, left in enumerate(bar):
            thetas[:, k] = newton(self.head, self.theta, tol, 100, **left)[0]
            ends.append(self._judged(self.head.gradient(thetas[:, k], **left)[:, None], tol))
        self._keep(ends, tol)
        return thetas

    def _without(self, rows):
        rows, weight = checks.group(rows, self.head.n), self.head.weight.copy()
        weight[rows] = 0.0
        return {"weight": weight, "n": self.head.n - len(rows)}

    @np.errstate(over="ignore", invalid="ignore")  # such refits are done anew, by Newton's method
    def _exact(self, rows, tol, max_steps):
        head, k = self.head, len(rows)
        z = self.factor.solve(self._wide(head.phi[rows])).reshape(-1, k, head.c)
        own = np.einsum("kd,dckb->kcb", head.phi[rows], z.reshape(head.d, head.c, k, head.c))
        theta = self.theta[:, None] + self._newton_steps(rows, own)
        left, last = np.arange(k), np.full(k, np.inf)
        for step in range(max_steps + 1):
            gradient = self._left_out_gradient(theta[:, left], rows[left])
            norms = np.linalg.norm(gradient, axis=0)
            slow = ~np.isfinite(norms) | (norms > (0.9 * last[left] if step < max_steps else 0))
            go = (norms > tol) & ~slow
            for j in left[slow & self._judged(gradient, tol)[1]]:
                alone = self._without(rows[j])
                theta[:, j] = newton(head, self.theta, tol, 100, **alone)[0]
            last[left], left = norms, left[go]
            if not len(left):
                break
            step = self._solve_left_out(gradient[:, go], rows[left], z[:, left], own[left])
            theta[:, left] -= step * (head.n - 1) / head.n
        return theta

    def _solve_left_out(self, g, rows, z, own):
        """Return (K - (w_i/n) phi_i A_i phi_i')^-1 g_i for the columns g (p, k)."""
        head, x = self.head, self.factor.solve(g)
        moved = np.einsum("kd,dck->kc", head.phi[rows], x.reshape(head.d, head.c, -1))
        return x + np.einsum("pkc,kc->pk", z, self._bent(rows, own, moved))

    def _left_out_gradient(self, theta, rows):
        """Return the gradient of the objective without point rows[j] at column j, (p, k)."""
        head, k = self.head, len(rows)
        r = head.residuals(head.y, head.outputs(head.phi, theta)) * head.weight[:, None, None]
        r[rows, :, np.arange(k)] = 0.0
        data = gemm(head.phi.T, r.reshape(head.n, -1)).reshape(theta.shape)
        return data / (head.n - 1) + head.decay[:, None] * theta

    def loss_change(self, thetas, x_test, y_test):
        """Return loss(z_test, theta_k) - loss(z_test, theta) for refits (p, k), (m, k) nats."""
        x_test, y_test = self.objective.examples(x_test, y_test)
        phi = self.head.features(x_test, y_test)
        base = self.head.losses(y_test, self.head.outputs(phi, self.theta))
        return self.head.losses(y_test, self.head.outputs(phi, thetas)) - base[:, None]
