"""The check that ends every user's work: predictions against real removals."""

import keras
import numpy as np

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
