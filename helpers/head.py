"""A model's last Dense layer: where curvature, gradients and removals have a closed form.

When the selected parameters are those of the last Dense layer, its outputs o_i = W' phi_i (+ b) are
linear in them, so with r_i = d loss_i / d o and A_i = d2 loss_i / d o2

    grad loss_i = phi_i (x) r_i        H = (1/n) sum_i w_i (phi_i phi_i') (x) A_i + diag(decay)

exactly, for any loss and any frozen network below. Everything is float64, whatever the model is.
Shapes: n examples, d features (one more with a bias), C outputs, p = d C parameters, k columns.
"""

from functools import cached_property, partial, reduce, wraps
from operator import iadd

import keras
import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from . import keras_facts
from .linalg import gemm, gram


class Head:
    """The features, labels and loss of an objective whose parameters are one last Dense layer."""

    def __init__(self, objective, end):
        self.objective, self._end, self._dense = objective, end, end.dense
        self.n, self.decay = objective.n, objective.decay
        own, last = end.dense.activation, objective.loss.last_activation
        own = keras_facts.as_function(own)
        self._activation = own if end.own else last or keras.activations.linear
        self.c = end.dense.units
        self._hold()

    def _hold(self):
        """Keep the features, labels and weights of all examples."""
        self._seen, parts = self._below(), zip(*self._read(), strict=True)
        self.phi, self.y, self.weight = (np.concatenate(part) for part in parts)
        # made outside every graph, so that graphs capture and do not copy them
        self.tensors = tf.constant(self.phi), tf.constant(self.y), tf.constant(self.weight)

    @keras_facts.traced
    def _sums_below(self):
        own = {id(v) for v in self.objective.variables}
        below = [v for v in self.objective.model.weights if id(v) not in own]
        return tf.stack([tf.reduce_sum(tf.cast(v, self.objective.dtype)) for v in below])

    def _below(self):
        """Return the sum of each variable that the features depend on."""
        return np.zeros(0) if self._end.direct else self._sums_below().numpy()

    def check_features(self):
        """Raise ValueError where the layers below were changed since their features were kept."""
        if not np.array_equal(self._seen, self._below(), equal_nan=True):
            raise ValueError(
                "The layers below the last were trained or loaded anew since this objective first "
                "used their features: bind a new Objective."
            )

    @classmethod
    def of(cls, objective):
        """Return the head of an objective, or None where its parameters are not one.

        A StreamedHead for data on disk whose features would not fit the memory budget.
        """
        x, _, _ = objective.data.first(2)
        end = keras_facts.end_of(objective.model, x, objective.variables)
        if end is None:
            return None
        large = 8 * objective.n * end.dense.kernel.shape[0] > objective.data.memory_budget
        return (StreamedHead if large and not objective.data.in_memory else cls)(objective, end)

    def blocks(self):
        """Yield this head once for each block of training examples that it holds at a time."""
        yield self

    def relabel(self, y):
        """Give the examples other labels (n,), shaped and typed like their own.

        For the closed forms, `fit` and `removals`; the objective's own data stay as they are.
        """
        given, y = np.asarray(y), np.asarray(y).astype(self.y.dtype)
        if (given != y).any():
            raise ValueError(f"Labels of type {given.dtype} are cut to their own, {self.y.dtype}.")
        self.y = y.reshape(self.y.shape)
        self.tensors = self.tensors[0], tf.constant(self.y), self.tensors[2]

    @property
    def d(self):
        return len(self.decay) // self.c

    def _read(self):
        """Yield the features, labels and weights of each batch of training examples."""
        start = 0
        for x, y, weight in self.objective.data.each():
            part = self._features(x), y.numpy(), weight.numpy().astype(np.float64)
            stop = start + len(part[1])
            if not all(np.isfinite(a).all() for a in part):
                raise ValueError(
                    f"Examples {start} to {stop - 1}, or their features, hold NaN or infinity."
                )
            yield part
            start = stop

    def _features(self, x):
        phi = keras.tree.flatten(x)[0]
        if not self._end.direct:
            phi = keras_facts.features_of(self.objective.model, self._dense, x)
        phi = np.asarray(phi, np.float64)
        return np.hstack([phi, np.ones((len(phi), 1))]) if self._dense.use_bias else phi

    def features(self, x, y):
        """Return phi (m, d) of other examples, computed in batches."""
        return np.concatenate([self._features(xb) for xb, _, _ in self.objective.data.of(x, y)])

    def outputs(self, phi, theta):
        """Return o (m, C) for one theta (p,), or (m, C, k) for k of them (p, k)."""
        k = theta.shape[1:]
        return gemm(phi, theta.reshape(self.d, -1)).reshape(len(phi), self.c, *k)

    def losses(self, y, outputs):
        """Return the loss at outputs (m, C) or, for k models at once, (m, C, k): (m,) or (m, k)."""
        return self._each(self._losses, y, outputs)

    def residuals(self, y, outputs):
        """Return r (m, C), or (m, C, k) for k models at once."""
        return self._each(self._residuals, y, outputs)

    def curvatures(self, y, outputs):
        """Return A (m, C, C) at outputs (m, C)."""
        return self._each(self.tf_curvatures, y, outputs)

    def _each(self, function, y, outputs):
        """Return function(y, outputs) (m, ...), or (m, ..., k) for outputs of k models at once."""
        m, c, *k = outputs.shape
        if k:
            y, outputs = np.repeat(y, *k, 0), np.moveaxis(outputs, 2, 1).reshape(-1, c)
        values = function(
            tf.convert_to_tensor(y), tf.convert_to_tensor(outputs, tf.float64)
        ).numpy()
        return np.moveaxis(values.reshape(m, *k, *values.shape[1:]), 1, -1) if k else values

    def losses_in_graph(self, y, outputs):
        """Return the loss at outputs (m, C) as a tensor (m,), to be differentiated."""
        return self.objective.loss.of_predictions(y, self._activation(outputs), "float64")

    def _slopes(self, y, outputs):
        """Return r (m, C); no graph of its own, which would be traced once more a derivative."""
        with tf.GradientTape() as tape:
            tape.watch(outputs)
            losses = self.losses_in_graph(y, outputs)
        return tape.gradient(losses, outputs)

    _losses = keras_facts.traced(losses_in_graph)
    _residuals = keras_facts.traced(_slopes)

    @keras_facts.traced
    def tf_curvatures(self, y, outputs):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(outputs)
            slope = self._slopes(y, outputs)
        none = tf.UnconnectedGradients.ZERO  # of a loss that is linear in pieces
        return tape.batch_jacobian(slope, outputs, none, experimental_use_pfor=False)

    @keras_facts.traced
    def bend(self, y, outputs, u):
        """Return A_i u_i (m, C) for u (m, C) as a tensor, without any A."""
        with tf.GradientTape() as tape:
            tape.watch(outputs)
            dot = tf.reduce_sum(self._slopes(y, outputs) * u)
        return tape.gradient(dot, outputs, None, tf.UnconnectedGradients.ZERO)

    def curvatures_in_parts(self, theta):
        """Yield slices of the examples and their A (b, C, C), as many as fit the memory budget."""
        size = self.objective.data.affordable(self.bytes_of_curvature)
        for start in range(0, len(self.phi), size):
            rows = slice(start, start + size)
            yield rows, self.curvatures(self.y[rows], self.outputs(self.phi[rows], theta))

    @property
    def bytes_of_curvature(self):
        """The memory that one example takes while its A is computed: about eight times A."""
        return 64 * self.c**2

    def gradients(self, phi, residuals):
        """Return grad loss_i = phi_i (x) r_i as rows (m, p)."""
        return (phi[:, :, None] * residuals[:, None, :]).reshape(len(phi), self.d * self.c)

    @cached_property
    def flat(self):
        """Return the directions in which L does not change at all, (p, f): orthonormal columns.

        A softmax is the same when all its outputs move together: with a bias that does not decay,
        that is one direction of theta.
        """
        decay = self.decay.reshape(self.d, self.c)
        if self.c == 1 or not self._dense.use_bias or decay[-1].any():
            return np.zeros((len(self.decay), 0))
        block = next(iter(self.blocks()))
        outputs = block.outputs(block.phi, self.objective.theta)
        bent = self.bend(block.y, outputs, np.ones_like(outputs)).numpy()
        slope = self.residuals(block.y, outputs).sum(1)
        one = np.zeros((self.d, self.c))
        one[-1] = self.c**-0.5
        still = max(np.abs(bent).max(), np.abs(slope).max()) <= 1e-12
        return one.reshape(-1, 1) if still else np.zeros((one.size, 0))

    def hessian(self, theta, *, weight=None, n=None):
        """Return H of the whole objective at theta, (p, p): C (C + 1) / 2 GEMMs of size n d d.

        `weight` (n,) and `n` replace the objective's own, for fits that leave points out.
        """
        share, h = self._share(weight, n), np.zeros((self.d, self.c, self.d, self.c))
        for rows, a in self.curvatures_in_parts(theta):
            a *= share[rows, None, None]
            for i, j in zip(*np.triu_indices(self.c), strict=True):
                h[:, i, :, j] += gram(self.phi[rows], a[:, i, j])
        for i, j in zip(*np.triu_indices(self.c, 1), strict=True):
            h[:, j, :, i] = h[:, i, :, j]  # the block is symmetric in the features
        h = h.reshape(self.d * self.c, -1)
        h[np.diag_indices_from(h)] += self.decay
        return h

    def product(self, theta, *, weight=None, n=None):
        """Return v (p,) -> H v at theta, for p too large to form H."""
        outputs, share = self.outputs(self.phi, theta), self._share(weight, n)[:, None]

        def hv(v):
            moved = self.bend(self.y, outputs, self.outputs(self.phi, v)).numpy() * share
            return gemm(self.phi.T, moved).ravel() + self.decay * v

        return hv

    def gradient(self, theta, *, weight=None, n=None):
        """Return the gradient of the whole objective at theta, (p,)."""
        r = self.residuals(self.y, self.outputs(self.phi, theta)) * self._share(weight, n)[:, None]
        return gemm(self.phi.T, r).ravel() + self.decay * theta

    def rounding(self, theta, *, weight=None, n=None):
        """Return about what rounding leaves of each entry of `gradient` at a minimum, (p,)."""
        share, total = self._share(weight, n)[:, None], self.decay * np.abs(theta)
        signs = (-1.0) ** np.arange(self.c)  # so that a softmax's A does not cancel
        for start in range(0, len(self.phi), 4096):
            rows = slice(start, start + 4096)
            size, outputs = np.abs(self.phi[rows]), self.outputs(self.phi[rows], theta)
            moved = self.bend(self.y[rows], outputs, self.outputs(size, np.abs(theta)) * signs)
            terms = np.abs(self.residuals(self.y[rows], outputs)) + np.abs(moved)
            total += gemm(size.T, terms * share[rows]).ravel()
        return 4 * np.finfo(float).eps * total

    def loss(self, theta, *, weight=None, n=None):
        """Return the training loss at theta, the regulariser included."""
        values = self.losses(self.y, self.outputs(self.phi, theta))
        return float(self._share(weight, n) @ values + 0.5 * self.decay @ theta**2)

    def _share(self, weight, n):
        return (self.weight if weight is None else weight) / (n or self.n)


