"""Ordinary models, losses and data whose numbers could be wrong without a word."""

import random
import threading
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_breast_cancer, load_iris

from helpers import (
    CG,
    Eigh,
    GaussNewton,
    Hessian,
    Objective,
    Removals,
    choose_damping,
    fit_head,
    influence_wrt_input,
    keras_facts,
    predicted_loss_change,
    s_test,
    self_influence,
    solve,
    validate,
)
from helpers.gradients import per_example_gradients

layers, losses, ops = keras.layers, keras.losses, keras.ops
RNG = np.random.default_rng(0)
N = 20
X, Y, T = RNG.normal(size=(N, 4)), RNG.integers(0, 3, N), RNG.normal(size=(N, 1))
B = RNG.integers(0, 2, N).astype(float)
BINARY = losses.BinaryCrossentropy(from_logits=True)
SPARSE = losses.SparseCategoricalCrossentropy(from_logits=True)
IN_ORDER = {"shuffled": B, "sorted": np.sort(B)}


def network(*parts, shape=(4,), dtype=None):
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input(shape, dtype=dtype), *parts])


def mlp(outputs=3):
    return network(layers.Dense(3, "tanh"), layers.Dense(outputs))


class Own(keras.Model):
    """A subclassed model: a normalisation that minds its batch, and a parameter beside."""

    def __init__(self, normalised=False):
        super().__init__()
        self.inner, self.end = layers.Dense(3, "tanh"), layers.Dense(1)
        self.normal = layers.BatchNormalization() if normalised else None
        self.scale = self.add_weight(name="log_sigma", shape=(), initializer="zeros")

    def call(self, x):
        x = self.inner(x)
        return self.end(self.normal(x, training=True) if self.normal else x)


class OwnLoss(Own):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return super().compute_loss(x, y, y_pred, sample_weight) + ops.mean(y_pred**2)


class OwnStep(Own):
    def train_step(self, data):
        return super().train_step(data)


def gradients_by_keras(model, loss, x, y):
    """Return the gradient of each example's loss, one at a time through Keras, (n, p)."""
    rows = []
    for i in range(len(y)):
        with tf.GradientTape() as tape:
            value = tf.reduce_mean(loss(y[i : i + 1], model(x[i : i + 1], training=False)))
        parts = tape.gradient(value, [v.value for v in model.trainable_variables])
        rows.append(np.concatenate([np.ravel(part) for part in parts]))
    return np.array(rows)


COUPLED = {
    "normalised by the batch": lambda: Own(normalised=True),
    "a norm over everything": lambda: network(layers.Lambda(tf.nn.l2_normalize), layers.Dense(1)),
    "less the batch's mean": lambda: network(
        layers.Lambda(lambda t: t - ops.mean(t, 0, keepdims=True)), layers.Dense(1)
    ),
    "noise with a fixed seed": lambda: network(
        layers.Lambda(lambda t: t + keras.random.normal(ops.shape(t), seed=7, dtype=t.dtype)),
        layers.Dense(1),
    ),
}


@pytest.mark.parametrize("kind", COUPLED)
def test_a_model_that_mixes_the_examples_of_a_batch_is_refused(kind):
    with pytest.raises(ValueError, match="an example alone differently than among others"):
        Objective(COUPLED[kind](), "mse", X, T, weight_decay=0.1)


BLANK = X.copy()
BLANK[:8] = 0
ZERO = {"kernel_initializer": "zeros"}
ENDS = {
    "all logits zero": (lambda: [layers.Dense(2, "softmax", **ZERO)], X),
    "a layer of its own": (lambda: [layers.Dense(2, **ZERO), layers.Softmax()], X),
    "blank rows first": (lambda: [layers.Dense(2), layers.Lambda(tf.nn.softmax)], BLANK),
}


