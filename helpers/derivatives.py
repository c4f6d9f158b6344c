"""Are the derivatives right? Those of an objective, held once against differences.

TensorFlow lacks the second derivatives of some operations and has wrong ones of others; a layer or
a loss may have a gradient of its own. What can not be differentiated twice is named and refused,
or computed by differences.
"""

import warnings
from functools import partial
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from . import keras_facts


class Derivatives(NamedTuple):
    """What the probe of an objective's derivatives found.

    checked : whether they were held against differences; by_differences : whether second
    derivatives are central differences of exact gradients from now on, because TensorFlow's own
    are missing or wrong; flat : whether the loss of those examples has no curvature in the outputs;
    words : all that.
    """

    checked: bool
    by_differences: bool
    flat: bool
    words: str


def warn_of_doubts(objective):
    """Warn where second derivatives could not be checked, and where the loss has no curvature."""
    head = objective.checked_head()
    if objective.derivatives.words == UNCLEAR:
        warnings.warn(
            f"Second {UNCLEAR}. They would if all layers computed in float64.", stacklevel=3
        )
    flat = objective.derivatives.flat
    if flat and head and objective.data.in_memory:  # theta may have moved, and all can be asked
        outputs = head.outputs(head.phi, objective.theta)
        direction = np.random.default_rng(0).normal(size=outputs.shape)
        flat = not head.bend(head.y, outputs, direction).numpy().any()
    if flat:
        where = "at any training example" if head else "at the first examples"
        warnings.warn(
            f"The loss has no curvature {where}: H is the weight decay (and damping) alone, and "
            "influence a scaled dot product of gradients.",
            stacklevel=3,
        )


UNCLEAR = "derivatives not checked: differences do not tell"
STEPS = {"float64": (1e-5, 1e-7, 1e-9), "float32": (3e-2, 1e-2, 3e-3)}
WRONG = "gradient", "curvature", "rounded"
MISSING = LookupError, NotImplementedError, tf.errors.NotFoundError, tf.errors.UnimplementedError
AGREE = {"float64": 1e-3, "float32": 5e-2}


def probe(objective, head):
    """Return the Derivatives of an objective, from at most 8 training examples, spread over all.

    In a float64 copy of the model, a little beside theta (where no unit stands on its kink): g.v
    against differences of the loss, H v against differences of the gradient, for steps that shrink
    until they agree. Only a disagreement that stays as the step shrinks is one; with many kinks
    nothing can be told, and that is said.

    Raises
    ------
    ValueError
        naming what is wrong, where a gradient is no gradient, or where a float32 model has no right
        second derivative.
    """
    if objective.data.strategy is not None:
        return Derivatives(False, False, False, "derivatives not checked under a strategy")
    x, y, _ = objective.data.few()
    rng = np.random.default_rng(0)
    if head is not None:
        outputs = head.outputs(head._features(x), objective.theta)
        loss = _of_tensor(lambda t: tf.reduce_sum(head.losses_in_graph(y, t)), outputs, rng)
        (verdict, flat), what = _verdict(*loss, "float64"), f"the loss {objective.loss.name}"
    else:
        o = objective if objective.dtype == "float64" else objective.in_float64() or objective
        coarsest = min(v.dtype for v in o.variables)
        verdict, flat = _verdict(*_of_parameters(o, x, y, rng), coarsest)
        what = _culprit(o, x, y, rng) if verdict in WRONG else ""
    if verdict == "gradient":
        raise ValueError(
            f"The gradient is not the derivative of the loss, as differences show: {what} has a "
            "gradient of its own (stop_gradient, custom_gradient?). Influence would be wrong."
        )
    if verdict == "rounded":
        raise ValueError(
            f"TensorFlow has no second derivative of {what}, and its gradient is rounded too much "
            "to take differences of it. Does it compute in float32?"
        )
    if verdict == "curvature":
        if objective.dtype != "float64":
            raise ValueError(
                f"TensorFlow has no right second derivative of {what}. In float64 differences of "
                "gradients take its place: set keras.config.set_dtype_policy('float64') and build "
                "or load the model again."
            )
        words = f"second derivatives by central differences of gradients, because of {what}"
        return Derivatives(True, True, False, words)
    if verdict == "unclear":
        return Derivatives(False, False, flat, UNCLEAR)
    return Derivatives(True, False, flat, f"derivatives checked on {len(y)} examples")


