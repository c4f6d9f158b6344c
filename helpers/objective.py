"""The empirical risk of a Keras model: what every Hessian, solve and influence is taken of.

    L(theta) = (1/n) sum_i w_i loss(z_i, theta) + (1/2) theta . (decay * theta)

theta are the selected parameters as one vector, `decay` is the weight decay on the decayed ones and
zero on the others (`wd * theta` below always means `decay * theta`), w_i are sample weights (1).
"""

import copy
from contextlib import contextmanager
from functools import cached_property, partial

import keras
import numpy as np
import tensorflow as tf

from . import checks, derivatives, keras_facts
from . import parameters as theta_of
from .batches import Batches, gathered, of_any_form
from .head import Head
from .loss import ExampleLoss

if keras.backend.backend() != "tensorflow":
    raise RuntimeError(
        f"helpers needs Keras on TensorFlow, but KERAS_BACKEND is '{keras.backend.backend()}': "
        "set KERAS_BACKEND=tensorflow and restart the kernel."
    )


def compiled(function):
    """Keep one `tf.function` of `function(objective, ...)` on the objective it was called with."""

    def call(objective, *args):
        cache = objective.compiled
        if function not in cache:
            _ = objective.head  # built and probed here, since that can not be inside a graph
            cache[function] = keras_facts.traced(partial(function, objective))
        return cache[function](*args)

    call.__doc__, call.__name__, call.graph = function.__doc__, function.__name__, function
    return call


