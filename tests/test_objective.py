"""What an objective takes from a model, and what it refuses in words."""

import keras
import numpy as np
import pytest
from conftest import BINARY, SOFTMAX

from helpers import Hessian, Objective

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(20, 3)), RNG.integers(0, 2, 20)


def dense(**options):
    layer = keras.layers.Dense(1, **options)
    return keras.Sequential([keras.Input((3,)), layer])


def test_labels_of_shape_n_are_not_broadcast_against_predictions_of_shape_n_1():
    flat = Objective(dense(), BINARY, X, Y).losses(X, Y)
    model = dense()
    objective = Objective(model, BINARY, X, Y)
    column = Objective(model, BINARY, X, Y[:, None])
    assert flat.shape == (20,)
    np.testing.assert_allclose(objective.losses(X, Y), column.losses(X, Y[:, None]))


def test_a_function_gets_the_wrapper_that_compile_gives_it():
    """Labels (n,) stand against predictions (n, 1), and whole numbers are cast."""

    def pinball(y, prediction):
        gap = y - prediction
        return keras.ops.mean(keras.ops.maximum(0.9 * gap, -0.1 * gap), axis=-1)

    model = dense()
    gap = Y - np.asarray(model(X))[:, 0]
    expected = np.maximum(0.9 * gap, -0.1 * gap)
    np.testing.assert_allclose(Objective(model, pinball, X, Y).losses(X, Y), expected, rtol=1e-12)
    model.compile(loss=pinball)
    objective = Objective(model, None, X, Y[:, None])
    np.testing.assert_allclose(objective.training_loss(), model.evaluate(X, Y, verbose=0))


def test_a_loss_averaged_over_examples_is_refused():
    with pytest.raises(ValueError, match="one value an example"):
        Objective(dense(), lambda y, p: keras.ops.mean(p), X, Y)


def test_names_and_compiled_losses_are_found():
    model = dense(activation="sigmoid")
    named = Objective(model, "binary_crossentropy", X, Y)
    model.compile(loss=keras.losses.BinaryCrossentropy())
    compiled = Objective(model, x=X, y=Y)
    np.testing.assert_allclose(named.losses(X, Y), compiled.losses(X, Y))
    with pytest.raises(ValueError, match="Name a loss"):
        Objective(dense(), None, X, Y)


def test_probabilities_and_logits_give_the_same_curvature():
    logits, probabilities = dense(), dense(activation="sigmoid")
    probabilities.set_weights(logits.get_weights())
    a = Objective(logits, BINARY, X, Y, weight_decay=0.1)
    b = Objective(probabilities, "binary_crossentropy", X, Y, weight_decay=0.1)
    np.testing.assert_allclose(Hessian(a).dense(), Hessian(b).dense(), rtol=1e-9)


def test_l2_regularisers_are_read_and_never_counted_twice():
    model = dense(kernel_regularizer=keras.regularizers.L2(0.05))
    objective = Objective(model, BINARY, X, Y)
    np.testing.assert_allclose(objective.decay, [0.1, 0.1, 0.1, 0.0])  # l2(c) is wd = 2c
    by_keras = float(model.losses[0])
    assert objective.regulariser() == pytest.approx(by_keras)
    with pytest.raises(ValueError, match="already decays"):
        Objective(model, BINARY, X, Y, weight_decay=0.1)


def test_decoupled_decay_asks_for_a_number():
    model = dense()
    model.compile(keras.optimizers.AdamW(weight_decay=0.01), loss=BINARY)
    with pytest.raises(ValueError, match="AdamW"):
        Objective(model, x=X, y=Y)
    assert Objective(model, x=X, y=Y, weight_decay=0.01).decay.max() == 0.01


def test_l1_activity_regularisers_and_added_losses_are_refused():
    with pytest.raises(ValueError, match="only L2"):
        Objective(dense(kernel_regularizer="l1"), BINARY, X, Y)
    with pytest.raises(ValueError, match="activity"):
        Objective(dense(activity_regularizer="l2"), BINARY, X, Y)


