"""Which training pictures carry a test set (09): tallies, orders and what their first k teach.

n training points, m test points, d features; influences (m, n) are changes of test losses in nats.
"""

import warnings

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist
from scipy.special import expit
from sklearn.neural_network import MLPClassifier

from helpers import predicted_loss_change, s_test
from support import vehicles


def tally(changes, same, k):
    """Return a table (n rows) of counts and sums over test points, of influences (m, n).

    Columns are <what>_count and <what>_sum, with _same or _other before the last word for test
    points of the same class or the other. What: positive, negative, zero, top (among the k most
    helpful of a test point), bottom (the k most harmful). same : (m, n), whether labels agree.
    """
    masks = {"positive": changes > 0, "negative": changes < 0, "zero": changes == 0}
    masks |= {"top": _first(-changes, k), "bottom": _first(changes, k)}
    columns = {}
    for name, mask in masks.items():
        for whose, part in {"": mask, "_same": mask & same, "_other": mask & ~same}.items():
            columns[f"{name}{whose}_count"] = part.sum(0)
            columns[f"{name}{whose}_sum"] = np.einsum("mn,mn->n", part, changes)
    return pd.DataFrame(columns)


def _first(values, k):
    mask = np.zeros(values.shape, bool)
    np.put_along_axis(mask, np.argpartition(values, k, axis=1)[:, :k], True, axis=1)
    return mask


def by_places(table):
    """Return the rows of a tally, the one most often in a top k first; ties by summed influence."""
    return np.lexsort((-table["top_sum"], -table["top_count"]))


def effective_number(a):
    """Return how many equal shares would be as concentrated as the shares a (n,)."""
    return a.sum() ** 2 / (a**2).sum()


# ---------------------------------------------------------------- subsets


def split_halves(m, splits, rng):
    """Return (choosing, scoring), each (2 splits, m / 2): halves of m test points, both ways."""
    pairs = [np.split(rng.permutation(m), 2) for _ in range(splits)]
    choosing = np.array([half for pair in pairs for half in pair])
    return choosing, np.array([half for one, two in pairs for half in (two, one)])


def chosen_orders(changes, same, y, choosing, size):
    """Return {rule: (halves, size)}: training points by influence on each choosing half."""
    rules = {}
    for half in choosing:
        some = changes[half]
        orders = {
            "most often in a top five": by_places(tally(some, same[half], 5)),
            "largest sum of |influence|": np.argsort(-np.abs(some).sum(0)),
            "largest sum of influence": np.argsort(-some.sum(0)),
        }
        for rule, order in orders.items():
            rules.setdefault(rule, []).append(_in_turn(order, y, size))
    return {rule: np.array(orders) for rule, orders in rules.items()}


def rival_orders(x, y, size, random, rng):
    """Return {rule: (orders, size)}: one by distance to the class's centroid, `random` others."""
    centroid = np.stack([x[y == c].mean(0) for c in (0, 1)])
    distance = np.linalg.norm(x - centroid[y.astype(int)], axis=1)
    drawn = [_in_turn(rng.permutation(len(x)), y, size) for _ in range(random)]
    nearest = _in_turn(np.argsort(distance), y, size)[None]
    return {"nearest to the centroid": nearest, "random": np.array(drawn)}


