"""First and second derivatives of an objective: compiled once a shape, summed over batches.

Vectors are columns: (p,) or (p, k). A product with k columns costs one pass over the data. For a
last Dense layer everything is a closed form (`helpers.head`); every other model takes the paths
that work for any Keras layer: reverse-over-reverse products and double vector-Jacobian products.
Layers known to survive `tf.vectorized_map` get their k columns, or their b examples, in one batched
graph; others (recurrent layers, attention, custom layers) get a loop that gives the same numbers.
"""

from functools import partial
from itertools import pairwise

import keras
import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from helpers import keras_facts
from helpers.head import gemm

VECTORISABLE = {
    *("Dense", "Conv1D", "Conv2D", "Embedding", "InputLayer", "Flatten", "Reshape", "Rescaling"),
    *("Activation", "ReLU", "Dropout", "BatchNormalization", "LayerNormalization"),
    *("AveragePooling1D", "AveragePooling2D", "MaxPooling2D", "ZeroPadding2D"),
    *("GlobalAveragePooling1D", "GlobalAveragePooling2D", "Add", "Multiply", "Concatenate"),
}

XLA_ROWS = 100  # below that many examples, compiling costs more than it saves


def compiled(function):
    """Keep one `tf.function` of `function(objective, ...)` on the objective it was called with."""

    def call(objective, *args):
        cache = objective.compiled
        if function not in cache:
            _ = objective.head  # built and probed here, since that can not be inside a graph
            cache[function] = tf.function(partial(function, objective), reduce_retracing=True)
        return cache[function](*args)

    call.__doc__, call.__name__, call.graph = function.__doc__, function.__name__, function
    return call


def is_vectorisable(objective):
    """Return whether every layer of the model is known to survive `tf.vectorized_map`."""
    if by_differences(objective):
        return False
    layers = objective.model._flatten_layers()
    containers = (keras.Sequential, keras.src.models.Functional)
    return all(
        (type(la).__name__ in VECTORISABLE and getattr(la, "groups", 1) == 1)
        or isinstance(la, containers)
        for la in layers
    )


def by_differences(objective):
    """Return whether TensorFlow lacks right second derivatives of the model or the loss."""
    return "derivatives" in objective.__dict__ and objective.derivatives.by_differences


def along(objective, vector, function):
    """Return the derivative of function(), a tensor, as theta moves along `vector` (p,).

    By central differences in float64, to be called inside a `tf.function`: where a second
    derivative can not be had, the difference of exact first ones is right to about 1e-8.
    """
    old = [tf.identity(t) for t in objective.tensors]
    size = tf.sqrt(tf.add_n([tf.reduce_sum(t**2) for t in old]))
    h = 1e-5 * tf.maximum(size, 1) / tf.maximum(tf.norm(vector), 1e-300)
    ends = []
    for sign in (1, -1):
        for variable, t, v in zip(
            objective.variables, old, objective.unflatten(vector), strict=True
        ):
            variable.assign(t + sign * h * v)
        ends.append(function())
    objective.move(old)
    with tf.control_dependencies([tf.identity(t) for t in objective.tensors]):  # put back first
        return (ends[0] - ends[1]) / (2 * h)


def loss_gradient(objective):
    """Return the gradient of L at theta, regulariser included, (p,) float64."""
    if objective.head:
        return objective.head.gradient(objective.theta)
    total = _summed_gradient(objective).numpy().astype(np.float64)
    return total / objective.n + objective.decay * objective.theta


@compiled
def _summed_gradient(objective):
    def one_batch(x, y, weight):
        with tf.GradientTape() as tape:
            loss = tf.tensordot(weight, objective.example_losses(x, y), 1)
        return objective.flatten(tape.gradient(loss, objective.tensors))

    return objective.accumulate(one_batch, tf.zeros(objective.p, objective.dtype))