class Objective:
    """A Keras model bound to a per-example loss, its training data and its weight decay.

    Attributes
    ----------
    n, p : training examples, selected parameters; theta : (p,); decay : (p,); variables : the
    selected ones; data : the training examples (`Batches`); loss : the `ExampleLoss`; head : the
    closed forms of a last Dense layer, or None; dtype : what the model computes in.

    Parameters
    ----------
    model : keras.Model
        Sequential, functional or subclassed, called with `training=False`: dropout is off,
        batch normalisation uses its moving statistics. Layers of a float64 model that resize
        pictures in float32, as Keras's do, resize in float64 from then on. One thread at a time:
        probes and differences move the parameters, and put them back.
    loss : keras.losses.Loss, name, or callable (y_true, y_pred) -> (b,); optional
        What `compile` takes, and the same is meant: a loss object is used as it is, a function gets
        Keras's wrapper. One value an example, in nats for cross-entropies. None takes the compiled
        loss. Where Keras masks steps of sequences or has an `ignore_class`, an example's loss is
        the sum over what counts, divided by the mean number of what counts in a training example.
    x, y : arrays (n, ...), lists or dicts of arrays, read in batches where they lie on disk (a
        np.memmap, Zarr or HDF5); or x = tf.data.Dataset of (x, y[, weight]) batches and y = None.
    weight_decay : float, optional
        wd of (wd/2)||theta_decayed||^2. None takes the model's own L2 regularisers
        (Keras' `l2(c)` is wd = 2c); giving both is refused, since they would count twice.
    decayed : "kernels", "all", or a list of layers, variables, or names of either
        What `weight_decay` applies to; "kernels" are the variables of rank two or more that are no
        bias, scale or offset.
    parameters : None (all trainable), "last_layer", or a list of layers, their names, or variables
        "last_layer" is the layer with parameters from which alone the predictions come.
    sample_weight : (n,), optional; finite, not negative
    batch_size : int, optional
        Examples a pass holds at once; by default what fits `memory_budget` bytes. Results do
        not depend on it: batches are summed and divided by n.
    strategy : tf.distribute.Strategy, optional
        The one the model was built under. Every replica keeps its share of the examples, and a sum
        over the data is one all-reduce; solvers need not know. Each process is given the same x and
        y, memory-mapped where they are large: it reads its share. A last Dense layer keeps its
        closed forms, in each process.
    """

    def __init__(
        self,
        model,
        loss=None,
        x=None,
        y=None,
        *,
        weight_decay=None,
        decayed="kernels",
        parameters=None,
        sample_weight=None,
        batch_size=None,
        memory_budget=2**30,
        strategy=None,
    ):
        keras_facts.one_output(getattr(model, "outputs", ()))
        self.model = model
        self.compiled = {}  # one tf.function a kind of product, freed with the objective
        x, y = of_any_form(x, y)
        if isinstance(x, tf.data.Dataset):
            checks.once(x)
            first, labels, *_ = next(iter(x), (None, None))
            if first is None:
                raise ValueError("The training data hold no example.")
        else:
            checks.lengths(x, y)
            if not len(y):
                raise ValueError("The training data hold no example.")
            labels = y[:3]
            first = keras.tree.map_structure(lambda a: tf.convert_to_tensor(a[:3]), x)
        checks.inputs(model, first)
        checks.stateless(model)
        self._input_shapes = [tuple(a.shape) for a in keras.tree.flatten(first)]
        predictions = keras_facts.predict(model, first)  # builds a model that was not called yet
        self.variables = theta_of.selected(model, parameters, first)
        self.dtype = theta_of.common_dtype(model, self.variables)
        self._decay = theta_of.decay(model, self.variables, weight_decay, decayed)
        self._decay.flags.writeable = False  # graphs would keep the old one
        self.loss = ExampleLoss(model, loss, labels, predictions, self.dtype)
        self.data = Batches(
            x,
            y,
            sample_weight,
            dtype=self.dtype,
            check=self._check_labels,
            bytes_an_example=keras_facts.bytes_an_example(model, first, self.dtype),
            batch_size=batch_size,
            memory_budget=memory_budget,
            strategy=strategy,
        )
        few = self.data.few(3)[:2]
        self._label_shape = few[1].shape
        twice = keras.tree.map_structure(lambda a: tf.concat([a, a], 0), few)
        self.loss.hold_against_keras(*twice)  # a loss that couples examples minds equal ones
        self.loss.count_steps(self.data)
        self._constants = keras_facts.constants(model)

    def _check_labels(self, y):
        checks.labels(self.loss.object, y, self.loss.predicted)

    @property
    def n(self):
        return self.data.n

    @property
    def decay(self):
        """The weight decay of each parameter, (p,): another one takes a new Objective."""
        return self._decay

    @property
    def p(self):
        return sum(self.sizes)

    @cached_property
    def sizes(self):
        """The number of parameters in each selected variable."""
        return [int(np.prod(v.shape)) for v in self.variables]

    def subset(self, rows):
        """Return the same objective over these training examples only."""
        part = self._copy()
        part.data, part.loss = self.data.subset(rows), copy.copy(self.loss)
        part.loss.count_steps(part.data)
        return part

    def in_float64(self):
        """Return this objective on a float64 copy of its model; None where none can be made."""
        model = keras_facts.in_float64(self.model, self.data.few()[0])
        if model is None:
            return None
        part, place = self._copy(), {id(v): k for k, v in enumerate(self.model.weights)}
        part.data, part.loss = copy.copy(self.data), copy.copy(self.loss)
        for each in (part, part.data, part.loss):
            each.dtype = "float64"
        part.model = part.loss.model = model
        part._constants = keras_facts.constants(model)
        part.variables = [model.weights[place[id(v)]] for v in self.variables]
        return part

    def _copy(self):
        part = copy.copy(self)
        part.compiled = {}
        for name, value in vars(Objective).items():  # nothing that was computed from other data
            if isinstance(value, cached_property):
                part.__dict__.pop(name, None)
        return part

    def examples(self, x, y):
        """Return (x, y) of examples to ask about as arrays, held against the training data."""
        self._check_constants()
        x, y = gathered(x, y)
        checks.lengths(x, y)
        if not len(y):
            raise ValueError("There is no test example.")
        checks.inputs(self.model, x, self._input_shapes)
        self._check_labels(y)
        y = checks.like_training(y, self._label_shape, self.loss.predicted)
        for values in (*keras.tree.flatten(x), y):
            checks.finite(values, "examples")
        return x, y

    # ---------------------------------------------------------------- parameters

    @property
    def tensors(self):
        """The selected parameters as TensorFlow variables, in the order of theta."""
        return [v.value for v in self.variables]

    @property
    def theta(self):
        """The selected parameters as one float64 vector (p,)."""
        return np.concatenate([np.asarray(v).ravel() for v in self.tensors]).astype(np.float64)

    @theta.setter
    def theta(self, vector):
        if np.shape(vector) != (self.p,):
            raise ValueError(f"theta has shape ({self.p},), not {np.shape(vector)}.")
        self._assign(tf.constant(np.asarray(vector), self.dtype))

    @contextmanager
    def at(self, theta):
        """Have the parameters at theta (p,) inside a `with`, and back where they were after it."""
        before = self.theta
        self.theta = theta
        try:
            yield self
        finally:
            self.theta = before

    def move(self, parts):
        """Give the selected parameters the values of a list of arrays shaped like them."""
        for variable, part in zip(self.variables, parts, strict=True):
            variable.assign(part)

    @keras_facts.traced  # ten times as fast as one by one
    def _assign(self, vector):
        self.move(self.unflatten(vector))

    def flatten(self, tensors):
        """Return a list shaped like the variables as one vector (p,); None counts as zero."""
        parts = [
            tf.zeros(size, self.dtype) if t is None else tf.reshape(tf.convert_to_tensor(t), [-1])
            for t, size in zip(tensors, self.sizes, strict=True)
        ]
        return tf.concat([tf.cast(part, self.dtype) for part in parts], 0)

    def unflatten(self, vector):
        """Return one vector (p,) as a list of tensors shaped like the variables."""
        parts = tf.split(tf.convert_to_tensor(vector), self.sizes)
        pairs = zip(parts, self.variables, strict=True)
        return [tf.cast(tf.reshape(t, v.shape), v.dtype) for t, v in pairs]

    @cached_property
    def head(self):
        """The closed forms of a last Dense layer (`helpers.head`), or None for other parameters.

        The layers below must stay as they are at the first use. Data on disk whose features would
        exceed the memory budget are read block by block (`head.StreamedHead`).
        """
        return None if self.derivatives.by_differences else self._closed_form

    def checked_head(self):
        """Return the head; ValueError where graphs or features hold what has changed since."""
        self._check_constants()
        if self.head:
            self.head.check_features()
        return self.head

    def _check_constants(self):
        if keras_facts.constants(self.model) != self._constants:
            raise ValueError(
                "A Normalization or Discretization was adapted or loaded anew since this objective "
                "was bound, and compiled graphs keep the old one: bind a new Objective."
            )

    @cached_property
    def derivatives(self):
        """What the probe of first and second derivatives found (`helpers.derivatives`)."""
        return derivatives.probe(self, self._closed_form)

    @cached_property
    def _closed_form(self):
        return Head.of(self)

    # ---------------------------------------------------------------- losses

    def losses(self, x, y):
        """Return the loss of each given example, (m,) float64, in nats for cross-entropies."""
        batches = self.data.of(*self.examples(x, y))
        parts = [self._batch_losses(xb, yb) for xb, yb, _ in batches]
        return np.concatenate([part.numpy() for part in parts]).astype(np.float64)

    @keras_facts.traced
    def _batch_losses(self, x, y):
        return self.loss(x, y)

    def loss_of_predictions(self, y, predictions):
        """Return the loss of each prediction, (b,): extra axes (pixels, time) are averaged."""
        return self.loss.of_predictions(y, predictions)

    def regulariser(self):
        """Return (1/2) theta . (decay * theta), a float."""
        return 0.5 * float(self.decay @ self.theta**2)

    def training_loss(self):
        """Return L(theta), the mean weighted training loss with the regulariser, a float."""
        batches = self.data.each()
        total = sum(float(tf.tensordot(w, self._batch_losses(x, y), 1)) for x, y, w in batches)
        return total / self.n + self.regulariser()

    def gradient(self):
        """Return the gradient of L at theta, regulariser included, (p,) float64."""
        if head := self.checked_head():
            return head.gradient(self.theta)
        total = summed_loss_and_gradient(self).numpy().astype(np.float64)[1:]
        return total / self.n + self.decay * self.theta


@compiled
def summed_loss_and_gradient(objective):
    """Return the sum of w_i loss_i over the training data, and its gradient, in one (1 + p,)."""
    one_batch = partial(loss_and_gradient.graph, objective)
    return objective.data.accumulate(one_batch, tf.zeros(1 + objective.p, objective.dtype))


@compiled
def loss_and_gradient(objective, x, y, weight):
    """Return the sum of w_i loss_i over a batch, and its gradient, in one vector (1 + p,)."""
    with tf.GradientTape() as tape:
        loss = tf.tensordot(weight, objective.loss(x, y), 1)
    gradient = objective.flatten(tape.gradient(loss, objective.tensors))
    return tf.concat([loss[None], gradient], 0)
