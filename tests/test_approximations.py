"""LiSSA, low rank, preconditioners, the spectrum and the damping that follows from it."""

from dataclasses import replace

import keras
import numpy as np
import pytest
from conftest import SOFTMAX

from helpers import CG, Hessian, LiSSA, LowRank, Objective, choose_damping, s_test, solve, spectrum
from helpers.gradients import per_example_gradients
from helpers.solvers import _cholesky_solve, nystroem_preconditioner


def relative(x, expected):
    return np.linalg.norm(x - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def system(binary):
    """H of a convex head, a right-hand side, and the solution with a damping of 0.1."""
    h = Hessian(binary.objective).dense()
    b = np.random.default_rng(0).normal(size=(len(h), 2))
    return binary.objective, h, b, np.linalg.solve(h + 0.1 * np.eye(len(h)), b)


def test_lissa_has_the_same_limit_as_every_other_solver(system):
    """C2: (H + damping I)^-1 b. The released code's own damping gives another limit."""
    objective, h, b, expected = system
    solution = solve(Hessian(objective), b, LiSSA(damping=0.1, depth=2000))
    assert relative(solution.x, expected) <= 1e-8
    scale, x = 2 * np.linalg.eigvalsh(h)[-1], b.copy()
    for _ in range(2000):
        x = b + (1 - 0.1) * x - h @ x / scale  # damping outside the division, as released
    released = np.linalg.solve(h + 0.1 * scale * np.eye(len(h)), b)
    assert relative(x / scale, released) <= 1e-8
    assert relative(x / scale, expected) > 0.05


def test_lissa_on_batches_comes_near_and_says_how_near(system):
    objective, _, b, expected = system
    solution = solve(objective, b, LiSSA(0.1, rtol=0.2, batch_size=20, samples=8))
    assert relative(solution.x, expected) <= 0.2
    assert solution.relative_residual.max() <= 0.5
    assert "8 x batch 20" in solution.method


def test_lissa_steps_on_the_drawn_batches_whatever_ran_before(system):
    """One graph once served two kinds of call, and took all examples for a batch of any size."""
    objective, _, b, _ = system
    lissa = LiSSA(0.1, rtol=1e3, scale=60.0, depth=40, seed=3)
    x, y = objective.head.phi, objective.head.y.ravel()
    p = 1 / (1 + np.exp(-x @ objective.theta))
    for size in (objective.n, 1, 3):
        found = solve(objective, b, replace(lissa, batch_size=size))
        draws = np.random.default_rng(3).integers(0, len(y), (40, size))
        expected = b.copy()
        for rows in np.arange(len(y))[None].repeat(40, 0) if size == len(y) else draws:
            phi, a = x[rows], (p * (1 - p))[rows, None]
            moved = phi.T @ (a * (phi @ expected)) / len(rows) + objective.decay[:, None] * expected
            expected = b + expected - (moved + 0.1 * expected) / 60
        assert relative(found.x, expected / 60) <= 1e-10


def test_lissa_says_so_when_it_diverges(system):
    objective, _, b, _ = system
    with pytest.raises(FloatingPointError, match="is below half the largest"):
        solve(Hessian(objective), b, LiSSA(damping=0.1, scale=1e-3, depth=500))


def test_lissa_chooses_a_depth_that_reaches_its_tolerance(system):
    objective, _, b, expected = system
    solution = solve(Hessian(objective), b, LiSSA(damping=0.1, rtol=1e-3))
    assert relative(solution.x, expected) <= 1e-2
    assert solution.steps.max() < 20_000


def test_low_rank_keeps_the_largest_eigenvalues_and_the_remainder(softmax):
    """Keeping the smallest, or no remainder, is far off: both have been shipped elsewhere."""
    objective, k = softmax.objective, 12
    h = Hessian(objective).dense()
    g = per_example_gradients(objective, softmax.x_test, softmax.y_test).T
    values, q = np.linalg.eigh(h)
    rest = objective.decay.min()
    largest = q[:, -k:]
    outside = (g - largest @ (largest.T @ g)) / rest
    expected = largest @ (largest.T @ g / values[-k:, None]) + outside
    exact = np.linalg.solve(h, g)
    solution = solve(Hessian(objective), g, LowRank(rank=k))
    np.testing.assert_allclose(solution.x, expected, rtol=1e-6, atol=1e-8)
    bare = largest @ (largest.T @ g / values[-k:, None])
    smallest = q[:, :k] @ (q[:, :k].T @ g / values[:k, None])
    error = relative(solution.x, exact)
    assert error < relative(bare, exact)
    assert error < relative(smallest, exact)
    everything = solve(Hessian(objective), g, LowRank(rank=objective.p - 1))
    assert relative(everything.x, exact) <= 1e-6
    more = solve(Hessian(objective), g, LowRank(rank=objective.p + 1))
    assert relative(more.x, exact) <= 1e-10


def test_low_rank_needs_to_know_what_it_leaves_out(network):
    objective = network[0]
    with pytest.raises(ValueError, match="Low rank needs weight decay"):
        solve(Hessian(objective), np.ones(objective.p), LowRank(damping=0.0, rank=10))


@pytest.fixture(scope="module")
def stiff():
    """A network with a wide spectrum, and a damping under which H is positive."""
    keras.utils.set_random_seed(5)
    rng = np.random.default_rng(5)
    x = rng.normal(size=(80, 6)) * np.geomspace(5, 0.1, 6)
    y = (x @ rng.normal(size=(6, 3))).argmax(1)
    body = [keras.layers.Dense(8, "tanh"), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((6,)), *body])
    objective = Objective(model, SOFTMAX, x, y, weight_decay=1e-3, decayed="all")
    model.compile(keras.optimizers.Adam(0.02), loss=SOFTMAX)
    model.fit(x, y, epochs=60, batch_size=20, verbose=0)
    return objective, choose_damping(objective).value