def _over_blocks(method):
    """Return a method of a Head as the sum of what it returns for each block."""

    @wraps(method)
    def summed(self, *arguments):
        return reduce(iadd, (method(block, *arguments) for block in self.blocks()))

    return summed


class StreamedHead(Head):
    """A head whose examples are read block by block: memory grows with p^2 and not with n.

    H, the gradient and the loss are sums over blocks, each of which carries its share of the weight
    decay; a block is a batch of the objective. What picks single examples needs a `Head`.
    """

    def _hold(self):
        """Keep no example: `blocks` reads them."""

    def check_features(self):
        """Do nothing: features are read anew each time."""

    def blocks(self):
        """Yield this head with the features, labels, weights and decay of each block in turn."""
        whole = self.decay
        try:
            with tqdm(total=self.n, desc="examples", leave=False, unit_scale=True) as bar:
                for part in self._read():
                    self.phi, self.y, self.weight = part
                    self.decay = whole * (len(self.y) / self.n)
                    yield self
                    bar.update(len(self.y))
        finally:
            self.decay = whole
            for name in ("phi", "y", "weight"):
                self.__dict__.pop(name, None)

    def __getattr__(self, name):
        if name not in ("phi", "y", "weight", "tensors"):
            raise AttributeError(name)
        size, budget = 8e-9 * self.n * self.d, 1e-9 * self.objective.data.memory_budget
        raise ValueError(
            f"This needs all features in memory, {size:.1f} GB, and the objective's memory_budget "
            f"is {budget:.1f}: raise it. Streamed are fit_head, s_test (with a number for damping "
            "where a parameter does not decay) by Cholesky, and influences."
        )

    hessian, gradient = _over_blocks(Head.hessian), _over_blocks(Head.gradient)
    rounding, loss = _over_blocks(Head.rounding), _over_blocks(Head.loss)
    _product = _over_blocks(lambda block, theta, v: Head.product(block, theta)(v))

    def product(self, theta):
        """Return v (p,) -> H v at theta: a pass over the examples each time."""
        return partial(self._product, theta)
