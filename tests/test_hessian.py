"""Products and gradients against dense matrices, finite differences and each other."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import SOFTMAX

from helpers import (
    CG,
    GaussNewton,
    Hessian,
    Objective,
    choose_damping,
    gradients,
    keras_facts,
    s_test,
)
from helpers.gradients import gradient_dots, per_example_gradients
from helpers.head import Head


def finite_difference_hessian(objective, step=1e-5):
    """Central differences of the gradient: the oracle that knows no second derivative."""
    theta, columns = objective.theta, []
    for e in np.eye(objective.p) * step:
        objective.theta = theta + e
        up = objective.gradient()
        objective.theta = theta - e
        columns.append((up - objective.gradient()) / (2 * step))
    objective.theta = theta
    return np.array(columns)


def test_gradient_is_the_slope_of_the_loss(network):
    objective, *_ = network
    theta, step = objective.theta, 1e-6
    gradient = objective.gradient()
    for k in range(0, objective.p, 7):
        e = np.zeros(objective.p)
        e[k] = step
        objective.theta = theta + e
        up = objective.training_loss()
        objective.theta = theta - e
        slope = (up - objective.training_loss()) / (2 * step)
        objective.theta = theta
        assert slope == pytest.approx(gradient[k], abs=1e-8)


def test_hvp_matches_finite_differences(network):
    objective, *_ = network
    h = finite_difference_hessian(objective)
    v = np.random.default_rng(0).normal(size=(objective.p, 3))
    np.testing.assert_allclose(Hessian(objective) @ v, h @ v, atol=1e-8)
    np.testing.assert_allclose(Hessian(objective) @ v[:, 0], h @ v[:, 0], atol=1e-8)
    np.testing.assert_allclose(Hessian(objective).dense(), h, atol=1e-8)


def test_dense_hessian_does_not_hang_on_the_order_of_the_variables(network):
    """It is computed layer by layer, in the order of the variables, and only from there on."""
    objective, x, y = network
    theta, h = objective.theta, Hessian(objective).dense()
    turned = objective.variables[::-1]
    other = Objective(
        objective.model, SOFTMAX, x, y, weight_decay=0.05, parameters=turned, batch_size=13
    )
    positions = np.split(np.arange(objective.p), np.cumsum(objective.sizes)[:-1])
    order = np.concatenate(positions[::-1])
    np.testing.assert_array_equal(other.theta, theta[order])
    np.testing.assert_allclose(Hessian(other).dense(), h[np.ix_(order, order)], atol=1e-14)


class WithALayerThatIsNotUsed(keras.Model):
    def __init__(self):
        super().__init__()
        self.used, self.unused = keras.layers.Dense(2), keras.layers.Dense(3)
        self.unused.build((None, 4))

    def call(self, x, training=False):
        return self.used(keras.ops.tanh(x)) ** 2


def test_a_layer_that_is_not_used_curves_by_its_decay_alone():
    x, y = np.random.default_rng(10).normal(size=(20, 4)), np.arange(20) % 2
    objective = Objective(WithALayerThatIsNotUsed(), SOFTMAX, x, y, weight_decay=0.1, decayed="all")
    h = Hessian(objective).dense()
    np.testing.assert_allclose(h, Hessian(objective) @ np.eye(objective.p), atol=1e-14)
    assert objective.p == 10 + 15
    np.testing.assert_array_equal(h[-15:], 0.1 * np.eye(objective.p)[-15:])


def test_hvp_is_symmetric(network):
    objective, *_ = network
    u, v = np.random.default_rng(1).normal(size=(2, objective.p))
    np.testing.assert_allclose(
        u @ (Hessian(objective) @ v), v @ (Hessian(objective) @ u), rtol=1e-12
    )


@pytest.mark.parametrize("name", ["binary", "softmax"])
def test_head_closed_forms_equal_automatic_differentiation(name, request):
    problem = request.getfixturevalue(name)
    objective = problem.objective
    v = np.random.default_rng(2).normal(size=(objective.p, 4))
    general = Hessian(objective)._by_batches(tf.constant(v)).numpy()
    np.testing.assert_allclose(Hessian(objective) @ v, general, atol=1e-14)
    np.testing.assert_allclose(Hessian(objective).dense() @ v, general, atol=1e-13)
    np.testing.assert_allclose(
        GaussNewton(objective)._by_batches(tf.constant(v)), general, atol=1e-13
    )
    np.testing.assert_allclose(
        per_example_gradients(objective, problem.x_test, problem.y_test),
        gradients._loss_gradients(
            objective, tf.constant(problem.x_test), tf.constant(problem.y_test)
        ),
        atol=1e-13,
    )


def test_gauss_newton_is_positive_and_not_the_hessian(network):
    objective, *_ = network
    g, h = GaussNewton(objective).dense(), Hessian(objective).dense()
    assert np.linalg.eigvalsh(g)[0] >= -1e-12
    assert np.linalg.norm(g - h) > 0.01 * np.linalg.norm(h)


def test_gauss_newton_from_jacobians(network):
    """G = (1/n) sum J' A J + decay, from Jacobians taken one output at a time."""
    objective, x, _ = network
    with tf.GradientTape() as tape:
        outputs = objective.model(x)
    parts = tape.jacobian(outputs, objective.tensors)
    j = np.concatenate([p.numpy().reshape(len(x), 3, -1) for p in parts], axis=2)
    p = tf.nn.softmax(outputs).numpy()
    a = p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None, :]
    expected = np.einsum("nap,nab,nbq->pq", j, a, j) / len(x) + np.diag(objective.decay)
    np.testing.assert_allclose(GaussNewton(objective).dense(), expected, atol=1e-12)


