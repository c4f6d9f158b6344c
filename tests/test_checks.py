"""What comes with x, and what the probe of derivatives says: right, another way, or refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import BINARY, SOFTMAX

from helpers import (
    CG,
    Cholesky,
    Eigh,
    GaussNewton,
    Hessian,
    Objective,
    Removals,
    derivatives,
    fit_head,
    influence_wrt_input,
    predicted_loss_change,
    s_test,
    solve,
)
from helpers.gradients import gradient_dots
from helpers.loss import ExampleLoss
from support import models

layers, losses = keras.layers, keras.losses
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 5)), RNG.integers(0, 3, 24)
PICTURES = RNG.random((12, 8, 8, 2))
PICTURES[:, :3] = 0  # dark rows, where a unit stands on its kink


def network(*parts, shape=(5,), dtype=None):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input(shape, dtype=dtype), *parts])


def mlp(outputs=3):
    return network(layers.Dense(4, "tanh"), layers.Dense(outputs))


def bound(model=None, loss=SOFTMAX, x=X, y=Y, weight_decay=0.1, **options):
    return Objective(model or mlp(), loss, x, y, weight_decay=weight_decay, **options)


def head(outputs=3, loss=SOFTMAX, y=Y, **options):
    return bound(network(layers.Dense(outputs)), loss, y=y, **options)


# -------------------------------------------------------------------- rows, numbers, data


def test_rows_are_read_as_numpy_reads_an_index():
    mask = np.zeros(24, bool)
    mask[[1, 4, 20]] = True
    objective = head()
    fit_head(objective)
    removals = Removals(objective)
    refits = removals.exact_groups([mask, [1, 4, 20], [20, 4, 1, 4], [-4, 1, 4]])
    np.testing.assert_allclose(refits, np.repeat(refits[:, :1], 4, axis=1), atol=1e-12)
    assert removals.gradient_norms.max() <= 1e-10
    keep = head(x=X[~mask], y=Y[~mask])
    keep.theta = refits[:, 0]
    assert np.linalg.norm(keep.head.gradient(refits[:, 0])) <= 1e-9
    np.testing.assert_array_equal(removals.exact(mask), removals.exact([1, 4, 20]))
    np.testing.assert_array_equal(objective.subset(mask).data.gather(range(3))[1], Y[mask])
    for wrong in ([24], [-25], np.array([2**64 - 1], np.uint64), mask[:5], [0.5]):
        with pytest.raises(ValueError, match=r"point|mask"):
            removals.newton_steps(wrong)
    with pytest.raises(ValueError, match="leaves none"):
        removals.exact_groups([np.ones(24, bool)])


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, "much"])
def test_numbers_that_are_none(value):
    objective, b = head(), np.ones(18)
    for name in ("rtol", "damping"):
        for solver in (CG, Cholesky):
            with pytest.raises(ValueError, match=name):
                solve(objective, b, solver(**{"damping": 1.0, name: value}))


@pytest.mark.parametrize("solver", [CG, Cholesky, Eigh])
def test_small_right_hand_sides_are_no_zeros(solver):
    objective, b = head(decayed="all"), RNG.normal(size=18)
    small = solve(objective, 1e-170 * b, solver(0.1, rtol=1e-10))
    whole = solve(objective, b, solver(0.1, rtol=1e-10))
    np.testing.assert_allclose(1e170 * small.x, whole.x, rtol=1e-6)
    assert small.converged.all()


def pairs(x=X, y=Y):
    return tf.data.Dataset.from_tensor_slices((x, y))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: pairs().shuffle(24).batch(5), "Two passes"),
        (lambda: pairs().batch(5).shuffle(5), "Two passes"),
        (lambda: pairs().batch(5).repeat(), "never ends"),
        (lambda: pairs(y=Y + 0.5).batch(5), "whole class numbers"),
        (lambda: pairs(y=Y - 1).batch(5), "class numbers from 0 to 2"),
        (lambda: pairs(np.where(X > 2, np.nan, X)).batch(5), "NaN"),
        (lambda: tf.data.Dataset.from_tensors((X, Y, np.ones(48))), "one weight an example"),
        (lambda: tf.data.Dataset.from_tensors((X, Y[:20])), "differ in length"),
    ],
)
def test_datasets_that_are_none(data, words):
    with pytest.raises(ValueError, match=words):
        Objective(mlp(), SOFTMAX, data())


def test_a_random_layer_is_refused():
    noise = layers.Lambda(lambda x: x + tf.random.normal(tf.shape(x), dtype=x.dtype))
    with pytest.raises(ValueError, match="draws random numbers"):
        bound(network(noise, layers.Dense(3)))


@pytest.mark.parametrize(
    ("loss", "y", "words"),
    [
        (BINARY, 2.0 * (Y > 0) - 1, "probabilities from 0 to 1"),
        (BINARY, 255 * (Y > 0), "probabilities from 0 to 1"),
        ("hinge", 255 * (Y > 0), "-1 and 1"),
        ("mse", X[:, :4], r"needs \('n', 1\)"),
        (losses.KLDivergence(), 2.0 * Y[:, None], "probabilities"),
        (losses.MeanSquaredLogarithmicError(), -1.0 - Y, "negative ones are cut"),
        (SOFTMAX, np.eye(3)[Y], "One-hot labels go with CategoricalCrossentropy"),
        (losses.MeanSquaredError(reduction="sum"), X[:, 0], "reduction='sum'"),
        (losses.Circle(), np.arange(len(Y)) % 3, "couples the examples"),  # the first ones differ
    ],
)
def test_labels_and_losses_with_another_meaning(loss, y, words):
    outputs = 3 if loss is SOFTMAX or isinstance(loss, losses.Circle) else 1
    with pytest.raises(ValueError, match=words):
        bound(mlp(outputs), loss, y=y)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (np.ones(48), "one weight an example"),
        (-np.ones(24), "not negative"),
        (np.zeros(24), "no example counts"),
        (np.full(24, np.nan), "finite"),
    ],
)
def test_weights_that_are_none(weights, words):
    with pytest.raises(ValueError, match=words):
        bound(sample_weight=weights)


def test_a_column_of_weights_is_a_list_of_them():
    w = RNG.random(24)
    model = mlp()
    model.compile(loss=SOFTMAX)
    loss = bound(model, sample_weight=w[:, None], weight_decay=0.0).training_loss()
    by_keras = model.evaluate(X, Y, sample_weight=w, verbose=0, batch_size=24)
    assert loss == pytest.approx(by_keras, rel=1e-6)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (X[:3], Y[:2], "differ in length"),
        (X[:2, :4], Y[:2], "An input has shape"),
        (X[0], Y[0], "first axis"),
        (X[:2], [5, 1], "class numbers from 0 to 2"),
        (X[:2], np.eye(3)[:2], "One-hot"),
        (X[:0], Y[:0], "no test example"),
        (np.full((1, 5), np.inf), Y[:1], "infinity"),
    ],
)
def test_test_examples_unlike_the_training_data(x, y, words):
    with pytest.raises(ValueError, match=words):
        s_test(bound(), x, y, damping=1.0)


def two_inputs(keys):
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    both = layers.Concatenate()([layers.Dense(2, "tanh")(a), b])
    return keras.Model(dict(zip(keys, (a, b), strict=True)), layers.Dense(3)(both))


@pytest.mark.filterwarnings("ignore:When providing")
def test_inputs_go_by_the_keys_they_were_declared_with():
    x = {"a": X[:, :3], "b": X[:, 2:]}
    model = two_inputs("ba")  # the input called a is declared as b
    model.compile(loss=SOFTMAX)
    objective = bound(model, x=x, parameters="last_layer", weight_decay=0.0)
    by_keras = model.evaluate(x, Y, verbose=0)
    assert objective.training_loss() == pytest.approx(by_keras, rel=1e-6)
    assert objective.head.loss(objective.theta) == pytest.approx(by_keras, rel=1e-6)
    with pytest.raises(ValueError, match="The inputs are called"):
        bound(two_inputs("ab"), x={"left": X[:, :3], "right": X[:, 2:]})


# -------------------------------------------------------------------- derivatives


@tf.custom_gradient
def of_another(x):
    return x**2, lambda upstream: upstream * x


@tf.custom_gradient
def without_a_second(x):
    at = tf.stop_gradient(x)
    return x**3, lambda upstream: upstream * 3 * at * at


def powered(function):
    return network(layers.Dense(4, "tanh"), layers.Lambda(function, name="power"), layers.Dense(3))


def test_a_gradient_that_is_none_is_refused_and_named():
    with pytest.raises(ValueError, match="layer power has a gradient of its own"):
        (bound(powered(of_another))).gradient()

    def detached(y, p):
        return keras.ops.mean((y - p) ** 2 * tf.stop_gradient(p), axis=-1)

    with pytest.raises(ValueError, match="the loss detached has a gradient of its own"):
        s_test(head(1, detached, X[:, 0]), X[:1], X[:1, 0])


def test_differences_take_the_place_of_a_second_derivative():
    """Every quantity against the same model whose derivatives TensorFlow knows."""
    plain, odd = powered(lambda x: x**3), powered(without_a_second)
    odd.set_weights(plain.get_weights())
    found = []
    for model in (plain, odd):
        objective = bound(model)
        solution = s_test(objective, X[:2], Y[:2], CG(damping=0.5, precondition=None))
        v = np.random.default_rng(1).normal(size=(objective.p, 1))
        found.append(
            [
                Hessian(objective) @ v,
                GaussNewton(objective) @ v,
                gradient_dots(objective, v),
                influence_wrt_input(objective, v[:, 0], X[:3], Y[:3]),
            ]
        )
    assert "central differences" in str(solution)
    assert "layer power" in solution.derivatives
    for expected, got in zip(*found, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-7 * np.abs(expected).max())
    keras.config.set_dtype_policy("float32")
    try:
        coarse = bound(powered(without_a_second))
    finally:
        keras.config.set_dtype_policy("float64")
    with pytest.raises(ValueError, match="no right second derivative of layer power"):
        Hessian(coarse) @ np.ones(coarse.p)


def attention():
    inputs = keras.Input((4, 3))
    x = layers.Dense(4)(inputs)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 2)(x, x))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


def relu_cnn():
    parts = layers.Conv2D(6, 3, activation="relu"), layers.MaxPooling2D(), layers.Flatten()
    return network(*parts, layers.Dense(3), shape=(8, 8, 2))


def normalised_cnn():
    parts = layers.Conv2D(6, 3), layers.BatchNormalization(), layers.ReLU()
    parts = *parts, layers.GlobalAveragePooling2D(), layers.Dense(3)
    return network(*parts, shape=(8, 8, 2))


def lstm():
    parts = layers.Embedding(7, 3, mask_zero=True), layers.LSTM(4), layers.Dense(3)
    return network(*parts, shape=(6,), dtype="int32")


def mobile():
    options = {"weights": None, "classes": 3, "classifier_activation": None}
    return keras.applications.MobileNetV2(input_shape=(32, 32, 3), alpha=0.35, **options)


USUAL = {
    "relu and max-pooling": (relu_cnn, PICTURES),
    "batch normalisation": (normalised_cnn, PICTURES),
    "LSTM": (lstm, RNG.integers(0, 7, (12, 6))),
    "attention": (attention, RNG.normal(size=(12, 4, 3))),
    "MobileNetV2": (mobile, RNG.random((8, 32, 32, 3))),
}


@pytest.mark.parametrize(
    ("name", "policy"),
    [*((name, "float32") for name in USUAL), ("relu and max-pooling", "float64")],
)
def test_no_false_alarm(name, policy):
    build, x = USUAL[name]
    keras.config.set_dtype_policy(policy)
    try:
        objective = bound(build(), x=x.astype(policy) if x.dtype.kind == "f" else x, y=Y[: len(x)])
    finally:
        keras.config.set_dtype_policy("float64")
    theta = objective.theta
    assert objective.head is None
    assert objective.derivatives.checked, objective.derivatives.words
    assert not objective.derivatives.by_differences
    np.testing.assert_array_equal(objective.theta, theta)  # the probe moved it and put it back


@pytest.mark.parametrize("t", [1.0, 0.03, 0.001])
def test_no_false_alarm_where_the_curvature_is_below_rounding(t):
    """A smooth hinge far from its bend: exp(-1/t) of the slope, which differences can not show."""
    model = models.linear_head(4)
    x = np.random.default_rng(0).normal(size=(20, 4))
    objective = Objective(model, models.smooth_hinge(t), x, np.sign(x[:, 0]), weight_decay=0.1)
    assert objective.head is not None
    assert objective.derivatives.words.startswith("derivatives checked on")


def test_the_usual_probe_is_short(monkeypatch):
    """Two passes and one product: no more, where derivatives are right."""
    calls = []
    each = ExampleLoss.__call__
    counted = lambda self, x, y: calls.append(len(y)) or each(self, x, y)  # noqa: E731
    objective = bound()
    monkeypatch.setattr(ExampleLoss, "__call__", counted)
    assert derivatives.probe(objective, None).checked
    assert calls == [8, 8]


# -------------------------------------------------------------------- what a result is worth


def test_a_loss_without_curvature_is_said():
    for loss, y in (("mae", X[:, 0]), ("hinge", 1.0 * (Y > 0))):
        with pytest.warns(UserWarning, match="no curvature"):
            s_test(head(1, loss, y, weight_decay=1e-3), X[:1], y[:1])


def test_a_solution_that_is_none_warns_where_it_is_used():
    objective = bound(weight_decay=0.0)
    objective.theta = 2 * RNG.normal(size=objective.p)
    with pytest.warns(UserWarning, match="NEGATIVE CURVATURE"):
        solution = s_test(objective, X[:1], Y[:1], CG(damping=1e-6))
    with pytest.warns(UserWarning, match="A solution that is none is used"):
        predicted_loss_change(objective, solution)


def test_a_rounded_matrix_is_not_certified_by_itself():
    keras.config.set_dtype_policy("float32")
    try:
        objective = bound(mlp(), weight_decay=0.0)
    finally:
        keras.config.set_dtype_policy("float64")
    b = RNG.normal(size=objective.p)
    certified = solve(GaussNewton(objective), b, Cholesky(1e-6))
    g = GaussNewton(objective).dense()
    own = solve(g, b, Cholesky(1e-6, rtol=1e-4))
    assert own.relative_residual.max() < 1e-8  # what it said of itself
    assert certified.relative_residual.max() > 1e-3
    assert not certified.converged.any()
    assert "Rounding of float32 products" in str(certified)


def test_a_fit_without_a_minimum_is_not_called_one():
    fit = fit_head(head(1, BINARY, np.zeros(24)))
    assert not fit.converged
    assert "there is no minimum" in str(fit)
    assert fit_head(head(1, BINARY, np.zeros(24), decayed="all")).converged


def test_the_flat_direction_of_a_softmax_with_bias():
    """All biases up by one change nothing: H is singular there, and the minimum a line."""
    objective = head()
    fit = fit_head(objective)
    assert fit.converged
    removals = Removals(objective)
    h = Hessian(objective).dense()
    assert np.linalg.eigvalsh(h)[0] == pytest.approx(0, abs=1e-12)
    refit = removals.exact([3])[:, 0]
    left = head(x=np.delete(X, 3, 0), y=np.delete(Y, 3))
    fit_head(left)
    change = refit - left.theta
    change[-3:] -= change[-3:].mean()  # up to the common shift
    np.testing.assert_allclose(change, 0, atol=1e-8)


# -------------------------------------------------------------------- which parameters


class Affine(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3), name="kernel")
        self.b = self.add_weight(shape=(1, 3), name="bias")

    def call(self, x):
        return keras.ops.matmul(x, self.kernel) + self.b


def test_a_bias_of_rank_two_does_not_decay():
    assert bound(network(Affine()), weight_decay=1.0).decay.tolist() == [1.0] * 15 + [0.0] * 3


def test_decayed_by_name():
    model = network(layers.Dense(4, "tanh", name="low"), layers.Dense(3, name="high"))
    for names, many in (["high"], 15), (["low/kernel"], 20), (["bias"], 7), (["high/bias"], 3):
        assert bound(model, weight_decay=1.0, decayed=names).decay.sum() == many
    with pytest.raises(ValueError, match="none of the selected"):
        bound(model, decayed=["middle"])


def test_adapters_whose_sizes_fit_are_no_dense_layer():
    """p = 4 + 2 (4 + 4) = (4 + 1) 4: against the general path on a dense matrix of differences."""
    model = network(layers.Dense(4), shape=(4,))
    model.layers[-1].enable_lora(2)
    for variable in model.trainable_variables:
        variable.assign(0.3 * RNG.normal(size=variable.shape))
    objective = bound(model, x=X[:, :4])
    assert objective.head is None
    v = RNG.normal(size=objective.p)
    v /= np.linalg.norm(v)
    theta, h, slopes = objective.theta, 1e-2, []
    for sign in (1, -1):
        objective.theta = theta + sign * h * v
        slopes.append(objective.gradient())
    objective.theta = theta
    expected = (slopes[0] - slopes[1]) / (2 * h)
    got = Hessian(objective) @ v
    assert np.linalg.norm(got - expected) <= 1e-3 * np.linalg.norm(expected)
