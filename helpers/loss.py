"""The loss that a model is trained on, one value an example, as Keras means it."""

import keras
import numpy as np
import tensorflow as tf

from . import keras_facts


class ExampleLoss:
    """A Keras model's loss z -> loss(z, theta), without a regulariser, differentiable twice.

    Attributes
    ----------
    object : the `keras.losses.Loss`; name : what it is called; predicted : the shape of the model's
    predictions, (b, ...), None for a length that may vary; last_activation : the softmax or sigmoid
    by which the model ends, or None; activation : the same where the loss is convex below it, so
    that `outputs` are logits; counted : (n,) how much of each training example Keras does not mask,
    in units of the mean, or None where it masks nothing.
    """

    def __init__(self, model, loss, y, predictions, dtype):
        """Bind what `compile` takes as a loss; y, predictions : of a few examples."""
        self.model, self.dtype = model, dtype
        self._weight = keras_facts.loss_weight(model) if loss is None else 1.0
        if loss is None and keras_facts.computes_its_loss(model):
            raise ValueError(
                "The model overrides compute_loss or train_step, so its compiled loss need not be "
                "what it is trained on: pass the loss of an example, loss=..."
            )
        given = loss if loss is not None else getattr(model, "loss", None)
        self.object, self._steps = keras_facts.as_loss(given, y, predictions), None
        self.counted = None
        if self.object.reduction in ("sum", "mean_with_sample_weight"):
            raise ValueError(
                f"The loss has reduction='{self.object.reduction}', which weighs examples against "
                "the weight decay by the batch they are in. Use reduction='sum_over_batch_size', "
                "and put factors into sample_weight or weight_decay."
            )
        shape, inputs = predictions.shape, getattr(model, "inputs", None)
        known = *[None] * (len(shape) - 1), shape[-1]  # a subclassed model declares nothing
        if inputs:
            free = any(None in t.shape[1:] for t in inputs)
            known = tuple(model.outputs[0].shape) if free else shape
        if keras_facts.function_of(self.object) in keras_facts.SPARSE:
            known = *known[:-1], shape[-1]
        self.predicted = known if len(known) == len(shape) > 1 else shape
        self.width = int(np.prod(shape[1:]))  # outputs an example

    @property
    def name(self):
        return self.object.name

    @property
    def is_cross_entropy(self):
        """Whether this is a cross-entropy of logits, which is convex in `outputs`.

        Keras takes the logits of a last softmax or sigmoid whatever `from_logits` says.
        """
        known = keras_facts.function_of(self.object) in keras_facts.OF_LOGITS
        return known and bool(self.activation or self.object.get_config().get("from_logits"))

    def __call__(self, x, y):
        """Return the loss of each example of a batch, (b,), in nats for cross-entropies."""
        return self.of_outputs(y, self.outputs(x))

    def outputs(self, x):
        """Return what the loss is convex in, (b, ...): logits, below a last softmax or sigmoid.

        The predictions themselves, where the loss is no function convex in the logits: for a
        squared error of probabilities, say.
        """
        predictions = keras_facts.predict(self.model, x)
        logits = predictions if self.activation is None else keras_facts.logits_of(predictions)
        if logits is None:  # not hung on the tensor, but every graph shows them
            return keras_facts.with_mask(*self._graph_of_outputs(x))
        return keras_facts.with_mask(tf.identity(logits), keras_facts.mask_of(predictions))

    @keras_facts.traced
    def _graph_of_outputs(self, x):
        outputs = self.outputs(x)
        return outputs, keras_facts.mask_of(outputs)

    def of_outputs(self, y, outputs):
        """Return the loss of each example, (b,), from what `outputs` returned."""
        if self.activation is None:
            return self.of_predictions(y, outputs)
        mask = keras_facts.mask_of(outputs)
        return self.of_predictions(y, keras_facts.with_mask(self.activation(outputs), mask))

    def slopes(self, y, outputs, weight=None):
        """Return the gradient of the (weighted) sum of `of_outputs` in them, shaped like them."""
        with tf.GradientTape() as tape:
            tape.watch(outputs)
            losses = self.of_outputs(y, outputs)
        return tape.gradient(losses, outputs, weight)

    def of_predictions(self, y, predictions, dtype=None):
        """Return the loss of each prediction, (b,): extra axes (pixels, time) are averaged.

        In `dtype`, by default the model's, with zero where Keras masks an entry. A loss that
        computes in a type of its own whatever it is given, gets that and is cast.
        """
        dtype = dtype or self.dtype
        values = keras_facts.unreduced(self.object, y, predictions, self._dtypes[dtype])
        mask = keras_facts.mask_of(values)
        values *= self._weight
        if mask is not None and self._steps is not None:
            entries = tf.cast(tf.size(values[:1]), values.dtype)
            share = entries / tf.cast(self._steps, values.dtype)
            values = tf.where(mask, values, 0) * share
        values, extra = tf.cast(values, dtype), list(range(1, values.shape.rank))
        return tf.reduce_mean(values, extra) if extra else values

    def hold_against_keras(self, x, y):
        """Refuse a loss of which Keras's own evaluation of a few examples differs.

        Sets `activation` and `last_activation`, for which examples are needed too.
        """
        predictions = keras_facts.predict(self.model, x)
        again = keras_facts.predict(self.model, x)
        if not np.array_equal(predictions, again, equal_nan=True):
            raise ValueError(
                "The model gives other predictions when it is called again with training=False: "
                "a layer draws random numbers. Make it depend on `training`."
            )
        last = keras.tree.map_structure(lambda a: a[-1:], x)
        alone, among = np.asarray(keras_facts.predict(self.model, last)), predictions[-1:].numpy()
        near = 1e-3 * np.nanmax(np.abs(predictions), initial=1e-2)
        if not np.allclose(alone, among, rtol=0, atol=near, equal_nan=True):
            raise ValueError(
                "The model predicts an example alone differently than among others: a layer mixes "
                "the examples of a batch (normalisation by the batch, a mean or norm over the "
                "first axis, noise with a fixed seed), and then no example has an influence."
            )
        self._dtypes, b = {}, int(predictions.shape[0])
        for wanted in dict.fromkeys(("float64", self.dtype)):
            try:
                dtype, values = wanted, keras_facts.unreduced(self.object, y, predictions, wanted)
            except (TypeError, tf.errors.InvalidArgumentError):
                dtype = self.object.dtype
                values = keras_facts.unreduced(self.object, y, predictions, dtype)
            self._dtypes[wanted] = dtype
        if values.shape.rank == 0 or int(values.shape[0]) != b:
            raise ValueError(
                f"The loss must return one value an example, shape ({b}, ...); it "
                f"returned shape {tuple(values.shape)}. Do not average over examples."
            )
        for k in (b, 1):  # one example alone must have the loss it has among others
            mine, theirs = keras_facts.both_means(self.object, y, predictions, values, k, dtype)
            if not np.isclose(mine, theirs, rtol=1e-3, atol=1e-5, equal_nan=True):
                raise ValueError(
                    f"Keras evaluates the loss of {k} examples to {theirs:.6g}, but the mean of "
                    f"one value an example is {mine:.6g}: the loss couples the examples of a batch "
                    "or averages in a way of its own, and then no example has an influence."
                )
        with tf.GradientTape() as tape:
            values = keras_facts.unreduced(self.object, y, predictions, dtype)
        own = tape.gradient(values, [v.value for v in self.model.trainable_variables])
        if any(g is not None for g in own):
            raise ValueError(
                "The loss depends on parameters of the model not only through its predictions: "
                "make a penalty a kernel_regularizer, and let the model output what is learned "
                "beside (a scale, say)."
            )
        self.last_activation = keras_facts.last_activation(self.model, x)
        self.activation = self.last_activation
        if self.activation is not None and not self._is_convex(x, y):
            self.activation = None

    def _is_convex(self, x, y):
        """Return whether the loss is convex in the logits: of some losses known, else measured."""
        if self.is_cross_entropy:
            return True
        logits = self.outputs(x)
        rng, shape = np.random.default_rng(0), logits.shape
        for spread in (0.0, 1.0, 3.0):
            at = logits + tf.constant(spread * rng.normal(size=shape), logits.dtype)
            v = tf.constant(rng.normal(size=shape), logits.dtype)
            with tf.GradientTape() as outer:
                outer.watch(at)
                slope = self.slopes(y, at)
            bent = None if slope is None else outer.gradient(slope, at, output_gradients=v)
            if bent is None:
                return False
            quadratic = tf.reduce_sum(tf.reshape(bent * v, (shape[0], -1)), 1)
            if np.min(quadratic) < -1e-6 * np.max(np.abs(quadratic)):
                return False
        return True

    def count_steps(self, batches):
        """Count what Keras does not mask, in each training example and in their mean."""
        x, y, _ = batches.first(1)
        self._steps = self.counted = None
        if self._mask(x, y) is None:
            return

        def count(x, y):
            mask = self._mask(x, y)
            return tf.math.count_nonzero(tf.reshape(mask, (tf.shape(mask)[0], -1)), axis=1)

        count = keras_facts.traced(count)
        counts = np.concatenate([count(x, y).numpy() for x, y, _ in batches.each()])
        if not counts.any():
            raise ValueError("Every step of the training data is masked: nothing counts.")
        self._steps = counts.mean()
        self.counted = counts / self._steps

    def _mask(self, x, y):
        predictions = keras_facts.predict(self.model, x)
        return keras_facts.mask_of(
            keras_facts.unreduced(self.object, y, predictions, self._dtypes[self.dtype])
        )
