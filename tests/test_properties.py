"""Identities that hold for every shape, conditioning and damping, on drawn examples."""

import numpy as np
import scipy.linalg
from conftest import Problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import (
    CG,
    Cholesky,
    Eigh,
    Removals,
    predicted_loss_change,
    s_test,
    self_influence,
    solve,
)

calm = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
seeds = st.integers(0, 2**32 - 1)


def matrix(p, condition, seed):
    """Return a symmetric positive definite matrix with eigenvalues from 1/condition to 1."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(p, p)))
    return (q * np.geomspace(1 / condition, 1, p)) @ q.T


@calm
@given(
    p=st.integers(1, 40),
    k=st.integers(1, 6),
    condition=st.floats(1, 1e6),
    damping=st.sampled_from([0.0, 1e-3, 1.0]),
    seed=seeds,
)
def test_three_solvers_find_the_same(p, k, condition, damping, seed):
    a, b = matrix(p, condition, seed), np.random.default_rng(seed + 1).normal(size=(p, k))
    expected = scipy.linalg.solve(a + damping * np.eye(p), b, assume_a="pos")
    found = [
        solve(a, b, Cholesky(damping)),
        solve(a, b, Eigh(damping)),
        solve(a, b, CG(damping, rtol=1e-12)),
    ]
    for solution in found:
        residual = b - (a + damping * np.eye(p)) @ solution.x
        true = np.linalg.norm(residual, axis=0) / np.linalg.norm(b, axis=0)
        assert np.allclose(solution.relative_residual, true, atol=1e-14 * condition + 1e-12)
        if solution.converged.all():
            error = np.abs(solution.x - expected).max() / np.abs(expected).max()
            assert error <= 10 * condition * max(solution.relative_residual.max(), 1e-15)
    assert found[0].converged.all()
    assert found[1].converged.all()


@calm
@given(p=st.integers(2, 20), columns=st.integers(2, 8), seed=seeds)
def test_cg_minds_no_dependent_columns(p, columns, seed):
    """Equal, zero and surplus right-hand sides are solved like any other."""
    rng = np.random.default_rng(seed)
    a, few = matrix(p, 100, seed), rng.normal(size=(p, 2))
    b = few @ rng.normal(size=(2, columns))
    b[:, 0] = 0
    solution = solve(a, b, CG(rtol=1e-10))
    assert solution.converged.all()
    np.testing.assert_allclose(solution.x, np.linalg.solve(a, b), atol=1e-6)


@calm
@given(
    n=st.integers(8, 60),
    d=st.integers(1, 12),
    classes=st.integers(2, 4),
    log_decay=st.floats(-3, 0),
    bias=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_influence_identities_of_any_head(n, d, classes, log_decay, bias, seed):
    problem = Problem(n, 3, d, classes, use_bias=bias, weight_decay=10**log_decay, seed=seed)
    objective, x, y = problem.objective, problem.x_test, problem.y_test
    assert problem.fit.converged
    s = s_test(objective, x, y)
    changes = predicted_loss_change(objective, s)
    size = max(np.abs(changes).max(), 1e-12)
    assert np.abs(changes.sum(1)).max() <= 1e-6 * size * n  # they sum to zero at the minimum
    twice = predicted_loss_change(objective, 2 * s.x)
    np.testing.assert_allclose(twice, 2 * changes, rtol=1e-9, atol=1e-12 * size)
    own = self_influence(objective, problem.x, problem.y)
    assert (own >= 0).all()
    removals = Removals(objective)
    assert (removals.leverage >= -1e-12).all()
    assert (removals.leverage < 1).all()
    refit = removals.exact(np.array([seed % n]))[:, 0]
    rest = np.arange(n) != seed % n
    head = objective.head
    r = head.residuals(head.y[rest], head.outputs(head.phi[rest], refit))
    gradient = head.gradients(head.phi[rest], r).sum(0) / (n - 1) + head.decay * refit
    assert np.linalg.norm(gradient) <= 1e-9