def hvp(objective, vectors):
    """Return H v, or H V for columns V (p, k), with H the Hessian of L at theta.

    Reverse-over-reverse (Pearlmutter 1994): d/dtheta of grad L . v, computed in the model's dtype
    (float64 for a last Dense layer), returned like `vectors`. Regulariser included, damping not.
    """
    return _product(objective, vectors, _head_hvp if objective.head else _hvp)


def gauss_newton_product(objective, vectors):
    """Return G v with G = (1/n) sum_i w_i J_i' A_i J_i + diag(decay), for (p,) or columns (p, k).

    J_i is the Jacobian of example i's outputs (`Objective.outputs`), A_i the Hessian of its loss in
    them, as it is. G has no negative eigenvalue for a loss convex in the outputs, and is H for a
    linear model.
    """
    return _product(objective, vectors, _head_hvp if objective.head else _gnvp)


def hessian_operator(objective, *, gauss_newton=False, rows=None):
    """Return V -> H V (or G V) on tensors (p, k), to be called inside a `tf.function`.

    `rows`, a tensor of indices, takes the mean over those training examples only.
    """
    product = _head_hvp if objective.head else _gnvp if gauss_newton else _hvp
    return partial(product.graph, objective, rows=rows)


def _product(objective, vectors, columns, *args):
    dtype = "float64" if objective.head else objective.dtype
    vectors = tf.cast(vectors, dtype)
    matrix = vectors[:, None] if vectors.shape.rank == 1 else vectors
    result = columns(objective, matrix, *args).numpy().astype(np.float64)
    return result[:, 0] if vectors.shape.rank == 1 else result


@compiled
def _head_hvp(objective, vectors, rows=None):
    return head_operator(objective, rows)(vectors)


def head_operator(objective, rows=None):
    """Return V -> H V = (1/n) phi' [A (phi V)] + decay V on tensors (p, k): two GEMMs.

    A is computed here and not in the product: inside a `tf.function`, call this before its loop.
    """
    head = objective.head
    phi, y, weight = head.tensors
    if rows is not None:
        phi, y, weight = (tf.gather(t, rows) for t in head.tensors)
    n = tf.shape(phi)[0]
    theta = tf.cast(objective.flatten(objective.tensors), phi.dtype)
    a = head.tf_curvatures(y, tf.matmul(phi, tf.reshape(theta, (head.d, head.c))))
    a *= weight[:, None, None] / tf.cast(n, phi.dtype)

    def product(vectors):
        moved = tf.matmul(phi, tf.reshape(vectors, (head.d, -1)))
        moved = tf.matmul(a, tf.reshape(moved, (n, head.c, -1)))
        back = tf.matmul(phi, tf.reshape(moved, (n, -1)), transpose_a=True)
        return tf.reshape(back, tf.shape(vectors)) + head.decay[:, None] * vectors

    return product


@compiled
def _hvp(objective, vectors, rows=None, first=0, last=None):
    """Return H V; for V in the variables `first` to `last` alone, its rows from `first` on."""

    def slope(x, y, weight):
        with tf.GradientTape() as tape:
            loss = tf.tensordot(weight, objective.example_losses(x, y), 1)
        return objective.flatten(tape.gradient(loss, objective.tensors))

    def one_vector(x, y, weight, vector):
        if by_differences(objective):
            return along(objective, vector, lambda: slope(x, y, weight))
        parts, tensors = objective.unflatten(vector)[first:last], objective.tensors
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                loss = tf.tensordot(weight, objective.example_losses(x, y), 1)
            dot = sum_of_products(inner.gradient(loss, tensors[first:last]), parts)
        return objective.flatten([None] * first + outer.gradient(dot, tensors[first:]))

    return _regularised(objective, vectors, one_vector, rows)