def _in_turn(order, y, size):
    """Return the first points of an order, one class after the other, (size,)."""
    return np.stack([order[y[order] == c][: size // 2] for c in (0, 1)], axis=1).ravel()


def fit_first(kernel, y, weight_decay):
    """Fit logistic heads on kernels (B, k, k), labels y (B, k): theta = X' a.

    Returns a (B, k) and the largest gradient norm, by Newton's method until 1e-10.
    """
    a, k = np.zeros(y.shape), y.shape[1]
    for _ in range(50):
        p = expit((kernel @ a[..., None])[..., 0])
        r = (p - y) / k + weight_decay * a
        norm = np.sqrt(np.einsum("bi,bij,bj->b", r, kernel, r).max())
        if norm <= 1e-10:
            break
        system = (p * (1 - p) / k)[..., None] * kernel + weight_decay * np.eye(k)
        a -= np.linalg.solve(system, r[..., None])[..., 0]
    return a, norm


def learning_curves(data, orders, sizes, weight_decay):
    """Return what heads on the first k points of each of B orders know, for each k of `sizes`.

    losses (sizes, B, m) of the test points, right (B, m) with the last k, and the largest gradient
    norm of all fits.
    """
    kernel, test_kernel = data.x_train @ data.x_train.T, data.x_test @ data.x_train.T
    losses, norms = np.empty((len(sizes), len(orders), len(data.x_test)), np.float32), []
    for j, k in enumerate(sizes):
        rows = orders[:, :k]
        gram = kernel[rows[:, :, None], rows[:, None, :]]
        a, norm = fit_first(gram, data.y_train[rows], weight_decay)
        weights = np.zeros((len(orders), len(kernel)))
        np.put_along_axis(weights, rows, a, axis=1)
        logits = weights @ test_kernel.T
        losses[j] = np.logaddexp(0, (1 - 2 * data.y_test) * logits)
        norms.append(norm)
    return losses, (logits > 0) == (data.y_test == 1), max(norms)


def over_halves(values, scoring, chosen):
    """Return means of values (..., B, m) over scoring halves (h, m / 2).

    chosen : order b was chosen on half b, and is scored on its scoring half only: (..., h); else
    each order is scored on every one: (..., B, h).
    """
    average = np.zeros((values.shape[-1], len(scoring)))
    average[scoring.T, np.arange(len(scoring))] = 1 / scoring.shape[1]
    means = values @ average
    return np.diagonal(means, axis1=-2, axis2=-1) if chosen else means


def network_accuracy(train, test, seed, weight_decay):
    """Return the test accuracy of eight ReLU units after about 500 steps of plain gradient descent.

    train, test : (pixels (n, d), labels (n,)); a step sees 100 pictures, or all of fewer.
    """
    n = len(train[0])
    batch = min(100, n)
    options = {"solver": "sgd", "learning_rate_init": 0.01, "momentum": 0.0, "alpha": weight_decay}
    options |= {"batch_size": batch, "max_iter": round(500 / -(-n // batch)), "tol": 0}
    network = MLPClassifier((8,), **options, n_iter_no_change=1000, random_state=seed)
    with warnings.catch_warnings(action="ignore"):  # that the steps are not the end, which we know
        return network.fit(*train).score(*test)


# ---------------------------------------------------------------- kinds and clusters


def kinds_and_mixtures(data, seed, *, smallest=100, mixtures=5):
    """Return {name: (rows, test rows)}, equally many airplanes and cars in each, of Vehicles.

    The cars are of one kind, for each kind with at least `smallest` training pictures (where none
    has as many, for the largest), or drawn from all these kinds ("mixed, draw 1", ...).
    """
    rng = np.random.default_rng([seed, 10])
    kinds, kinds_test = (t["subtype"].to_numpy() for t in (data.train, data.test))
    count = pd.Series(kinds[data.y_train == 0]).value_counts()
    cars = sorted(count.index[count >= min(smallest, count.max())])
    size, size_test = count[cars].min(), min((kinds_test == kind).sum() for kind in cars)
    parts = [(kinds, data.y_train, size), (kinds_test, data.y_test, size_test)]
    airplanes = [rng.choice(np.flatnonzero(y == 1), k, replace=False) for _, y, k in parts]
    sets = {car: [np.flatnonzero(kind == car)[:k] for kind, _, k in parts] for car in cars}
    for j in range(mixtures):
        pools = [(np.flatnonzero(np.isin(kind, cars)), k) for kind, _, k in parts]
        sets[f"mixed, draw {j + 1}"] = [rng.choice(pool, k, replace=False) for pool, k in pools]
    return {name.replace("_", " "): list(map(np.append, airplanes, s)) for name, s in sets.items()}


def carried(data, rows, test_rows, weight_decay):
    """Return the effective share of the cars, and test accuracy, of a head on some Vehicles.

    The share is the effective number of the cars' summed |influence| over how many there are.
    """
    x, y = data.x_test[test_rows], data.y_test[test_rows]
    part = data._replace(x_train=data.x_train[rows], y_train=data.y_train[rows])
    head = vehicles.fitted_head(part, weight_decay)
    changes = predicted_loss_change(head, s_test(head, x, y))
    weights = np.abs(changes).sum(0)[part.y_train == 0]
    return effective_number(weights) / len(weights), np.mean((x @ head.theta > 0) == (y == 1))


def distances_within(x, y, marked, permutations, rng):
    """Return the mean distance of marked points (n,) bool of one class, and a null (permutations,).

    The null marks as many random points of each class; x : (n, d), y : (n,) classes 0 and 1.
    """
    observed, null, pairs = 0.0, np.zeros(permutations), 0
    for c in (0, 1):
        of_class, mark = x[y == c], marked[y == c].astype(float)
        distance = cdist(of_class, of_class)
        permuted = rng.permuted(np.tile(mark, (permutations, 1)), axis=1)
        observed += mark @ distance @ mark
        null += ((permuted @ distance) * permuted).sum(1)
        pairs += mark.sum() * (mark.sum() - 1)
    return observed / pairs, null / pairs