@pytest.mark.parametrize("loss", [losses.KLDivergence(), losses.CategoricalFocalCrossentropy()])
@pytest.mark.parametrize("end", ENDS)
def test_two_equal_logits_do_not_make_a_softmax_a_sigmoid(end, loss):
    parts, x = ENDS[end]
    model, y = network(*parts()), np.eye(2)[B.astype(int)]
    objective = Objective(model, loss, x, y, weight_decay=0.0)
    objective.theta = RNG.normal(size=objective.p)  # trained after it was bound
    by_keras = gradients_by_keras(model, loss, x, y)
    found = per_example_gradients(objective, x, y)
    np.testing.assert_allclose(found, by_keras, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(objective.training_loss(), loss(y, model(x)), rtol=1e-6)


def test_a_loss_that_minds_parameters_beside_the_predictions_is_refused():
    model, own = mlp(1), Own()
    own(X)

    def penalised(y, p):
        return (y - p) ** 2 + 0.3 * tf.reduce_sum(model.layers[0].kernel ** 2)

    def learned_scale(y, p):
        return 0.5 * (y - p) ** 2 * tf.exp(-2 * own.scale) + own.scale

    for net, loss in ((model, penalised), (own, learned_scale)):
        with pytest.raises(ValueError, match="not only through its predictions"):
            Objective(net, loss, X, T, weight_decay=0.1)


class Broadcast(losses.Loss):
    def call(self, y, p):
        return ops.mean(ops.square(y - p), axis=-1)


def balanced(y, p):
    share = ops.mean(y)
    weight = ops.where(y == 1, 1 - share, share + 0.1)
    return weight * losses.binary_crossentropy(y, p, from_logits=True)[:, None]


@pytest.mark.parametrize("order", IN_ORDER)
@pytest.mark.parametrize("loss", [Broadcast(), balanced])
@pytest.mark.parametrize("streamed", [False, True])
def test_probes_look_at_all_the_data_and_not_at_the_first_rows(loss, order, streamed):
    x, y = X, IN_ORDER[order]
    if streamed:
        x, y = tf.data.Dataset.from_tensor_slices((X, y)).batch(4), None
    with pytest.raises(ValueError, match="Keras evaluates the loss of"):
        Objective(mlp(1), loss, x, y, weight_decay=0.1)


def test_blank_rows_first_hide_no_wrong_gradient():
    i = keras.Input((4,))
    tied = layers.Dense(3, "tanh", use_bias=False)
    hidden = tied(i)
    stopped = layers.Lambda(lambda t: tf.stop_gradient(t) ** 2)(hidden)
    model = keras.Model(i, layers.Dense(1)(layers.Concatenate()([hidden, stopped])))
    y = X[:, :1] + 1
    with pytest.raises(ValueError, match="gradient of its own"):
        s_test(Objective(model, "mse", BLANK, y, weight_decay=0.1), X[:1], y[:1], damping=1.0)
    model = keras.Model(i, layers.Lambda(lambda t: t @ tf.transpose(tied.kernel))(hidden))
    objective = Objective(model, "mse", BLANK, X, weight_decay=0.1)
    found = per_example_gradients(objective, BLANK, X)
    by_keras = gradients_by_keras(model, losses.MeanSquaredError(), BLANK, X)
    np.testing.assert_allclose(found, by_keras, rtol=1e-6, atol=1e-9)


class Batches(keras.utils.PyDataset):
    """Two batches, the first of whole numbers."""

    def __len__(self):
        return 2

    def __getitem__(self, k):
        whole = np.array([[1, 2, 3, 4], [0, 1, 0, 1]]), np.array([1, 2]), np.array([1, 1])
        return whole if k == 0 else (X[:3], T[:3, 0], np.array([0.5, 0.25, 0.9]))


@pytest.mark.parametrize(
    "form", [lambda b: b, lambda b: [b[0], b[1]], lambda b: [[*b[0]], [*b[1]]]]
)
def test_the_types_of_the_first_batch_are_not_those_of_all(form):
    x, y, weight = (
        np.concatenate(part) for part in zip(*(Batches()[k] for k in (0, 1)), strict=True)
    )
    model = network(layers.Dense(1))
    objective = Objective(model, "mse", form(Batches()), weight_decay=0.0)
    expected = np.mean(weight * (np.ravel(model(x)) - y) ** 2)
    np.testing.assert_allclose(objective.training_loss(), expected, rtol=1e-12)


def test_batches_may_be_padded_to_lengths_of_their_own():
    lengths = (3, 5)
    parts = [(RNG.integers(1, 6, (2, t)), np.array([0, 1])) for t in lengths]
    body = layers.Embedding(6, 2), layers.GlobalAveragePooling1D(), layers.Dense(2)
    model = network(*body, shape=(None,), dtype="int32")
    found = Objective(model, SPARSE, parts, weight_decay=0.0).training_loss()
    expected = np.mean([float(SPARSE(y, model(x))) for x, y in parts])
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_label_that_is_ignored_has_no_influence():
    """Keras trains the same with such a row and without it."""
    y = Y.copy()
    y[:6] = -1
    loss = losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    changes = []
    for some in (slice(None), slice(6, None)):
        model = network(layers.Dense(3, kernel_initializer="zeros"))
        objective = Objective(model, loss, X[some], y[some], weight_decay=0.2, decayed="all")
        fit_head(objective)
        losses_of_keras = [float(loss(y[i : i + 1], model(X[i : i + 1]))) for i in (6, 7)]
        unit = objective.losses(X[6:8], y[6:8]) / losses_of_keras
        solution = s_test(objective, X[6:8], y[6:8])
        changes.append(predicted_loss_change(objective, solution) / unit[:, None])
        if some == slice(None):
            with pytest.raises(ValueError, match="ignores some of the labels"):
                Removals(objective)
    np.testing.assert_allclose(changes[0][:, :6], 0, atol=1e-12)
    np.testing.assert_allclose(changes[0][:, 6:], changes[1], rtol=1e-6)


def test_a_short_sequence_takes_a_short_share_of_the_regulariser_along():
    """Against the derivative of Keras's own training loss in the weight of one sequence."""
    x = RNG.integers(1, 7, (N, 5))
    for i in range(N):
        x[i, 1 + i % 5 :] = 0
    y = RNG.integers(0, 2, (N, 5))
    body = layers.Embedding(7, 2, mask_zero=True), layers.Dense(2)
    objective = Objective(network(*body, shape=(5,), dtype="int32"), SPARSE, x, y, weight_decay=0.1)
    s, n = RNG.normal(size=(objective.p, 1)), (x > 0).sum(1)
    found = predicted_loss_change(objective, s)[0]

    def without(i, share):
        """Return the gradient of the loss where sequence i has only a share of its weight."""
        with tf.GradientTape() as tape:
            out = objective.model(x)
            each = losses.sparse_categorical_crossentropy(y, out, from_logits=True)
            weight = np.where(np.arange(N) == i, share, 1.0)[:, None] * (x > 0)
            value = tf.reduce_sum(each * weight) / weight.sum()
        return objective.flatten(tape.gradient(value, objective.tensors)).numpy()

    for i in (0, 4, 7):
        slope = (without(i, 1 + 1e-6) - without(i, 1 - 1e-6)) / 2e-6
        whole = without(i, 1.0) + objective.decay * objective.theta
        # the derivative at the minimum, where the gradient of the data is minus the regulariser's
        expected = s[:, 0] @ (slope + n[i] / n.sum() * whole)
        np.testing.assert_allclose(found[i], expected, rtol=1e-5)


def test_token_ids_that_are_floats_are_refused_and_not_given_zeros():
    tokens, body = RNG.integers(0, 7, (N, 5)), (layers.Flatten(), layers.Dense(3))
    model = network(layers.Embedding(7, 3), *body, shape=(5,), dtype="int32")
    for kind in ("int32", "float64"):
        objective = Objective(model, SPARSE, tokens.astype(kind), Y, weight_decay=0.1)
        asked = tokens[:2].astype(kind), Y[:2]
        s = s_test(objective, asked[0][:1], Y[:1], damping=1.0)
        if kind == "int32":
            assert influence_wrt_input(objective, s, *asked).shape == (2, 5, 3)
        else:
            with pytest.raises(ValueError, match="are floats, made integers"):
                influence_wrt_input(objective, s, *asked)


def test_a_head_that_is_not_at_its_minimum():
    """Trained by Adam and not by `fit_head`: a refit also does the rest of the training."""
    rng, n = np.random.default_rng(0), 200
    x = rng.normal(size=(n, 6))
    y = (x @ rng.normal(size=(6, 3)) + rng.normal(size=(n, 3))).argmax(1)
    model = network(layers.Dense(8, "tanh"), layers.Dense(3), shape=(6,))
    model.compile(keras.optimizers.Adam(0.01), SPARSE)
    model.fit(x, y, epochs=30, verbose=0)
    objective = Objective(model, SPARSE, x, y, weight_decay=1e-3, parameters="last_layer")
    with pytest.warns(UserWarning, match=r"fit_head\(objective\) first"):
        Removals(objective).exact([0])
    found = validate(objective, x[:5] + 0.1, y[:5])
    assert found.r > 0.9
    fit_head(objective)
    settled = Removals(objective)
    assert settled.at_minimum
    actual = settled.loss_change(settled.exact(found.rows), x[:5] + 0.1, y[:5])
    assert np.corrcoef(found.actual.ravel(), actual.ravel())[0, 1] > 0.9


def test_a_name_that_two_layers_have_names_neither():
    left, right = (
        keras.Sequential([keras.Input((4,)), layers.Dense(3, name="body")]) for _ in range(2)
    )
    i = keras.Input((4,))
    model = keras.Model(i, layers.Dense(3)(layers.Concatenate()([left(i), right(i)])))
    with pytest.raises(ValueError, match="2 layers are called body: pass variables"):
        Objective(model, SPARSE, X, Y, parameters=["body"], weight_decay=0.1)


@pytest.mark.parametrize("kind", [OwnLoss, OwnStep])
def test_a_loss_that_the_model_computes_itself_has_to_be_passed(kind):
    model = kind()
    model(X)
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="overrides compute_loss or train_step"):
        Objective(model, None, X, T, weight_decay=0.1)
    assert Objective(model, "mse", X, T, weight_decay=0.1).n == N


