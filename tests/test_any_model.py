"""The same calls on every kind of Keras model, each against the same oracle.

The oracle is finite differences of the gradient, and the definition of an influence. At the end, a
table of what was tried: architecture x loss x end of the model, against differences of Keras's own
evaluation of the loss in float64 and dense solves.
"""

import contextlib
from pathlib import Path

import keras
import numpy as np
import pytest

from helpers import (
    CG,
    GaussNewton,
    Hessian,
    Objective,
    gradients,
    keras_facts,
    predicted_loss_change,
    s_test,
)
from helpers.gradients import gradient_dots, per_example_gradients

RNG = np.random.default_rng(0)
N, M = 24, 3
layers = keras.layers


def mlp():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5, "tanh"), layers.Dense(3)])
    return model, RNG.normal(size=(N, 4)), RNG.integers(0, 3, N), "logits"


def functional_cnn_with_batch_norm():
    inputs = keras.Input((6, 6, 1))
    x = layers.Conv2D(3, 3)(inputs)
    x = layers.Activation("softplus")(layers.BatchNormalization()(x))
    x = layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, layers.Dense(2, "softmax")(x))
    return model, RNG.normal(size=(N, 6, 6, 1)), RNG.integers(0, 2, N), "probabilities"


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.second = layers.Dense(4, "tanh"), layers.Dense(3)

    def call(self, x, training=None):
        return self.second(self.first(x))


def subclassed():
    return Subclassed(), RNG.normal(size=(N, 4)), RNG.integers(0, 3, N), "logits"


def two_inputs():
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    x = layers.Concatenate()([layers.Dense(3, "tanh")(a), b])
    model = keras.Model({"a": a, "b": b}, layers.Dense(3)(x))
    x = {"a": RNG.normal(size=(N, 3)), "b": RNG.normal(size=(N, 2))}
    return model, x, RNG.integers(0, 3, N), "logits"


def regression_of_two_outputs():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(2)])
    return model, RNG.normal(size=(N, 3)), RNG.normal(size=(N, 2)), "squares"


def shared_layer():
    a, b = keras.Input((3,)), keras.Input((3,))
    shared = layers.Dense(3, "tanh")
    model = keras.Model([a, b], layers.Dense(3)(layers.Add()([shared(a), shared(b)])))
    x = [RNG.normal(size=(N, 3)), RNG.normal(size=(N, 3))]
    return model, x, RNG.integers(0, 3, N), "logits"


def embedding_and_lstm():
    model = keras.Sequential(
        [keras.Input((5,), dtype="int32"), layers.Embedding(7, 3), layers.LSTM(3), layers.Dense(2)]
    )
    return model, RNG.integers(0, 7, (N, 5)).astype("int32"), RNG.integers(0, 2, N), "logits"


def attention():
    tokens = keras.Input((4,), dtype="int32")
    wide = keras.initializers.RandomNormal(stddev=1.0)
    x = layers.Embedding(7, 4, embeddings_initializer=wide)(tokens)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 2)(x, x))
    model = keras.Model(tokens, layers.Dense(2)(layers.GlobalAveragePooling1D()(x)))
    return model, RNG.integers(0, 7, (N, 4)).astype("int32"), RNG.integers(0, 2, N), "logits"


MODELS = [
    mlp,
    functional_cnn_with_batch_norm,
    subclassed,
    two_inputs,
    regression_of_two_outputs,
    shared_layer,
    embedding_and_lstm,
    attention,
]
LOSSES = {
    "logits": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "probabilities": keras.losses.SparseCategoricalCrossentropy(),
    "squares": keras.losses.MeanSquaredError(),
}


@pytest.fixture(scope="module", params=MODELS, ids=lambda build: build.__name__)
def case(request):
    keras.utils.set_random_seed(1)
    model, x, y, loss = request.param()
    return Objective(model, LOSSES[loss], x, y, weight_decay=0.5, batch_size=10), x, y


def rows(x, k):
    return keras.tree.map_structure(lambda a: a[:k], x)


def test_hvp_and_gauss_newton(case):
    objective, *_ = case
    v = np.random.default_rng(2).normal(size=(objective.p, 2))
    theta, step = objective.theta, 1e-5
    slopes = []
    for column in v.T:
        objective.theta = theta + step * column
        up = objective.gradient()
        objective.theta = theta - step * column
        slopes.append((up - objective.gradient()) / (2 * step))
    objective.theta = theta
    np.testing.assert_allclose(Hessian(objective) @ v, np.array(slopes).T, atol=2e-7)
    g = GaussNewton(objective) @ v
    assert np.einsum("pk,pk->k", v, g).min() > 0


