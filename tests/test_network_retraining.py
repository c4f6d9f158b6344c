"""Retraining a network without a point: closed forms, finite differences, plain descent."""

import keras
import numpy as np
import pytest
from conftest import SOFTMAX, ridge
from scipy.optimize import check_grad, minimize

from helpers import (
    Cholesky,
    GaussNewton,
    Hessian,
    Objective,
    Removals,
    predicted_loss_change,
    s_test,
    solve,
)
from helpers.gradients import per_example_gradients
from helpers.hessian import curvature_factors
from studies.network_retraining import NetworkRemovals, _Anchor, _target, polish
from support import stored


@pytest.fixture(scope="module")
def polished():
    """A tanh network of two layers at a minimum; labels noisy, examples weighted."""
    keras.utils.set_random_seed(3)
    rng = np.random.default_rng(3)
    x = rng.normal(size=(90, 4))
    y = np.where(
        rng.random(90) < 0.25, rng.integers(0, 3, 90), (x @ rng.normal(size=(4, 3))).argmax(1)
    )
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(3)]
    )
    objective = Objective(
        model,
        SOFTMAX,
        x,
        y,
        weight_decay=0.05,
        decayed="all",
        batch_size=32,
        sample_weight=rng.uniform(0.5, 2, 90),
    )
    theta = polish(objective, tol=1e-9)
    return objective, theta, rng.normal(size=(5, 4)), np.array([0, 1, 2, 1, 0])


def test_polishing_ends_at_a_minimum(polished):
    objective, theta, *_ = polished
    assert np.linalg.norm(objective.gradient()) <= 1e-9
    assert np.linalg.eigvalsh(Hessian(objective).dense())[0] > 0
    np.testing.assert_array_equal(objective.theta, theta)


def test_a_target_is_the_mean_loss_of_the_others(polished):
    objective, *_ = polished
    x, y, w = (a.numpy() for a in objective.data.gather(np.arange(90)))
    theta, keep = objective.theta + 0.1, np.arange(90) != 7
    value, gradient = _target(objective, without=7)(theta)
    others = Objective(
        objective.model,
        SOFTMAX,
        x[keep],
        y[keep],
        weight_decay=0.05,
        decayed="all",
        sample_weight=w[keep],
    )
    others.theta = theta
    np.testing.assert_allclose(value, others.training_loss(), rtol=1e-12)
    np.testing.assert_allclose(gradient, others.gradient(), atol=1e-12)
    objective.theta = polished[1]


@pytest.mark.parametrize("kind", ["left out", "half left out", "proximal"])
def test_gradients_of_targets_are_those_of_their_values(polished, kind):
    objective, theta, *_ = polished
    slopes = np.random.default_rng(0).normal(size=(90, 3))
    target = {
        "left out": lambda: _target(objective, without=3),
        "half left out": lambda: _target(objective, without=3, fraction=0.5),
        "proximal": lambda: _target(objective, 3, anchor=_Anchor(theta, 0.1, slopes)),
    }[kind]()
    where = theta + 0.2
    gap = check_grad(lambda t: target(t)[0], lambda t: target(t)[1], where)
    assert gap < 1e-5
    objective.theta = theta


def test_curvature_factors_are_the_gauss_newton_matrix(polished):
    objective, *_ = polished
    x, y, w = objective.data.gather(np.arange(90))
    u, _ = curvature_factors(objective, x, y)
    g = np.einsum("npc,nqc,n->pq", u, u, w.numpy()) / 90 + np.diag(objective.decay)
    np.testing.assert_allclose(g, GaussNewton(objective).dense(), atol=1e-12)


def test_a_newton_step_of_a_linear_network_is_the_heads(softmax):
    removals = NetworkRemovals(softmax.objective, Hessian(softmax.objective).dense())
    rows = np.array([0, 5, 99])
    expected = Removals(softmax.objective).newton_steps(rows)
    np.testing.assert_allclose(removals.newton_steps(rows), expected, atol=1e-12)


def test_retraining_a_linear_network_is_the_exact_refit(softmax):
    removals = NetworkRemovals(softmax.objective, Hessian(softmax.objective).dense())
    rows = np.array([0, 5, 99])
    expected = Removals(softmax.objective).exact(rows)
    refits = removals.retrain(rows, tol=1e-10)
    np.testing.assert_allclose(refits.thetas, expected, atol=1e-7)
    assert (refits.gradient_norms <= 1e-10).all()
    steps = Removals(softmax.objective).newton_steps(rows)
    stepped = softmax.objective.theta[:, None] + steps  # a convex loss lets the whole step through
    np.testing.assert_allclose(removals.newton(rows), stepped, atol=1e-9)


