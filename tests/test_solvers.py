"""Solvers against dense solves, on easy, hard, indefinite and trivial systems."""

from functools import partial

import keras
import numpy as np
import pytest
import scipy.sparse.linalg
import tensorflow as tf
from sklearn.datasets import load_digits

from helpers import (
    CG,
    Cholesky,
    Eigh,
    GaussNewton,
    Hessian,
    Objective,
    choose_damping,
    solve,
    solvers,
)
from helpers.gradients import per_example_gradients
from helpers.hessian import Matrix
from helpers.linalg import Factor
from helpers.solvers import gauss_newton_preconditioner


def spd(p, condition, seed=0):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(p, p)))
    return (q * np.geomspace(1 / condition, 1, p)) @ q.T


@pytest.mark.parametrize("condition", [1, 10, 1e3, 1e6])
@pytest.mark.parametrize("k", [1, 5, 60])  # 60 right-hand sides of 40 unknowns: none may be dropped
def test_cg_equals_a_dense_solve(condition, k):
    a, b = spd(40, condition), np.random.default_rng(1).normal(size=(40, k))
    solution = solve(a, b, CG(rtol=1e-9))
    assert solution.converged.all()
    exact = np.linalg.solve(a, b)
    error = np.linalg.norm(solution.x - exact, axis=0) / np.linalg.norm(exact, axis=0)
    assert error.max() <= 1e-9 * condition  # the residual bounds the error times the condition


def test_cg_agrees_with_scipy_and_tensorflow():
    a, b = spd(30, 50), np.random.default_rng(2).normal(size=30)
    ours = solve(a, b, CG(rtol=1e-12)).x
    scipys, info = scipy.sparse.linalg.cg(a, b, rtol=1e-12)
    operator = tf.linalg.LinearOperatorFullMatrix(
        a, is_self_adjoint=True, is_positive_definite=True
    )
    tfs = tf.linalg.experimental.conjugate_gradient(
        operator, tf.constant(b), tol=1e-12, max_iter=200
    ).x
    assert info == 0
    np.testing.assert_allclose(ours, scipys, atol=1e-9)
    np.testing.assert_allclose(ours, tfs, atol=1e-9)


def test_residual_is_the_true_one():
    a, b = spd(40, 1e4), np.random.default_rng(3).normal(size=(40, 3))
    solution = solve(a, b, CG(rtol=1e-2, damping=0.1))
    residual = np.linalg.norm(b - a @ solution.x - 0.1 * solution.x, axis=0)
    np.testing.assert_allclose(
        solution.relative_residual, residual / np.linalg.norm(b, axis=0), rtol=1e-10
    )


def test_columns_help_each_other():
    a, b = np.diag([1.0, 2.0, 3.0, 4.0]), np.eye(4)[:, :2]
    b = np.concatenate([b, np.ones((4, 1))], axis=1)
    assert solve(a, b[:, 2], CG()).steps.tolist() == [4]
    assert solve(a, b, CG()).steps.tolist() == [1, 1, 2]


def test_equal_zero_and_badly_scaled_columns_are_no_obstacle():
    a, rng = spd(50, 1e3), np.random.default_rng(7)
    b = rng.normal(size=(50, 6)) * np.geomspace(1e-12, 1e6, 6)
    b = np.column_stack([b, b[:, 1], np.zeros(50), b[:, 2] + b[:, 3], b[:, 0] * 3])
    solution = solve(a, b, CG(rtol=1e-10))
    assert solution.converged.all()
    exact = np.linalg.solve(a, b)
    error = np.linalg.norm(solution.x - exact, axis=0)
    assert (error <= 1e-7 * np.linalg.norm(exact, axis=0)).all()


def test_zero_right_hand_side_gives_zero():
    b = np.zeros((6, 2))
    b[:, 1] = 1
    solution = solve(spd(6, 10), b, CG())
    assert not solution.x[:, 0].any()
    assert solution.converged.all()
    assert solution.steps[0] == 0