def test_features_of_layers_that_were_changed_are_not_used():
    """As over checkpoints: weights are loaded anew below a head that was used before."""
    model = mlp(1)
    loss = losses.BinaryCrossentropy(from_logits=True)

    def bound():
        return Objective(model, loss, X, B, weight_decay=0.1, parameters="last_layer")

    before = bound()
    fit_head(before)  # the head's own parameters may move
    s = s_test(before, X[:2], B[:2])
    predicted_loss_change(before, s)
    model.layers[0].kernel.assign(model.layers[0].kernel * 1.01)
    uses = [
        fit_head,
        Removals,
        Objective.gradient,
        lambda o: s_test(o, X[:2], B[:2]),
        lambda o: solve(o, s.x),
        lambda o: self_influence(o, X[:2], B[:2]),
        lambda o: predicted_loss_change(o, s.x),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=r"trained or loaded anew .* bind a new Objective"):
            use(before)
    after = bound()
    for use in uses:
        use(after)


def test_features_that_depend_on_no_parameter():
    model = network(layers.Flatten(), layers.Dense(1), shape=(2, 2))
    loss = losses.BinaryCrossentropy(from_logits=True)
    flat = network(layers.Dense(1))
    flat.set_weights(model.get_weights())
    changes = []
    for each, x in ((model, X.reshape(-1, 2, 2)), (flat, X)):
        objective = Objective(each, loss, x, B, weight_decay=0.1)
        fit_head(objective)
        changes.append(predicted_loss_change(objective, s_test(objective, x[:2], B[:2])))
    np.testing.assert_allclose(*changes, rtol=1e-4, atol=1e-8)


