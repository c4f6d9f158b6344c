"""What is known here of the insides of Keras and TensorFlow: no other module relies on them.

Each fact has a test in `tests/test_keras_facts.py` that fails when an upgrade changes it.
"""

import inspect
import random
import re
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from threading import Lock
from typing import NamedTuple
from unittest.mock import patch

import keras
import numpy as np
import tensorflow as tf
from keras.src.losses.loss import squeeze_or_expand_to_same_rank
from keras.src.models import Functional
from keras.src.trainers.compile_utils import get_loss

losses = keras.losses
# Keras runs layers and losses as they are; AutoGraph would take as long as all other tracing
traced = partial(tf.function, autograph=False, reduce_retracing=True)
SPARSE = {losses.sparse_categorical_crossentropy}
BINARY = {losses.binary_crossentropy, losses.binary_focal_crossentropy}
OF_LOGITS = SPARSE | {losses.binary_crossentropy, losses.categorical_crossentropy}
ELEMENTWISE = {  # losses that compare labels and predictions entry by entry
    *(losses.categorical_crossentropy, losses.categorical_focal_crossentropy, losses.huber),
    *(losses.mean_squared_error, losses.mean_absolute_error, losses.mean_squared_logarithmic_error),
    *(losses.mean_absolute_percentage_error, losses.log_cosh, losses.poisson, losses.kl_divergence),
    *(losses.hinge, losses.squared_hinge, losses.categorical_hinge, losses.cosine_similarity),
    *BINARY,
}

# ------------------------------------------------------------------ derivatives


@contextmanager
def _replaced(*places):
    """Let attributes (object, name, value) have other values, inside this block only."""
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(patch.object(*place))
        yield


@contextmanager
def exact_derivatives():
    """Let TensorFlow differentiate four functions twice, inside this block only.

    Their values stay; what is registered as their derivatives is not the derivative of them:
    `moments` stops the gradient of the mean inside the variance, which no first derivative sees;
    `softmax_cross_entropy_with_logits` has p - y, right for labels that sum to one; resized images
    and `softsign` have a first derivative and none, or zero, as the second.
    """
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)


def _moments(x, axes, shift=None, keepdims=False, name=None):
    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean(tf.square(x - mean), axes, keepdims=keepdims)
    return (mean if keepdims else tf.squeeze(mean, axes)), variance


def _softmax_cross_entropy(labels, logits, axis=-1, name=None):
    labels = tf.cast(labels, logits.dtype)
    return -tf.reduce_sum(labels * tf.nn.log_softmax(logits, axis), axis)


def _softsign(x, name=None):
    x = tf.convert_to_tensor(x)
    return x / (1 + tf.abs(x))


RESIZE = tf.image.resize  # as it is outside every block


def _resize(images, size, method="bilinear", preserve_aspect_ratio=False, **options):
    """Return resized images as M_h x M_w', with the matrices that the original's weights are."""
    images = tf.convert_to_tensor(images)
    old, new = images.shape[-3:-1], tf.get_static_value(tf.convert_to_tensor(size))
    if preserve_aspect_ratio or new is None or None in old or not images.dtype.is_floating:
        return RESIZE(images, size, method, preserve_aspect_ratio, **options)
    antialias = options.get("antialias", False)
    with tf.init_scope():
        rows, columns = (
            RESIZE(np.eye(a, dtype="float32")[:, :, None, None], (b, 1), method, False, antialias)
            for a, b in zip(old, new, strict=True)
        )
        rows, columns = (np.asarray(m, "float64")[:, :, 0, 0] for m in (rows, columns))
    rows, columns = tf.constant(rows, images.dtype), tf.constant(columns, images.dtype)
    return tf.einsum("hp,...hwc,wq->...pqc", rows, images, columns)


EXACT = [
    patch.object(tf.nn, "moments", _moments),
    patch.object(tf.nn, "softmax_cross_entropy_with_logits", _softmax_cross_entropy),
    patch.object(tf.nn, "softsign", _softsign),
    patch.object(tf.image, "resize", _resize),
]
INSIDE, LOCK = [0], Lock()  # how many blocks are open, in all threads: the first replaces


def _enter(change):
    with LOCK:
        before, INSIDE[0] = INSIDE[0], INSIDE[0] + change
        for each in EXACT if 0 in (before, INSIDE[0]) else ():
            each.stop() if before else each.start()