def test_negative_curvature_stops_and_says_so():
    a = np.diag([2.0, 1.0, -0.5])
    solution = solve(a, np.ones(3), CG())
    assert solution.negative_curvature.all()
    assert not solution.converged.any()
    assert "NEGATIVE CURVATURE" in str(solution)
    assert np.isfinite(solution.x).all()
    healed = solve(a, np.ones(3), CG(damping=0.6))
    assert healed.converged.all()


def test_too_few_steps_are_reported():
    solution = solve(spd(50, 1e6), np.ones(50), CG(max_steps=3))
    assert not solution.converged.any()
    assert "NOT CONVERGED" in str(solution)


def test_float32_products_reach_float64_residuals_by_restarts():
    """The recursive residual of float32 products drifts; the certificate must not."""
    a, b = spd(60, 1e4), np.random.default_rng(4).normal(size=(60, 2))
    a32 = a.astype(np.float32)
    operator = Matrix(a32)
    operator.precision, operator.product = "float32", lambda: partial(tf.matmul, tf.constant(a32))
    solution = solve(operator, b, CG(rtol=1e-5))
    fresh = (a32 @ solution.x.astype(np.float32)).astype(float)
    residual = np.linalg.norm(b - fresh, axis=0) / np.linalg.norm(b, axis=0)
    np.testing.assert_allclose(solution.relative_residual, residual, rtol=0.5)
    assert solution.converged.tolist() == (solution.relative_residual <= 1e-5).tolist()


def test_a_preconditioner_saves_steps():
    a, b = spd(80, 1e5), np.random.default_rng(5).normal(size=(80, 2))
    near = np.linalg.inv(a + 1e-4 * spd(80, 10, seed=9))
    plain = solve(a, b, CG(rtol=1e-8))
    helped = solve(a, b, CG(rtol=1e-8, precondition=lambda r: tf.matmul(tf.constant(near), r)))
    assert helped.converged.all()
    assert helped.steps.max() < plain.steps.max() / 2
    np.testing.assert_allclose(helped.x, np.linalg.solve(a, b), rtol=1e-3, atol=1e-2)


def test_cg_brackets_the_spectrum_from_inside():
    a = spd(40, 1e3)
    solution = solve(a, np.ones((40, 1)), CG(rtol=1e-12))
    values = np.linalg.eigvalsh(a)
    assert values[0] * (1 - 1e-9) <= solution.lambda_min <= values[0] * 1.5
    assert values[-1] * 0.9 <= solution.lambda_max <= values[-1] * (1 + 1e-9)


def test_cholesky_and_eigh_share_the_damping_convention():
    a, b = spd(20, 100), np.random.default_rng(6).normal(size=(20, 3))
    for damping in (0.0, 0.5):
        expected = np.linalg.solve(a + damping * np.eye(20), b)
        for solver in (Cholesky(damping), Eigh(damping)):
            np.testing.assert_allclose(solve(a, b, solver).x, expected, rtol=1e-9, atol=1e-10)


def test_cholesky_refuses_an_indefinite_matrix_in_words():
    with pytest.raises(np.linalg.LinAlgError, match="add damping"):
        solve(np.diag([1.0, -1.0]), np.ones(2), Cholesky())


def test_bad_options_are_refused(binary):
    b = np.ones(binary.objective.p)
    with pytest.raises(ValueError, match="negative"):
        solve(binary.objective, b, damping=-1.0)
    with pytest.raises(TypeError, match="solver object"):
        solve(binary.objective, b, "cg")


@pytest.mark.parametrize(
    ("b", "word"),
    [(np.ones(3), "parameters"), (np.full(12, np.nan), "NaN"), (1.0, r"not shape \(\)")],
)
def test_bad_right_hand_sides_are_refused(binary, b, word):
    with pytest.raises(ValueError, match=word):
        solve(Hessian(binary.objective), b)


def test_a_zero_eigenvalue_gives_no_nan():
    solution = solve(np.diag([0.0, 1.0]), np.array([0.0, 1.0]), Eigh())
    np.testing.assert_array_equal(solution.x, [0.0, 1.0])
    assert solution.converged.all()  # nothing of the right-hand side lies where H is zero
    assert not solve(np.diag([0.0, 1.0]), np.array([1.0, 1.0]), Eigh()).converged.any()


