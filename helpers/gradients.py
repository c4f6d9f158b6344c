"""First derivatives of every example's loss: rows of gradients, and their products with vectors.

For a last Dense layer they are closed forms (`helpers.head`). Other models get their rows layer by
layer: one pass forward and one back for the whole batch, then the products of what went into a
layer and what came back to it, example by example. Where that is not possible (recurrent layers,
attention, shared variables), an example at a time: in one batched graph where all layers are known
to survive `tf.vectorized_map`, else in a loop. All of them give the same numbers.
"""

from functools import partial

import keras
import numpy as np
import tensorflow as tf

from . import keras_facts
from .batches import spread
from .objective import compiled

LAYERS = "layer by layer"  # the note on an objective: False, True, or "checked"


def by_differences(objective):
    """Return whether TensorFlow lacks right second derivatives of the model or the loss."""
    return "derivatives" in objective.__dict__ and objective.derivatives.by_differences


def along(objective, vector, function):
    """Return the derivative of function(), a tensor, as theta moves along `vector` (p,).

    By central differences in float64, to be called inside a `tf.function`: where a second
    derivative can not be had, the difference of exact first ones is right to about 1e-8. The step
    moves no variable by more than 1e-5 of its size, since each may have a scale of its own; a bias
    is taken to be of size one at least, and a kernel of zeros too.
    """

    def size(t):
        norm = tf.norm(t)
        return tf.where(norm > 0, norm, 1) if len(t.shape) > 1 else tf.maximum(norm, 1)

    old, step, ends = [tf.identity(t) for t in objective.tensors], objective.unflatten(vector), []
    moved = [tf.norm(v) / size(t) for t, v in zip(old, step, strict=True)]
    h = 1e-5 / tf.maximum(tf.reduce_max(moved), 1e-300)
    for sign in (1, -1):
        objective.move([t + sign * h * v for t, v in zip(old, step, strict=True)])
        ends.append(function())
    objective.move(old)
    with tf.control_dependencies([tf.identity(t) for t in objective.tensors]):  # put back first
        return (ends[0] - ends[1]) / (2 * h)


def map_rows(objective, function, rows):
    """Apply function to every row in a loop of the graph; differences move theta meanwhile."""
    return tf.map_fn(function, rows, parallel_iterations=1 if by_differences(objective) else 2)


def recorded_gradient(tape, value, tensors, direction=None):
    """Return the gradient of a value as tensors (embeddings have IndexedSlices), None for zero."""
    gradient = tape.gradient(value, tensors, direction)
    return [g if g is None else tf.convert_to_tensor(g) for g in gradient]


def second_derivative(tape, gradient, parts, sources):
    """Return the derivative of gradient . parts in the sources, None or zero where it has none.

    tape : what has recorded `recorded_gradient`. It does so once for all vectors.
    """
    pairs = [(g, v) for g, v in zip(gradient, parts, strict=True) if g is not None]
    if not pairs:
        return [None] * len(sources)
    targets, directions = map(list, zip(*pairs, strict=True))
    return tape.gradient(targets, sources, directions)


def per_example_gradients(objective, x, y):
    """Return grad loss_i of every given example as rows (m, p): data loss only, no weights.

    Rows are in the model's dtype (float64 for a last Dense layer); m p numbers must fit.
    """
    x, y = objective.examples(x, y)
    if head := objective.checked_head():
        phi = head.features(x, y)
        return head.gradients(phi, head.residuals(y, head.outputs(phi, objective.theta)))
    batches = objective.data.of(x, y, batch_size=rows_at_once(objective))
    return np.concatenate([_loss_gradients(objective, xb, yb) for xb, yb, _ in batches])


def _loss_gradients(objective, x, y):
    """Return grad loss_i = J_i' r_i as rows (b, p)."""
    return pulled(objective, x, output_slopes(objective, x, y))


def rows_at_once(objective, width=0):
    """Return how many per-example gradients fit the memory budget, at most a batch.

    With the Hessian of each loss in `width` outputs beside them where they are asked for.
    """
    size = tf.as_dtype(objective.dtype).size
    fit = objective.data.affordable(size * (4 * objective.p + 8 * width**2))
    return min(fit, objective.data.batch_size)


