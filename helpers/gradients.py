"""First derivatives of every example's loss: rows of gradients, and their products with vectors.

For a last Dense layer they are closed forms (`helpers.head`); every other model takes paths that
work for any Keras layer. Layers known to survive `tf.vectorized_map` get their b examples, or
their k columns, in one batched graph; others (recurrent layers, attention, custom layers) get a
loop that gives the same numbers.
"""

from functools import partial
from operator import itemgetter

import keras
import numpy as np
import tensorflow as tf

from . import keras_facts
from .linalg import gemm
from .objective import compiled

XLA_ROWS = 100  # below that many examples, compiling costs more than it saves


def by_differences(objective):
    """Return whether TensorFlow lacks right second derivatives of the model or the loss."""
    return "derivatives" in objective.__dict__ and objective.derivatives.by_differences


def is_vectorisable(objective):
    """Return whether many columns, or many examples, go through one batched graph."""
    return not by_differences(objective) and keras_facts.is_vectorisable(objective.model)


def along(objective, vector, function):
    """Return the derivative of function(), a tensor, as theta moves along `vector` (p,).

    By central differences in float64, to be called inside a `tf.function`: where a second
    derivative can not be had, the difference of exact first ones is right to about 1e-8.
    """
    old = [tf.identity(t) for t in objective.tensors]
    size = tf.sqrt(tf.add_n([tf.reduce_sum(t**2) for t in old]))
    h = 1e-5 * tf.maximum(size, 1) / tf.maximum(tf.norm(vector), 1e-300)
    step, ends = objective.unflatten(vector), []
    for sign in (1, -1):
        objective.move([t + sign * h * v for t, v in zip(old, step, strict=True)])
        ends.append(function())
    objective.move(old)
    with tf.control_dependencies([tf.identity(t) for t in objective.tensors]):  # put back first
        return (ends[0] - ends[1]) / (2 * h)


def map_rows(objective, function, rows):
    """Apply function to every row: in one batched graph where the layers allow it, else a loop."""
    if rows.shape[0] == 1:
        return function(rows[0])[None]
    if is_vectorisable(objective):
        return tf.vectorized_map(function, rows)
    return tf.map_fn(function, rows, parallel_iterations=1)  # differences move theta meanwhile


def sum_of_products(gradient, parts):
    """Return gradient . parts of two lists of tensors; a missing gradient counts as zero."""
    pairs = zip(gradient, parts, strict=True)
    # embeddings have IndexedSlices for gradients
    terms = [tf.reduce_sum(tf.convert_to_tensor(g) * v) for g, v in pairs if g is not None]
    dtype = max((v.dtype for v in parts), key=lambda dtype: dtype.size)
    return tf.add_n([tf.cast(t, dtype) for t in terms]) if terms else tf.zeros((), dtype)