def test_gradients_add_up(case):
    objective, x, y = case
    each = per_example_gradients(objective, x, y)
    assert each.shape == (N, objective.p)
    whole = each.mean(0) + objective.decay * objective.theta
    np.testing.assert_allclose(objective.gradient(), whole, atol=1e-10)
    v = np.random.default_rng(3).normal(size=(objective.p, 6))
    for columns in (v[:, :1], v):
        np.testing.assert_allclose(
            gradient_dots(objective, columns), columns.T @ each.T, atol=1e-10
        )


def test_influences_by_their_definition(case):
    """(H + damping I)^-1 in dense float64 from the products, gradients one by one."""
    objective, x, y = case
    solution = s_test(objective, rows(x, M), y[:M], CG(rtol=1e-10))  # damping chosen
    assert solution.converged.all(), str(solution)
    h = Hessian(objective) @ np.eye(objective.p) + solution.damping * np.eye(objective.p)
    assert np.linalg.eigvalsh((h + h.T) / 2)[0] > 0
    each = per_example_gradients(objective, x, y)
    full = each + objective.decay * objective.theta
    expected = each[:M] @ np.linalg.solve(h, full.T) / N
    changes = predicted_loss_change(objective, solution)
    np.testing.assert_allclose(changes, expected, atol=1e-8 * np.abs(expected).max())


def test_dense_gauss_newton_equals_its_products(case):
    objective, *_ = case
    v = np.random.default_rng(4).normal(size=(objective.p, 2))
    np.testing.assert_allclose(
        GaussNewton(objective).dense() @ v, GaussNewton(objective) @ v, atol=1e-9
    )


def test_dropout_and_batch_norm_are_in_inference_mode(case):
    objective, x, y = case
    np.testing.assert_array_equal(objective.losses(x, y), objective.losses(x, y))


def normalised():
    inputs = keras.Input((4, 4))
    x = layers.LayerNormalization()(layers.Dense(4)(inputs))
    x = layers.GroupNormalization(2)(layers.Dense(4, "tanh")(x))
    model = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))
    return Objective(
        model, LOSSES["logits"], RNG.normal(size=(N, 4, 4)), RNG.integers(0, 3, N), weight_decay=0.5
    )


def test_second_derivatives_of_normalisation_layers(monkeypatch):
    """TensorFlow's own moments get them wrong; the test is shown to fail on those."""
    objective = normalised()
    v = np.random.default_rng(7).normal(size=objective.p)
    theta, step = objective.theta, 1e-6
    objective.theta = theta + step * v
    up = objective.gradient()
    objective.theta = theta - step * v
    slope = (up - objective.gradient()) / (2 * step)
    objective.theta = theta
    np.testing.assert_allclose(Hessian(objective) @ v, slope, atol=1e-7)
    monkeypatch.setattr("helpers.keras_facts.exact_derivatives", contextlib.nullcontext)
    objective.compiled.clear()
    wrong = Hessian(objective) @ v
    assert np.linalg.norm(wrong - slope) > 0.01 * np.linalg.norm(slope)


def one_after_another(*parts, shape):
    return keras.Sequential([keras.Input(shape), *parts])


def shared_variable():
    """Return a model in which a kernel is used a second time, outside its layer."""
    inputs, first = keras.Input((4,)), layers.Dense(4, "tanh")
    x = first(inputs)
    return keras.Model(inputs, layers.Dense(2)(x + layers.Lambda(lambda t: t @ first.kernel)(x)))


def called_twice():
    inputs, both = keras.Input((4,)), layers.Dense(4, "tanh")
    return keras.Model(inputs, layers.Dense(2)(both(both(inputs))))


