"""Detection curves and intervals against rankings that can be counted by hand."""

import numpy as np
import pytest
from scipy import stats

from support import evaluation


def test_detection_of_a_perfect_a_reversed_and_a_constant_ranking():
    wanted = np.zeros(20, bool)
    wanted[:4] = True
    shares = [0, 0.1, 0.2, 1]
    perfect = evaluation.detection(-np.arange(20.0), wanted, shares)
    assert perfect.auc == perfect.average_precision == 1
    np.testing.assert_allclose(perfect.found, [0, 0.5, 1, 1])
    backward = evaluation.detection(np.arange(20.0), wanted, shares)
    assert backward.auc == 0
    np.testing.assert_allclose(backward.found, [0, 0, 0, 1])
    assert evaluation.detection(np.zeros(20), wanted, shares).auc == 0.5


def test_auc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    scores, wanted = rng.normal(size=30), rng.random(30) < 0.3
    pairs = scores[wanted][:, None] > scores[~wanted]
    assert evaluation.detection(scores, wanted, [0.5]).auc == pytest.approx(pairs.mean())


def test_mean_of_is_students_interval():
    values = np.array([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    assert evaluation.mean_of(values).interval == pytest.approx([low, high])
    assert np.isnan(evaluation.mean_of([1.0]).half)
    assert str(evaluation.mean_of([0.5, 0.5])) == "0.500 ± 0.000"


def test_one_repetition_has_no_interval_to_show():
    assert str(evaluation.mean_of([0.5])) == "0.500"
    assert str(evaluation.mean_of([0.5, 0.7])) == "0.600 ± 1.271"


def test_bootstrap_of_a_mean_is_the_normal_interval_of_many_values():
    values = np.random.default_rng(0).exponential(size=2000)
    mean, low, high = evaluation.bootstrap_of_mean(values, 1)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert mean == values.mean()
    np.testing.assert_allclose([mean - low, high - mean], half, rtol=0.1)


def test_datamodelling_score_of_a_linear_world_is_one_and_keeps_the_sign():
    rng = np.random.default_rng(0)
    effects, kept = rng.normal(size=(5, 30)), rng.random((30, 40)) < 0.5
    losses = 3 - effects @ kept  # a point with a positive effect lowers the loss: it is helpful
    score = evaluation.datamodelling_score(effects, kept, losses)
    assert (score.mean, score.interval[0]) == pytest.approx((1, 1))
    assert evaluation.datamodelling_score(-effects, kept, losses).mean == pytest.approx(-1)
    noisy = losses + 5 * rng.normal(size=losses.shape)
    score = evaluation.datamodelling_score(effects, kept, noisy)
    expected = [
        stats.spearmanr(e @ ~kept, x).statistic for e, x in zip(effects, noisy, strict=True)
    ]
    np.testing.assert_allclose(score.each, expected)
    assert score.interval[0] < score.mean < score.interval[1] < 1
    assert evaluation.datamodelling_score(np.zeros((5, 30)), kept, losses).mean == 0