# ------------------------------------------------------------------ what hangs on a tensor


def predict(model, x):
    """Return a model's predictions of a batch, (b, ...), with what Keras hangs on them."""
    with exact_derivatives():
        return one_output(model(x, training=False))[0]


def one_output(outputs):
    """Return outputs as a list; ValueError for more than one."""
    outputs = keras.tree.flatten(outputs)
    if len(outputs) > 1:
        raise ValueError(
            "The model has several outputs. Bind one: keras.Model(model.inputs, model.outputs[0])."
        )
    return outputs


def mask_of(tensor):
    """Return the mask that Keras hangs on a tensor, or None."""
    return getattr(tensor, "_keras_mask", None)


def with_mask(tensor, mask):
    """Return the tensor with that mask hung on it."""
    if mask is not None:
        tensor._keras_mask = mask
    return tensor


def logits_of(predictions):
    """Return what a last softmax or sigmoid was taken of, or None; layers may be anywhere.

    Keras hangs it on the tensor; inside a graph the operation shows it.
    """
    found = getattr(predictions, "_keras_logits", None)
    if found is None and not tf.executing_eagerly() and hasattr(predictions, "op"):
        found = predictions.op.inputs[0] if predictions.op.type in ("Softmax", "Sigmoid") else None
    return found


def last_activation(model, x):
    """Return the activation by which a model's predictions of x end above its logits, or None."""
    hung = [False]

    def both():
        predictions = predict(model, x)
        hung[0] = hasattr(predictions, "_keras_logits")
        logits = logits_of(predictions)
        if logits is None:
            return predictions, predictions, predictions, False
        none = tf.UnconnectedGradients.ZERO
        slopes = tf.gradients(predictions, logits, waves(predictions), unconnected_gradients=none)
        return predictions, logits, slopes[0], True

    def waves(like):
        return tf.reshape(tf.sin(tf.range(tf.size(like), dtype=like.dtype)), tf.shape(like))

    predictions, logits, slope, found = traced(both).get_concrete_function()()
    if not found or logits.shape != predictions.shape:
        return None
    kind = keras.activations if hung[0] else tf.nn  # Keras's losses tell them apart
    axes = [-1, *range(1, len(logits.shape) - 1)]
    for activation in (kind.sigmoid, *(partial(kind.softmax, axis=axis) for axis in axes)):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            made = activation(logits)
        # at two logits of zero the values are the same, the slopes are not
        pairs = (made, predictions), (tape.gradient(made, logits, waves(made)), slope)
        if all(np.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs):
            return activation
    return None


# ------------------------------------------------------------------ losses


def as_loss(loss, y, predictions):
    """Return the keras.losses.Loss that `compile` makes of an object, a name or a function."""
    if loss is None:
        raise ValueError(
            "Name a loss: Objective(model, keras.losses.…(), x, y), or compile the model with one."
        )
    if isinstance(loss, (list, tuple, dict)) and "class_name" not in loss:
        several = keras.tree.flatten(loss)
        if len(several) != 1:
            raise ValueError("Several losses are not supported: bind one output and one loss.")
        loss = several[0]
    return get_loss(loss, y, predictions)


def computes_its_loss(model):
    """Return whether a model overrides how `fit` computes its loss."""
    own = {"compute_loss", "train_step"}
    kinds = (k for k in type(model).__mro__ if own & vars(k).keys())
    return not next(kinds).__module__.startswith("keras.")


def function_of(loss):
    """Return the function that a Keras loss object wraps, or None for a class of the user's own."""
    return getattr(loss, "fn", None) if isinstance(loss, losses.Loss) else None


def loss_weight(model):
    """Return the factor that `compile(loss_weights=...)` puts before the loss."""
    compiled = getattr(model, "_compile_loss", None)
    weights = keras.tree.flatten(getattr(compiled, "_user_loss_weights", None))
    weights = [1.0 if w is None else float(w) for w in weights]
    return weights[0] if weights else 1.0