ROWS = {  # layers -> whether their rows are found layer by layer
    "strides, padding": lambda: (
        [layers.Conv2D(3, 3, 2, "same", activation="relu"), layers.Conv2D(2, (2, 1)),
         layers.Flatten(), layers.Dense(2, use_bias=False)], (7, 6, 2), True),
    "dilation": lambda: (
        [layers.Conv2D(3, 2, dilation_rate=2), layers.UpSampling2D(), layers.Conv2D(2, 3),
         layers.GlobalMaxPooling2D()], (6, 6, 1), True),
    "normalisation": lambda: (
        [layers.Conv2D(3, 3), layers.BatchNormalization(), layers.LayerNormalization(),
         layers.MaxPooling2D(), layers.Flatten(), layers.Dense(2, "softmax")], (6, 6, 1), True),
    "sequences": lambda: (
        [layers.Conv1D(3, 2, padding="causal"), layers.Dense(3, "tanh"), layers.Dense(2)],
        (5, 2), True),
    "depthwise": lambda: (
        [layers.DepthwiseConv2D(2), layers.Flatten(), layers.Dense(2)], (4, 4, 2), False),
    "groups": lambda: (
        [layers.Conv2D(4, 2, groups=2), layers.Flatten(), layers.Dense(2)], (4, 4, 2), False),
    "a step at a time": lambda: (
        [layers.TimeDistributed(layers.Dense(3)), layers.Flatten(), layers.Dense(2)],
        (3, 2), False),
    "recurrent": lambda: ([layers.GRU(3), layers.Dense(2)], (3, 2), False),
    "shared": lambda: ([shared_variable()], (4,), False),
    "twice": lambda: ([called_twice()], (4,), False),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_rows_layer_by_layer_are_those_of_one_example_at_a_time(kind):
    parts, shape, possible = ROWS[kind]()
    model = one_after_another(*parts, shape=shape)
    x, (*steps, width) = RNG.normal(size=(9, *shape)), model.output_shape[1:]
    y = RNG.normal(size=(9, *steps, width))
    objective = Objective(model, "mean_squared_error", x, y)
    each = per_example_gradients(objective, x, y)
    assert objective.compiled[gradients.LAYERS] == ("checked" if possible else False)
    alone = [per_example_gradients(objective, x[i : i + 1], y[i : i + 1])[0] for i in range(9)]
    np.testing.assert_allclose(each, alone, rtol=1e-9, atol=1e-12)
    slopes = gradients.output_slopes(objective, x, y)
    for i in range(9):
        rows = slice(i, i + 1)
        expected = gradients._gradient_along(objective, x[rows], slopes[rows])
        np.testing.assert_allclose(each[i], expected, rtol=1e-9, atol=1e-12)


def test_rows_that_are_found_wrong_are_not_used(monkeypatch):
    model = one_after_another(
        layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(3), shape=(8, 8, 1)
    )
    x, y = RNG.normal(size=(20, 8, 8, 1)), RNG.integers(0, 3, 20)
    objective = Objective(model, LOSSES["logits"], x, y)
    expected = per_example_gradients(objective, x, y)
    true = gradients.patches
    monkeypatch.setattr(gradients, "patches", lambda layer, a: true(layer, a)[::-1])
    objective.compiled.clear()
    for _ in range(2):  # the first call, and the one that follows its verdict
        got = per_example_gradients(objective, x, y)
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)
    assert not objective.compiled[gradients.LAYERS]


# -------------------------------------------------------------------- what was tried

OWN = np.random.default_rng(1)
TOKENS = np.array([[1, 2, 3, 0], [4, 2, 0, 0], [5, 1, 2, 3], [2, 0, 0, 0]] * 3)
BODIES = {  # input shape, dtype, layers below the end, x
    "dense": ((4,), None, lambda: [layers.Dense(3, "softsign")], OWN.normal(size=(12, 4))),
    "pictures": (
        (5, 5, 1),
        None,
        lambda: [
            layers.Conv2D(2, 2, activation="tanh"),
            layers.UpSampling2D(2, interpolation="bilinear"),
            layers.GlobalAveragePooling2D(),
        ],
        OWN.normal(size=(12, 5, 5, 1)),
    ),
    "masked steps": (
        (4,),
        "int32",
        lambda: [layers.Embedding(6, 2, mask_zero=True), layers.SimpleRNN(2, unroll=True)],
        TOKENS,
    ),
    "a label a step": (
        (4,),
        "int32",
        lambda: [
            layers.Embedding(6, 2, mask_zero=True),
            layers.SimpleRNN(2, return_sequences=True, unroll=True),
        ],
        TOKENS,
    ),
}
CLASSES, STEPS = OWN.integers(0, 3, 12), OWN.integers(0, 3, (12, 4))


class WeightedSquares(keras.losses.Loss):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def call(self, y, p):
        return self.factor * keras.ops.mean(keras.ops.square(y - p), axis=-1)


def tilted(y, p):
    return keras.ops.mean(keras.ops.logaddexp(2.0 * (y - p), p - y), axis=-1)


def sparse(from_logits=True, **options):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits, **options)


def soft(y):
    return np.eye(3)[y] * OWN.uniform(0.3, 1.5, (*y.shape, 1))


