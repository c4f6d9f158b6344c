"""The insides of Keras and TensorFlow that `helpers.keras_facts` relies on, each held here."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from helpers import keras_facts

layers, losses = keras.layers, keras.losses
RNG = np.random.default_rng(0)


def slope_and_bend(function, x, v):
    """Return TensorFlow's gradient of sum(sin(function)) at x, and its derivative along v."""
    x = tf.constant(x)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            value = tf.reduce_sum(tf.sin(function(x)))
        slope = inner.gradient(value, x)
    return slope, outer.gradient(slope, x, tf.constant(v))


def differences(function, x, v, h=1e-5):
    up, down = (slope_and_bend(function, x + s * h * v, v)[0] for s in (1, -1))
    return (up - down) / (2 * h)


def resized(method):
    return lambda x: tf.cast(tf.image.resize(x, (7, 9), method), x.dtype)


PICTURE, SOFT = RNG.normal(size=(2, 5, 4, 2)), RNG.uniform(0.2, 1.5, (2, 3))
FUNCTIONS = {
    "moments": (lambda x: tf.nn.moments(x, [-1])[1], PICTURE),
    "softsign": (lambda x: tf.nn.softsign(x), PICTURE),
    "soft labels": (lambda x: tf.nn.softmax_cross_entropy_with_logits(SOFT, x), SOFT - 0.5),
    **{f"resize {m}": (resized(m), PICTURE) for m in ("nearest", "bilinear", "bicubic", "area")},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replaced_functions_have_the_same_value_and_right_derivatives(name):
    """The oracle is differences; TensorFlow's own fails it, which is why they are replaced."""
    function, x = FUNCTIONS[name]
    v = RNG.normal(size=x.shape)
    with keras_facts.exact_derivatives():
        value = function(x)
        slope, bend = slope_and_bend(function, x, v)
        expected = differences(function, x, v)
    np.testing.assert_allclose(value, function(tf.constant(x)), atol=1e-6)
    np.testing.assert_allclose(bend, expected, atol=1e-8)
    h = 1e-6
    with keras_facts.exact_derivatives():
        ends = [tf.reduce_sum(tf.sin(function(x + s * h * v))) for s in (1, -1)]
    assert float((ends[0] - ends[1]) / (2 * h)) == pytest.approx(float(np.sum(slope * v)), rel=1e-6)
    if name == "soft labels":
        return  # deterministic operations, as in these tests, have another kernel for them
    try:
        _, own = slope_and_bend(function, x, v)
    except (LookupError, TypeError):
        return  # no second derivative is registered
    assert own is None or np.abs(own - expected).max() > 1e-2 * np.abs(expected).max()


def test_nothing_stays_replaced():
    before = tf.nn.moments, tf.nn.softsign, tf.image.resize
    with keras_facts.exact_derivatives():
        with keras_facts.exact_derivatives():
            assert tf.nn.softsign is not before[1]
        assert tf.nn.softsign is not before[1]

    def fail():
        with keras_facts.exact_derivatives():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tf.nn.moments, tf.nn.softsign, tf.image.resize) == before


class Ending(keras.Model):
    def __init__(self, end):
        super().__init__()
        self.low, self.high, self.end = layers.Dense(4, "tanh"), layers.Dense(3), end

    def call(self, x, training=None):
        return self.end(self.high(self.low(x)))


def ended(*end):
    return keras.Sequential([keras.Input((5,)), layers.Dense(4, "tanh"), *end])


ENDS = {
    "Dense with softmax": lambda: ended(layers.Dense(3, "softmax")),
    "Activation": lambda: ended(layers.Dense(3), layers.Activation("softmax")),
    "Softmax": lambda: ended(layers.Dense(3), layers.Softmax()),
    "sigmoid": lambda: ended(layers.Dense(3), layers.Activation("sigmoid")),
    "nested": lambda: ended(keras.Sequential([layers.Dense(3, "softmax")])),
    "subclassed": lambda: Ending(keras.activations.softmax),
    "operation": lambda: Ending(keras.ops.softmax),
    "TensorFlow's": lambda: Ending(tf.nn.sigmoid),
}