def test_products_that_are_not_numbers_are_named():
    with pytest.raises(FloatingPointError, match="NaN"):
        solve(np.full((3, 3), np.nan), np.ones(3), CG())


def test_no_right_hand_side_is_refused():
    with pytest.raises(ValueError, match="no right-hand side"):
        solve(np.eye(2), np.ones((2, 0)), Cholesky())


def test_a_factor_multiplies_and_divides():
    """L and L' and their inverses, against the matrix itself."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(6, 6)), rng.normal(size=(6, 3))
    a = a @ a.T + np.eye(6)
    factor = Factor(a)
    np.testing.assert_allclose(factor.lower @ factor.lower.T @ b, a @ b, atol=1e-12)
    np.testing.assert_allclose(factor.lower @ factor.whiten(b), b, atol=1e-12)
    np.testing.assert_allclose(factor.lower.T @ factor.unwhiten(b), b, atol=1e-12)


class Wave(keras.losses.Loss):
    """Not convex in the outputs: the Gauss-Newton matrix has negative eigenvalues."""

    def call(self, y_true, y_pred):
        return keras.ops.mean(keras.ops.cos(3 * (y_pred - y_true)), -1)


def test_a_loss_that_is_not_convex_has_the_gauss_newton_preconditioner_too():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)), rng.integers(0, 2, (40, 1)).astype(float)
    body = [keras.layers.Dense(3, "tanh"), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((3,)), *body])
    objective = Objective(model, Wave(), x, y, weight_decay=0.01, decayed="all")
    assert np.linalg.eigvalsh(GaussNewton(objective).dense())[0] < -0.1
    b, lowest = rng.normal(size=objective.p), np.linalg.eigvalsh(Hessian(objective).dense())[0]
    found = solve(objective, b, CG(0.05 - lowest, precondition="gauss_newton"))
    assert found.converged.all()
    # a damping that leaves the Gauss-Newton matrix indefinite
    assert np.isfinite(gauss_newton_preconditioner(objective, 0.0)(b[:, None])).all()


BODIES = {
    "linear": [],
    "tanh": [keras.layers.Dense(16, "tanh")],
    "ReLU": [keras.layers.Dense(32, "relu"), keras.layers.Dense(32, "relu")],
    "convolution": [
        keras.layers.Reshape((8, 8, 1)),
        keras.layers.Conv2D(4, 3, activation="tanh"),
        keras.layers.Flatten(),
    ],
}


@pytest.mark.parametrize("body", BODIES)
def test_the_bar_tells_how_long_a_solve_will_take(body, monkeypatch):
    """After a third of the steps it stands where their number follows within a factor of two."""
    seen = []

    class Bar(solvers.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False})

        def update(self, n=1):
            super().update(n)
            seen.append(self.n / self.total)

    monkeypatch.setattr(solvers, "tqdm", Bar)
    x, y = load_digits(return_X_y=True)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), *BODIES[body], keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    model.fit(x[:1000] / 16, y[:1000], epochs=20, verbose=0)
    objective = Objective(model, loss, x[:1000] / 16, y[:1000], weight_decay=1e-3, decayed="all")
    gradients = per_example_gradients(objective, x[1000:1010] / 16, y[1000:1010])
    for H in (Hessian(objective), GaussNewton(objective))[: 1 if body == "linear" else 2]:
        damping = max(1e-3, choose_damping(H).value)
        for k in (1, 10):
            seen.clear()
            solution = solve(H, gradients[:k].T, CG(damping, 1e-3, precondition=None))
            assert solution.converged.all()
            assert seen[-1] == 1
            third = -(-len(seen) // 3)
            assert len(seen) / 2 <= third / seen[third - 1] <= 2 * len(seen)


def test_cg_where_functions_run_eagerly():
    tf.config.run_functions_eagerly(True)
    try:
        assert solve(spd(20, 10), np.ones(20), CG()).converged.all()
    finally:
        tf.config.run_functions_eagerly(False)
