"""Influence against its definition: refits, finite differences, closed forms, and the sign."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import BINARY, SOFTMAX, Problem, ridge

from helpers import (
    CG,
    GaussNewton,
    Hessian,
    Objective,
    Removals,
    choose_damping,
    fit_head,
    influence_on_loss,
    influence_wrt_input,
    most_influential,
    predicted_loss_change,
    s_test,
    self_influence,
    solve,
    validate,
)
from helpers.gradients import per_example_gradients
from support import models


def predictions(problem, solver=None):
    solution = s_test(problem.objective, problem.x_test, problem.y_test, solver)
    return predicted_loss_change(problem.objective, solution)


@pytest.mark.parametrize("name", ["binary", "softmax"])
def test_rows_sum_to_zero_at_the_optimum(name, request):
    problem = request.getfixturevalue(name)
    assert problem.fit.gradient_norm <= 1e-10
    assert np.abs(predictions(problem).sum(1)).max() <= 1e-8


@pytest.mark.parametrize("name", ["binary", "softmax"])
def test_prediction_is_the_derivative_of_a_refit(name, request):
    """d loss(z_test) / d weight, weights rescaled to sum n: slope 1 within 1e-5."""
    problem = request.getfixturevalue(name)
    predicted, step, i = predictions(problem), 1e-3, 3
    losses = []
    for sign in (1, -1):
        weight = np.ones(len(problem.x))
        weight[i] -= sign * step
        weight *= len(weight) / weight.sum()
        model = keras.models.clone_model(problem.model)
        other = Objective(
            model,
            problem.loss,
            problem.x,
            problem.y,
            sample_weight=weight,
            weight_decay=problem.weight_decay,
            decayed="all",
        )
        other.theta = problem.objective.theta
        fit_head(other, tol=1e-13)
        losses.append(other.losses(problem.x_test, problem.y_test))
    slope = (losses[0] - losses[1]) / (2 * step)
    np.testing.assert_allclose(slope, predicted[:, i], rtol=1e-5, atol=1e-9)


def test_removing_a_mislabelled_twin_lowers_the_test_loss():
    """The sign in words: a harmful point has a negative predicted change."""
    problem = Problem(100, 1, 6, 2)
    x = np.concatenate([problem.x, problem.x_test])
    y = np.concatenate([problem.y, 1 - problem.y_test])  # the test point itself, wrongly labelled
    objective = Objective(models.linear_head(6), BINARY, x, y, weight_decay=1e-2)
    fit_head(objective)
    solution = s_test(objective, problem.x_test, problem.y_test)
    change = predicted_loss_change(objective, solution)[0]
    assert change.argmin() == 100
    assert change[100] < 0
    assert influence_on_loss(objective, solution)[0, 100] == -101 * change[100]


def test_ridge_regression_newton_step_is_exact_removal():
    """Squared loss: the Newton prediction equals the closed-form leave-one-out to 1e-10."""
    wd = 0.3
    objective, x, y = ridge(30, 4, wd)
    steps = Removals(objective).newton_steps(np.arange(30))
    for i in range(30):
        keep = np.arange(30) != i
        h = 2 * x[keep].T @ x[keep] / 29 + wd * np.eye(4)
        expected = np.linalg.solve(h, 2 * x[keep].T @ y[keep] / 29)
        np.testing.assert_allclose(objective.theta + steps[:, i], expected, atol=1e-10)


def test_cg_and_cholesky_give_the_same_influences(softmax):
    exact = predictions(softmax)
    np.testing.assert_allclose(predictions(softmax, CG(rtol=1e-11)), exact, atol=1e-10)


def test_unregularised_share_is_what_sets_removal_right(binary):
    """C4: with the regulariser's share the prediction is closer to the refits than without."""
    problem = binary
    removals = Removals(problem.objective)
    rows = np.arange(len(problem.x))
    actual = removals.loss_change(removals.exact(rows), problem.x_test, problem.y_test)
    predicted = predictions(problem)
    solution = s_test(problem.objective, problem.x_test, problem.y_test)
    share = problem.objective.decay * problem.objective.theta @ solution.x / len(problem.x)
    without = predicted - share[:, None]
    assert np.abs(predicted - actual).mean() < np.abs(without - actual).mean()