def test_gradient_dots_equal_per_example_gradients(network):
    objective, x, y = network
    gradients = per_example_gradients(objective, x, y)
    v = np.random.default_rng(4).normal(size=(objective.p, 6))
    for columns in (v[:, :1], v):  # the two paths: double VJP, and GEMM
        np.testing.assert_allclose(
            gradient_dots(objective, columns), columns.T @ gradients.T, atol=1e-12
        )


@pytest.mark.parametrize("batch_size", [1, 7, 60, 61, 500])
def test_results_do_not_depend_on_the_batch_size(network, batch_size):
    """Uneven last batches are weighted by their size (a defect of a peer: means of batch means)."""
    objective, x, y = network
    other = Objective(objective.model, SOFTMAX, x, y, weight_decay=0.05, batch_size=batch_size)
    v = np.random.default_rng(5).normal(size=objective.p)
    np.testing.assert_allclose(Hessian(other) @ v, Hessian(objective) @ v, atol=1e-13)
    np.testing.assert_allclose(other.gradient(), objective.gradient(), atol=1e-13)
    np.testing.assert_allclose(
        gradient_dots(other, v[:, None]), gradient_dots(objective, v[:, None]), atol=1e-13
    )
    assert other.training_loss() == pytest.approx(objective.training_loss(), abs=1e-13)


def test_a_tf_data_set_and_a_memory_map_give_the_same(network, tmp_path):
    objective, x, y = network
    v = np.random.default_rng(6).normal(size=(objective.p, 2))
    expected = Hessian(objective) @ v
    stream = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    streamed = Objective(objective.model, SOFTMAX, stream, weight_decay=0.05)
    on_disk = Objective(objective.model, SOFTMAX, mapped, y, weight_decay=0.05, batch_size=10)
    for other in (streamed, on_disk):
        assert other.n == len(x)
        np.testing.assert_allclose(Hessian(other) @ v, expected, atol=1e-13)
        np.testing.assert_allclose(gradient_dots(other, v), gradient_dots(objective, v), atol=1e-13)


def test_vectorised_and_looped_paths_agree(network, monkeypatch):
    objective, x, y = network
    v = np.random.default_rng(7).normal(size=(objective.p, 3))
    expected = Hessian(objective) @ v, per_example_gradients(objective, x, y)
    other = Objective(objective.model, SOFTMAX, x, y, weight_decay=0.05)
    monkeypatch.setattr(keras_facts, "VECTORISABLE", set())
    assert not keras_facts.is_vectorisable(other.model)
    np.testing.assert_allclose(Hessian(other) @ v, expected[0], atol=1e-13)
    np.testing.assert_allclose(per_example_gradients(other, x, y), expected[1], atol=1e-13)


