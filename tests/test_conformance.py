"""Defects found in other libraries, each as a check that ours passes and the defect does not."""

import numpy as np
import pytest
from conftest import BINARY, SOFTMAX, ridge

from helpers import CG, Cholesky, Eigh, Hessian, Objective, predicted_loss_change, s_test, solve
from helpers.gradients import per_example_gradients
from support import models


def test_sign_and_unit_on_a_quadratic_model():
    """Squared loss, by hand: +(1/n) g_test' H^-1 (g_i + wd theta), to 1e-10."""
    wd = 0.2
    objective, x, y = ridge(40, 3, wd)
    h = 2 * x.T @ x / 40 + wd * np.eye(3)
    theta = np.linalg.solve(h, 2 * x.T @ y / 40)
    g = 2 * (x @ theta - y)[:, None] * x
    expected = g[:5] @ np.linalg.solve(h, (g + wd * theta).T) / 40
    for solver in (Cholesky, CG, Eigh):
        s = s_test(objective, x[:5], y[:5], solver(rtol=1e-12))
        changes = predicted_loss_change(objective, s)
        np.testing.assert_allclose(changes, expected, atol=1e-10)
    assert (np.diag(changes[:, :5]) > 0).all()  # removing a point hurts its own loss


@pytest.mark.parametrize("batch_size", [7, 20, 61])
def test_results_do_not_depend_on_the_batch_size(network, batch_size):
    """Another library sums inverses of batch Hessians: slope 24 with ten batches."""
    whole, x, y = network
    part = Objective(whole.model, SOFTMAX, x, y, weight_decay=0.05, batch_size=batch_size)
    b = per_example_gradients(whole, x[:3], y[:3]).T
    cg = CG(damping=0.5, rtol=1e-12)
    expected = solve(whole, b, cg).x
    np.testing.assert_allclose(solve(part, b, cg).x, expected, atol=1e-10)
    if batch_size == 61:
        return
    batches = [slice(k, k + batch_size) for k in range(0, 61, batch_size)]
    inverses = [
        solve(Objective(whole.model, SOFTMAX, x[r], y[r], weight_decay=0.05), b, cg).x
        for r in batches
    ]
    assert np.abs(sum(inverses) - expected).max() > 0.1 * np.abs(expected).max()


def test_more_right_hand_sides_than_parameters(binary):
    """Another library's CG leaves all beyond the first p at zero, silently."""
    objective, x, y = binary.objective, binary.x, binary.y
    assert len(x) > objective.p
    s = s_test(objective, x, y, CG(rtol=1e-12))
    assert s.converged.all()
    assert (np.linalg.norm(s.x, axis=0) > 0).all()
    exact = s_test(objective, x, y, Cholesky()).x
    np.testing.assert_allclose(s.x, exact, atol=1e-9 * np.abs(exact).max())


def test_options_are_used_and_can_not_be_swapped(binary):
    """Elsewhere a tolerance is accepted and ignored, and two integers are passed in wrong order."""
    objective, b = binary.objective, np.ones(binary.objective.p)
    loose = solve(Hessian(objective), b, CG(rtol=1e-1))
    tight = solve(Hessian(objective), b, CG(rtol=1e-10))
    assert loose.steps.max() < tight.steps.max()
    assert loose.relative_residual.max() <= 1e-1
    with pytest.raises(TypeError):
        solve(Hessian(objective), b, "cg", 0.1)


def test_a_singular_hessian_is_no_reason_for_a_silent_pseudo_inverse():
    """Without decay a constant feature pair leaves H singular; a cut-off would hide directions."""
    rng = np.random.default_rng(1)
    x = np.repeat(rng.normal(size=(30, 2)), 2, axis=1)  # every feature twice
    y = (x[:, 0] > 0).astype(int)
    y[:5] = 1 - y[:5]
    objective = Objective(models.linear_head(4), BINARY, x, y, weight_decay=0.0)
    b = np.array([1.0, -1.0, 0.0, 0.0])  # in the null space
    with pytest.raises(np.linalg.LinAlgError, match="not positive definite"):
        solve(Hessian(objective), b, Cholesky(damping=0.0))
    solution = solve(Hessian(objective), b, CG(damping=0.0))
    assert not solution.converged.any()


def test_one_column_of_a_solve_per_test_point(binary):
    """And not one per training point: the solution has m columns, whatever n is."""
    s = s_test(binary.objective, binary.x_test, binary.y_test)
    assert s.x.shape == (binary.objective.p, len(binary.x_test))


def test_nearly_zero_test_gradients_are_flagged(binary):
    """C9: a test point far on the right side of the margin has nothing but rounding to explain."""
    objective = binary.objective
    x_test = np.stack([binary.x_test[0], 1e4 * objective.theta])
    y_test = np.array([binary.y_test[0], 1])
    with pytest.warns(UserWarning, match="1 of 2 test gradients"):
        solution = s_test(objective, x_test, y_test)
    assert solution.converged.all()
