"""A model's last Dense layer: where curvature, gradients and removals have a closed form.

When the selected parameters are those of the last Dense layer, its outputs o_i = W' phi_i (+ b) are
linear in them, so with r_i = d loss_i / d o and A_i = d2 loss_i / d o2

    grad loss_i = phi_i (x) r_i        H = (1/n) sum_i w_i (phi_i phi_i') (x) A_i + diag(decay)

exactly, for any loss and any frozen network below. Everything is float64, whatever the model is.
Shapes: n examples, d features (one more with a bias), C outputs, p = d C parameters, k columns.
"""

import keras
import numpy as np
import tensorflow as tf

ON_GPU = bool(tf.config.list_physical_devices("GPU"))


def gemm(a, b):
    """Return a @ b in float64: on the GPU where there is one, else by NumPy's BLAS.

    TensorFlow's own float64 product is 2.5 times slower than OpenBLAS on a CPU.
    """
    return tf.matmul(a, b).numpy() if ON_GPU else a @ b


def gram(phi, weight):
    """Return phi' diag(weight) phi; weights of one sign take half the work (a symmetric GEMM)."""
    sign = 1 if weight.min() >= 0 else -1 if weight.max() <= 0 else 0
    if sign == 0:
        return gemm(phi.T, phi * weight[:, None])
    half = phi * np.sqrt(np.abs(weight))[:, None]
    return sign * gemm(half.T, half)


class Head:
    """The features, labels and loss of an objective whose parameters are one last Dense layer."""

    def __init__(self, objective, dense):
        self.objective = objective
        self.n, self.decay = objective.n, objective.decay
        self._dense = dense
        self._body = None
        if dense.input is not objective.model.inputs[0]:
            self._body = keras.Model(objective.model.inputs, dense.input)
        self.c = dense.units
        batches = [(self._features(x), y.numpy(), w.numpy()) for x, y, w in objective.batches()]
        phi, y, weight = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        self.phi, self.y, self.weight = phi, y, weight.astype(np.float64)
        # made outside every graph, so that graphs capture and do not copy them
        self.tensors = tf.constant(phi), tf.constant(y), tf.constant(self.weight)

    @classmethod
    def of(cls, objective):
        """Return the head of an objective, or None where its parameters are not one."""
        layers = [
            la
            for la in objective.model._flatten_layers(include_self=False)
            if la._trainable_variables
        ]
        dense = layers[-1] if layers else None
        if type(dense) is not keras.layers.Dense or dense.quantization_mode:
            return None
        if [id(v) for v in dense.trainable_variables] != [id(v) for v in objective.variables]:
            return None
        try:
            last = objective.model.outputs[0] is dense.output and len(dense.input.shape) == 2
        except AttributeError:  # a subclassed model has no symbolic outputs
            return None
        return cls(objective, dense) if last else None

    def relabel(self, y):
        """Give the examples other labels (n,), shaped and typed like their own.

        For the closed forms and refits of `retraining`; the objective's own data stay as they are.
        """
        self.y = np.asarray(y, self.y.dtype).reshape(self.y.shape)
        self.tensors = self.tensors[0], tf.constant(self.y), self.tensors[2]

    @property
    def d(self):
        return self.phi.shape[1]

    def _features(self, x):
        phi = x if self._body is None else self._body(x, training=False)
        phi = np.asarray(keras.tree.flatten(phi)[0], np.float64)
        return np.hstack([phi, np.ones((len(phi), 1))]) if self._dense.use_bias else phi

    def features(self, x, y):
        """Return phi (m, d) of other examples, computed in batches."""
        return np.concatenate([self._features(xb) for xb, _, _ in self.objective.batches_of(x, y)])

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

    @tf.function(reduce_retracing=True)
    def _losses(self, y, outputs):
        loss = self.objective.loss_in("float64")
        values = loss(y, self._dense.activation(outputs))
        return tf.reduce_mean(tf.reshape(values, (tf.shape(outputs)[0], -1)), axis=1)

    @tf.function(reduce_retracing=True)
    def _residuals(self, y, outputs):
        with tf.GradientTape() as tape:
            tape.watch(outputs)
            losses = self._losses(y, outputs)
        return tape.gradient(losses, outputs)

    @tf.function(reduce_retracing=True)
    def tf_curvatures(self, y, outputs):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(outputs)
            columns = tf.unstack(self._residuals(y, outputs), axis=1)
        return tf.stack([tape.gradient(column, outputs) for column in columns], axis=1)

    def gradients(self, phi, residuals):
        """Return grad loss_i = phi_i (x) r_i as rows (m, p)."""
        return (phi[:, :, None] * residuals[:, None, :]).reshape(len(phi), -1)

    def hessian(self, theta, *, weight=None, n=None):
        """Return H of the whole objective at theta, (p, p): C (C + 1) / 2 GEMMs of size n d d.

        `weight` (n,) and `n` replace the objective's own, for fits that leave points out.
        """
        a = self.curvatures(self.y, self.outputs(self.phi, theta))
        a *= self._share(weight, n)[:, None, None]
        h = np.empty((self.d, self.c, self.d, self.c))
        for i in range(self.c):
            for j in range(i, self.c):
                h[:, i, :, j] = gram(self.phi, a[:, i, j])
                h[:, j, :, i] = h[:, i, :, j]  # the block is symmetric in the features
        h = h.reshape(self.d * self.c, -1)
        h[np.diag_indices_from(h)] += self.decay
        return h

    def product(self, theta, *, weight=None, n=None):
        """Return v (p,) -> H v at theta, for p too large to form H."""
        a = self.curvatures(self.y, self.outputs(self.phi, theta))
        a *= self._share(weight, n)[:, None, None]

        def hv(v):
            moved = np.einsum("nab,nb->na", a, gemm(self.phi, v.reshape(self.d, self.c)))
            return gemm(self.phi.T, moved).ravel() + self.decay * v

        return hv

    def gradient(self, theta, *, weight=None, n=None):
        """Return the gradient of the whole objective at theta, (p,)."""
        r = self.residuals(self.y, self.outputs(self.phi, theta)) * self._share(weight, n)[:, None]
        return gemm(self.phi.T, r).ravel() + self.decay * theta

    def loss(self, theta, *, weight=None, n=None):
        """Return the training loss at theta, the regulariser included."""
        values = self.losses(self.y, self.outputs(self.phi, theta))
        return float(self._share(weight, n) @ values + 0.5 * self.decay @ theta**2)

    def _share(self, weight, n):
        return (self.weight if weight is None else weight) / (n or self.n)
