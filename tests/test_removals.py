"""Exact refits against scikit-learn and against each other."""

import warnings

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from conftest import SOFTMAX, ridge
from sklearn.linear_model import LogisticRegression

from helpers import (
    Objective,
    Removals,
    fit,
    fit_head,
    predicted_loss_change,
    s_test,
    self_influence,
    validate,
)
from helpers.fit import newton
from studies import leave_one_out, many_fits, mislabels
from support import stored


def test_fit_equals_scikit_learn(binary):
    wd, n = binary.weight_decay, len(binary.x)
    reference = LogisticRegression(
        C=1 / (n * wd), fit_intercept=False, tol=1e-12, solver="newton-cholesky"
    ).fit(binary.x, binary.y)
    np.testing.assert_allclose(binary.objective.theta, reference.coef_[0], atol=1e-8)


def test_exact_leave_one_out_equals_scikit_learn(binary):
    """C4: C' = 1 / ((n - 1) wd)."""
    wd, n = binary.weight_decay, len(binary.x)
    rows = np.array([0, 17, 101])
    thetas = Removals(binary.objective).exact(rows)
    for k, i in enumerate(rows):
        keep = np.arange(n) != i
        reference = LogisticRegression(
            C=1 / ((n - 1) * wd), fit_intercept=False, tol=1e-12, solver="newton-cholesky"
        ).fit(binary.x[keep], binary.y[keep])
        np.testing.assert_allclose(thetas[:, k], reference.coef_[0], atol=1e-8)


@pytest.mark.parametrize("name", ["binary", "softmax"])
def test_every_left_out_gradient_vanishes(name, request):
    problem = request.getfixturevalue(name)
    removals = Removals(problem.objective)
    rows = np.arange(len(problem.x))
    thetas = removals.exact(rows, batch=64)
    for i in rows[::17]:
        keep = rows != i
        model = keras.models.clone_model(problem.model)
        other = Objective(
            model,
            problem.loss,
            problem.x[keep],
            problem.y[keep],
            weight_decay=problem.weight_decay,
            decayed="all",
        )
        assert np.linalg.norm(other.head.gradient(thetas[:, i])) <= 1e-10


@pytest.mark.parametrize("name", ["binary", "softmax"])
def test_the_ladder_gets_better_with_every_rung(name, request):

    problem = request.getfixturevalue(name)
    removals = Removals(problem.objective)
    thetas = removals.exact(np.arange(len(problem.x)))
    actual = removals.loss_change(thetas, problem.x_test, problem.y_test)
    first = predicted_loss_change(
        problem.objective, s_test(problem.objective, problem.x_test, problem.y_test)
    )
    second = removals.newton_loss_change(problem.x_test, problem.y_test)
    assert np.linalg.norm(second - actual) < 0.3 * np.linalg.norm(first - actual)


def test_newton_matrix_is_the_evaluated_newton_step(binary):
    removals = Removals(binary.objective)
    steps = removals.newton_steps(np.arange(len(binary.x)))
    direct = removals.loss_change(
        binary.objective.theta[:, None] + steps, binary.x_test, binary.y_test
    )
    fast = removals.newton_loss_change(binary.x_test, binary.y_test)
    np.testing.assert_allclose(fast, direct, atol=1e-13)


@pytest.mark.parametrize("name", ["binary", "softmax"])
def test_newton_changes_of_some_rows_are_those_of_the_matrix(name, request):
    """In any order, all of them backwards too."""
    problem = request.getfixturevalue(name)
    removals = Removals(problem.objective)
    whole = removals.newton_loss_change(problem.x_test, problem.y_test)
    for rows in (np.array([3, 99, 7]), np.arange(len(problem.x))[::-1]):
        some = removals.newton_loss_change(problem.x_test, problem.y_test, rows)
        np.testing.assert_allclose(some, whole[:, rows], atol=1e-14)


@pytest.mark.parametrize("name", ["binary", "softmax"])
def test_no_removal_at_all_is_an_empty_answer(name, request):
    problem = request.getfixturevalue(name)
    removals, p = Removals(problem.objective), problem.objective.p
    for nothing in (removals.newton_steps, removals.exact, removals.exact_groups):
        assert nothing([]).shape == (p, 0)
    change = removals.newton_loss_change(problem.x_test, problem.y_test, [])
    assert change.shape == (len(problem.x_test), 0)


def test_a_bad_tolerance_is_refused(binary):
    removals = Removals(binary.objective)
    for refits, which in ((removals.exact, [1]), (removals.exact_groups, [[1]])):
        with pytest.raises((TypeError, ValueError), match="tol"):
            refits(which, tol="a")