def unreduced(loss, y, predictions, dtype):
    """Return the loss of each entry, (b, ...) in `dtype`, as Keras has it before it averages.

    What Keras masks, a step of a sequence or an `ignore_class`, stands on it (`mask_of`).
    """
    mask, logits = mask_of(predictions), getattr(predictions, "_keras_logits", None)
    cast = tf.cast(predictions, dtype)
    if cast is not predictions and logits is not None:
        cast._keras_logits = tf.cast(logits, dtype)
    call, y = loss.call if type(loss).__call__ is losses.Loss.__call__ else loss, tf.cast(y, dtype)
    with _computing_in(loss, dtype), exact_derivatives():
        values = tf.convert_to_tensor(call(y, with_mask(cast, mask)))
        if len(predictions.shape) == 1 and values.shape.rank == 0:  # the one axis was averaged
            column, logits = cast[:, None], logits_of(predictions)
            if logits is not None:
                column._keras_logits = tf.cast(logits, dtype)[:, None]
            values = tf.convert_to_tensor(call(y if len(y.shape) > 1 else y[:, None], column))
    own = mask_of(values)
    masks = [tf.cast(m, bool) for m in (mask, own) if m is not None]
    values = tf.cast(values, dtype)
    if not masks:
        return values
    mask = masks[0] if len(masks) == 1 else masks[0] & masks[1]
    values, mask = squeeze_or_expand_to_same_rank(values, mask)
    if len(values.shape) != len(mask.shape):
        raise ValueError(
            f"The loss has shape {tuple(values.shape)} and the mask {tuple(mask.shape)}: Keras "
            "multiplies one by the other. Let the loss keep an entry a step, or drop the mask."
        )
    return with_mask(values, mask)


def both_means(loss, y, predictions, values, k, dtype):
    """Return the mean of k examples' own `values` that count, and Keras's own evaluation of them.

    values : what `unreduced` returned for all of y and predictions.
    """
    mask = mask_of(values)
    own = values[:k].numpy() if mask is None else values[:k].numpy()[mask[:k].numpy()]
    some, hung = tf.cast(predictions[:k], dtype), mask_of(predictions)
    if hung is not None:
        some._keras_mask = hung[:k]
    logits = getattr(predictions, "_keras_logits", None)
    if logits is not None:
        some._keras_logits = tf.cast(logits[:k], dtype)
    with _computing_in(loss, dtype):
        by_keras = loss(y[:k], some)
    return float(own.mean()) if own.size else 0.0, float(tf.reduce_mean(by_keras))


def _computing_in(loss, dtype):
    """Let a loss object, and those it holds, compute in `dtype` and not in Keras's floatx."""
    return _replaced(*((each, "_dtype", dtype) for each in _objects_in(loss)))


def _objects_in(loss):
    if isinstance(loss, losses.Loss):
        yield loss
        for value in vars(loss).values():
            yield from _objects_in(value)


# ------------------------------------------------------------------ layers

ADAPTED = keras.layers.TextVectorization, keras.layers.StringLookup, keras.layers.IntegerLookup
VECTORISABLE = {
    *("Dense", "Conv1D", "Conv2D", "Embedding", "InputLayer", "Flatten", "Reshape", "Rescaling"),
    *("Activation", "ReLU", "Dropout", "BatchNormalization", "LayerNormalization"),
    *("AveragePooling1D", "AveragePooling2D", "MaxPooling2D", "ZeroPadding2D"),
    *("GlobalAveragePooling1D", "GlobalAveragePooling2D", "Add", "Multiply", "Concatenate"),
}


def all_layers(model):
    """Return a model, the layers in it, and those inside them."""
    return list(model._flatten_layers())


def leaves(model):
    """Return the layers of a model that hold no other layer."""
    return [la for la in all_layers(model) if len(list(la._flatten_layers())) == 1]


def constants(model):
    """Return the sums of what layers that are adapted hold as plain numbers, which graphs keep."""
    kinds = keras.layers.Normalization, keras.layers.Discretization
    held = (la for la in all_layers(model) if isinstance(la, kinds))
    names = "mean", "variance", "bin_boundaries"
    numbers = (getattr(la, name, None) for la in held for name in names)
    return [float(np.sum(a)) for a in numbers if a is not None]


def is_known(layer):
    """Return whether a layer is known to survive `tf.vectorized_map`, differentiated."""
    plain = not getattr(layer, "lora_enabled", False) and getattr(layer, "groups", 1) == 1
    channels_last = getattr(layer, "data_format", "channels_last") == "channels_last"
    return type(layer).__name__ in VECTORISABLE and plain and channels_last