@compiled
def _gnvp(objective, vectors, rows=None):
    def slope(y, weight, outputs, mask):
        with tf.GradientTape() as tape:
            tape.watch(outputs)
            losses = objective.loss_of_outputs(y, keras_facts.with_mask(outputs, mask))
            loss = tf.tensordot(weight, losses, 1)
        return tape.gradient(loss, outputs)

    def one_vector(x, y, weight, vector):
        with tf.GradientTape(persistent=True) as tape:
            outputs = objective.outputs(x)
        mask = keras_facts.mask_of(outputs)
        if by_differences(objective):
            moved = along(objective, vector, lambda: objective.outputs(x))  # J v
            h = 1e-5 * tf.maximum(tf.norm(outputs), 1) / tf.maximum(tf.norm(moved), 1e-300)
            ends = [slope(y, weight, outputs + s * h * moved, mask) for s in (1, -1)]
            bent = (ends[0] - ends[1]) / (2 * h)
        else:
            with tf.GradientTape() as linear:
                dummy = tf.ones_like(outputs)
                linear.watch(dummy)
                pulled = tape.gradient(outputs, objective.tensors, output_gradients=dummy)
                dot = sum_of_products(pulled, objective.unflatten(vector))
            moved = linear.gradient(dot, dummy)  # J v, by differentiating u -> (J' u) . v
            with tf.GradientTape() as outer:
                outer.watch(outputs)
                dot = tf.reduce_sum(slope(y, weight, outputs, mask) * tf.stop_gradient(moved))
            bent = outer.gradient(dot, outputs, None, tf.UnconnectedGradients.ZERO)  # A J v
        return objective.flatten(tape.gradient(outputs, objective.tensors, output_gradients=bent))

    return _regularised(objective, vectors, one_vector, rows)


def _regularised(objective, vectors, one_vector, rows):
    """Return the batch sums of `one_vector` over n, for every column, plus decay * V."""
    columns = tf.transpose(vectors)

    def one_batch(x, y, weight):
        return map_rows(objective, lambda v: one_vector(x, y, weight, v), columns)

    if rows is None:
        # the number of columns is unknown where a graph serves several; 64 is what callers send
        copies = (columns.shape[0] or 64) if is_vectorisable(objective) else 1
        total = objective.accumulate(one_batch, tf.zeros_like(columns), copies) / objective.n
    else:
        total = one_batch(*objective.gather(rows)) / tf.cast(len(rows), vectors.dtype)
    decay = tf.constant(objective.decay[:, None], objective.dtype)
    return tf.transpose(total) + decay * vectors


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
    batches = objective.batches_of(x, y, batch_size=_rows_at_once(objective))
    return np.concatenate([_loss_gradients(objective, xb, yb) for xb, yb, _ in batches])


def _loss_gradients(objective, x, y):
    """Return grad loss_i = J_i' r_i as rows (b, p)."""
    return _pulled(objective, x, output_slopes(objective, x, y))


def _rows_at_once(objective):
    """Return how many per-example gradients fit the memory budget, at most a batch."""
    fit = objective.affordable_batch(4 * objective.p * tf.as_dtype(objective.dtype).size)
    return min(fit, objective.batch_size)


def _pulled(objective, x, directions):
    """Return J_i' direction_i as rows (b, p), for directions (b, C) in the flat outputs.

    Many examples of a model with convolutions run under XLA, where their gradients are an order of
    magnitude faster, after a guard has compared the first batch with the plain graph: XLA gives
    wrong second derivatives through max-pooling on a CPU, so it is believed where it was checked.
    """
    cache = objective.compiled
    if len(directions) < XLA_ROWS or not (
        is_vectorisable(objective) and has_convolution(objective)
    ):
        return _example_gradients(objective, x, directions).numpy()
    if "XLA" not in cache:
        plain = partial(_example_gradients.graph, objective)
        cache["XLA"] = tf.function(plain, jit_compile=True)
        expected = _example_gradients(objective, x, directions).numpy()
        try:
            cache["XLA agrees"] = agrees(cache["XLA"](x, directions).numpy(), expected)
        except tf.errors.OpError:  # XLA has no kernel for one of the layers
            cache["XLA agrees"] = False
        return expected
    fast = cache["XLA"] if cache["XLA agrees"] else partial(_example_gradients, objective)
    return fast(x, directions).numpy()