def test_last_layer_of_a_network_is_a_head(network):
    objective, x, y = network
    last = Objective(objective.model, SOFTMAX, x, y, weight_decay=0.05, parameters="last_layer")
    assert last.head is not None
    assert last.p == 5 * 3 + 3
    whole = Hessian(objective).dense()[-last.p :, -last.p :]
    np.testing.assert_allclose(Hessian(last).dense(), whole, atol=1e-13)


def test_sample_weights_scale_each_example(network):
    objective, x, y = network
    weight = np.random.default_rng(8).uniform(0.5, 2, len(x))
    other = Objective(objective.model, SOFTMAX, x, y, weight_decay=0.05, sample_weight=weight)
    expected = weight @ per_example_gradients(objective, x, y) / len(x)
    expected += objective.decay * objective.theta
    np.testing.assert_allclose(other.gradient(), expected, atol=1e-13)


def test_squared_error_has_the_hessian_of_a_quadratic():
    """Keras' MSE of one output is (x.theta - y)^2: H = 2 X'X / n + wd I, whatever theta is."""
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(40, 3)), rng.normal(size=40)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False)])
    objective = Objective(model, "mean_squared_error", x, y, weight_decay=0.1)
    expected = 2 * x.T @ x / 40 + 0.1 * np.eye(3)
    np.testing.assert_allclose(Hessian(objective).dense(), expected, atol=1e-14)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' /proc")
def test_memory_of_a_product_does_not_grow_with_the_data(tmp_path):
    """Memory-mapped input, ten times the examples: a tenth of the added data is not in memory.

    glibc gives threads that meet arenas of their own, 20 MB and more by chance, so it gets one
    arena here. What is left is some 7 MB of noise; a copy of the data would be 184 in every try.
    """

    def peak(n):
        script = Path(__file__).with_name("memory_of_streaming.py")
        command = [sys.executable, script, str(n), str(tmp_path)]
        one_arena = {**os.environ, "MALLOC_ARENA_MAX": "1"}
        run = subprocess.run(command, capture_output=True, check=True, env=one_arena)
        return float(run.stdout.split()[-1])

    added = (200_000 - 20_000) * 256 * 4 / 1e6
    grown = (peak(200_000) - peak(20_000) for _ in range(3))
    assert any(growth <= 0.1 * added for growth in grown)


def test_a_head_of_many_outputs_keeps_to_its_memory_budget(monkeypatch):
    """H, its products and convexity with 50 times fewer curvatures at a time: the same numbers."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 4)), rng.integers(0, 20, 300)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(20, dtype="float64")])
    options = {"weight_decay": 0.01, "decayed": "all"}
    whole = Objective(model, SOFTMAX, x, y, **options)
    small = Objective(model, SOFTMAX, x, y, **options, memory_budget=6 * 64 * 20**2, batch_size=64)
    seen, curvatures = [], Head.curvatures
    monkeypatch.setattr(
        Head, "curvatures", lambda h, y, o: seen.append(len(y)) or curvatures(h, y, o)
    )
    v, h = rng.normal(size=(whole.p, 3)), Hessian(whole).dense()
    seen.clear()
    np.testing.assert_allclose(Hessian(small).dense(), h, atol=1e-14)
    np.testing.assert_allclose(Hessian(small) @ v, h @ v, atol=1e-13)
    np.testing.assert_allclose(small.head.product(small.theta)(v[:, 0]), h @ v[:, 0], atol=1e-13)
    assert choose_damping(small).value == 0
    assert seen
    assert max(seen) == 6


def test_images_take_products_and_not_a_gradient_for_every_output(monkeypatch):
    """A model with 256 outputs and 20 parameters: no Hessian in the outputs is formed."""
    keras.utils.set_random_seed(0)
    conv = partial(keras.layers.Conv2D, padding="same", dtype="float64")
    model = keras.Sequential([keras.Input((16, 16, 1)), conv(1, 3, activation="tanh"), conv(1, 3)])
    x = np.random.default_rng(0).normal(size=(6, 16, 16, 1))
    G = GaussNewton(Objective(model, keras.losses.MeanSquaredError(), x, x / 2, weight_decay=0.1))
    monkeypatch.setattr("helpers.hessian.output_factors", None)
    np.testing.assert_allclose(G.dense() @ np.eye(20)[0], G @ np.eye(20)[0], atol=1e-12)
    assert s_test(G.objective, x[:2], x[:2] / 2, CG(1.0)).converged.all()