@pytest.mark.parametrize("kind", ["gauss_newton", "nystroem"])
def test_preconditioners_save_steps_and_change_no_solution(stiff, kind):
    objective, damping = stiff
    b = np.random.default_rng(6).normal(size=objective.p)
    plain = solve(objective, b, CG(damping, rtol=1e-9, precondition=None))
    helped = solve(objective, b, CG(damping, rtol=1e-9, precondition=kind))
    assert plain.converged.all()
    assert helped.converged.all()
    assert helped.steps.max() <= 0.7 * plain.steps.max()
    assert relative(helped.x, plain.x) <= 1e-6


def test_one_traced_loop_serves_every_preconditioner_of_a_kind(stiff):
    """Other weights, other dampings: nothing is traced again, and nothing old is used."""
    objective, damping = stiff
    b = np.random.default_rng(7).normal(size=objective.p)
    for shift in (damping, 10 * damping):
        solution = solve(Hessian(objective), b, CG(damping=shift, rtol=1e-9))
        h = Hessian(objective).dense() + shift * np.eye(objective.p)
        assert relative(solution.x, np.linalg.solve(h, b)) <= 1e-6
    loop = Hessian(objective).compiled["CG", _cholesky_solve]
    assert loop.experimental_get_tracing_count() == 1


def test_a_dense_network_takes_products_sooner_than_the_gauss_newton_matrix():
    """Of 1,210 parameters of a perceptron the matrix costs what a hundred products do."""
    keras.utils.set_random_seed(0)
    rng, layers = np.random.default_rng(0), keras.layers
    x, y = rng.normal(size=(30, 8, 8, 1)), rng.integers(0, 10, 30)
    body = {
        "perceptron": [layers.Flatten(), layers.Dense(16, "tanh"), layers.Dense(10)],
        "convolutions": [
            *(layers.Conv2D(8, 3, activation="tanh") for _ in range(3)),
            *(layers.Conv2D(10, 1), layers.GlobalAveragePooling2D()),
        ],
    }
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for name, parts in body.items():
        model = keras.Sequential([keras.Input((8, 8, 1)), *parts])
        objective = Objective(model, loss, x, y, weight_decay=0.1)
        solve(Hessian(objective), np.ones(objective.p), CG(1.0))
        taken = ("CG", _cholesky_solve) in Hessian(objective).compiled
        assert taken == (name == "convolutions")


def test_the_spectrum_is_bracketed_from_inside_and_exact_at_full_length(stiff):
    objective, _ = stiff
    values = np.linalg.eigvalsh(Hessian(objective).dense())
    seen = spectrum.spectrum(objective, steps=20)
    slack = 1e-9 * values[-1]
    assert values[0] - slack <= seen.lambda_min
    assert 0.99 * values[-1] <= seen.lambda_max <= values[-1] + slack
    assert seen.weights.sum() == pytest.approx(1)
    full = spectrum.spectrum(objective, steps=objective.p)
    np.testing.assert_allclose(full.lambda_min, values[0], atol=1e-6)
    np.testing.assert_allclose(full.lambda_max, values[-1], rtol=1e-9)