def test_decay_applies_to_kernels_unless_told_otherwise():
    model = dense()
    assert Objective(model, BINARY, X, Y, weight_decay=0.1).decay.tolist() == [0.1, 0.1, 0.1, 0]
    everything = Objective(model, BINARY, X, Y, weight_decay=0.1, decayed="all")
    assert everything.decay.tolist() == [0.1] * 4
    bias = Objective(model, BINARY, X, Y, weight_decay=0.1, decayed=[model.layers[0].bias])
    assert bias.decay.tolist() == [0, 0, 0, 0.1]


def test_parameters_are_selected_by_layer_variable_or_name():
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, "tanh", name="a"),
            keras.layers.Dense(2, name="b"),
        ]
    )
    assert Objective(model, SOFTMAX, X, Y).p == 26
    assert Objective(model, SOFTMAX, X, Y, parameters="last_layer").p == 10
    assert Objective(model, SOFTMAX, X, Y, parameters=["a"]).p == 16
    assert Objective(model, SOFTMAX, X, Y, parameters=[model.layers[0].kernel]).p == 12
    with pytest.raises(ValueError, match="No layer is called"):
        Objective(model, SOFTMAX, X, Y, parameters=["c"])
    with pytest.raises(ValueError, match="not known"):
        Objective(model, SOFTMAX, X, Y, parameters="first")
    model.trainable = False
    with pytest.raises(ValueError, match="frozen"):
        Objective(model, SOFTMAX, X, Y)


def test_mixed_precision_is_refused():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = dense()
    finally:
        keras.config.set_dtype_policy("float64")
    with pytest.raises(ValueError, match="mixed precision"):
        Objective(model, BINARY, X, Y)


def test_several_outputs_are_refused():
    inputs = keras.Input((3,))
    outputs = [keras.layers.Dense(1)(inputs), keras.layers.Dense(1)(inputs)]
    with pytest.raises(ValueError, match="several outputs"):
        Objective(keras.Model(inputs, outputs), BINARY, X, Y)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="differ in length"):
        Objective(dense(), BINARY, X, Y[:-1])


def test_theta_goes_in_and_out():
    objective = Objective(dense(), BINARY, X, Y)
    theta = np.arange(4.0)
    objective.theta = theta
    np.testing.assert_array_equal(objective.theta, theta)
    np.testing.assert_array_equal(objective.model.layers[0].bias, [3.0])


def test_batches_follow_the_memory_budget():
    whole = Objective(dense(), BINARY, X, Y)
    small = Objective(dense(), BINARY, X, Y, memory_budget=1500)
    assert whole.data.batch_size == 20
    assert 1 <= small.data.batch_size < 20
    assert sum(len(weight) for *_, weight in small.data.each()) == 20


@pytest.mark.parametrize("used", [False, True])
def test_a_subset_knows_nothing_of_the_other_examples(used):
    """Whatever was computed of the whole before: the closed forms are those of the subset."""
    rng, rows = np.random.default_rng(0), [0, 3, 3, 5, 7]
    x, y = rng.normal(size=(12, 4)), rng.integers(0, 3, 12)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    whole = Objective(model, loss, x, y, weight_decay=0.1)
    if used:
        Hessian(whole).dense(), whole.training_loss(), whole.gradient(), whole.derivatives
    part, alone = whole.subset(rows), Objective(model, loss, x[rows], y[rows], weight_decay=0.1)
    np.testing.assert_array_equal(part.head.phi, alone.head.phi)
    np.testing.assert_allclose(Hessian(part).dense(), Hessian(alone).dense(), rtol=1e-12)
    np.testing.assert_allclose(part.gradient(), alone.gradient(), rtol=1e-12)
    assert part.training_loss() == pytest.approx(alone.training_loss(), rel=1e-12)