TABLE = {  # last layers, loss, labels from class numbers
    "logits": (lambda: [layers.Dense(3)], sparse, lambda y: y),
    "softmax in Dense": (lambda: [layers.Dense(3, "softmax")], "crossentropy", lambda y: y),
    "softmax in Activation": (
        lambda: [layers.Dense(3), layers.Activation("softmax")],
        lambda: sparse(False),
        lambda y: y,
    ),
    "softmax in a nested model": (
        lambda: [keras.Sequential([layers.Dense(3, "softmax")])],
        lambda: sparse(False),
        lambda y: y,
    ),
    "a class ignored": (lambda: [layers.Dense(3)], lambda: sparse(ignore_class=0), lambda y: y),
    "labels that do not sum to one": (
        lambda: [layers.Dense(3)],
        lambda: keras.losses.CategoricalCrossentropy(from_logits=True),
        soft,
    ),
    "smoothed labels": (
        lambda: [layers.Dense(3, "softmax")],
        lambda: keras.losses.CategoricalCrossentropy(label_smoothing=0.2),
        lambda y: np.eye(3)[y],
    ),
    "sigmoid, several labels": (
        lambda: [layers.Dense(3), layers.Activation("sigmoid")],
        keras.losses.BinaryCrossentropy,
        lambda y: np.eye(3)[y],
    ),
    "squares of a sigmoid": (lambda: [layers.Dense(3, "sigmoid")], "mse", lambda y: np.eye(3)[y]),
    "Huber, delta 3": (
        lambda: [layers.Dense(1)],
        lambda: keras.losses.Huber(delta=3.0),
        lambda y: 4.0 * y[..., None],
    ),
    "a class of one's own": (
        lambda: [layers.Dense(1)],
        lambda: WeightedSquares(2.5),
        lambda y: y[..., None] - 0.7,
    ),
    "a plain function": (lambda: [layers.Dense(1)], lambda: tilted, lambda y: y),
}
SOME = {"logits", "softmax in Activation", "a class ignored", "labels that do not sum to one"}
TRIED = {
    "dense": TABLE,
    "pictures": {*SOME, "softmax in a nested model", "sigmoid, several labels", "Huber, delta 3"},
    "masked steps": SOME,
    "a label a step": SOME,
}


@pytest.mark.parametrize(("body", "end"), [(b, e) for b in BODIES for e in TABLE if e in TRIED[b]])
def test_what_was_tried(body, end):
    shape, dtype, below, x = BODIES[body]
    last, loss, labels = TABLE[end]
    keras.utils.set_random_seed(2)
    model = keras.Sequential([keras.Input(shape, dtype=dtype), *below(), *last()])
    loss = loss if isinstance(loss, str) else loss()
    y = labels(STEPS if body == "a label a step" else CLASSES)
    model.compile(loss=loss)
    objective = Objective(model, None, x, y, weight_decay=0.1)
    evaluate, theta, p = Evaluation(model, x, y), objective.theta, objective.p
    assert objective.training_loss() == pytest.approx(
        evaluate() + objective.regulariser(), rel=1e-6
    )
    v = np.random.default_rng(5).normal(size=p)
    v /= np.linalg.norm(v)

    def at(h):
        objective.theta = theta + h * v
        return evaluate() + objective.regulariser()

    e = 1e-3
    five = {k: at(k * e) for k in (-2, -1, 0, 1, 2)}
    objective.theta = theta
    slope = (8 * (five[1] - five[-1]) - (five[2] - five[-2])) / (12 * e)
    bend = (16 * (five[1] + five[-1]) - (five[2] + five[-2]) - 30 * five[0]) / (12 * e**2)
    product = Hessian(objective) @ v
    assert objective.gradient() @ v == pytest.approx(slope, abs=1e-7)
    assert v @ product == pytest.approx(bend, abs=1e-5)
    g = GaussNewton(objective).dense()
    np.testing.assert_allclose(g @ v, GaussNewton(objective) @ v, atol=1e-10)
    assert np.linalg.eigvalsh(g)[0] > -1e-10  # every loss of the table is convex in its outputs
    assert objective.derivatives.checked


def test_the_page_of_what_was_tried_is_this_table():
    page = Path(__file__).parent.parent / "docs" / "tried.md"
    rows = [line.strip("| ").split(" | ") for line in page.read_text(encoding="utf-8").splitlines()]
    printed = {row[0]: row[1:] for row in rows if row[0] in TABLE}
    assert printed == {e: ["yes" if e in TRIED[b] else "-" for b in BODIES] for e in TABLE}


class Evaluation:
    """Keras's own evaluation of a compiled model in one batch, pictures resized in float64."""

    def __init__(self, model, x, y):
        self.model, self.x = model, x
        self.y = keras.ops.convert_to_tensor(y)

    def __call__(self):
        predictions = keras_facts.predict(self.model, self.x)
        return float(self.model.compute_loss(self.x, self.y, predictions, training=False))