def test_self_influence_has_sigma_squared(binary):
    """C3: sigma^2 x'H^-1x, and not sigma x'H^-1x as in the code released with the paper."""
    objective, x, y = binary.objective, binary.x, binary.y
    p = 1 / (1 + np.exp(-x @ objective.theta))
    h = (x * (p * (1 - p) / len(x))[:, None]).T @ x + binary.weight_decay * np.eye(x.shape[1])
    q = np.einsum("nd,de,ne->n", x, np.linalg.inv(h), x)
    ours = self_influence(objective, x, y)
    np.testing.assert_allclose(ours, (p - y) ** 2 * q, rtol=1e-10)
    assert not np.allclose(ours, np.abs(p - y) * q, rtol=0.1)


def test_self_influence_of_a_network(network):
    objective, x, y = network

    damping = 0.5
    g = per_example_gradients(objective, x, y)
    h = Hessian(objective).dense() + damping * np.eye(objective.p)
    expected = np.einsum("np,pq,nq->n", g, np.linalg.inv(h), g)
    np.testing.assert_allclose(
        self_influence(objective, x, y, damping=damping), expected, rtol=1e-9
    )


def test_influence_wrt_input_has_the_closed_form_of_logistic_regression(binary):
    """C5: d(s . grad loss) / dx = (p - y) s + p (1 - p) (s . x) theta."""
    objective, x, y = binary.objective, binary.x[:5], binary.y[:5]
    s = s_test(objective, binary.x_test[:1], binary.y_test[:1]).x[:, 0]
    p = 1 / (1 + np.exp(-x @ objective.theta))
    expected = (p - y)[:, None] * s + (p * (1 - p) * (x @ s))[:, None] * objective.theta
    ours = influence_wrt_input(objective, s, x, y.astype(float))
    np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_influence_wrt_input_by_finite_differences(network):
    objective, x, y = network

    s = np.random.default_rng(0).normal(size=objective.p)
    ours = influence_wrt_input(objective, s, x[:2], y[:2])
    step = 1e-6
    for k in range(x.shape[1]):
        up, down = x[:2].copy(), x[:2].copy()
        up[:, k] += step
        down[:, k] -= step
        slope = (
            (
                per_example_gradients(objective, up, y[:2])
                - per_example_gradients(objective, down, y[:2])
            )
            @ s
            / (2 * step)
        )
        np.testing.assert_allclose(ours[:, k], slope, atol=1e-8)


def test_integer_inputs_are_refused(network):
    with pytest.raises(ValueError, match="real-valued"):
        influence_wrt_input(network[0], np.ones(network[0].p), np.ones((2, 4), int), [0, 1])


def test_a_float32_model_gives_float64_influences_through_its_head(binary):
    keras.config.set_dtype_policy("float32")
    try:
        model = models.linear_head(12)
    finally:
        keras.config.set_dtype_policy("float64")
    objective = Objective(model, BINARY, binary.x, binary.y, weight_decay=1e-2)
    assert objective.dtype == "float32"
    fit = fit_head(objective)
    assert fit.gradient_norm < 1e-7
    assert fit.converged
    assert fit.exact_norm <= 1e-10 < fit.gradient_norm
    assert "before the model rounded the parameters" in str(fit)  # float32 holds seven digits
    solution = s_test(objective, binary.x_test, binary.y_test)
    assert solution.dtype == "float64"
    np.testing.assert_allclose(
        predicted_loss_change(objective, solution), predictions(binary), atol=1e-7
    )