def _verdict(at, product, v, dtype):
    """Return "right", or what is wrong: "gradient", "curvature", or that it is "unclear".

    Second value: whether a right H v is zero.
    """
    tol, bent = AGREE[dtype], None
    try:
        value, gradient, bent = product()
        if np.isfinite(gradient).all() and not np.isfinite(bent).all():
            bent = None
    except MISSING:  # an operation without a second derivative
        value, gradient = at(0.0)
    along, typical = gradient @ v, np.linalg.norm(gradient * v)
    faint = 10 * np.finfo(dtype).eps * np.linalg.norm(gradient) / STEPS[dtype][0]
    slopes, bends = [], []
    for h in STEPS[dtype]:
        up, up_g = at(h)
        low, (down, down_g) = (0, (value, gradient)) if dtype == "float64" else (-h, at(-h))
        slopes.append((up - down) / (h - low))
        bends.append((up_g - down_g) / (h - low))
        floor = 10 * np.finfo(dtype).eps * abs(up) / h
        right = abs(along - slopes[-1]) <= tol * max(abs(slopes[-1]), typical) + floor
        if right and bent is None:
            return "curvature", False
        alike = right and _apart(bent, bends[-1]) <= tol
        if alike or (right and np.linalg.norm(bent - bends[-1]) <= faint):
            return "right", not bent.any()
    if not right:
        settled = abs(slopes[-1] - slopes[-2]) <= 0.1 * abs(along - slopes[-1])
        settled &= bool(slopes[-1]) or not slopes[0]  # else the step is lost in rounding
        rounded = "rounded" if bent is None else "unclear"
        return "gradient" if settled else rounded, False
    settled = _apart(bends[-1], bends[-2]) <= 0.1 * _apart(bent, bends[-1])
    return "curvature" if settled and dtype == "float64" else "unclear", False


def _apart(a, b):
    """Return the norm of a - b in units of the larger one's."""
    scale = max(np.linalg.norm(a), np.linalg.norm(b))
    return np.linalg.norm(a - b) / scale if scale > 0 else 0.0


def _of_tensor(function, tensor, rng):
    """Return what `_verdict` asks of a function of one float64 tensor, beside that tensor."""
    x = tf.Variable(np.asarray(tensor, np.float64))
    spread = max(float(np.std(tensor)), 1e-2)
    return _of(lambda: function(tf.identity(x)), [x], [spread], 0.1, rng)


def _of_parameters(objective, x, y, rng):
    """Return the same of the summed loss of some examples in the selected parameters."""
    x, tensors = objective.data.cast(x), objective.tensors
    sizes = [max(float(np.sqrt(np.mean(np.square(t)))), 1e-2) for t in tensors]
    return _of(lambda: tf.reduce_sum(objective.loss(x, y)), tensors, sizes, 0.01, rng)


def _of(function, variables, sizes, beside, rng):
    """Return (at, product, v) of function(), a number, a little beside where its variables are.

    at : h -> (value, gradient (p,)) at the point + h v; product : () -> (value, gradient, H v) at
    the point; v : (p,).
    """
    home = [np.asarray(t, np.float64) for t in variables]
    point = [t + beside * s * rng.normal(size=t.shape) for t, s in zip(home, sizes, strict=True)]
    v = [s * rng.normal(size=t.shape) for t, s in zip(home, sizes, strict=True)]

    flat = np.concatenate([b.ravel() for b in v])

    def moved(h, function):
        try:
            for t, a, b in zip(variables, point, v, strict=True):
                t.assign(a + h * b)
            value, *vectors = function()
            return float(value), *(vector.numpy() for vector in vectors)
        finally:
            for t, a in zip(variables, home, strict=True):
                t.assign(a)

    def gradient_of(value, tape):
        parts = tape.gradient(value, variables, None, tf.UnconnectedGradients.ZERO)
        parts = [tf.cast(tf.convert_to_tensor(part), tf.float64) for part in parts]
        return tf.concat([tf.reshape(part, [-1]) for part in parts], 0)

    def slope():
        with tf.GradientTape() as tape:
            value = function()
        return value, gradient_of(value, tape)

    def bend():
        with tf.GradientTape() as tape:
            value, gradient = slope()
            dot = tf.tensordot(gradient, flat, 1)
        return value, gradient, gradient_of(dot, tape)

    return partial(moved, function=slope), partial(moved, 0.0, bend), flat


def _culprit(objective, x, y, rng):
    """Return in words which part of a model has the wrong derivative, as far as can be found."""
    outputs = objective.loss.outputs(objective.data.cast(x))
    mask = keras_facts.mask_of(outputs)

    def loss(o):
        o = keras_facts.with_mask(tf.cast(o, objective.dtype), mask)
        return tf.cast(tf.reduce_sum(objective.loss.of_outputs(y, o)), tf.float64)

    probe = _of_tensor(loss, np.asarray(outputs, np.float64), rng)
    if _verdict(*probe, objective.dtype)[0] in WRONG:
        return f"the loss {objective.loss.name}"
    seen, names = {}, []
    layers = keras_facts.outermost_layers(objective.model)
    with keras_facts.tapped(layers, seen):
        objective.model(objective.data.cast(x), training=False)
    for layer, calls in seen.items():
        given = calls[0][0]
        if not tf.is_tensor(given) or not given.dtype.is_floating:
            continue

        def bent(t, layer=layer, dtype=given.dtype):
            with keras_facts.exact_derivatives():
                made = keras.tree.flatten(layer(tf.cast(t, dtype), training=False))[0]
            return tf.reduce_sum(tf.sin(tf.cast(made, tf.float64)))

        try:
            probe = _of_tensor(bent, np.asarray(given, np.float64), rng)
            found, _ = _verdict(*probe, objective.dtype)
        except (TypeError, ValueError, tf.errors.OpError):
            continue
        if found in WRONG:
            names.append(layer.name)
    return f"layer {', '.join(names)}" if names else "some part of the model"