def test_self_influence_from_the_removals_carries_no_weight():
    weight = RNG.uniform(0.2, 2, N)
    loss, model = losses.BinaryCrossentropy(from_logits=True), network(layers.Dense(1))
    objective = Objective(model, loss, X, B, sample_weight=weight, weight_decay=0.1)
    fit_head(objective)
    ours, expected = Removals(objective).self_influence(), self_influence(objective, X, B)
    np.testing.assert_allclose(ours, expected, rtol=3 / N)


def test_self_influence_of_a_float32_network_is_that_in_float64():
    """Features up to 1,000 and little damping: float32 has no digit left of H."""
    rng, found = np.random.default_rng(0), []
    x, y = rng.random((80, 6)) * [1, 10, 255, 1000, 1, 1], rng.integers(0, 3, 80)
    keras.utils.set_random_seed(0)
    weights = None
    for policy in ("float32", "float64"):
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(policy)
        try:
            model = keras.Sequential([keras.Input((6,)), layers.Dense(8, "relu"), layers.Dense(3)])
        finally:
            keras.config.set_dtype_policy(before)
        weights = weights or model.get_weights()
        model.set_weights(weights)
        bound = GaussNewton(Objective(model, SPARSE, x.astype(policy), y, weight_decay=1e-3))
        found.append(self_influence(bound, x.astype(policy), y, damping=1e-4))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5 * found[1].max())


def test_a_constraint_is_said():
    model = network(layers.Dense(1, kernel_constraint="non_neg"))
    with pytest.warns(UserWarning, match="takes theta as free"):
        Objective(model, "mse", X, T, weight_decay=0.1)


def test_a_dict_goes_by_names_into_a_model_that_lists_its_inputs():
    b, a = keras.Input((2,), name="b"), keras.Input((3,), name="a")
    model = keras.Model([b, a], layers.Dense(3)(layers.Concatenate()([layers.Dense(2)(b), a])))
    model.compile("sgd", SPARSE)
    x = {"a": X[:, :3], "b": X[:, 2:]}
    found = Objective(model, None, x, Y, weight_decay=0.0).training_loss()
    np.testing.assert_allclose(found, model.evaluate(x, Y, verbose=0), rtol=1e-6)


def test_labels_and_rows_in_other_nestings():
    i = keras.Input((4,))
    model = keras.Model(i, {"out": layers.Dense(3, name="out")(i)})
    data = tf.data.Dataset.from_tensor_slices((X, {"out": Y})).batch(4)
    expected = Objective(model, SPARSE, X, Y, weight_decay=0.1)
    for x, y in ((data, None), ([list(row) for row in X], Y)):
        found = Objective(model, SPARSE, x, y, weight_decay=0.1).training_loss()
        np.testing.assert_allclose(found, expected.training_loss(), rtol=1e-12)
    with pytest.raises(ValueError, match=r"several outputs, \['a', 'b'\]: bind one"):
        Objective(model, SPARSE, X, {"a": Y, "b": Y}, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"theta has shape \(15,\), not \(3,\)"):
        expected.theta = np.zeros(3)
    two = Objective(network(layers.Dense(2)), "mse", X, X[:, :2], weight_decay=0.1)
    assert s_test(two, X[:1].tolist(), [[0.1, 0.2]]).x.shape == (two.p, 1)


@tf.custom_gradient
def tanh_without_second(x):
    y = tf.tanh(x)
    return y, lambda u: u * tf.stop_gradient(1 - y**2)


