"""Leave-one-out of a linear head (05): other ways to predict, and what spoils them.

n training points, m test points, d features, p parameters; changes of losses are in nats.
"""

from functools import partial

import numpy as np
from scipy.sparse.linalg import eigsh
from sklearn.linear_model import LogisticRegression

from helpers import Cholesky, Hessian, LiSSA, Removals, predicted_loss_change, s_test, solve
from helpers.gradients import per_example_gradients


def refits(removals, rows, keep, size=500):
    """Return the exact refits (p, k) without each training point of rows (k,), in parts of `size`.

    removals : of a head; keep : a `stored.checkpoint`, so that a run goes on where it was.
    """
    head, parts = removals.head, np.split(rows, range(size, len(rows), size))
    loss = removals.objective.loss.object
    same = [loss, removals.theta, head.decay, head.phi, head.y, head.weight]
    ends = [keep([*same, part], partial(removals.exact, part)) for part in parts]
    return np.concatenate(ends, axis=1)


def by_lissa(objective, x, y, samples):
    """Return {setting: predicted changes (n,)} of one test point's loss, LiSSA for the solve.

    The scale is chosen from the spectrum and a step sees up to 5,000 examples; or everything is as
    in the paper: one example a step, 5,000 steps, scale 25, the mean of `samples` repetitions.
    """
    gradient = per_example_gradients(objective, x[None], y[None])[0]
    chosen = {"batch_size": min(objective.n, 5000), "rtol": 0.02}
    papers = {"batch_size": 1, "depth": 5000, "scale": 25, "samples": samples, "rtol": 0.5}
    changes = {}
    for name, options in {"LiSSA, scale chosen": chosen, "LiSSA as in the paper": papers}.items():
        solution = solve(objective, gradient, LiSSA(**options))
        changes[name] = predicted_loss_change(objective, solution)[0]
    return changes


def spoilt(objective, x, y, weight_decay):
    """Return {cause: predicted changes (m, n)}, first order with one thing spoilt in each."""
    hessian = Hessian(objective).dense()
    gradients = per_example_gradients(objective, x, y).T
    values, vectors = eigsh(hessian, 200, v0=np.ones(len(hessian)))
    solutions = {}
    for k in (1, 10):
        solution = solve(hessian, gradients, Cholesky(k * weight_decay))
        solutions[f"damping of {k} x weight decay"] = solution
    for rank in (50, 200):
        kept = vectors[:, -rank:]
        solution = kept @ ((kept.T @ gradients) / values[-rank:, None])
        solutions[f"the {rank} largest eigenvalues alone"] = solution
    changes = {name: predicted_loss_change(objective, s) for name, s in solutions.items()}
    theta, rate = np.zeros(objective.p), 1 / (1.05 * values[-1])  # of gradient descent from zero
    for _ in range(20):
        theta -= rate * objective.head.gradient(theta)
    with objective.at(theta):
        unfinished = predicted_loss_change(objective, s_test(objective, x, y))
    return changes | {"training stopped after 20 steps": unfinished}


def groups(kinds, seed):
    """Return {name: rows} of training points to leave out together; kinds : (n,) labels.

    Random groups of 20 to 400, as far as n goes, and each of the first six kinds; of a kind that is
    more than a quarter of the data, a random quarter of n.
    """
    rng, n = np.random.default_rng([seed, 6]), len(kinds)
    sizes = [size for size in (20, 60, 200, 400) if size < n]
    chosen = {f"{size} random": rng.choice(n, size, replace=False) for size in sizes}
    for kind in np.unique(kinds)[:6]:
        rows = np.flatnonzero(kinds == kind)
        chosen[kind] = rows if len(rows) <= n // 4 else rng.choice(rows, n // 4, replace=False)
    return chosen


def group_effects(objective, groups, x, y):
    """Return the changes (3, m, k) of m test losses, nats, without each of k groups of rows.

    By the sum of first order, by one Newton step on the objective without the group, by the refit.
    """
    removals = Removals(objective)
    changes = predicted_loss_change(objective, s_test(objective, x, y))
    steps = np.transpose([removals.theta + removals.group_newton_step(rows) for rows in groups])
    ends = [removals.loss_change(thetas, x, y) for thetas in (steps, removals.exact_groups(groups))]
    return np.stack([np.transpose([changes[:, rows].sum(1) for rows in groups]), *ends])


def refit_with_sklearn(x, y, weight_decay, rows):
    """Fit scikit-learn's logistic regression without each of the given rows, one by one."""
    c = 1 / ((len(y) - 1) * weight_decay)
    for i in rows:
        model = LogisticRegression(C=c, fit_intercept=False, tol=1e-8, solver="newton-cholesky")
        model.fit(np.delete(x, i, axis=0), np.delete(y, i))
