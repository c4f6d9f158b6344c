"""How well predictions agree with what retraining shows, and which points they are judged on."""

import warnings
from timeit import timeit
from typing import NamedTuple

import numpy as np
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score


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


class Correlation(NamedTuple):
    """Agreement of predicted with actual loss changes of one test point, over its removals.

    mean : Pearson's r; interval : 95 %, bootstrap over removals; slope : of the least-squares line
    of actual on predicted *with* an intercept: what adds a constant to every actual change, as the
    drift of a training that goes on does, changes neither r nor slope.
    """

    mean: float
    interval: list
    slope: float


def correlation(predicted, actual, *, draws=2000):
    """Return the Correlation of two vectors (k,) of loss changes, in nats."""
    pair = np.asarray(predicted), np.asarray(actual)
    rng = np.random.default_rng([0, 65])
    how = stats.BootstrapMethod(n_resamples=draws, method="percentile", rng=rng)
    with warnings.catch_warnings():  # changes that are all alike have no r: NaN
        warnings.simplefilter("ignore")
        ends = stats.pearsonr(*pair).confidence_interval(method=how)
        line = stats.linregress(*pair)
    return Correlation(float(line.rvalue), list(map(float, ends)), line.slope)


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


class Mean(NamedTuple):
    """A mean over repetitions, the half-width of its 95 % interval, and where values can lie."""

    mean: float
    half: float
    possible: tuple = (-np.inf, np.inf)

    @property
    def interval(self):
        return np.clip([self.mean - self.half, self.mean + self.half], *self.possible).tolist()

    def __str__(self):
        return f"{self.mean:.3f}" + f" ± {self.half:.3f}" * bool(np.isfinite(self.half))


def mean_of(values, possible=(-np.inf, np.inf)):
    """Return the Mean of repetitions (k,), its interval Student's; one alone has no interval.

    possible : where values can lie, (0, 1) of shares.
    """
    values = np.asarray(values, float)
    k = len(values)
    half = stats.t.ppf(0.975, k - 1) * values.std(ddof=1) / np.sqrt(k) if k > 1 else np.nan
    return Mean(float(values.mean()), float(half), possible)


def bootstrap_of_mean(values, seed):
    """Return [mean, low, high] of values (k,), the interval a 95 % bootstrap one over them."""
    values = np.asarray(values)
    drawn = np.random.default_rng(seed).integers(0, len(values), (2000, len(values)))
    return [values.mean(), *np.quantile(values[drawn].mean(1), [0.025, 0.975])]


class Share(NamedTuple):
    """A share and its 95 % interval (Wilson's)."""

    mean: float
    interval: list


def share_of(hits):
    """Return the Share of True in hits (k,)."""
    ends = stats.binomtest(int(np.sum(hits)), len(hits)).proportion_ci(method="wilson")
    return Share(float(np.mean(hits)), [float(end) for end in ends])


class DatamodellingScore(NamedTuple):
    """Rank correlation of summed attributions with losses after training on subsets of the data.

    each : (m,), one a test point; mean : over them; interval : 95 %, bootstrap over test points and
    subsets together.
    """

    mean: float
    interval: np.ndarray
    each: np.ndarray


def datamodelling_score(predicted, kept, losses, *, seed=0, draws=500):
    """Return the DatamodellingScore (LDS; Ilyas et al. 2022, Park et al. 2023).

    predicted : (m, n), predicted change of each test loss if a training point is removed;
    kept : (n, k) bool, the subsets; losses : (m, k), test losses after training on each subset.
    """
    summed = predicted @ ~np.asarray(kept, bool)
    rng, (m, k) = np.random.default_rng([seed, 14]), summed.shape
    resampled = []
    for _ in range(draws):
        some = np.ix_(rng.integers(0, m, m), rng.integers(0, k, k))
        resampled.append(_rank_correlations(summed[some], losses[some]).mean())
    each = _rank_correlations(summed, losses)
    return DatamodellingScore(float(each.mean()), np.quantile(resampled, [0.025, 0.975]), each)


def _rank_correlations(a, b):
    """Return Spearman's correlation of each row of a with that of b; 0 for a constant row."""
    a, b = (stats.rankdata(values, axis=1) for values in (a, b))
    a, b = (values - values.mean(1, keepdims=True) for values in (a, b))
    scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), scale, out=np.zeros(len(a)), where=scale > 0)


class Detection(NamedTuple):
    """How well a ranking finds what it looks for: true AUC, average precision, share found.

    found : the share found in the first part of the ranking, one value a share inspected.
    """

    auc: float
    average_precision: float
    found: np.ndarray


def detection(scores, wanted, shares):
    """Return the Detection of the `wanted` (n,) bool by scores (n,), the most suspicious highest.

    Ties keep the order they came in for `found`, and count half for the AUC.
    """
    order, k = np.argsort(-scores, kind="stable"), np.round(np.multiply(shares, len(scores)))
    found = np.concatenate([[0], np.cumsum(wanted[order])])[k.astype(int)] / wanted.sum()
    return Detection(
        float(roc_auc_score(wanted, scores)), float(average_precision_score(wanted, scores)), found
    )


def auc_of(scores, wanted):
    """Return the Mean area under the ROC curves of k rankings, scores (k, n), of `wanted` (k, n).

    The interval is DeLong's (1988): over the n points, the rankings taken as independent draws.
    """
    areas, variances = zip(*map(_delong, np.asarray(scores), np.asarray(wanted)), strict=True)
    half = 1.96 * np.sqrt(np.mean(variances) / len(areas))
    return Mean(float(np.mean(areas)), float(half), (0, 1))


def _delong(scores, wanted):
    """Return the area under the ROC curve of one ranking and the variance of that estimate."""
    ranks, high, low = stats.rankdata(scores), scores[wanted], scores[~wanted]
    beaten = (ranks[wanted] - stats.rankdata(high)) / len(low)  # share of `low` below each
    above = 1 - (ranks[~wanted] - stats.rankdata(low)) / len(high)
    return beaten.mean(), beaten.var(ddof=1) / len(high) + above.var(ddof=1) / len(low)


def time_ratio(ours, reference, *, repeats=5):
    """Return the median of time(ours) / time(reference) over interleaved runs, after a warm-up."""
    ours(), reference()
    runs = [[timeit(way, number=1) for way in (ours, reference)] for _ in range(repeats)]
    return float(np.median([own / other for own, other in runs]))