def pulled(objective, x, directions):
    """Return J_i' direction_i as rows (b, p), for directions (b, C) in the flat outputs.

    Layer by layer where that is possible and, at the first use, found to be right.
    """
    known, key = objective.compiled, LAYERS
    if known.setdefault(key, _layers(objective) is not None):
        try:
            rows = _rows_by_layers(objective, x, directions).numpy()
            if known[key] is True:  # which takes two examples to be found out
                found = _is_right(objective, x, directions, rows)
                known[key] = "checked" if found and len(rows) > 1 else found
            if known[key]:
                return rows
        except (TypeError, ValueError, tf.errors.OpError):  # a layer was not called as it seems
            known[key] = False
    return _example_gradients(objective, x, directions).numpy()


def _layers(objective):
    """Return the layers that hold the selected parameters, if their rows have a known form."""
    owners = {id(v): la for la in keras_facts.leaves(objective.model) for v in la.weights}
    found = list(dict.fromkeys(owners.get(id(v)) for v in objective.variables))
    return found if all(keras_facts.is_known(layer) for layer in found) else None


def has_rows(objective):
    """Return whether the gradients of many examples are cheap: not one pass for each of them."""
    known = objective.compiled.get(LAYERS, _layers(objective) is not None)
    return bool(known) or keras_facts.is_vectorisable(objective.model)


def _is_right(objective, x, directions, rows, k=4):
    """Return whether k of the rows, with weights of their own, sum to an ordinary gradient."""
    x, directions, rows = spread((x, directions, rows), k)
    weights = np.sqrt(np.arange(1, 1 + len(rows), dtype=rows.dtype))
    expected = _gradient_along(objective, x, directions * weights[:, None]).numpy()
    scale = np.finfo(rows.dtype).eps * (np.abs(rows).max(initial=0) + np.abs(expected).max())
    return bool(np.abs(weights @ rows - expected).max() <= 100 * scale)


def opened(objective, x, layers):
    """Return what goes into each layer, what it makes, and the way back to that from the outputs.

    What it makes is before its activation; the way back takes directions (b, C) in the flat
    outputs to those in what each layer makes.
    """
    seen = {}
    with tf.GradientTape(persistent=True) as tape, keras_facts.tapped(layers, seen):
        outputs = objective.loss.outputs(x)
    wrong = [layer.name for layer in layers if len(seen.get(layer, ())) != 1]
    if wrong:
        raise ValueError(f"Each layer must be used exactly once; {wrong} are not.")
    inputs, befores, _ = zip(*(seen[layer][0] for layer in layers), strict=True)

    def back(directions):
        directions = tf.reshape(directions, tf.shape(outputs))
        return tape.gradient(outputs, befores, directions, tf.UnconnectedGradients.ZERO)

    return inputs, befores, back


@compiled
def _rows_by_layers(objective, x, directions):
    layers, rows = _layers(objective), {}
    inputs, _, back = opened(objective, x, layers)
    for layer, a, g in zip(layers, inputs, back(directions), strict=True):
        rows |= _rows_of_layer(layer, a, g, {id(v) for v in objective.variables})
    parts = [tf.cast(rows[id(v)], objective.dtype) for v in objective.variables]
    return tf.concat([tf.reshape(part, (tf.shape(directions)[0], -1)) for part in parts], 1)


def _rows_of_layer(layer, a, g, selected):
    """Return {id(variable): rows (b, ...)} from a layer's inputs a and directions g in outputs."""
    if type(layer) in (keras.layers.Dense, keras.layers.Conv2D):
        a, g = patches(layer, a), tf.reshape(g, (tf.shape(g)[0], -1, g.shape[-1]))
        return {
            id(layer.kernel): tf.matmul(a, g, transpose_a=True),
            id(layer.bias): tf.reduce_sum(g, 1),
        }
    variables = [v for v in layer.weights if id(v) in selected]  # frozen ones too

    def one_example(example):
        a, g = keras.tree.map_structure(lambda t: t[None], example)
        with tf.GradientTape() as tape:
            dot = tf.reduce_sum(layer.call(a) * g)
        return [tf.convert_to_tensor(t) for t in tape.gradient(dot, [v.value for v in variables])]

    rows = tf.vectorized_map(one_example, (a, g))
    return {id(v): part for v, part in zip(variables, rows, strict=True)}