def test_leverage_lies_between_zero_and_one(softmax):
    leverage = Removals(softmax.objective).leverage
    assert leverage.shape == (len(softmax.x),)
    assert (leverage > 0).all()
    assert (leverage < 1).all()


def test_a_separable_problem_without_decay_is_refused(binary):
    objective = binary.bind(weight_decay=0.0)
    with pytest.raises(ValueError, match="weight decay"):
        fit_head(objective)


def test_a_network_has_no_exact_fit(network):
    with pytest.raises(ValueError, match="last_layer"):
        fit_head(network[0])


def test_weighted_fit_drops_a_point(softmax):
    """Weight zero is removal, up to the n in the mean: the rescaled fit equals the left-out one."""
    n, i = len(softmax.x), 5
    weight = np.ones(n)
    weight[i] = 0.0
    model = keras.models.clone_model(softmax.model)
    weighted = Objective(
        model,
        SOFTMAX,
        softmax.x,
        softmax.y,
        weight_decay=softmax.weight_decay,
        decayed="all",
        sample_weight=weight * n / (n - 1),
    )
    fit_head(weighted)
    exact = Removals(softmax.objective).exact([i])[:, 0]
    np.testing.assert_allclose(weighted.theta, exact, atol=1e-8)


@pytest.mark.parametrize("name", ["binary", "softmax"])
def test_fits_by_conjugate_gradients_reach_the_same_minimum(name, request, monkeypatch):
    """What many parameters take, forced on few."""
    problem = request.getfixturevalue(name)
    expected, objective = problem.objective.theta, problem.bind()
    monkeypatch.setattr(fit, "DENSE_FIT", 0)
    theta, steps = newton(objective.head, np.zeros(objective.p), 1e-11, 100)
    assert steps < 30
    np.testing.assert_allclose(theta, expected, atol=1e-8)


def test_an_interrupted_run_goes_on_where_it_was(softmax, tmp_path, monkeypatch):
    """Nothing is lost, nothing is computed twice, and no number changes."""
    removals, rows = Removals(softmax.objective), np.arange(12)
    whole = removals.exact(rows, batch=4)
    work, done, keep = removals.exact, [], stored.checkpoint(tmp_path)

    def interrupted(part):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(part)
        return work(part)

    monkeypatch.setattr(removals, "exact", interrupted)
    with pytest.raises(KeyboardInterrupt):
        leave_one_out.refits(removals, rows, keep, size=4)
    done.clear()
    resumed = leave_one_out.refits(removals, rows, stored.checkpoint(tmp_path), size=4)
    assert [part.tolist() for part in done] == [[8, 9, 10, 11]]
    np.testing.assert_array_equal(resumed, whole)
    other = Removals(softmax.bind(weight_decay=0.02))
    different = leave_one_out.refits(other, rows, keep, size=4)  # other data: other files
    assert np.abs(different - whole).max() > 1e-6


def test_group_refits_are_scikit_learns(binary):
    removals = Removals(binary.objective)
    groups = [np.arange(10), np.arange(30, 90)]
    thetas = removals.exact_groups(groups)
    for group, theta in zip(groups, thetas.T, strict=True):
        keep = np.setdiff1d(np.arange(len(binary.x)), group)
        reference = LogisticRegression(
            C=1 / (len(keep) * binary.weight_decay),
            fit_intercept=False,
            tol=1e-12,
            solver="newton-cholesky",
        ).fit(binary.x[keep], binary.y[keep])
        np.testing.assert_allclose(theta, reference.coef_[0], atol=1e-8)


@pytest.mark.parametrize("dense_up_to", [0, 3000])
def test_a_group_newton_step_is_exact_for_squared_loss(dense_up_to, monkeypatch):
    """By CG too: a step cut short as inside a fit would not be."""
    monkeypatch.setattr(fit, "DENSE_FIT", dense_up_to)
    objective, *_ = ridge(30, 4, 0.3)
    removals, group = Removals(objective), np.arange(12)
    step = removals.group_newton_step(group)
    exact = removals.exact_groups([group])[:, 0]
    np.testing.assert_allclose(objective.theta + step, exact, atol=1e-10)


@pytest.mark.parametrize("name", ["binary", "softmax"])
def test_many_fits_equal_one_by_one(name, request):
    problem = request.getfixturevalue(name)
    rng, k = np.random.default_rng(5), 5
    labels = np.repeat(np.asarray(problem.y)[:, None], k, 1)
    labels[rng.choice(len(labels), 20), rng.integers(0, k, 20)] = 0
    fits = many_fits.fit_many(problem.objective, labels, batch=3, tol=1e-10)
    assert fits.gradient_norm.max() <= 1e-10
    for j in range(k):
        model = keras.models.clone_model(problem.model)
        options = {"weight_decay": problem.weight_decay, "decayed": "all"}
        other = Objective(model, problem.loss, problem.x, labels[:, j], **options)
        fit_head(other)
        np.testing.assert_allclose(fits.theta[:, j], other.theta, atol=1e-8)