class Squashed(layers.Layer):
    """`function` of x w; not to be copied in another dtype, as layers without a config are not."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 4), name="kernel")

    def call(self, x):
        return self.function(x @ self.w)


def squashed(function, scale=1.0):
    """Return an objective that depends on `scale` by the size of data and first kernel alone."""
    keras.utils.set_random_seed(1)
    model = network(layers.Dense(4, "tanh"), Squashed(function), layers.Dense(3))
    model.layers[0].kernel.assign(model.layers[0].kernel / scale)
    return Objective(model, SPARSE, X * scale, Y, weight_decay=0.0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_differences_step_each_variable_by_its_own_size(scale):
    """One step for all of theta was up to 100 % off where a kernel is far larger or smaller."""
    ours, right = squashed(tanh_without_second, scale), squashed(tf.tanh, scale)
    v = np.eye(right.p)[:, [0, 20, -1]]
    for operator in (Hessian, GaussNewton):
        error = operator(ours) @ v - operator(right) @ v
        expected = np.linalg.norm(operator(right) @ v, axis=0)
        assert (np.linalg.norm(error, axis=0) <= 1e-7 * expected).all()
    assert ours.derivatives.by_differences
    assert not right.derivatives.by_differences


RECOMPUTED = {"TensorFlow": lambda x: tf.recompute_grad(tf.tanh)(x)}
if hasattr(keras, "remat"):  # since Keras 3.9
    RECOMPUTED["Keras"] = keras.remat(tf.tanh)


@pytest.mark.parametrize("function", RECOMPUTED.values(), ids=RECOMPUTED)
def test_recomputed_activations_take_differences(function):
    v, right = np.ones(51), Hessian(squashed(tf.tanh))
    np.testing.assert_allclose(Hessian(squashed(function)) @ v, right @ v, rtol=1e-6, atol=1e-9)


def test_second_derivatives_that_can_not_be_told_are_said():
    def in_float32(x):
        return tf.cast(tanh_without_second(tf.cast(x, "float32")), x.dtype)

    with pytest.warns(UserWarning, match=r"not checked: differences do not tell\. They would if"):
        solve(squashed(in_float32), np.ones(51), CG(0.5))


def test_a_rounded_gradient_without_a_second_is_refused():
    def normalised(x):
        x = tf.cast(x[:, None, None], "float32")
        return tf.cast(tf.nn.local_response_normalization(x)[:, 0, 0], "float64")

    with pytest.raises(ValueError, match=r"no second derivative .* rounded too much"):
        squashed(normalised).gradient()


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_products_too_mind_layers_below_that_were_changed(kind):
    model = mlp()
    bound = kind(Objective(model, SPARSE, X, Y, weight_decay=0.1, parameters="last_layer"))
    _ = bound @ np.ones(bound.shape[0])
    model.layers[0].kernel.assign(2 * model.layers[0].kernel)
    for use in (lambda: bound @ np.ones(bound.shape[0]), bound.dense):
        with pytest.raises(ValueError, match="bind a new Objective"):
            use()


def test_complex_vectors_and_other_decays():
    objective = Objective(mlp(), SPARSE, X, Y, weight_decay=0.1)
    h, v = Hessian(objective), RNG.normal(size=objective.p)
    np.testing.assert_allclose(h @ (v + 2j * v), (1 + 2j) * (h @ v), rtol=1e-12)
    with pytest.raises(ValueError, match="complex"):
        solve(h, 1j * v)
    with pytest.raises(AttributeError):
        objective.decay = np.zeros(objective.p)  # products would keep the old one
    with pytest.raises(ValueError, match="read-only"):
        objective.decay[:] = 0


def test_parameters_that_no_output_depends_on():
    class Unused(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.beside = layers.Dense(3), layers.Dense(2)

        def call(self, x):
            self.beside(x)
            return self.used(x)

    model = Unused()
    model(X)
    names = [model.beside.name]
    objective = Objective(model, SPARSE, X, Y, weight_decay=0.1, parameters=names)
    s = RNG.normal(size=objective.p)
    share = objective.decay * objective.theta @ s / N
    np.testing.assert_allclose(predicted_loss_change(objective, s), np.full((1, N), share))


def test_labels_of_several_outputs_as_a_list():
    i = keras.Input((4,))
    model = keras.Model(i, [layers.Dense(1)(i), layers.Dense(2)(i)])
    with pytest.raises(ValueError, match=r"several outputs\. Bind one"):
        Objective(model, "mse", X, [T, X[:, :2]], weight_decay=0.1)


# ---------------------------------------------------------------- convex heads of raw data


def softmax_of_iris():
    x, y = load_iris(return_X_y=True)
    objective = Objective(network(layers.Dense(3)), SPARSE, x, y, weight_decay=1e-3)
    assert fit_head(objective).converged
    return objective, x, y


def test_a_convex_head_with_an_undecayed_bias_is_not_damped():
    objective, x, y = softmax_of_iris()
    solution = s_test(objective, x[::30], y[::30])
    assert solution.converged.all()
    assert solution.damping == 0
    h, gradients = Hessian(objective).dense(), per_example_gradients(objective, x, y)
    expected = np.linalg.lstsq(h, gradients[::30].T, rcond=1e-12)[0]
    np.testing.assert_allclose(solution.x, expected, rtol=1e-6, atol=1e-8)
    by_eigh = solve(objective, gradients[::30].T, Eigh(damping=0.0))
    assert by_eigh.converged.all()
    np.testing.assert_allclose(by_eigh.x, expected, rtol=1e-6, atol=1e-8)
    own = (gradients * np.linalg.lstsq(h, gradients.T, rcond=1e-12)[0].T).sum(1)
    np.testing.assert_allclose(self_influence(objective, x, y), own, rtol=1e-6, atol=1e-9)


def test_a_fit_of_unscaled_features_does_not_fail_where_it_starts():
    x, y = load_breast_cancer(return_X_y=True)
    model, loss = network(layers.Dense(1), shape=(30,)), losses.BinaryCrossentropy(True)
    assert np.abs(model.predict(x, verbose=0)).min() > 20  # every output is saturated
    fits = [fit_head(Objective(model, loss, x, y, weight_decay=1e-3))]
    model.set_weights([np.zeros_like(w) for w in model.get_weights()])
    fits.append(fit_head(Objective(model, loss, x, y, weight_decay=1e-3)))
    assert all(fit.converged for fit in fits)
    assert fits[0].training_loss == pytest.approx(fits[1].training_loss, rel=1e-6)


def test_large_losses_are_fitted_and_refitted_to_their_rounding():
    rng, n = np.random.default_rng(0), 60
    x = rng.uniform([40, 1950, 100], [200, 2020, 9000], (n, 3))
    y = 1000 * (2 * x[:, 0] + 0.5 * (x[:, 1] - 1950) - 0.01 * x[:, 2] + 30 * rng.normal(size=n))
    objective = Objective(network(layers.Dense(1), shape=(3,)), "mse", x, y, weight_decay=1e-3)
    fit = fit_head(objective)
    assert fit.converged
    assert fit.exact_norm > 1e-8  # squares of dollars: no 1e-10 is to be had
    design = np.hstack([x, np.ones((n, 1))])

    def closed(rows):
        a, k = design[rows], len(rows)
        return np.linalg.solve(2 * a.T @ a / k + np.diag([1e-3] * 3 + [0]), 2 * a.T @ y[rows] / k)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        removals = Removals(objective)
        refits = removals.exact(range(5))
    for row, theta in enumerate(refits.T):
        np.testing.assert_allclose(theta, closed(np.delete(np.arange(n), row)), rtol=1e-8)


def test_a_column_of_large_numbers_does_not_end_a_fit_early():
    rng, n = np.random.default_rng(0), 100
    scaled = np.hstack([rng.normal(size=(n, 3)), np.ones((n, 1))])
    y = (scaled @ [3.0, -2, 1, 0.5] + rng.logistic(size=n) > 0).astype(float)
    units = np.diag([1, 1, 1e7, 1])  # the third column is in raw units, far from zero
    units[3, 2] = 3e8
    raw, inverse = scaled @ units, np.linalg.inv(units)
    decay = inverse.T @ np.diag([1e-3, 1e-3, 1e-3, 0]) @ inverse

    def newton(rows):
        a, theta = scaled[rows], np.zeros(4)
        for _ in range(30):
            p = 1 / (1 + np.exp(-a @ theta))
            gradient = a.T @ (p - y[rows]) / len(rows) + decay @ theta
            theta -= np.linalg.solve(a.T * (p * (1 - p)) @ a / len(rows) + decay, gradient)
        return scaled @ theta

    model = network(layers.Dense(1), shape=(3,))
    objective = Objective(model, BINARY, raw[:, :3], y, weight_decay=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the start, with no curvature at all, raises no doubt
        assert fit_head(objective).converged
        refits = Removals(objective).exact(range(4))
    np.testing.assert_allclose(raw @ objective.theta, newton(np.arange(n)), atol=1e-9)
    for row, theta in enumerate(refits.T):
        expected = newton(np.delete(np.arange(n), row))
        np.testing.assert_allclose(raw @ theta, expected, atol=1e-8)


def test_a_singular_head_that_lanczos_takes_for_regular_is_damped():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 60)), rng.normal(size=200)
    x[:, 1] = x[:, 0]
    objective = Objective(network(layers.Dense(1), shape=(60,)), "mse", x, y, weight_decay=0.0)
    solution = s_test(objective, x[:2], y[:2])
    assert solution.converged.all()


@pytest.mark.parametrize("kind", ["int32", "float16"])
def test_a_cast_below_a_head_stays_a_cast(kind):
    x = RNG.uniform(0, 5, (N, 4))
    body = network(layers.Lambda(lambda t: ops.cast(t, kind)), layers.Dense(1))
    for model in (body, network(layers.Dense(1), dtype="int32")):
        objective = Objective(model, "mse", x, T, weight_decay=0.1)
        assert objective.head.loss(objective.theta) == pytest.approx(objective.training_loss())


# ---------------------------------------------------------------- other models


def test_a_model_tied_by_a_lambda_has_no_copy_that_is_tied_to_it():
    table = layers.Embedding(6, 3)
    inputs = keras.Input((4,), dtype="int32")
    hidden = layers.Dense(3, "tanh")(layers.GlobalAveragePooling1D()(table(inputs)))
    tied = layers.Lambda(lambda t: ops.matmul(t, ops.transpose(table.embeddings)))
    model = keras.Model(inputs, tied(hidden))
    x, y = RNG.integers(0, 6, (N, 4)), RNG.integers(0, 6, N)
    before = random.getstate()
    objective = Objective(model, SPARSE, x, y, weight_decay=0.1)
    assert objective.in_float64() is None
    assert random.getstate() == before  # the user's next initialisers are as they would have been


def test_both_factors_of_lora_decay():
    model = mlp()
    model.layers[0].enable_lora(2)
    objective = Objective(model, SPARSE, X, Y, weight_decay=0.1, parameters=model.layers[:1])
    assert [v.name for v in objective.variables] == ["bias", "lora_kernel_a", "lora_kernel_b"]
    assert objective.decay.tolist() == [0] * 3 + [0.1] * (8 + 6)
    assert s_test(objective, X[:2], Y[:2], damping=1.0).converged.all()  # float32 among float64


def test_layers_may_be_named_by_themselves():
    model = mlp()
    last, kernel = model.layers[-1], model.layers[-1].kernel
    for chosen in ([last], last, [last.name], last.trainable_variables):
        objective = Objective(model, SPARSE, X, Y, weight_decay=0.1, parameters=chosen)
        assert objective.p == 12
    assert Objective(model, SPARSE, X, Y, weight_decay=0.1, parameters=kernel).p == 9
    decayed = Objective(model, SPARSE, X, Y, weight_decay=0.1, decayed=last).decay
    assert decayed.tolist() == [0] * 15 + [0.1] * 12
    with pytest.raises(TypeError, match="no layer, name of a layer, or Keras variable"):
        Objective(model, SPARSE, X, Y, parameters=[last.kernel.value])


def test_a_loss_by_name_above_an_activation_of_ones_own_is_measured():
    model = network(layers.Dense(1, "hard_sigmoid"))
    model.layers[0].set_weights([0.1 * w for w in model.layers[0].get_weights()])
    objective = Objective(model, "binary_crossentropy", X, B, weight_decay=0.1, decayed="all")
    assert choose_damping(objective).value >= 0


def test_predictions_without_a_last_axis_mean_what_keras_means():
    inputs = keras.Input((4,))
    outputs = mlp(1)(inputs)
    flat = keras.Model(inputs, layers.Lambda(lambda t: ops.squeeze(t, -1))(outputs))
    usual = Objective(keras.Model(inputs, outputs), "mse", X, T, weight_decay=0.1)
    squeezed = Objective(flat, "mse", X, T[:, 0], weight_decay=0.1)
    np.testing.assert_allclose(Hessian(squeezed).dense(), Hessian(usual).dense(), atol=1e-12)
    for ends in (layers.Activation("sigmoid"), layers.Lambda(lambda t: ops.sigmoid(t))):
        ended = [keras.Model(inputs, ends(end)) for end in (outputs, flat.outputs[0])]
        for model in ended:
            model.layers[1].layers[-1].bias.assign([40.0])
        pair = [Objective(m, "binary_crossentropy", X, B, weight_decay=0.1) for m in ended]
        np.testing.assert_allclose(pair[1].losses(X, 1 - B), pair[0].losses(X, 1 - B))
        np.testing.assert_allclose(pair[1].gradient(), pair[0].gradient())


def test_a_normalisation_adapted_anew_is_not_overlooked():
    scale = layers.Normalization()
    scale.adapt(X)
    model = network(scale, layers.Dense(3, "tanh"), layers.Dense(3))
    objective = Objective(model, SPARSE, X, Y, weight_decay=0.1)
    solution = s_test(objective, X[:2], Y[:2], damping=0.5)
    scale.adapt(2 * X + 1)
    ways = (
        lambda: s_test(objective, X[:2], Y[:2], damping=0.5),
        lambda: predicted_loss_change(objective, solution),
        lambda: Hessian(objective) @ np.ones(objective.p),
        lambda: objective.losses(X, Y),
    )
    for way in ways:
        with pytest.raises(ValueError, match="bind a new Objective"):
            way()


def test_a_discretization_adapted_anew_is_not_overlooked():
    bins = layers.Discretization(num_bins=4)
    bins.adapt(X[:, :1])
    body = layers.Embedding(4, 2), layers.Flatten(), layers.Dense(3)
    model = network(bins, *body, shape=(1,))
    objective = Objective(model, SPARSE, X[:, :1], Y, weight_decay=0.1)
    bins.adapt(3 * X[:, :1] + 1)
    with pytest.raises(ValueError, match="bind a new Objective"):
        objective.losses(X[:, :1], Y)


class Squares(losses.Loss):
    def call(self, y, outputs):
        return ops.mean((y - outputs) ** 2, axis=-1)


def test_labels_to_ask_about_have_the_axes_of_the_training_labels():
    """Keras squeezes for losses of its own; in a class, (m,) and (m, 1) make (m, m)."""
    objective = Objective(mlp(1), Squares(), X, T, weight_decay=0.1)
    expected = np.mean((T - np.asarray(objective.model(X))) ** 2, axis=1)
    np.testing.assert_allclose(objective.losses(X, T), expected)
    np.testing.assert_allclose(objective.losses(X, T[:, 0]), expected)
    for wrong in (np.tile(T, 2), T[..., None, None]):
        with pytest.raises(ValueError, match=r"y has shape .*, the training labels \('n', 1\)"):
            objective.losses(X, wrong)
    steps = keras.Sequential([keras.Input((None, 2)), layers.SimpleRNN(3, return_sequences=True)])
    x, y = RNG.normal(size=(N, 4, 2)), RNG.normal(size=(N, 4, 3))
    objective = Objective(steps, Squares(), x, y, weight_decay=0.1)
    shorter = Objective(steps, Squares(), x[:, :3], y[:, :3], weight_decay=0.1)
    some = x[:, :3], y[:, :3]
    np.testing.assert_allclose(objective.losses(*some), shorter.losses(*some))

    short = y[:, :, 0], y[:, :2, 0]
    per_step = keras.Sequential([steps, layers.Lambda(lambda t: ops.mean(t, -1))])
    objective = Objective(per_step, Squares(), x, short[0], weight_decay=0.1)
    assert objective.losses(x[:, :2], short[1]).shape == (N,)


def adapted(kind, data, **options):
    layer = kind(**options)
    layer.adapt(data)
    return layer


WORDS = np.array(["a b", "b c", "c c d", "a d"] * 5)[:, None]


@pytest.mark.parametrize(
    ("parts", "x"),
    [
        (lambda: [adapted(layers.Normalization, X)], X),
        (lambda: [adapted(layers.TextVectorization, WORDS, output_mode="tf_idf")], WORDS),
        (lambda: [adapted(layers.StringLookup, WORDS), layers.Embedding(9, 2)], WORDS),
    ],
)
def test_layers_that_were_adapted_have_a_float64_copy(parts, x):
    kind = "string" if x is WORDS else None
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")
    try:
        model = network(*parts(), layers.Dense(3), shape=x.shape[1:], dtype=kind)
    finally:
        keras.config.set_dtype_policy(before)
    copy = keras_facts.in_float64(model, tf.constant(x))
    assert {v.dtype for v in copy.weights if "float" in v.dtype} == {"float64"}
    np.testing.assert_allclose(copy(tf.constant(x)), model(tf.constant(x)), rtol=1e-5, atol=1e-6)


class Limited(keras.Model):
    """A model with an attribute that its class does not set: a copy would lack it."""

    def __init__(self):
        super().__init__()
        self.inner, self.limit = layers.Dense(3, dtype="float32"), 100.0

    def call(self, x):
        return ops.clip(self.inner(x), -self.limit, self.limit)


def test_a_copy_that_is_another_model_is_none():
    model = Limited()
    model.limit, x = 1.0, np.concatenate([0.01 * X[:2], 9 * X]).astype("float32")
    objective = Objective(model, SPARSE, x, np.append(Y, [0, 1]), weight_decay=0.1)
    assert objective.in_float64() is None


def test_ctc_labels_to_ask_about_may_be_padded_otherwise():
    model = network(layers.Conv1D(4, 2, padding="same"), shape=(6, 2))
    x, y = RNG.normal(size=(N, 6, 2)), RNG.integers(1, 4, (N, 3))
    objective = Objective(model, losses.CTC(), x, y, weight_decay=0.1)
    longer = np.pad(y, ((0, 0), (0, 2)))
    np.testing.assert_allclose(objective.losses(x, longer), objective.losses(x, y), rtol=1e-5)


def test_layers_that_are_frozen_later_have_rows():
    norm = layers.LayerNormalization()
    model = network(layers.Dense(3, "tanh"), norm, layers.Dense(3))
    objective = Objective(model, SPARSE, X, Y, weight_decay=0.1)
    expected = gradients_by_keras(model, SPARSE, X, Y)
    norm.trainable = False
    np.testing.assert_allclose(per_example_gradients(objective, X, Y), expected, atol=1e-12)
    alone = Objective(model, SPARSE, X, Y, weight_decay=0.1, parameters=[norm.gamma])
    assert per_example_gradients(alone, X, Y).shape == (N, 3)


@pytest.mark.parametrize("mode", ["multi_hot", "count", "tf_idf"])
def test_bags_of_words(mode):
    texts, y = ["a b a", "b c", "c c d", "a d"] * 4, np.arange(16) % 2
    words = layers.TextVectorization(output_mode=mode)
    words.adapt(texts)
    model = network(words, layers.Dense(1), shape=(1,), dtype="string")
    model.compile(loss=BINARY)
    expected = model.evaluate(tf.constant(texts), y, verbose=0)
    for labels in (y, y[:, None]):
        objective = Objective(model, None, texts, labels)
        np.testing.assert_allclose(objective.training_loss(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "layer", "loss", "y"),
    [
        ("softmax", layers.Softmax(), losses.SparseCategoricalCrossentropy(), Y),
        ("softplus", layers.Activation("softplus"), losses.MeanSquaredError(), T**2),
    ],
)
def test_a_head_whose_activation_is_a_layer(name, layer, loss, y):
    """In float32 that layer rounds what it is given, the closed forms do not."""
    changes = []
    for activation in (name, layer):
        units = 3 if name == "softmax" else 1
        model = network(layers.Dense(units, activation, dtype="float32"))
        objective = Objective(model, loss, X.astype("float32"), y, weight_decay=0.01)
        assert fit_head(objective).converged
        changes.append(predicted_loss_change(objective, s_test(objective, X[:3], y[:3])))
    np.testing.assert_allclose(*changes, rtol=1e-6)


def test_a_head_whose_activation_has_parameters_has_no_closed_form():
    model = network(layers.Dense(2, activation=layers.PReLU()))
    kernel, bias = model.layers[0].kernel, model.layers[0].bias
    objective = Objective(model, "mse", X, X[:, :2], weight_decay=0.1, parameters=[kernel, bias])
    assert objective.head is None


def test_a_loss_whose_second_derivative_is_no_number_is_refused():
    model = network(layers.Conv1D(3, 2, padding="same"), shape=(6, 2))
    x, y = RNG.normal(size=(N, 6, 2)), RNG.integers(1, 3, (N, 2))
    objective = Objective(model, losses.CTC(), x, y, weight_decay=0.1)
    with pytest.raises(ValueError, match="no second derivative of the loss ctc"):
        s_test(objective, x[:1], y[:1])


def test_threads_leave_no_replaced_function_behind():
    original, meet, leave = tf.nn.moments, threading.Barrier(2, timeout=60), threading.Event()

    def other():
        with keras_facts.exact_derivatives():
            meet.wait()  # as replicas do that reduce inside a model
            leave.wait()

    thread = threading.Thread(target=other)
    with keras_facts.exact_derivatives():
        thread.start()
        meet.wait()
    assert tf.nn.moments is not original  # the other is inside
    leave.set()
    thread.join()
    assert tf.nn.moments is original