def patches(layer, a):
    """Return the inputs of a Dense layer, or the patches of a Conv2D, (b, T positions, d)."""
    if type(layer) is keras.layers.Conv2D:
        numbers = ([1, *n, 1] for n in (layer.kernel_size, layer.strides, layer.dilation_rate))
        a = tf.image.extract_patches(a, *numbers, layer.padding.upper())
    positions = -1 if None in a.shape[1:-1] else int(np.prod(a.shape[1:-1]))
    return tf.reshape(a, (tf.shape(a)[0], positions, a.shape[-1]))


@compiled
def _example_gradients(objective, x, directions):
    def one_example(example):
        return _gradient_along(objective, *keras.tree.map_structure(lambda a: a[None], example))

    if keras_facts.is_vectorisable(objective.model):
        return tf.vectorized_map(one_example, (x, directions))
    return tf.map_fn(one_example, (x, directions), fn_output_signature=objective.dtype)


def _gradient_along(objective, x, directions):
    """Return the sum of J_i' direction_i over a batch, (p,)."""
    with tf.GradientTape() as tape:
        outputs = objective.loss.outputs(x)
        dot = tf.reduce_sum(tf.reshape(outputs, tf.shape(directions)) * directions)
    return objective.flatten(tape.gradient(dot, objective.tensors))


@compiled
def output_slopes(objective, x, y):
    """Return r_i, the gradient of loss_i in the flat outputs, (b, C)."""
    outputs = objective.loss.outputs(x)
    return tf.reshape(objective.loss.slopes(y, outputs), (tf.shape(outputs)[0], -1))


def gradient_dots(objective, vectors):
    """Return w_i grad loss_i . v_j for every training example and column of `vectors`, (k, n).

    One or a few columns: the derivative of u -> grad(sum_i u_i loss_i) . v in u, one pass a column,
    never n gradients. Many columns: per-example gradients a batch at a time and a GEMM.
    """
    return np.concatenate(list(blocks_of_dots(objective, vectors)), axis=1)


def blocks_of_dots(objective, vectors):
    """Yield `gradient_dots` in blocks (k, b) of consecutive examples."""
    vectors, data = np.asarray(vectors, np.float64), objective.data
    if head := objective.checked_head():
        theta = objective.theta
        yield from (_head_dots(block, theta, vectors) for block in head.blocks())
        return
    columns = tf.constant(vectors, objective.dtype)
    if data.strategy is not None:
        yield _dots_of_shares(objective, columns).numpy().T.astype(np.float64)
        return
    k, itemsize = vectors.shape[1], tf.as_dtype(objective.dtype).size
    # rows are p numbers an example to write; each column without them is a pass through the layers
    dear = 8 * itemsize * objective.p / max(1, data.bytes_an_example)
    many = has_rows(objective) and k > min(64, dear)
    rows = rows_at_once(objective) if many else data.batch_size
    for x, y, weight in data.each(rows):
        if many:
            gradients = _loss_gradients(objective, x, y)
            dots = (gradients @ columns.numpy()).T * weight.numpy()
        else:
            dots = _double_vjp_dots(objective, x, y, weight, columns).numpy()
        yield dots.astype(np.float64)


def _head_dots(head, theta, vectors):
    r = head.residuals(head.y, head.outputs(head.phi, theta)) * head.weight[:, None]
    width = head.objective.data.affordable(8 * r.size)
    chunks = (vectors[:, j : j + width] for j in range(0, vectors.shape[1], width))
    return np.concatenate([np.einsum("nc,nck->kn", r, head.outputs(head.phi, v)) for v in chunks])


@compiled
def _dots_of_shares(objective, columns):
    """Return the dots of every replica's share, gathered in the order of the examples, (n, k)."""

    def one_batch(x, y, weight):
        return tf.transpose(_double_vjp_dots.graph(objective, x, y, weight, columns))

    return objective.data.over_replicas(one_batch)


@compiled
def _double_vjp_dots(objective, x, y, weight, vectors):
    columns = tf.transpose(vectors)
    if by_differences(objective):
        losses = partial(objective.loss, x, y)
        return map_rows(objective, lambda v: weight * along(objective, v, losses), columns)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(weight)
        with tf.GradientTape() as inner:
            loss = tf.tensordot(weight, objective.loss(x, y), 1)
        gradient = recorded_gradient(inner, loss, objective.tensors)

    def one_vector(vector):
        (bent,) = second_derivative(outer, gradient, objective.unflatten(vector), [weight])
        return tf.zeros_like(weight) if bent is None else bent * weight

    return map_rows(objective, one_vector, columns)