def is_vectorisable(model):
    """Return whether every layer of a model is known."""
    containers = (keras.Sequential, Functional)
    return all(is_known(la) or isinstance(la, containers) for la in all_layers(model))


def bytes_an_example(model, x, dtype):
    """Return what a Hessian-vector product holds of one example: about eight copies of all layers.

    x : a batch of inputs.
    """
    inputs = sum(np.prod(a.shape[1:]) for a in keras.tree.flatten(x))
    layers = 0
    for layer in all_layers(model)[1:]:
        try:
            shapes = [t.shape[1:] for t in keras.tree.flatten(layer.output)]
            layers += sum(np.prod([s or 1 for s in shape]) for shape in shapes)
        except AttributeError:  # a layer of a subclassed model knows no output shape
            layers += 32 * inputs
    return 8 * tf.as_dtype(dtype).size * (inputs + layers)


def work_an_example(model):
    """Return about how many multiply-adds a model takes for one example, inf where it is not known.

    Of each layer its weights, times the positions (pixels, steps) that it makes.
    """
    total = 0
    for layer in leaves(model):
        try:
            positions = np.prod([s or 1 for s in layer.output.shape[1:-1]])
        except AttributeError:  # a layer of a subclassed model knows no output shape
            return np.inf
        total += positions * layer.count_params()
    return total


def tapped(layers, seen):
    """Let layers report (input, output before and after the activation) while a model is called."""

    def tap(layer, call):
        def reported(inputs, *more, **options):
            plain = type(layer) in (keras.layers.Dense, keras.layers.Conv2D)
            activation = plain and layer.activation
            with patch.object(layer, "activation", None) if activation else nullcontext():
                outputs = call(inputs, *more, **options)
            after = activation(outputs) if activation else outputs
            seen.setdefault(layer, []).append((inputs, outputs, after))
            return after

        return reported

    return _replaced(*((layer, "call", tap(layer, layer.call)) for layer in layers))


def outermost_layers(model):
    """Return the layers of a model, those of the models inside it, and none inside a layer."""
    found = []
    for layer in model._flatten_layers(include_self=False, recursive=False):
        found += outermost_layers(layer) if isinstance(layer, keras.Model) else [layer]
    return list(dict.fromkeys(found))


class End(NamedTuple):
    """A Dense layer that ends a model: the layer, what its outputs go through, and its features.

    own : whether the layer's own activation is the last one (else one after it may be).
    direct : whether the model's input itself are the features, but for a cast.
    """

    dense: keras.layers.Dense
    own: bool
    direct: bool


def as_function(activation):
    """Return an activation as a function: a layer that is called would cast to its own dtype."""
    call = getattr(activation, "call", activation)
    trains = call is not activation and "training" in inspect.signature(call).parameters
    return partial(call, training=False) if trains else call


def end_of(model, x, variables):
    """Return the End whose kernel (and bias) the variables are, or None.

    None too where something else uses the same variables, or where more than a softmax or sigmoid
    stands above the layer: then its outputs are not linear in them.
    """
    own = [id(v) for v in variables]
    for dense in outermost_layers(model):
        plain = type(dense) is keras.layers.Dense and dense.built and not dense.quantization_mode
        plain = plain and not dense.lora_enabled and not getattr(dense.activation, "weights", ())
        mine = (dense._kernel, dense.bias) if plain else ()
        if [id(v) for v in mine if v is not None] == own:
            break
    else:
        return None
    found = [None]

    def call(x):
        seen = {}
        with tf.GradientTape() as tape, tapped([dense], seen), exact_derivatives():
            predictions = _tensors(model(x, training=False))[0]
        calls = seen.get(dense, [])
        if len(calls) == 1 and len(calls[0][0].shape) == 2 and mask_of(predictions) is None:
            features, before, after = calls[0]
            tied = tape.gradient(features, [v.value for v in variables])
            linear = before is logits_of(predictions) and before is after
            if all(g is None for g in tied) and (after is predictions or linear):
                while _keeps_numbers(features.op):
                    features = features.op.inputs[0]  # what it was before the type of a keras.Input
                direct = features is keras.tree.flatten(x)[0]
                found[0] = End(dense, after is predictions, direct)

    traced(call).get_concrete_function(x)
    return found[0]