def test_a_newton_step_has_the_exact_left_out_hessian_and_lowers_the_loss(polished):
    objective, theta, *_ = polished
    removals = NetworkRemovals(objective, Hessian(objective).dense())
    x, y, w = (a.numpy() for a in objective.data.gather(np.arange(90)))
    moved = removals.newton([7])[:, 0]
    keep = np.arange(90) != 7
    data = SOFTMAX, x[keep], y[keep]
    how = {"weight_decay": 0.05, "decayed": "all", "sample_weight": w[keep]}
    others = Objective(objective.model, *data, **how)
    h, g = Hessian(others).dense(), others.gradient()
    np.testing.assert_allclose(moved - theta, -np.linalg.solve(h, g), atol=1e-8)
    before = others.training_loss()
    others.theta = moved
    assert others.training_loss() < before
    objective.theta = theta


def test_retraining_a_network_equals_plain_descent_from_theta(polished):
    """Another method, in other coordinates, with no factorisation."""
    objective, theta, x_test, y_test = polished
    removals, rows = (NetworkRemovals(objective, Hessian(objective).dense()), np.array([4, 50]))
    refits = removals.retrain(rows)
    for found, row in zip(refits.thetas.T, rows, strict=True):
        plain = minimize(
            _target(objective, without=row),
            theta,
            jac=True,
            method="BFGS",
            options={"gtol": 1e-9, "maxiter": 5000},
        ).x
        np.testing.assert_allclose(found, plain, atol=1e-5)
    objective.theta = theta
    changes = removals.loss_change(refits.thetas, x_test, y_test)
    base = objective.losses(x_test, y_test)
    objective.theta = refits.thetas[:, 1]
    np.testing.assert_allclose(changes[:, 1], objective.losses(x_test, y_test) - base, atol=1e-14)
    objective.theta = theta


def test_taking_little_weight_away_changes_what_influence_predicts(polished):
    objective, _, x_test, y_test = polished
    removals, rows = (NetworkRemovals(objective, Hessian(objective).dense()), np.array([4, 50]))
    predicted = predicted_loss_change(objective, s_test(objective, x_test, y_test))[:, rows]
    little = removals.retrain(rows, fraction=1e-3, tol=1e-11)
    actual = removals.loss_change(little.thetas, x_test, y_test) / 1e-3
    np.testing.assert_allclose(actual, predicted, rtol=0.02, atol=1e-6)


def test_the_proximal_response_of_ridge_regression_is_its_influence():
    """For squared loss the Bregman objective is quadratic: its minimum has a closed form."""
    objective, *_ = ridge(30, 4, 0.3)
    g, rows, damping = GaussNewton(objective).dense(), np.array([0, 11]), 0.2
    refits = NetworkRemovals(objective, g).proximal(rows, damping, tol=1e-12)
    x, y, _ = objective.data.gather(rows)
    own = per_example_gradients(objective, x, y).T
    share = (objective.decay * objective.theta)[:, None]
    first = solve(g, own + share, Cholesky(damping)).x / objective.n
    phi = x.numpy()
    for k in range(2):
        # the removed point's loss is gone, its Bregman term is not: both are quadratic
        moved = refits.thetas[:, k] - objective.theta
        curvature_i = (
            2 * np.outer(phi[k], phi[k]) / objective.n + np.diag(objective.decay) / objective.n
        )
        expected = np.linalg.solve(g + damping * np.eye(4) - curvature_i, (own + share)[:, k]) / 30
        np.testing.assert_allclose(moved, expected, atol=1e-9)
        np.testing.assert_allclose(moved, first[:, k], rtol=0.5)


def test_an_interrupted_run_of_refits_goes_on_where_it_was(polished, tmp_path):
    objective, *_ = polished
    removals, rows = NetworkRemovals(objective, Hessian(objective).dense()), np.arange(4)
    whole = removals.retrain(rows)
    keep, done = stored.checkpoint(tmp_path), []

    def interrupted(numbers, compute):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(numbers[-1])
        return keep(numbers, compute)

    with pytest.raises(KeyboardInterrupt):
        removals.retrain(rows, checkpoint=interrupted)
    assert len(list(tmp_path.glob("*.npz"))) == 2
    np.testing.assert_array_equal(removals.retrain(rows, checkpoint=keep).thetas, whole.thetas)
    assert len(list(tmp_path.glob("*.npz"))) == 4
    removals.proximal(rows[:1], 0.1, checkpoint=keep)  # another question, another file
    removals.retrain(rows[:1], fraction=0.1, checkpoint=keep)
    assert len(list(tmp_path.glob("*.npz"))) == 6
