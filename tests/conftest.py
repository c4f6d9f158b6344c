"""One kernel set-up for all tests, and the small problems they share."""

import numpy as np
import pytest

from support.start import start

start("demo")

import keras  # noqa: E402

from helpers import Objective, fit_head  # noqa: E402
from support import models  # noqa: E402

BINARY = keras.losses.BinaryCrossentropy(from_logits=True)
SOFTMAX = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.fixture(autouse=True)
def _runs_of_a_test_are_its_own(monkeypatch):
    monkeypatch.delenv("THESIS_RUNS", raising=False)


class Problem:
    """A fitted head with its data: n training and m test points, d features, C classes."""

    def __init__(self, n, m, d, classes, *, use_bias=False, weight_decay=1e-2, seed=0):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(n + m, d)) * np.geomspace(1, 0.2, d)
        scores = x @ rng.normal(size=(d, classes)) + 0.5 * rng.normal(size=(n + m, classes))
        y = scores.argmax(1)
        self.x, self.y, self.x_test, self.y_test = x[:n], y[:n], x[n:], y[n:]
        self.loss = BINARY if classes == 2 else SOFTMAX
        self.model = models.linear_head(d, classes, use_bias=use_bias)
        self.weight_decay = weight_decay
        self.objective = self.bind()
        self.fit = fit_head(self.objective)

    def bind(self, **options):
        options = {"weight_decay": self.weight_decay, "decayed": "all", **options}
        return Objective(self.model, self.loss, self.x, self.y, **options)


def ridge(n, d, weight_decay):
    """Return a fitted linear regression with squared loss, whose removals have closed forms."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, d)), rng.normal(size=n)
    model = keras.Sequential([keras.Input((d,)), keras.layers.Dense(1, use_bias=False)])
    objective = Objective(model, keras.losses.MeanSquaredError(), x, y, weight_decay=weight_decay)
    fit_head(objective)
    return objective, x, y


@pytest.fixture(scope="session")
def binary():
    return Problem(200, 7, 12, 2)


@pytest.fixture(scope="session")
def softmax():
    return Problem(150, 6, 5, 4, use_bias=True)


@pytest.fixture(scope="session")
def network():
    """A tanh network of two layers, all parameters selected: the paths for any Keras model."""
    keras.utils.set_random_seed(3)
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(61, 4)), rng.integers(0, 3, 61)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(3)]
    )
    return Objective(model, SOFTMAX, x, y, weight_decay=0.05), x, y
