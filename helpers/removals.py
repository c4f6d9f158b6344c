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
        self._decay_theta = head.decay * self.theta
        if head.c == 1:
            self._white = self.factor.whiten(head.phi.T)  # (p, n): L^-1 phi_i
            self._q = (self._white**2).sum(0)  # phi_i' K^-1 phi_i
            self._shift_i = gemm(self._white.T, self.factor.whiten(self._decay_theta))

    @cached_property
    def at_minimum(self):
        """Whether theta minimises L: its gradient is below a tenth of one point's largest share."""
        own = np.linalg.norm(self.head.phi, axis=1) * np.linalg.norm(self.residual, axis=1)
        return 10 * np.linalg.norm(self.head.gradient(self.theta)) <= own.max() / self.head.n

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
        residual = self.head.residuals(self.head.y, self.outputs)  # without the weights
        return np.einsum("na,nab,nb->n", residual, self.own, residual)

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
        return z, self.curvature[rows] @ q / head.n

    def _solve_left_out(self, g, rows, z, coupling):
        """Return (K - (w_i/n) phi_i A_i phi_i')^-1 g_i for the columns g (p, k)."""
        head, k = self.head, len(rows)
        x = self.factor.solve(g)
        own = np.einsum("kd,dck->kc", head.phi[rows], x.reshape(head.d, head.c, k))
        bent = np.einsum("kab,kb->ka", self.curvature[rows], own)[..., None] / head.n
        middle = np.linalg.solve(np.eye(head.c) - coupling, bent)[..., 0]
        return x + np.einsum("pkc,kc->pk", z, middle)

    def newton_steps(self, rows):
        """Return theta_-i - theta by one Newton step on the left-out objective, (p, k)."""
        rows = checks.rows(rows, self.head.n)
        return self._newton_steps(rows, *self._pieces(rows))

    def _newton_steps(self, rows, z, coupling):
        own = self.head.gradients(self.head.phi[rows], self.residual[rows]).T
        gradient = own + self._decay_theta[:, None]
        return self._solve_left_out(gradient, rows, z, coupling) / self.head.n

    def newton_loss_change(self, x_test, y_test, rows=None):
        """Return loss(z_test, theta + Newton step_i) - loss(z_test, theta) in nats, (m, k).

        For the given rows (k,), by default all n training points. Evaluated, not linearised. For
        one output every shift of every test output comes from one GEMM: no solve a point.
        """
        head, every = self.head, rows is None
        rows = np.arange(head.n) if every else checks.rows(rows, head.n)
        x_test, y_test = self.objective.examples(x_test, y_test)
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
        ends = [self._judged(thetas[:, :0], tol)]  # where there are no rows
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
        missed = norms > tol
        if missed.any():
            missed &= (np.abs(gradients) > self._rounding).any(0)
        return norms, missed

    def _keep(self, ends, tol):
        """Keep the gradient norms of refits, and warn of those that missed the tolerance.

        ends : what `_judged` returned of each batch.
        """
        norms, missed = (np.concatenate(part) for part in zip(*ends, strict=True))
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
        left_out = [self._without(g) for g in groups]
        bar = tqdm(left_out, desc="leave-group-out refits", unit="group", leave=False)
        refits = [newton(self.head, self.theta, tol, 100, **left)[0] for left in bar]
        pairs = zip(refits, left_out, strict=True)
        ends = [self.head.gradient(theta, **left)[:, None] for theta, left in pairs]
        self._keep([self._judged(end, tol) for end in ends], tol)
        return np.stack(refits, axis=1)

    def _without(self, rows):
        rows, weight = checks.group(rows, self.head.n), self.head.weight.copy()
        weight[rows] = 0.0
        return {"weight": weight, "n": self.head.n - len(rows)}

    def _exact(self, rows, tol, max_steps):
        head, (z, coupling) = self.head, self._pieces(rows)
        theta = self.theta[:, None] + self._newton_steps(rows, z, coupling)
        left = np.arange(len(rows))
        last = np.full(len(rows), np.inf)
        for _ in range(max_steps):
            gradient = self._left_out_gradient(theta[:, left], rows[left])
            norms = np.linalg.norm(gradient, axis=0)
            slow = norms > 0.9 * last[left]
            go = (norms > tol) & ~slow
            for j in left[self._judged(gradient * slow, tol)[1]]:
                theta[:, j] = self._refit_alone(theta[:, j], rows[j], tol)
            last[left], left = norms, left[go]
            if not len(left):
                return theta
            step = self._solve_left_out(gradient[:, go], rows[left], z[:, left], coupling[left])
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
        x_test, y_test = self.objective.examples(x_test, y_test)
        phi = self.head.features(x_test, y_test)
        base = self.head.losses(y_test, self.head.outputs(phi, self.theta))
        return self.head.losses(y_test, self.head.outputs(phi, thetas)) - base[:, None]