def agrees(got, expected):
    """Return whether two results differ by no more than 100 roundings of their type."""
    scale = np.abs(expected).max(initial=0)
    return bool(np.abs(got - expected).max(initial=0) <= 100 * np.finfo(got.dtype).eps * scale)


def has_convolution(objective):
    """Return whether the model convolves: the case that XLA speeds up."""
    return any("Conv" in type(la).__name__ for la in objective.model._flatten_layers())


@compiled
def _example_gradients(objective, x, directions):
    def one_example(example):
        one_x, direction = keras.tree.map_structure(lambda a: a[None], example)
        with tf.GradientTape() as tape:
            outputs = tf.reshape(objective.outputs(one_x), [1, -1])
            dot = tf.reduce_sum(outputs * direction)
        return objective.flatten(tape.gradient(dot, objective.tensors))

    if is_vectorisable(objective):
        return tf.vectorized_map(one_example, (x, directions))
    return tf.map_fn(one_example, (x, directions), fn_output_signature=objective.dtype)


@compiled
def output_slopes(objective, x, y):
    """Return r_i, the gradient of loss_i in the flat outputs, (b, C)."""
    outputs = objective.outputs(x)
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        losses = objective.loss_of_outputs(y, outputs)
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
    vectors = np.asarray(vectors, np.float64)
    if objective.head:
        theta = objective.theta
        yield from (_head_dots(block, theta, vectors) for block in objective.head.blocks())
        return
    columns = tf.constant(vectors, objective.dtype)
    if objective.strategy is not None:
        yield _dots_of_shares(objective, columns).numpy().T.astype(np.float64)
        return
    k, vectorisable = vectors.shape[1], is_vectorisable(objective)
    many = vectorisable and k > (4 if has_convolution(objective) else 64)
    rows = _rows_at_once(objective) if many else objective.rows_for(k if vectorisable else 1)
    for x, y, weight in objective.batches(rows):
        if many:
            gradients = _loss_gradients(objective, x, y)
            dots = (gradients @ columns.numpy()).T * weight.numpy()
        else:
            dots = _double_vjp_dots(objective, x, y, weight, columns).numpy()
        yield dots.astype(np.float64)