def test_damping_is_chosen_from_the_spectrum_with_a_reason(stiff, binary, network):
    objective, damping = stiff
    values = np.linalg.eigvalsh(Hessian(objective).dense())
    assert values[0] + damping > 0
    assert "Lanczos saw eigenvalues" in choose_damping(objective).reason
    convex = choose_damping(binary.objective)
    assert convex.value == 0
    assert "convex head" in convex.reason
    untrained = choose_damping(network[0])
    lowest = np.linalg.eigvalsh(Hessian(network[0]).dense())[0]
    assert lowest < 0
    assert "negative" in untrained.reason
    assert lowest + untrained.value > 0


def test_a_non_convex_loss_on_a_head_is_not_taken_for_convex():
    """Squared error of a sigmoid bends downwards: a decay alone does not make H positive."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, "sigmoid", use_bias=False)])
    objective = Objective(
        model, keras.losses.MeanSquaredError(), np.ones((3, 1)), np.zeros((3, 1)), weight_decay=1e-3
    )
    objective.theta = [2.0]
    assert Hessian(objective).dense()[0, 0] < 0
    chosen = choose_damping(objective)
    assert chosen.value > -Hessian(objective).dense()[0, 0]
    assert "negative" in chosen.reason


def test_lissa_names_an_indefinite_hessian(network):
    objective = network[0]
    assert np.linalg.eigvalsh(Hessian(objective).dense())[0] < 0
    b = np.full(objective.p, 1e300)  # so that it overflows soon
    with pytest.raises(FloatingPointError, match="not positive definite"):
        solve(Hessian(objective), b, LiSSA(damping=0.0, depth=5000))


def test_a_sketch_of_nothing_preconditions_nothing():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, "tanh")])
    flat = Objective(model, lambda y, p: 0 * keras.ops.sum(p, 1), np.ones((4, 2)), np.zeros(4))
    r = np.random.default_rng(0).normal(size=(flat.p, 2))
    plan = nystroem_preconditioner(flat, 0.1, rank=5)
    np.testing.assert_array_equal(plan(r), r)


def test_a_float32_network_is_solved_to_what_float32_can_reach(network):
    _, x, y = network
    keras.config.set_dtype_policy("float32")
    try:
        body = [keras.layers.Dense(5, "tanh"), keras.layers.Dense(3)]
        model = keras.Sequential([keras.Input((4,)), *body])
    finally:
        keras.config.set_dtype_policy("float64")
    objective = Objective(model, SOFTMAX, x, y, weight_decay=0.05)
    solution = s_test(objective, x[:3], y[:3])
    assert solution.dtype == "float32"
    assert solution.converged.all(), str(solution)
    assert solution.relative_residual.max() <= 1e-4


def test_only_a_cross_entropy_of_logits_is_taken_for_convex_unseen():
    """One of outputs that are taken for probabilities is not; the damping must come from H."""
    rng, known = np.random.default_rng(0), []
    x, y = rng.normal(size=(40, 3)), rng.integers(0, 4, 40)
    for activation, from_logits in ((None, True), ("softmax", False), ("softplus", False)):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
        objective = Objective(model, loss, x, y, weight_decay=1e-4, decayed="all")
        objective.theta = 2 * rng.normal(size=objective.p)
        parts = objective.head.curvatures_in_parts(objective.theta)
        convex = all(np.linalg.eigvalsh(a).min() > -1e-12 for _, a in parts)
        value = spectrum.choose_damping(objective).value
        assert (value == 0) == convex
        assert np.linalg.eigvalsh(Hessian(objective).dense()).min() + value > 0
        known.append((objective.loss.is_cross_entropy, convex))
    assert known == [(True, True), (True, True), (False, False)]


def test_many_classes_cost_no_eigenvalues_of_each_example():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 4)), rng.integers(0, 400, 300)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(400)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    objective = Objective(model, loss, x, y, weight_decay=0.01, decayed="all")
    objective.head.curvatures_in_parts = None  # 300 matrices of 400 x 400 are never made
    assert choose_damping(objective).value == 0
