"""The check that ends every user's work: predictions against real removals."""

import warnings

import keras
import numpy as np
import pytest

from helpers import CG, GaussNewton, Objective, Removals, predicted_loss_change, s_test, validate


def test_a_head_is_refitted_exactly(softmax):
    problem = softmax
    found = validate(problem.objective, problem.x_test, problem.y_test, 12)
    assert len(set(found.rows)) == 12
    without = Removals(problem.objective)
    actual = without.loss_change(without.exact(found.rows), problem.x_test, problem.y_test)
    np.testing.assert_allclose(found.actual, actual, atol=1e-12)
    s = s_test(problem.objective, problem.x_test, problem.y_test)
    predicted = predicted_loss_change(problem.objective, s)
    np.testing.assert_allclose(found.predicted, predicted[:, found.rows])
    largest = np.argsort(-np.abs(predicted).max(0))[:6]
    assert set(largest) <= set(found.rows)
    assert found.r > 0.9
    assert str(found).startswith("12 removals, 6 test points: r 0.9")


def test_a_network_is_held_near_wherever_it_stands():
    """To first order in 1/n the response is the influence: with more examples both meet."""
    errors = []
    for copies in (1, 8):
        keras.utils.set_random_seed(2)
        rng = np.random.default_rng(2)
        x = np.tile(rng.normal(size=(30, 3)), (copies, 1))
        y = np.tile(rng.integers(0, 3, 30), copies)
        hidden = keras.layers.Dense(4, "tanh", dtype="float64")
        model = keras.Sequential(
            [keras.Input((3,)), hidden, keras.layers.Dense(3, dtype="float64")]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        objective = Objective(model, loss, x, y, weight_decay=0.01)
        theta = objective.theta
        found = validate(objective, x[:2], y[:2], 6, solver=CG(0.5, rtol=1e-10))
        np.testing.assert_array_equal(objective.theta, theta)
        away = np.linalg.norm(found.actual - found.predicted)
        errors.append(away / np.linalg.norm(found.predicted))
        assert found.r > 0.99
        assert "can be trusted" in str(found)
    assert errors[1] < errors[0] / 4
    assert errors[1] < 0.02
    G = GaussNewton(objective)
    found, s = validate(G, x[:2], y[:2], 2, damping=0.5), s_test(G, x[:2], y[:2], damping=0.5)
    predicted = predicted_loss_change(objective, s)[:, found.rows]
    np.testing.assert_allclose(found.predicted, predicted)


class Sized(keras.Model):
    """A subclassed network, which Keras can not make again: its argument is not kept."""

    def __init__(self, units):
        super().__init__()
        self.hidden, self.end = keras.layers.Dense(units, "tanh"), keras.layers.Dense(3)

    def call(self, x):
        return self.end(self.hidden(x))


class Plain(Sized):
    """One without arguments."""

    def __init__(self):
        super().__init__(4)


@pytest.fixture
def in_float32():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")
    yield
    keras.config.set_dtype_policy(before)


@pytest.mark.usefixtures("in_float32")
def test_removals_are_made_in_float64():
    """A step of size 1/n drowns in float32: a subclassed model is copied too, or refused."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 4)).astype("float32")
    y, loss = x[:, :3].argmax(1), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    keras.utils.set_random_seed(0)
    model = Plain()
    model(x[:1])
    usual = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(3)]
    )
    usual.set_weights(model.get_weights())
    bound = [Objective(m, loss, x, y, weight_decay=1e-3) for m in (model, usual)]
    one, two = (validate(o, x[:3], y[:3], 4, damping=0.5) for o in bound)
    np.testing.assert_allclose(one.actual, two.actual, rtol=1e-4, atol=1e-9)
    assert one.slope == pytest.approx(1, abs=0.05)
    assert keras.config.dtype_policy().name == "float32"
    sized = Sized(4)
    sized(x[:1])
    objective = Objective(sized, loss, x, y, weight_decay=1e-3)
    with pytest.raises(ValueError, match="build it in float64"):
        validate(objective, x[:3], y[:3], 4, damping=0.5)


def test_removals_from_a_model_that_fits_closely():
    """The response to tiny gradients must not be lost in tolerances."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(1000, 3))
    hidden = keras.layers.Dense(4, "tanh", dtype="float64")
    model = keras.Sequential([keras.Input((3,)), hidden, keras.layers.Dense(1, dtype="float64")])
    y = np.asarray(model(x)) + 1e-7 * np.random.default_rng(1).normal(size=(1000, 1))
    with warnings.catch_warnings(action="error"):
        found = validate(Objective(model, "mse", x, y), x[:3], y[:3], 6, damping=0.1)
    assert found.r > 0.99
    assert found.slope == pytest.approx(1, abs=0.03)


def test_a_model_that_does_not_stay_near_is_said():
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)), rng.integers(0, 3, 40)
    model = keras.Sequential([keras.layers.Dense(8, "tanh"), keras.layers.Dense(3)])
    model.build((None, 3))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    objective = Objective(model, loss, x, y, weight_decay=1e-4)
    with pytest.warns(UserWarning, match="of 2 removals the model does not stay near"):
        validate(GaussNewton(objective), x[:2], y[:2], 2, damping=1e-4)