def _head_dots(head, theta, vectors):
    r = head.residuals(head.y, head.outputs(head.phi, theta)) * head.weight[:, None]
    width = max(1, int(head.objective.memory_budget // (8 * r.size)))
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
    k = columns.shape[1]
    step = objective.rows_for(k if is_vectorisable(objective) else 1)

    def of_a_share(*share):
        n = share[1].shape[0]
        parts = tf.TensorArray(objective.dtype, -(-n // step), element_shape=(None, k))
        for i in tf.range(-(-n // step)):
            rows = slice(i * step, (i + 1) * step)
            batch = keras.tree.map_structure(lambda a, r=rows: a[r], share)
            dots = _double_vjp_dots.graph(objective, *batch, columns)
            parts = parts.write(i, tf.transpose(dots))
        return parts.concat()

    parts = objective.strategy.run(of_a_share, args=objective.shares)
    return objective.strategy.gather(parts, axis=0)


@compiled
def _double_vjp_dots(objective, x, y, weight, vectors):
    def one_vector(vector):
        if by_differences(objective):
            return weight * along(objective, vector, lambda: objective.example_losses(x, y))
        parts = objective.unflatten(vector)
        with tf.GradientTape() as outer:
            outer.watch(weight)
            with tf.GradientTape() as inner:
                loss = tf.tensordot(weight, objective.example_losses(x, y), 1)
            dot = sum_of_products(inner.gradient(loss, objective.tensors), parts)
        return outer.gradient(dot, weight) * weight

    return map_rows(objective, one_vector, tf.transpose(vectors))


def dense_hessian(objective):
    """Return H of L at theta as a matrix (p, p) float64, regulariser included, damping not.

    A closed form for a last Dense layer; otherwise a product for every column, layer by layer, with
    that layer and those behind it only. The rest is known by symmetry, and what depends on a late
    layer alone, most of a network's columns, is never taken back through the first ones.
    """
    if objective.head:
        return objective.head.hessian(objective.theta)
    ends = np.cumsum([0, *objective.sizes])
    kernels = [k for k, v in enumerate(objective.variables) if k == 0 or len(v.shape) > 1]
    h = np.zeros((objective.p, objective.p))
    with tqdm(total=objective.p, desc="Hessian", unit="column", leave=False) as bar:
        for first, last in pairwise([*kernels, len(objective.sizes)]):
            own = range(ends[first], ends[last])
            for columns, identity in _identity(objective.p, own):
                h[:, columns] = _product(objective, identity, _hvp, None, first, last)
            bar.update(len(own))
    return np.tril(h) + np.tril(h, -1).T


def dense_gauss_newton(objective):
    """Return G (see `gauss_newton_product`) as a matrix (p, p) float64.

    With A_i = F_i S_i F_i', G is the Gram matrix of the rows J_i' F_i with the signs S_i: C
    per-example gradients and one GEMM a batch, where a product for every column would cost p
    passes. The GEMM runs in the model's dtype.
    """
    if objective.head:
        return objective.head.hessian(objective.theta)
    if not is_vectorisable(objective):
        g = np.empty((objective.p, objective.p))
        for columns, identity in _identity(objective.p, range(objective.p)):
            g[:, columns] = gauss_newton_product(objective, identity)
        return (g + g.T) / 2
    total = np.zeros((objective.p, objective.p))
    for x, y, weight in objective.batches(_rows_at_once(objective)):
        for rows, signs in _curvature_rows(objective, x, y):
            total += (rows.T * (weight.numpy() * signs)) @ rows
    total = (total + total.T) / (2 * objective.n)  # a product in float32 rounds the two apart
    return total + np.diag(objective.decay)


def curvature_factors(objective, x, y):
    """Return U_i (m, p, C) and signs S_i (m, C), U_i S_i U_i' = J_i' A_i J_i: shares of n G."""
    batches = objective.batches_of(x, y, batch_size=_rows_at_once(objective))
    parts = [list(zip(*_curvature_rows(objective, xb, yb), strict=True)) for xb, yb, _ in batches]
    factors, signs = ([np.stack(part[k], -1) for part in parts] for k in (0, 1))
    return np.concatenate(factors).astype(np.float64), np.concatenate(signs)


def _curvature_rows(objective, x, y):
    """Yield, for each column f of F_i, the rows J_i' f (b, p) and the signs (b,)."""
    factors, signs = output_factors(objective, x, y)
    for c in range(factors.shape[-1]):
        yield _pulled(objective, x, factors[:, :, c]), signs[:, c].numpy()


@compiled
def output_factors(objective, x, y):
    """Return F_i (b, C, C) and signs S_i (b, C), F_i S_i F_i' = A_i, the Hessian in the outputs."""
    outputs = objective.outputs(x)
    shape, mask = tf.shape(outputs), keras_facts.mask_of(outputs)
    flat = tf.reshape(outputs, (shape[0], -1))
    with tf.GradientTape() as outer:
        outer.watch(flat)
        with tf.GradientTape() as inner:
            inner.watch(flat)
            again = keras_facts.with_mask(tf.reshape(flat, shape), mask)
            losses = objective.loss_of_outputs(y, again)
        slope = inner.gradient(losses, flat)
    a = outer.batch_jacobian(slope, flat, tf.UnconnectedGradients.ZERO)
    values, vectors = tf.linalg.eigh(a)
    rounding = 10 * np.finfo(objective.dtype).eps * tf.reduce_max(tf.abs(values), 1, True)
    values = tf.where(tf.abs(values) > rounding, values, 0)
    return vectors * tf.sqrt(tf.abs(values))[:, None, :], tf.sign(values)


def _identity(p, columns, most=64):
    """Yield slices of the columns, and I there, (p, k): of one width, one graph; some overlap."""
    width = -(-len(columns) // -(-len(columns) // most))
    for start in columns[::width]:
        start = min(start, columns.stop - width)
        yield slice(start, start + width), np.eye(p, width, -start)