def test_zero_test_gradient_has_zero_influence(binary):
    """C9: a test point whose loss does not depend on theta has no influences, and no error."""
    objective = binary.objective
    x_test = np.zeros((1, 12))
    with pytest.warns(UserWarning, match="zero but for rounding"):
        solution = s_test(objective, x_test, np.array([1]), CG())
    assert solution.converged.all()
    assert not predicted_loss_change(objective, tf.constant(solution.x)).any()


def test_a_solution_is_of_the_theta_where_it_was_solved(binary):
    objective = binary.bind()
    s = s_test(objective, binary.x_test, binary.y_test)
    with objective.at(objective.theta + 0.1), pytest.raises(ValueError, match="has moved since"):
        predicted_loss_change(objective, s)
    assert predicted_loss_change(objective, s).shape == (len(binary.x_test), objective.n)


@pytest.mark.parametrize("use", [predicted_loss_change, influence_on_loss, most_influential])
def test_an_unsolved_system_is_warned_of_where_it_is_used(binary, use):
    objective = binary.bind()
    with pytest.warns(UserWarning, match="solution that is none"):
        s = s_test(objective, binary.x_test, binary.y_test, CG(max_steps=1))
    with pytest.warns(UserWarning, match="solution that is none") as told:
        use(objective, s, *[3] * (use is most_influential))
    assert [warning.filename for warning in told] == [__file__]


def test_a_matrix_has_no_influences(binary):
    matrix = Hessian(binary.objective).dense()
    for use in (s_test, self_influence, validate):
        with pytest.raises(TypeError, match="An Objective is needed"):
            use(matrix, binary.x_test, binary.y_test)
    with pytest.raises(TypeError, match="An Objective is needed"):
        choose_damping(matrix)
    with pytest.raises(ValueError, match="has shape"):
        solve(matrix[:, :3], matrix[0])


def test_cg_solves_with_the_gauss_newton_matrix_and_does_not_mix_it_up(network):
    """One objective solves with H, with G and with H again: each has its own compiled product."""
    objective, x, y = network
    g = per_example_gradients(objective, x[:2], y[:2]).T.astype(float)
    for kind in (Hessian, GaussNewton, Hessian):
        solution, matrix = solve(kind(objective), g, CG(0.5, rtol=1e-5)), kind(objective).dense()
        expected = np.linalg.solve(matrix + 0.5 * np.eye(len(g)), g)
        assert np.linalg.norm(solution.x - expected) <= 1e-4 * np.linalg.norm(expected)
    h = Hessian(objective).dense()
    assert np.linalg.norm(GaussNewton(objective).dense() - h) > 0.01 * np.linalg.norm(h)


@pytest.mark.parametrize("frozen", [False, True])
def test_influence_wrt_tokens_is_that_of_what_the_embedding_makes_of_them(frozen):
    """The oracle adds a real input, zero, to the embedding's output, and asks for its influence."""
    rng, layers = np.random.default_rng(0), keras.layers
    tokens, y = rng.integers(0, 7, (20, 5)), rng.integers(0, 3, 20)
    embedding = layers.Embedding(7, 4, mask_zero=True)
    recurrent, dense = layers.LSTM(3), layers.Dense(3)
    steps = keras.Input((5,), dtype="int32")
    model = keras.Model(steps, dense(recurrent(embedding(steps))))
    embedding.trainable = not frozen
    moved = keras.Input((5, 4))
    mask = embedding.compute_mask(steps)
    read = recurrent(layers.Add()([embedding(steps), moved]), mask=mask)
    other = Objective(
        keras.Model([steps, moved], dense(read)), SOFTMAX, [tokens, np.zeros((20, 5, 4))], y
    )
    objective, s = Objective(model, SOFTMAX, tokens, y), rng.normal(size=other.p)
    found = influence_wrt_input(objective, s, tokens[:3], y[:3])
    _, expected = influence_wrt_input(other, s, [tokens[:3], np.zeros((3, 5, 4))], y[:3])
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(found, expected, atol=1e-12)
