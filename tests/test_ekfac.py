"""EK-FAC against dense matrices made from its definition."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from helpers import EKFAC, GaussNewton, Objective, solve
from helpers.ekfac import Blocks
from helpers.hessian import curvature_factors
from tests.conftest import SOFTMAX


def solved(matrix, damping, b):
    return np.linalg.solve(matrix + damping * np.eye(len(matrix)), b)


def right_hand_sides(objective, k=3):
    return np.random.default_rng(1).normal(size=(objective.p, k))


def dense_ekfac(objective, factors, damping):
    """Return EK-FAC's matrix from its definition: factors (A, B) of each layer, in theta's order.

    In coordinates scaled by S = (decay + damping)^-1/2, with the eigenvectors of S A S and of B as
    columns of V, it is S^-1 (V diag(V' S G S V) V' + I) S^-1, layer by layer.
    """
    x, y, weight = objective.data.gather(np.arange(objective.n))
    u, signs = curvature_factors(objective, x, y)
    assert signs.min() >= 0
    u *= np.sqrt(weight.numpy())[:, None, None]
    g = np.einsum("npc,nqc->pq", u, u) / objective.n
    s, out, start = np.sqrt(objective.decay + damping), np.zeros_like(g), 0
    for a, b in factors:
        end = start + len(a) * len(b)
        rows, own = slice(start, end), s[start : end : len(b)]
        v = np.kron(np.linalg.eigh(a / np.outer(own, own))[1], np.linalg.eigh(b)[1])
        scaled = g[rows, rows] / np.outer(s[rows], s[rows])
        kept = (v * (v * (scaled @ v)).sum(0)) @ v.T + np.eye(end - start)
        out[rows, rows] = kept * np.outer(s[rows], s[rows])
        start = end
    return out


def output_curvatures(logits):
    p = keras.ops.convert_to_numpy(keras.ops.softmax(logits))
    return p[:, :, None] * np.eye(p.shape[1]) - p[:, :, None] * p[:, None, :]


def ones_added(a):
    return np.concatenate([a, np.ones_like(a[..., :1])], -1)


def one_layer(loss, outputs, **options):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), rng.normal(size=(40, outputs))
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(outputs)])
    return Objective(model, loss, x, y, **options)


@pytest.mark.parametrize("damping", [0.02, 3.0])
def test_one_layer_with_squared_loss_is_the_exact_gauss_newton(damping):
    weight = np.random.default_rng(2).uniform(0.5, 2, 40)
    objective = one_layer("mse", 3, weight_decay=0.1, sample_weight=weight)  # no decay on the bias
    b = right_hand_sides(objective)
    expected = solved(GaussNewton(objective).dense(), damping, b)
    np.testing.assert_allclose(solve(objective, b, EKFAC(damping)).x, expected, rtol=1e-8)
    np.testing.assert_allclose(
        solve(objective, b[:, 0], EKFAC(damping)).x, expected[:, 0], rtol=1e-8
    )


def test_softmax_network_is_the_dense_closed_form(network):
    objective, x, _ = network
    kernel_1, bias_1, kernel_2, bias_2 = (v.numpy() for v in objective.variables)
    hidden = np.tanh(x @ kernel_1 + bias_1)
    a2 = output_curvatures(hidden @ kernel_2 + bias_2)
    slope = (1 - hidden**2)[:, :, None] * kernel_2
    factors = [(ones_added(a).T @ ones_added(a), b) for a, b in [
        (x, np.einsum("nia,nab,njb->ij", slope, a2, slope)), (hidden, a2.sum(0))
    ]]  # fmt: skip
    matrix, b = dense_ekfac(objective, factors, 0.01), right_hand_sides(objective)
    got = solve(objective, b, EKFAC(0.01)).x
    np.testing.assert_allclose(got, np.linalg.solve(matrix, b), rtol=1e-8)
    exact = solved(GaussNewton(objective).dense(), 0.01, b)
    assert np.abs(got - exact).max() > 1e-3 * np.abs(exact).max()  # an approximation all the same


def convolutional(activation, **options):
    """Return an Objective of two convolutions of different kinds and a Dense layer, small."""
    keras.utils.set_random_seed(5)
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(30, 7, 6, 2)), rng.integers(0, 3, 30)
    layers = [
        keras.layers.Conv2D(3, 3, 2, padding="same", activation=activation),
        keras.layers.Conv2D(2, (2, 1), dilation_rate=2, use_bias=False, activation=activation),
        keras.layers.Flatten(),
        keras.layers.Dense(3),
    ]
    model = keras.Sequential([keras.Input((7, 6, 2)), *layers])
    return Objective(model, SOFTMAX, x, y, weight_decay=0.05, **options)


def positions(layer, x):
    """Return the patches (b, T, kh kw c) that a convolution sees, by convolving with deltas."""
    kh, kw = layer.kernel_size
    d = kh * kw * x.shape[-1]
    deltas = np.eye(d).reshape(kh, kw, x.shape[-1], d)
    seen = tf.nn.conv2d(
        x, deltas, layer.strides, layer.padding.upper(), "NHWC", layer.dilation_rate
    )
    return seen.numpy().reshape(len(x), -1, d)


def test_convolutions_are_the_dense_closed_form():
    objective = convolutional("tanh")
    first, second, _, dense = objective.model.layers
    x = tf.convert_to_tensor(objective.data.gather(np.arange(30))[0])
    befores, inputs = [], [x]
    with tf.GradientTape(persistent=True) as tape:
        for layer in (first, second):
            bias = layer.bias if layer.use_bias else 0.0
            kernel = tf.convert_to_tensor(layer.kernel)
            how = layer.strides, layer.padding.upper(), None, layer.dilation_rate
            befores.append(tf.nn.convolution(inputs[-1], kernel, *how) + bias)
            inputs.append(tf.tanh(befores[-1]))
        flat = tf.reshape(inputs[-1], (30, -1))
        logits = tf.matmul(flat, tf.convert_to_tensor(dense.kernel)) + dense.bias
        outputs = [logits[:, c] for c in range(3)]
    bent = output_curvatures(logits)
    factors = []
    for layer, a, before in zip((first, second), inputs, befores, strict=False):
        pulled = np.stack([tape.gradient(o, before).numpy() for o in outputs], -1)
        pulled = pulled.reshape(30, -1, *pulled.shape[-2:])
        a = positions(layer, a)
        a = ones_added(a) if layer.use_bias else a
        factors.append((np.einsum("nti,ntj->ij", a, a),
                        np.einsum("ntoa,nab,ntpb->op", pulled, bent, pulled)))  # fmt: skip
    factors.append((ones_added(flat).T @ ones_added(flat), bent.sum(0)))
    matrix, b = dense_ekfac(objective, factors, 0.02), right_hand_sides(objective)
    got = solve(objective, b, EKFAC(0.02)).x
    np.testing.assert_allclose(got, np.linalg.solve(matrix, b), rtol=1e-8)


def test_batches_do_not_matter():
    whole, small = convolutional("tanh"), convolutional("tanh", batch_size=7)
    b = right_hand_sides(whole)
    got = solve(small, b, EKFAC(0.1)).x
    np.testing.assert_allclose(got, solve(whole, b, EKFAC(0.1)).x, rtol=1e-9)


def test_a_softmax_in_the_last_layer_changes_nothing(network):
    objective, x, y = network
    dense = keras.layers.Dense(3, "softmax")
    model = keras.Sequential([*objective.model.layers[:-1], dense])
    model(x[:1])
    dense.set_weights(objective.model.layers[-1].get_weights())
    same = Objective(model, "sparse_categorical_crossentropy", x, y, weight_decay=0.05)
    b = right_hand_sides(objective)
    got, expected = (solve(o, b, EKFAC(0.1)).x for o in (same, objective))
    np.testing.assert_allclose(got, expected, rtol=1e-8)
    np.testing.assert_array_equal(
        model.layers[-1].activation(np.zeros((1, 3))), np.full((1, 3), 1 / 3)
    )


def test_other_layers_are_refused_in_words():
    layers = [keras.layers.Dense(4), keras.layers.LayerNormalization(), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    x, y = np.ones((5, 3)), np.zeros(5, int)
    with pytest.raises(ValueError, match=r"Dense and Conv2D.*gamma"):
        Blocks(Objective(model, SOFTMAX, x, y, weight_decay=0.1), 0.1)
    names = [layers[0].name, layers[2].name]
    chosen = Objective(model, SOFTMAX, x, y, weight_decay=0.1, parameters=names)
    assert np.isfinite(solve(chosen, np.ones(chosen.p), EKFAC(0.1)).x).all()
    with pytest.raises(ValueError, match="weight decay on every parameter"):
        Blocks(chosen, 0.0)


def test_a_shared_layer_is_refused_in_words():
    shared, inputs = keras.layers.Dense(3), keras.Input((3,))
    model = keras.Model(inputs, shared(shared(inputs)))
    objective = Objective(model, SOFTMAX, np.ones((5, 3)), np.zeros(5, int), weight_decay=0.1)
    with pytest.raises(ValueError, match="exactly once"):
        Blocks(objective, 0.1)
