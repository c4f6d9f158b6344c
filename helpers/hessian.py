"""The Hessian of an objective, and its Gauss-Newton part, as operators: `H @ v`, `H @ V`.

Symmetric (p, p) operators in SciPy's protocol, regulariser included, damping not: `eigsh(H)` and
`minres(H, b)` work as they stand. A product with k columns is one pass over the data, summed over
batches inside one graph that is compiled once a shape. For a last Dense layer all is a closed form
(`helpers.head`); other models take reverse-over-reverse products, which work for any Keras layer.
"""

from functools import partial
from itertools import pairwise

import numpy as np
import tensorflow as tf
from scipy.sparse.linalg import LinearOperator
from tqdm.auto import tqdm

from . import keras_facts
from .gradients import (
    along,
    by_differences,
    has_rows,
    map_rows,
    pulled,
    recorded_gradient,
    rows_at_once,
    second_derivative,
)
from .objective import Objective, compiled, loss_and_gradient


class Symmetric(LinearOperator):
    """A symmetric matrix (p, p) known by its products; NumPy in, float64 NumPy out.

    precision : the dtype that products are computed in. compiled : where the graphs made of this
    operator are kept for the next call.
    """

    precision, objective = "float64", None

    def __init__(self, p):
        super().__init__(np.float64, (p, p))

    def product(self, rows=None):
        """Return V -> H V on tensors (p, k) of `precision`, to be called inside a `tf.function`."""
        raise NotImplementedError

    def dense(self):
        """Return the matrix, (p, p) float64."""
        raise NotImplementedError

    @property
    def damped(self):
        """The graph (V, damping) -> (H + damping I) V on float64 tensors (p, k), one for any k."""

        precision = self.precision  # which builds what can not be built inside a graph
        takes = tf.TensorSpec((self.shape[0], None), tf.float64), tf.TensorSpec((), tf.float64)

        def matvec(v, damping):
            return tf.cast(self.product()(tf.cast(v, precision)), tf.float64) + damping * v

        graph = keras_facts.traced(matvec, input_signature=takes)
        return self.compiled.setdefault("damped", graph)

    def _matmat(self, vectors):
        if np.iscomplexobj(vectors):
            return self._matmat(vectors.real) + 1j * self._matmat(vectors.imag)
        return self.damped(tf.constant(vectors, tf.float64), tf.zeros((), tf.float64)).numpy()

    def _adjoint(self):
        return self


class Matrix(Symmetric):
    """A symmetric matrix (p, p) that is there as an array."""

    def __init__(self, matrix):
        self._matrix, self.compiled = np.asarray(matrix, np.float64), {}
        if self._matrix.ndim != 2 or len(set(self._matrix.shape)) > 1:
            raise ValueError(f"A matrix has shape (p, p), not {self._matrix.shape}.")
        super().__init__(len(matrix))

    def product(self, rows=None):
        return partial(tf.matmul, tf.constant(self._matrix))

    def dense(self):
        return self._matrix


