"""How well predictions agree with what retraining shows, and which points they are judged on."""

import time
from typing import NamedTuple

import numpy as np
from scipy import stats


class Agreement(NamedTuple):
    """Agreement of predicted with actual loss changes over one set of removals.

    r : Pearson's correlation; rank : Spearman's; slope : least-squares slope of actual on predicted
    through the origin (1 is perfect, above 1 the prediction is too small); relative_error : median
    of |predicted - actual| / |actual|.
    """

    r: float
    rank: float
    slope: float
    relative_error: float


def agreement(predicted, actual):
    """Return the Agreement of two vectors (k,) of loss changes, in nats."""
    predicted, actual = np.asarray(predicted), np.asarray(actual)
    if len(predicted) < 3 or np.ptp(predicted) == 0 or np.ptp(actual) == 0:
        raise ValueError("Agreement needs at least three removals with different loss changes.")
    error = np.abs(predicted - actual) / np.maximum(np.abs(actual), np.finfo(float).tiny)
    return Agreement(
        float(np.corrcoef(predicted, actual)[0, 1]),
        float(stats.spearmanr(predicted, actual).statistic),
        float(predicted @ actual / (predicted @ predicted)),
        float(np.median(error)),
    )


def choose_test_points(losses, correct, *, seed=0, k=5):
    """Return {rule: indices}: the k hardest correct ones, k random correct, up to k misclassified.

    losses, correct : (m,). A fixed rule, so that no test point is picked for its result.
    """
    rng = np.random.default_rng([seed, 1])
    right, wrong = np.flatnonzero(correct), np.flatnonzero(~np.asarray(correct))
    hardest = right[np.argsort(-losses[right])[:k]]
    rest = np.setdiff1d(right, hardest)
    return {
        "hardest correct": hardest,
        "random correct": np.sort(rng.choice(rest, min(k, len(rest)), replace=False)),
        "misclassified": wrong[np.argsort(-losses[wrong])[:k]],
    }


def top(values, k):
    """Return the indices of the k largest |values|, largest first."""
    return np.argsort(-np.abs(values), kind="stable")[:k]


def time_ratio(ours, reference, *, repeats=5):
    """Return the median of time(ours) / time(reference) over interleaved runs, after a warm-up."""
    ours(), reference()
    ratios = []
    for _ in range(repeats):
        times = []
        for function in (ours, reference):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
        ratios.append(times[0] / times[1])
    return float(np.median(ratios))