def test_many_fits_with_weights_leave_points_out(binary):
    """Weight 0 is the exact removal; sparse features and another start change nothing."""
    weight = np.ones((len(binary.x), 2))
    weight[[4, 9], [0, 1]] = 0
    labels = np.repeat(np.asarray(binary.y)[:, None], 2, 1)
    exact = Removals(binary.objective).exact([4, 9])
    for start in (None, exact + 0.1):
        fits = many_fits.fit_many(binary.objective, labels, weight=weight, start=start, tol=1e-10)
        np.testing.assert_allclose(fits.theta, exact, atol=1e-8)
    sparse = np.where(np.random.default_rng(1).random(binary.x.shape) < 0.05, binary.x, 0)
    options = {"weight_decay": 0.01, "decayed": "all"}
    model = keras.models.clone_model(binary.model)
    objective = Objective(model, binary.loss, sparse, binary.y, **options)
    fit_head(objective)
    fits = many_fits.fit_many(objective, labels, tol=1e-10)
    np.testing.assert_allclose(fits.theta[:, 1], objective.theta, atol=1e-8)


def test_many_fits_refuse_what_they_cannot_do(binary):
    with pytest.raises(ValueError, match="rows"):
        many_fits.fit_many(binary.objective, np.zeros((3, 2)))


@pytest.mark.parametrize("name", ["binary", "softmax"])
def test_left_out_losses_are_those_of_the_newton_steps(name, request):
    problem = request.getfixturevalue(name)
    removals, head = Removals(problem.objective), problem.objective.head
    rows = np.arange(head.n)
    thetas = removals.theta[:, None] + removals.newton_steps(rows)
    each = [
        head.losses(head.y[i : i + 1], head.outputs(head.phi[i : i + 1], thetas[:, i]))
        for i in rows
    ]
    np.testing.assert_allclose(removals.left_out_losses(), np.concatenate(each), rtol=1e-9)


@pytest.mark.parametrize("name", ["binary", "softmax"])
def test_self_influence_from_the_factor_of_the_removals(name, request):

    problem = request.getfixturevalue(name)
    expected = self_influence(problem.objective, problem.x, problem.y)
    found = Removals(problem.objective).self_influence()
    np.testing.assert_allclose(found, expected, rtol=1.5 / len(problem.x))


def test_a_relabelled_head_is_the_head_of_those_labels(binary):
    labels = np.where(np.arange(len(binary.y)) % 7 == 0, 1 - binary.y, binary.y)
    model, options = binary.model, {"weight_decay": binary.weight_decay, "decayed": "all"}
    relabelled = Objective(model, binary.loss, binary.x, binary.y, **options)
    relabelled.head.relabel(labels)
    fresh = Objective(model, binary.loss, binary.x, labels, **options)
    ours, theirs = (Removals(o).self_influence() for o in (relabelled, fresh))
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("classes", [2, 3])
def test_leverage_scaled_is_self_influence_by_the_hessian_of_the_others(classes):
    """Against dense matrices, from which the part of one point after another is taken out."""
    rng, n, d, wd = np.random.default_rng(0), 60, 4, 0.1
    x, y = rng.normal(size=(n, d)), np.arange(n) % classes
    data = mislabels.Data(x, y, x, y, pd.DataFrame({"label": y}))
    problem = mislabels.problem(data, wd)
    theta = many_fits.fit_many(problem.objective, y[:, None]).theta[:, 0]
    scores = mislabels.rankings(problem, y, theta, rng)["leverage-scaled"]
    outputs = x @ theta.reshape(d, -1)
    if classes == 2:
        p = 1 / (1 + np.exp(-outputs))
        residuals, curvatures = p - y[:, None], (p * (1 - p))[..., None]
    else:
        p = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
        residuals, curvatures = p - np.eye(classes)[y], np.array([np.diag(q) for q in p])
        curvatures -= p[:, :, None] * p[:, None, :]
    wide = [np.kron(row[:, None], np.eye(outputs.shape[1])) for row in x]
    parts = [w @ a @ w.T / n for w, a in zip(wide, curvatures, strict=True)]
    whole = sum(parts) + wd * (1 - 1 / n) * np.eye(theta.size)
    for w, part, r, score in zip(wide, parts, residuals, scores, strict=True):
        g = w @ r
        np.testing.assert_allclose(score, g @ np.linalg.solve(whole - part, g), rtol=1e-10)