class Hessian(Symmetric):
    """H, the Hessian of an `Objective` at its present theta: (1/n) sum_i w_i H_i + diag(decay).

    Reverse-over-reverse (Pearlmutter 1994): d/dtheta of grad L . v, in the model's dtype; float64
    for a last Dense layer. Where TensorFlow has no right second derivative (the probe of the
    objective's derivatives found out), central differences of exact gradients.
    """

    def __init__(self, objective):
        if not isinstance(objective, Objective):
            raise TypeError(f"An Objective is needed, not {type(objective).__name__}.")
        self.objective, self.compiled = objective, objective.compiled.setdefault(type(self), {})
        super().__init__(objective.p)

    def _matmat(self, vectors):
        self.objective.checked_head()
        return super()._matmat(vectors)

    @property
    def precision(self):
        return "float64" if self.objective.head else self.objective.dtype

    def product(self, rows=None):
        """Return V -> H V on tensors (p, k) of `precision`, to be called inside a `tf.function`.

        `rows`, a tensor of indices, takes the mean over those training examples only.
        """
        if self.objective.head:
            return _head_product(self.objective, rows)
        return partial(self._by_batches, rows=rows)

    def _by_batches(self, vectors, *part, rows=None):
        """Return H V from products with the Hessian of each batch, or of these rows alone.

        part : first, last, for V in those variables alone: its rows from the first of them on.
        """
        objective, columns = self.objective, tf.transpose(vectors)

        def one_batch(*batch):
            return map_rows(objective, self._of_batch(*batch, *part), columns)

        if rows is None:
            total = objective.data.accumulate(one_batch, tf.zeros_like(columns)) / objective.n
        else:
            total = one_batch(*objective.data.gather(rows))
            total /= tf.cast(tf.shape(rows)[0], vectors.dtype)
        decay = tf.constant(objective.decay[:, None], objective.dtype)
        return tf.transpose(total) + decay * vectors

    def _of_batch(self, x, y, weight, first=0, last=None):
        """Return v -> the sum of w_i H_i v over a batch."""
        objective, tensors = self.objective, self.objective.tensors
        if by_differences(objective):
            slope = partial(loss_and_gradient.graph, objective, x, y, weight)
            return lambda vector: along(objective, vector, slope)[1:]
        with tf.GradientTape(persistent=True) as outer:
            with tf.GradientTape() as inner:
                loss = tf.tensordot(weight, objective.loss(x, y), 1)
            gradient = recorded_gradient(inner, loss, tensors[first:last])

        def one_vector(vector):
            parts = objective.unflatten(vector)[first:last]
            bent = second_derivative(outer, gradient, parts, tensors[first:])
            return objective.flatten([None] * first + bent)

        return one_vector

    def dense(self):
        """Return H as a matrix (p, p) float64: a closed form for a last Dense layer.

        Otherwise a product for every column, layer by layer, with that layer and those behind it
        only. The rest is known by symmetry, and what depends on a late layer alone, most of a
        network's columns, is never taken back through the first ones.
        """
        objective = self.objective
        if head := objective.checked_head():
            return head.hessian(objective.theta)
        ends = np.cumsum([0, *objective.sizes])
        kernels = [k for k, v in enumerate(objective.variables) if k == 0 or len(v.shape) > 1]
        h = np.zeros((objective.p, objective.p))
        some_columns = self.compiled.setdefault("columns", keras_facts.traced(self._by_batches))
        with tqdm(total=objective.p, desc="Hessian", unit="column", leave=False) as bar:
            for first, last in pairwise([*kernels, len(objective.sizes)]):
                own = range(ends[first], ends[last])
                for columns, identity in _identity(objective, own):
                    h[:, columns] = some_columns(identity, first, last).numpy()
                bar.update(len(own))
        return np.tril(h) + np.tril(h, -1).T


class GaussNewton(Hessian):
    """G = (1/n) sum_i w_i J_i' A_i J_i + diag(decay), the Gauss-Newton part of the Hessian.

    J_i is the Jacobian of example i's outputs (`ExampleLoss.outputs`), A_i the Hessian of its loss
    in them, as it is. G has no negative eigenvalue for a loss convex in the outputs, and is H for a
    linear model.
    """

    def _of_batch(self, x, y, weight):
        objective, tensors = self.objective, self.objective.tensors
        with tf.GradientTape(persistent=True) as tape:
            outputs = objective.loss.outputs(x)
        mask = keras_facts.mask_of(outputs)

        def differences(vector):
            moved = along(objective, vector, lambda: objective.loss.outputs(x))  # J v
            h = 1e-5 * tf.maximum(tf.norm(outputs), 1) / tf.maximum(tf.norm(moved), 1e-300)
            ends = (keras_facts.with_mask(outputs + s * h * moved, mask) for s in (1, -1))
            up, down = (objective.loss.slopes(y, end, weight) for end in ends)
            bent = (up - down) / (2 * h)
            return objective.flatten(tape.gradient(outputs, tensors, bent))

        if by_differences(objective):
            return differences
        dummy = tf.ones_like(outputs)
        with tf.GradientTape(persistent=True) as linear:
            linear.watch(dummy)
            back = recorded_gradient(tape, outputs, tensors, dummy)
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(outputs)
            steep = objective.loss.slopes(y, outputs, weight)

        def one_vector(vector):
            parts = objective.unflatten(vector)
            (moved,) = second_derivative(linear, back, parts, [dummy])  # J v, of u -> (J' u) . v
            bent = outer.gradient(steep, outputs, moved, tf.UnconnectedGradients.ZERO)  # A J v
            return objective.flatten(tape.gradient(outputs, tensors, bent))

        return one_vector

    def dense(self):
        """Return G as a matrix (p, p) float64.

        With A_i = F_i S_i F_i', G is the Gram matrix of the rows J_i' F_i with the signs S_i: C
        per-example gradients and one GEMM a batch, in the model's dtype. With more outputs than
        parameters (images), a product for every column, p passes, is cheaper.
        """
        objective = self.objective
        if head := objective.checked_head():
            return head.hessian(objective.theta)
        total = np.zeros((objective.p, objective.p))
        if objective.loss.width > objective.p or not has_rows(objective):
            for columns, identity in _identity(objective, range(objective.p)):
                total[:, columns] = self @ identity.numpy()
            return (total + total.T) / 2
        for x, y, weight in objective.data.each(rows_at_once(objective, objective.loss.width)):
            factors, signs = output_factors(objective, x, y)
            shares = signs * weight[:, None]
            for c in np.flatnonzero(signs.numpy().any(0)):  # softmax has rank C - 1
                rows = pulled(objective, x, factors[:, :, c])
                weighted = rows * shares[:, c, None]
                # the lower triangle and little of the upper, 400 columns at a time, by TensorFlow's
                # GEMM, which other work on the machine slows down less than NumPy's
                for start in range(0, objective.p, 400):
                    own = slice(start, start + 400)
                    part = tf.matmul(rows[:, start:], weighted[:, own], transpose_a=True)
                    total[start:, own] += part.numpy()
        total = (np.tril(total) + np.tril(total, -1).T) / objective.n
        return total + np.diag(objective.decay)