def per_example_gradients(objective, x, y):
    """Return grad loss_i of every given example as rows (m, p): data loss only, no weights.

    Rows are in the model's dtype (float64 for a last Dense layer); m p numbers must fit.
    """
    x, y = objective.examples(x, y)
    head = objective.head
    if head:
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

    Many examples of a model with convolutions run under XLA, where their gradients are an order of
    magnitude faster, after a guard has compared the first ones with what no graph gives: XLA gives
    wrong second derivatives through max-pooling on a CPU, so it is believed where it was checked.
    """
    cache = objective.compiled
    if len(directions) < XLA_ROWS or not (
        is_vectorisable(objective) and has_convolution(objective)
    ):
        return _example_gradients(objective, x, directions).numpy()
    if "XLA" not in cache:
        plain = partial(_example_gradients.graph, objective)
        cache["XLA"] = keras_facts.traced(plain, jit_compile=True)
        few = [keras.tree.map_structure(itemgetter(i), (x, directions)) for i in range(8)]
        expected = np.stack([_example_gradient(objective, each) for each in few])
        try:
            cache["XLA agrees"] = agrees(cache["XLA"](x, directions).numpy()[:8], expected)
        except tf.errors.OpError:  # XLA has no kernel for one of the layers
            cache["XLA agrees"] = False
    fast = cache["XLA"] if cache["XLA agrees"] else partial(_example_gradients, objective)
    return fast(x, directions).numpy()


def agrees(got, expected):
    """Return whether two results differ by no more than 100 roundings of their type."""
    scale = np.abs(expected).max(initial=0)
    return bool(np.abs(got - expected).max(initial=0) <= 100 * np.finfo(got.dtype).eps * scale)


def has_convolution(objective):
    """Return whether the model convolves: the case that XLA speeds up."""
    return any("Conv" in type(la).__name__ for la in keras_facts.all_layers(objective.model))


@compiled
def _example_gradients(objective, x, directions):
    one_example = partial(_example_gradient, objective)
    if is_vectorisable(objective):
        return tf.vectorized_map(one_example, (x, directions))
    return tf.map_fn(one_example, (x, directions), fn_output_signature=objective.dtype)


def _example_gradient(objective, example):
    x, direction = keras.tree.map_structure(lambda a: a[None], example)
    with tf.GradientTape() as tape:
        dot = tf.reduce_sum(tf.reshape(objective.loss.outputs(x), [1, -1]) * direction)
    return objective.flatten(tape.gradient(dot, objective.tensors))


@compiled
def output_slopes(objective, x, y):
    """Return r_i, the gradient of loss_i in the flat outputs, (b, C)."""
    outputs = objective.loss.outputs(x)
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        losses = objective.loss.of_outputs(y, outputs)
    return tf.reshape(tape.gradient(losses, outputs), (tf.shape(outputs)[0], -1))


def gradient_dots(objective, vectors):
    """Return w_i grad loss_i . v_j for every training example and column of `vectors`, (k, n).

    One or a few columns: the derivative of u -> grad(sum_i u_i loss_i) . v in u, one pass a column,
    never n gradients. Many columns: per-example gradients a batch at a time and a GEMM, which pays
    from a few columns on where XLA makes those gradients cheap.
    """
    return np.concatenate(list(blocks_of_dots(objective, vectors)), axis=1)


def blocks_of_dots(objective, vectors):
    """Yield `gradient_dots` in blocks (k, b) of consecutive examples."""
    vectors, data = np.asarray(vectors, np.float64), objective.data
    if objective.head:
        theta = objective.theta
        yield from (_head_dots(block, theta, vectors) for block in objective.head.blocks())
        return
    columns = tf.constant(vectors, objective.dtype)
    if data.strategy is not None:
        yield _dots_of_shares(objective, columns).numpy().T.astype(np.float64)
        return
    k, vectorisable = vectors.shape[1], is_vectorisable(objective)
    many = vectorisable and k > (4 if has_convolution(objective) else 64)
    rows = rows_at_once(objective) if many else data.rows_for(k if vectorisable else 1)
    for x, y, weight in data.each(rows):
        if many:
            gradients = _loss_gradients(objective, x, y)
            dots = (gradients @ columns.numpy()).T * weight.numpy()
        else:
            dots = _double_vjp_dots(objective, x, y, weight, columns).numpy()
        yield dots.astype(np.float64)


def _head_dots(head, theta, vectors):
    r = head.residuals(head.y, head.outputs(head.phi, theta)) * head.weight[:, None]
    width = max(1, head.objective.data.affordable(8 * r.size))
    chunks = range(0, vectors.shape[1], width)
    return np.concatenate([_dots(head.phi, r, vectors[:, j : j + width]) for j in chunks])


def _dots(phi, residuals, vectors):
    moved = gemm(phi, vectors.reshape(phi.shape[1], -1)).reshape(*residuals.shape, -1)
    if residuals.shape[1] == 1:
        return moved[:, 0].T * residuals[:, 0]
    return np.einsum("nc,nck->kn", residuals, moved)


@compiled
def _dots_of_shares(objective, columns):
    """Return the dots of every replica's share, gathered in the order of the examples, (n, k)."""

    def one_batch(x, y, weight):
        return tf.transpose(_double_vjp_dots.graph(objective, x, y, weight, columns))

    copies = columns.shape[1] if is_vectorisable(objective) else 1
    return objective.data.over_replicas(one_batch, copies)


@compiled
def _double_vjp_dots(objective, x, y, weight, vectors):
    def one_vector(vector):
        if by_differences(objective):
            return weight * along(objective, vector, lambda: objective.loss(x, y))
        parts = objective.unflatten(vector)
        with tf.GradientTape() as outer:
            outer.watch(weight)
            with tf.GradientTape() as inner:
                loss = tf.tensordot(weight, objective.loss(x, y), 1)
            dot = sum_of_products(inner.gradient(loss, objective.tensors), parts)
        return outer.gradient(dot, weight) * weight

    return map_rows(objective, one_vector, tf.transpose(vectors))
