"""A training set that loses most of its children (13): draws, both fits, and what explains them.

N stays in the cohort, n of them in the training data after the loss, m test children, d features,
one parameter each.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.metrics.pairwise import euclidean_distances

from helpers import Removals, fit_head, predicted_loss_change, s_test
from helpers.gradients import per_example_gradients
from studies.leave_one_out import group_effects
from support.models import bound_head


def stratified(cohort, n_class, rng):
    """Return rows (2 n_class,) of the Cohort in random order, n_class readmitted and as many not.

    Among them are 3 readmitted children and 21 others.
    """
    child, again = cohort.child, cohort.table["readmitted"].to_numpy()
    parts = [
        (child & again, 3),
        (child & ~again, 21),
        (~child & again, n_class - 3),
        (~child & ~again, n_class - 21),
    ]
    drawn = [rng.choice(np.flatnonzero(mask), k, replace=False) for mask, k in parts]
    return rng.permutation(np.concatenate(drawn))


def released(cohort, n_class):
    """Return rows (2 n_class,) of the Cohort as the authors' notebook drew them."""
    old, again = np.random.RandomState(2), cohort.table["readmitted"].to_numpy()
    classes = [np.flatnonzero(again), np.flatnonzero(~again)]
    for rows in classes:
        old.shuffle(rows)
    rows = np.concatenate([rows[:n_class] for rows in classes])
    old.shuffle(rows)
    return rows


def healthy_children(cohort, rows):
    """Return the positions in `rows` of children who were not readmitted."""
    return np.flatnonzero(cohort.child[rows] & ~cohort.table["readmitted"].to_numpy()[rows])


class Case(NamedTuple):
    """A model before and one after the training data lost some patients, at their minima.

    x, y : features (N, d) and labels (N,) of all stays; test : rows of the m test children;
    gone : rows of the lost patients; models, fits : Objectives and Fits, before and after;
    logits : (2, m) of the test children, before and after; s : (d, m) s_test of the later model;
    changes : (m, n) nats, predicted change of each child's loss if a training patient is removed.
    """

    x: np.ndarray
    y: np.ndarray
    test: np.ndarray
    gone: np.ndarray
    models: list
    fits: list
    logits: np.ndarray
    s: np.ndarray
    changes: np.ndarray

    @property
    def changed(self):
        """How many decisions on test children the loss changes."""
        before, after = self.logits > 0
        return int((before != after).sum())

    @property
    def misjudged(self):
        """Which test children the later model judges wrongly, positions in `test`."""
        return np.flatnonzero((self.logits[1] > 0) != (self.y[self.test] > 0))


def case(x, y, before, lost, test, weight_decay):
    """Return the Case of training rows `before` that lose those at the positions `lost`."""
    after = np.delete(before, lost)
    models = [bound_head(x[rows], y[rows], weight_decay) for rows in (before, after)]
    fits = [fit_head(model) for model in models]
    logits = np.stack([x[test] @ model.theta for model in models])
    s = s_test(models[1], x[test], y[test]).x
    changes = predicted_loss_change(models[1], s)
    return Case(x, y, test, before[lost], models, fits, logits, s, changes)


def lead(changes, children):
    """Return how far some training patients stand above all others, (k,), for k test children.

    The smallest |influence| of the patients at the positions `children` over the largest of the
    others: above 1, the patients are the most influential ones. changes : (k, n).
    """
    size = np.abs(changes)
    return size[:, children].min(1) / np.delete(size, children, axis=1).max(1)


def share_on_top(changes, children):
    """Return which share of the patients at `children` is among the as many most influential."""
    first = np.argsort(-np.abs(changes), axis=1)[:, : len(children)]
    return np.isin(first, children).mean()


def found_by(case, children, age):
    """Return {way: share of the training children found}, the mean over misjudged test children.

    children : their positions in the training data; age : the column of their feature. A way that
    ranks features finds all of them where this feature comes first, and none where it does not.
    """
    model, x = case.models[1], case.x[case.test[case.misjudged]]
    phi = model.head.phi
    unit = np.where(np.ptp(phi, axis=0) > 0, phi.std(0), 1)
    nearness = 1 / (1 + euclidean_distances(x / unit, phi / unit))
    terms = model.theta * (x - phi.mean(0))
    return {
        "influence": share_on_top(case.changes[case.misjudged], children),
        "neighbours": share_on_top(nearness, children),
        "coefficient x (value - mean)": np.mean(terms.argmax(1) == age),
        "coefficients": float(np.abs(model.theta).argmax() == age),
    }


def put_back(case):
    """Return the changes of the test children's losses if the lost patients come back, (3, m) nats.

    By the sum of first-order predictions, by one Newton step on the larger objective, by the fit.
    """
    full, model = case.models
    x, y = case.x[case.gone], case.y[case.gone]
    own = per_example_gradients(model, x, y) + model.decay * model.theta
    step = np.linalg.solve(full.head.hessian(model.theta), full.head.gradient(model.theta))
    thetas = np.stack([model.theta - step, full.theta], axis=1)
    changes = Removals(model).loss_change(thetas, case.x[case.test], case.y[case.test])
    return np.stack([-(own @ case.s).sum(0) / model.n, *changes.T])


def leave_out(case, rows):
    """Return the same changes (3, m) if the training patients at `rows` are left out."""
    test = case.x[case.test], case.y[case.test]
    return group_effects(case.models[1], [rows], *test)[..., 0]


def lbfgs_path(x, y, weight_decay, steps):
    """Return the parameters after each step of L-BFGS from zero, and the last gradient norm.

    (k + 1, d), k <= steps; the objective is scaled by 1/weight_decay, as in scikit-learn.
    """
    path, scale = [np.zeros(x.shape[1])], 1 / weight_decay

    def objective(theta):
        z = x @ theta
        loss = np.logaddexp(0, z).mean() - (y * z).mean() + weight_decay / 2 * theta @ theta
        return scale * loss, scale * (x.T @ (expit(z) - y) / len(y) + weight_decay * theta)

    how = {"jac": True, "method": "L-BFGS-B", "callback": lambda theta: path.append(theta.copy())}
    options = {"maxiter": steps, "gtol": 1e-8, "ftol": 64 * np.finfo(float).eps}
    minimize(objective, path[0], options=options, **how)
    return np.array(path), np.linalg.norm(objective(path[-1])[1]) / scale