def _keeps_numbers(op):
    """Return whether an operation gives real numbers on, rounded to float32 at the most."""
    if op.type not in ("Cast", "Identity"):
        return False
    old, new = op.inputs[0].dtype, op.outputs[0].dtype
    return old == new or (new.is_floating and (new.size >= 4 or old.is_integer))


def features_of(model, dense, x):
    """Return what a Dense layer is given when the model is called with x, (b, d)."""
    seen = {}
    with tapped([dense], seen), exact_derivatives():
        model(x, training=False)
    return seen[dense][0][0]


def last_layer(model, x):
    """Return the layer with parameters that the predictions of x come from, walking back to it."""
    layers, found = [la for la in outermost_layers(model) if la.trainable_variables], set()

    def walk(x):
        seen = {}
        with tapped(layers, seen):
            predictions = model(x, training=False)
        made = {t.ref(): la for la, calls in seen.items() for _, o, _ in calls for t in _tensors(o)}
        left, known = {t.ref() for t in _tensors(predictions)}, set()
        while left:
            tensor = left.pop()
            known.add(tensor)
            if tensor in made:
                found.add(made[tensor])
            elif tensor.deref().dtype == tf.resource:
                found.add(None)  # a variable that no layer in between owns
            else:
                left |= {t.ref() for t in tensor.deref().op.inputs} - known

    traced(walk).get_concrete_function(x)
    if len(found) != 1 or None in found:
        names = sorted(la.name for la in found - {None})
        raise ValueError(
            f"The last layer is not clear: the predictions come from {names or 'no layer'}"
            f"{' and from variables besides' if None in found else ''}. Name the layers, "
            "parameters=[...]."
        )
    return found.pop()


def _tensors(structure):
    return [t for t in keras.tree.flatten(structure) if tf.is_tensor(t)]


def is_kernel(variable):
    """Return whether a variable multiplies inputs: rank two or more, no bias, scale or offset."""
    added = r"(b|(.*_)?(bias|gamma|beta|alpha|scale|offset|shift))\d*(_\d+)?"
    return len(variable.shape) >= 2 and not re.fullmatch(added, variable.name.lower())


def declared_inputs(model):
    """Return the inputs a Sequential or functional model declares, as it nests them, or None."""
    return getattr(getattr(model, "_functional", model), "_inputs_struct", None)


def in_float64(model, x):
    """Return a copy of the model that computes in float64, or None where none can be made."""

    def widened(value):
        return "float64" if isinstance(value, str) and value == "float32" else value

    def copied(layer):
        if type(layer) is keras.layers.Lambda:  # it may be saved only where that is allowed
            known = {"output_shape": layer._output_shape, "arguments": layer.arguments}
            known["name"] = layer.name
            return keras.layers.Lambda(layer.function, dtype="float64", **known)
        if isinstance(layer, ADAPTED):  # without a weight, and no config holds what it learnt
            return layer
        return type(layer).from_config(keras.tree.map_structure(widened, layer.get_config()))

    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    drawn = random.getstate()
    with suppress(Exception):  # any layer of the user's may refuse to be rebuilt
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
        try:
            if isinstance(model, (keras.Sequential, Functional)):
                copy = keras.models.clone_model(model, clone_function=copied)
            else:  # subclassed: by a `get_config` of its own, or with no argument
                try:
                    copy = copied(model)
                except (TypeError, NotImplementedError):
                    copy = type(model)()
            if not copy.built:
                copy(x, training=False)
            copy.set_weights(model.get_weights())
            for layer in all_layers(copy):
                if isinstance(layer, keras.layers.Normalization):
                    layer.finalize_state()
            with tf.GradientTape() as tape:
                mine = np.asarray(_tensors(copy(x, training=False))[0])
            theirs = np.asarray(_tensors(model(x, training=False))[0])
        finally:
            keras.config.set_floatx(floatx)
            keras.config.set_dtype_policy(policy)
            random.setstate(drawn)  # Keras seeds initialisers from it
        own = {v.value.ref() for v in model.weights}
        tied = any(v.ref() in own for v in tape.watched_variables())  # held by a Lambda
        alike = np.allclose(mine, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max(initial=0))
        kinds = {v.dtype for v in copy.weights if "float" in v.dtype}
        if alike and not tied and kinds == {"float64"}:
            return copy
    return None