def as_operator(H):
    """Return H as a Symmetric operator: the Hessian of an Objective, or an array as it is."""
    if isinstance(H, Symmetric):
        return H
    return Hessian(H) if isinstance(H, Objective) else Matrix(H)


def operator_of_model(H):
    """Return H as the operator of an Objective: a bare matrix knows neither losses nor data."""
    H = as_operator(H)
    if not H.objective:
        raise TypeError("An Objective is needed, or its Hessian or GaussNewton; not a matrix.")
    return H


def _head_product(objective, rows=None):
    """Return V -> H V = (1/n) phi' [A (phi V)] + decay V on tensors (p, k): two GEMMs.

    Where A fits the memory budget it is computed here and not in the product: inside a
    `tf.function`, call this before its loop.
    """
    head = objective.head
    phi, y, weight = head.tensors
    if rows is not None:
        phi, y, weight = (tf.gather(t, rows) for t in head.tensors)
    n = tf.shape(phi)[0]
    theta = tf.cast(objective.flatten(objective.tensors), phi.dtype)
    outputs = tf.matmul(phi, tf.reshape(theta, (head.d, head.c)))
    share = weight / tf.cast(n, phi.dtype)
    fits = objective.data.affordable(head.bytes_of_curvature) >= (phi.shape[0] or objective.n)
    a = head.tf_curvatures(y, outputs) if fits else None

    def bend(u):
        columns = tf.map_fn(partial(head.bend, y, outputs), tf.transpose(u, (2, 0, 1)))
        return tf.transpose(columns, (1, 2, 0))

    def product(vectors):
        moved = tf.reshape(tf.matmul(phi, tf.reshape(vectors, (head.d, -1))), (n, head.c, -1))
        moved = (tf.matmul(a, moved) if fits else bend(moved)) * share[:, None, None]
        back = tf.matmul(phi, tf.reshape(moved, (n, -1)), transpose_a=True)
        return tf.reshape(back, tf.shape(vectors)) + head.decay[:, None] * vectors

    return product


def curvature_factors(objective, x, y):
    """Return U_i (m, p, C) and signs S_i (m, C), U_i S_i U_i' = J_i' A_i J_i: shares of n G."""
    parts, size = [], rows_at_once(objective, objective.loss.width)
    for xb, yb, _ in objective.data.of(x, y, batch_size=size):
        factors, signs = output_factors(objective, xb, yb)
        rows = [pulled(objective, xb, f) for f in tf.unstack(factors, axis=-1)]
        parts.append((np.stack(rows, -1).astype(np.float64), signs.numpy()))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


@compiled
def output_factors(objective, x, y):
    """Return F_i (b, C, C) and signs S_i (b, C), F_i S_i F_i' = A_i, the Hessian in the outputs."""
    outputs = objective.loss.outputs(x)
    shape, mask = tf.shape(outputs), keras_facts.mask_of(outputs)
    flat = tf.reshape(outputs, (shape[0], -1))
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(flat)
        again = keras_facts.with_mask(tf.reshape(flat, shape), mask)
        slope = tf.reshape(objective.loss.slopes(y, again), tf.shape(flat))
    a = outer.batch_jacobian(slope, flat, tf.UnconnectedGradients.ZERO, experimental_use_pfor=False)
    values, vectors = tf.linalg.eigh(a)
    rounding = 10 * np.finfo(objective.dtype).eps * tf.reduce_max(tf.abs(values), 1, True)
    values = tf.where(tf.abs(values) > rounding, values, 0)
    return vectors * tf.sqrt(tf.abs(values))[:, None, :], tf.sign(values)


def _identity(objective, columns, most=64):
    """Yield slices of the columns, and I there, (p, k): of one width, one graph; some overlap."""
    width = -(-len(columns) // -(-len(columns) // most))
    for start in columns[::width]:
        start = min(start, columns.stop - width)
        identity = np.eye(objective.p, width, -start)
        yield slice(start, start + width), tf.constant(identity, objective.dtype)