def least(features, y, weight, decay, theta):
    """Return the minimum of a mean and a log sigma fitted by likelihood, by damped Newton steps."""

    def loss(theta):
        mean, log = (features @ theta.reshape(-1, 2)).T
        with np.errstate(over="ignore"):
            own = log + (y - mean) ** 2 * np.exp(-2 * log) / 2
        return weight @ own + decay * theta @ theta / 2

    for _ in range(500):
        mean, log = (features @ theta.reshape(-1, 2)).T
        q, e = y - mean, np.exp(-2 * log)
        gradient = features.T @ (np.stack([-q * e, 1 - q * q * e], 1) * weight[:, None])
        gradient = gradient.ravel() + decay * theta
        if np.linalg.norm(gradient) < 1e-11:
            return theta
        a = np.array([[e, 2 * q * e], [2 * q * e, 2 * q * q * e]]) * weight
        h = np.einsum("na,ijn,nb->aibj", features, a, features).reshape(len(theta), -1)
        h += decay * np.eye(len(h))
        shift = max(0.0, 0.01 - np.linalg.eigvalsh(h)[0])
        step = np.linalg.solve(h + shift * np.eye(len(h)), gradient)
        while not loss(theta - step) <= loss(theta) - 1e-4 * gradient @ step + 1e-15:
            step /= 2
        theta = theta - step
    raise AssertionError("no minimum")


@pytest.mark.parametrize("seed", [1, 2, 4])  # a Hessian with negative eigenvalues, NaN, infinity
def test_refits_that_run_astray_are_made_anew(seed):
    rng, n, decay = np.random.default_rng(seed), 30, 0.05
    x, y = rng.normal(size=(n, 3)), rng.normal(size=(n, 1))

    def likelihood(t, p):
        return p[:, 1] + 0.5 * (tf.cast(t, p.dtype)[:, 0] - p[:, 0]) ** 2 * tf.exp(-2 * p[:, 1])

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype="float64")])
    objective = Objective(model, likelihood, x, y, weight_decay=decay, decayed="all")
    assert fit_head(objective).converged
    removals, features = Removals(objective), np.hstack([x, np.ones((n, 1))])
    with warnings.catch_warnings(action="error"):
        refits = removals.exact(range(n))
    for i, theta in enumerate(refits.T):
        weight = np.full(n, 1 / (n - 1))
        weight[i] = 0
        expected = least(features, y[:, 0], weight, decay, objective.theta)
        np.testing.assert_allclose(theta, expected, rtol=1e-6, atol=1e-8)
    assert validate(objective, x[:3], y[:3]).r > 0.7


@pytest.mark.parametrize("loss", [keras.losses.Huber(), keras.losses.LogCosh()])
def test_a_fit_that_starts_where_the_loss_is_linear(loss):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    y = 50 + 5 * x[:, :1] + 5 * rng.normal(size=(60, 1))
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, dtype="float64")])
    objective = Objective(model, loss, x, y, weight_decay=1e-2)
    assert fit_head(objective).converged

    def total(theta):
        error = np.abs(x @ theta[:3] + theta[3] - y[:, 0])
        huber = np.where(error < 1, error**2 / 2, error - 0.5)
        cosh = error + np.log1p(np.exp(-2 * error)) - np.log(2)
        return (
            np.mean(huber if isinstance(loss, keras.losses.Huber) else cosh)
            + 0.005 * theta[:3] @ theta[:3]
        )

    assert objective.training_loss() == pytest.approx(total(objective.theta), rel=1e-9)
    away = [total(objective.theta + 0.1 * step) for step in rng.normal(size=(50, 4))]
    assert min(away) > total(objective.theta)


def test_a_fit_whose_start_overflows():
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.uniform(20, 80, 50), rng.uniform(1000, 9000, 50)])
    y = rng.poisson(3, (50, 1))
    head = keras.layers.Dense(1, "exponential", dtype="float64")
    model = keras.Sequential([keras.Input((2,)), head])
    head.kernel.assign([[0.5], [1.0]])
    objective = Objective(model, keras.losses.Poisson(), x, y, weight_decay=1e-3)
    with warnings.catch_warnings(action="ignore"):  # differences overflow there too
        assert fit_head(objective).converged


@pytest.mark.parametrize("loss", ["mae", "hinge"])
def test_a_head_whose_loss_does_not_bend_is_held_near(loss):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    y = np.sign(x[:, :1] + rng.normal(size=(60, 1)))
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, dtype="float64")])
    objective = Objective(model, loss, x, y, weight_decay=1e-3)
    with warnings.catch_warnings(action="ignore"):  # the loss has kinks, and no curvature
        assert validate(objective, x[:2], y[:2], damping=1.0).r > 0.9
    with pytest.raises(np.linalg.LinAlgError, match="decayed='all'"):
        Removals(objective)