@pytest.mark.parametrize("name", ENDS)
def test_logits_and_the_last_dense_layer_are_found(name):
    model, x = ENDS[name](), tf.constant(RNG.normal(size=(3, 5)))
    predictions = model(x)
    activation = keras_facts.last_activation(model, x)
    logits = tf.function(lambda x: keras_facts.logits_of(model(x)))(x)
    np.testing.assert_allclose(activation(logits), predictions, rtol=1e-12)
    dense = keras_facts.last_layer(model, x)
    end = keras_facts.end_of(model, x, dense.trainable_variables)
    assert end.dense is dense
    phi = keras_facts.features_of(model, dense, x)
    np.testing.assert_allclose(phi @ dense.kernel + dense.bias, logits, rtol=1e-12)
    assert keras_facts.end_of(model, x, model.trainable_variables) is None


def functional(make, shape=(4, 3)):
    inputs = keras.Input(shape)
    return keras.Model(inputs, make(inputs))


def test_last_layers_that_are_no_dense_one():
    x = tf.constant(RNG.normal(size=(2, 4, 3)))
    both = functional(lambda i: layers.Bidirectional(layers.LSTM(2))(i))
    assert type(keras_facts.last_layer(both, x)) is layers.Bidirectional
    attention = functional(lambda i: layers.MultiHeadAttention(2, 2)(i, i))
    assert type(keras_facts.last_layer(attention, x)) is layers.MultiHeadAttention
    gate = functional(lambda i: layers.Dense(2)(i) * layers.Dense(2, "sigmoid")(i))
    with pytest.raises(ValueError, match="Name the layers"):
        keras_facts.last_layer(gate, x)


class Tied(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(5, use_bias=False)

    def call(self, x, training=None):
        return self.dense(keras.ops.tanh(self.dense(x)))


def test_no_end_where_the_outputs_are_not_linear_in_the_layer():
    x = tf.constant(RNG.normal(size=(3, 5)))
    tied = Tied()
    tied(x)
    assert keras_facts.end_of(tied, x, tied.trainable_variables) is None
    adapted = keras.Sequential([keras.Input((5,)), layers.Dense(3)])
    adapted.layers[-1].enable_lora(2)
    assert keras_facts.end_of(adapted, x, adapted.trainable_variables) is None
    squared = Ending(keras.ops.square)
    squared(x)
    assert keras_facts.end_of(squared, x, squared.high.trainable_variables) is None
    assert keras_facts.end_of(ended(layers.Dense(3)), x, squared.high.trainable_variables) is None


def test_a_copy_in_float64_is_the_same_model():
    keras.config.set_dtype_policy("float32")
    try:
        model = ended(layers.Lambda(lambda x: x**2), keras.Sequential([layers.Dense(3)]))
    finally:
        keras.config.set_dtype_policy("float64")
    x = RNG.normal(size=(3, 5)).astype("float32")
    copy = keras_facts.in_float64(model, x)
    assert {v.dtype for v in copy.variables} == {"float64"}
    np.testing.assert_allclose(copy(x), model(x), rtol=1e-5, atol=1e-6)
    assert keras_facts.in_float64(Ending(keras.ops.tanh), x) is None  # knows no configuration


def test_an_activation_layer_is_a_function_that_does_not_train_or_cast():
    class Own(layers.Layer):
        def call(self, x, training=True):
            return 2 * x if training else x

    x = tf.constant([[0.1, 1 / 3]], tf.float64)
    assert np.array_equal(keras_facts.as_function(Own(dtype="float32"))(x), x)
    soft = keras_facts.as_function(layers.Softmax(dtype="float32"))(x)
    np.testing.assert_allclose(soft, tf.nn.softmax(x), rtol=1e-14)
    assert keras_facts.as_function(tf.nn.relu) is tf.nn.relu


def test_the_work_of_a_model_counts_the_positions_of_its_layers():
    parts = layers.Conv2D(8, 3), layers.GlobalAveragePooling2D(), layers.Dense(10)
    model = keras.Sequential([keras.Input((8, 8, 1)), *parts])
    assert keras_facts.work_an_example(model) == 36 * (9 * 8 + 8) + 8 * 10 + 10

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.end = layers.Dense(3)

        def call(self, x):
            return self.end(x)

    own = Own()
    own(np.zeros((2, 4)))
    assert keras_facts.work_an_example(own) == np.inf


def test_what_multiplies_inputs_is_a_kernel():
    model = keras.Sequential(
        [
            keras.Input((4, 3)),
            layers.GRU(2, return_sequences=True),
            layers.LayerNormalization(axis=(1, 2)),
            layers.PReLU(),
            layers.Dense(2),
        ]
    )
    kernels = [v.name for v in model.trainable_variables if keras_facts.is_kernel(v)]
    assert kernels == ["kernel", "recurrent_kernel", "kernel"]
