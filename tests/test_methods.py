"""Many trainings at once against single ones."""

import keras
import numpy as np
from scipy.stats import spearmanr

from studies import methods
from tests.conftest import SOFTMAX


def normalised():
    """Return a network whose batch normalisation makes the other examples matter."""
    layers = [
        keras.layers.Dense(5, use_bias=False),  # which normalisation would subtract
        keras.layers.BatchNormalization(center=False, scale=False, momentum=0.5),
        keras.layers.Activation("tanh"),
        keras.layers.Dense(3),
    ]
    return keras.Sequential([keras.Input((4,)), *layers])


def test_many_trainings_are_each_keras_own_training():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 4)), rng.integers(0, 3, 30)
    rows = np.stack([rng.permutation(30)[:12] for _ in range(3)])
    problem = methods.Problem(x, y, x, y, normalised(), SOFTMAX, 0.1, 40, 0.05)
    found = methods.train_many(problem, y, rows, [1, 2, 1], keep=(40,), batch=2)
    for k, seed in enumerate([1, 2, 1]):
        keras.utils.set_random_seed(seed)
        alone = normalised()

        def penalised(labels, outputs, alone=alone):
            squares = [keras.ops.sum(v**2) for v in alone.trainable_variables]
            return SOFTMAX(labels, outputs) + 0.05 * sum(squares)

        schedule = keras.optimizers.schedules.CosineDecay(0.05, 40)
        alone.compile(keras.optimizers.Adam(schedule), loss=penalised)
        alone.fit(x[rows[k]], y[rows[k]], batch_size=12, epochs=40, verbose=0, shuffle=False)
        theta = np.concatenate([v.numpy().ravel() for v in alone.trainable_variables])
        rest = np.concatenate([v.numpy().ravel() for v in alone.non_trainable_variables])
        np.testing.assert_allclose(found[0][k], theta, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[1][k], rest, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found[2][-1], found[0])


def test_the_noise_ceiling_is_what_the_true_effect_of_a_subset_reaches():
    """Losses are a known effect plus luck; ten seeds of unit luck: the effect reaches 0.953."""
    rng, (m, k, seeds) = np.random.default_rng(0), (40, 400, 10)
    effect = rng.normal(size=(m, k, 1))
    losses = effect + rng.normal(size=(m, k, seeds))
    reached = np.mean(
        [spearmanr(*p).statistic for p in zip(effect[..., 0], losses.mean(2), strict=True)]
    )
    middle, low, high = methods.noise_ceiling(losses, 0)
    assert low < middle < high < 1
    assert abs(middle - reached) < 0.01
    assert methods.noise_ceiling(losses - effect, 0)[0] < 0.2  # luck alone
