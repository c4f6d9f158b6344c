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

from helpers.head import Head

if keras.backend.backend() != "tensorflow":
    raise RuntimeError(
        f"helpers needs Keras on TensorFlow, but KERAS_BACKEND is '{keras.backend.backend()}': "
        "set KERAS_BACKEND=tensorflow and restart the kernel."
    )


class Objective:
    """A Keras model bound to a per-example loss, its training data and its weight decay.

    Parameters
    ----------
    model : keras.Model
        Sequential, functional or subclassed, called with `training=False`: dropout is off,
        batch normalisation uses its moving statistics.
    loss : keras.losses.Loss, name, or callable (y_true, y_pred) -> (b,); optional
        One value an example, in nats for cross-entropies. None takes the compiled loss.
    x, y : arrays (n, ...), lists or dicts of arrays, read in batches where they lie on disk (a
        np.memmap, Zarr or HDF5); or x = tf.data.Dataset of (x, y[, weight]) batches and y = None.
    weight_decay : float, optional
        wd of (wd/2)||theta_decayed||^2. None takes the model's own L2 regularisers
        (Keras' `l2(c)` is wd = 2c); giving both is refused, since they would count twice.
    decayed : "kernels", "all", or a list of variables
        What `weight_decay` applies to; "kernels" are the variables of rank two or more.
    parameters : None (all trainable), "last_layer", or a list of layer names or variables
    sample_weight : (n,), optional
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
        self.model, self.strategy = model, strategy
        self.compiled = {}  # one tf.function a kind of product, freed with the objective
        self.memory_budget = memory_budget
        if not isinstance(x, tf.data.Dataset):
            x = _as_arrays(x)
            model(_first(x, 2), training=False)  # builds a model that has not been called yet
        else:
            model(next(iter(x))[0], training=False)
        _ = self._logits  # built here, since it can not be inside a graph
        self.variables = _select(model, parameters)
        self.dtype = _dtype(model, self.variables)
        self._loss = loss if loss is not None else getattr(model, "loss", None)
        self.decay = _decay(model, self.variables, weight_decay, decayed)
        self._bind_data(x, y, sample_weight, batch_size)
        self._check_loss()

    # ---------------------------------------------------------------- data

    def _bind_data(self, x, y, sample_weight, batch_size):
        if isinstance(x, tf.data.Dataset):
            if self.strategy is not None:
                raise ValueError("Under a strategy pass arrays, memory-mapped or not: no Dataset.")
            if y is not None or sample_weight is not None:
                raise ValueError(
                    "With a tf.data.Dataset pass y and weights inside it, as "
                    "(x, y) or (x, y, weight) batches."
                )
            self._dataset, self.bytes_an_example, self._data = x.map(self._complete), 0, None
            read = [(len(weight), *_ends(y)) for _, y, weight in self._dataset if len(weight)]
            sizes, low, high = zip(*read, strict=True) if read else ((0,), (0,), (0,))
            self.n, self.batch_size, self._labels = sum(sizes), max(sizes), (min(low), max(high))
        else:
            self.n = len(y)
            wrong = {len(a) for a in keras.tree.flatten(x)} - {self.n}
            if wrong:
                raise ValueError(f"x and y differ in length: {wrong.pop()} and {self.n}.")
            self.bytes_an_example = self._bytes_an_example(x)
            affordable = self.affordable_batch(self.bytes_an_example)
            self.batch_size = min(self.n, batch_size or affordable)
            weight = np.ones(self.n) if sample_weight is None else sample_weight
            _check_numbers(x, y, weight)
            self._labels = _ends(y) if self.n else (0, 0)
            if any(_is_on_disk(a) for a in keras.tree.flatten(x)):
                self._dataset = _stream(x, y, weight, self.batch_size).map(self._complete)
                self._data = None
            else:
                self._dataset, self._data = None, self._complete(x, y, weight)
            if self.strategy is not None:
                self.shares = self._shared_out(x, y, weight)
        if self.n == 0:
            raise ValueError("The training data hold no example.")

    def _shared_out(self, x, y, weight):
        """Return (x, y, weight) as distributed values: consecutive rows, a share a replica."""
        k, devices = self.strategy.num_replicas_in_sync, self.strategy.extended.worker_devices
        if self.n < k:
            raise ValueError(f"{self.n} examples cannot be shared out among {k} replicas.")

        def share(context):
            j = context.replica_id_in_sync_group
            rows = slice(self.n * j // k, self.n * (j + 1) // k)
            with tf.device(devices[j % len(devices)]):
                part = keras.tree.map_structure(lambda a: np.asarray(a[rows]), (x, y, weight))
                return self._complete(*part)

        return self.strategy.experimental_distribute_values_from_function(share)

    def _complete(self, x, y, weight=None):
        weight = tf.ones(tf.shape(y)[0]) if weight is None else weight
        return self.cast(x), tf.convert_to_tensor(y), tf.cast(weight, self.dtype)

    def cast(self, x):
        """Return x as tensors: floating ones in the model's dtype, integers as they are."""

        def one(a):
            a = tf.convert_to_tensor(a)
            return tf.cast(a, self.dtype) if a.dtype.is_floating else a

        return keras.tree.map_structure(one, x)

    def batches(self, batch_size=None):
        """Yield (x, y, weight) tensors that cover the training data once, in order."""
        for x, y, weight in [self._data] if self._dataset is None else self._dataset:
            yield from self.batches_of(x, y, weight, batch_size=batch_size)

    def batches_of(self, x, y, weight=None, batch_size=None):
        """Yield (x, y, weight) tensors of at most `batch_size` examples; the last is smaller."""
        step = batch_size or self.batch_size
        for start in range(0, len(y), step):
            rows = slice(start, start + step)
            w = None if weight is None else weight[rows]
            yield self._complete(keras.tree.map_structure(lambda a, r=rows: a[r], x), y[rows], w)

    def accumulate(self, function, zeros, copies=1, extra=()):
        """Return zeros + the sum of function(x, y, weight, *extra) over all batches.

        To be called inside a `tf.function`: the loop over batches is part of the graph, and
        nothing leaves the device. A function that holds several `copies` of a batch's activations
        gets smaller batches, so that they fit the memory budget together. `extra` tensors have one
        row an example; they need the training data in memory.
        """
        if self.strategy is not None:
            if extra:
                raise ValueError("Under a strategy no other tensors go along with the examples.")
            run = partial(self._sum, function, zeros, copies)
            return self.strategy.reduce("SUM", self.strategy.run(run, args=self.shares), axis=None)
        if self._dataset is not None and not extra:
            total = zeros
            for x, y, weight in self._dataset:
                total += function(x, y, weight)
            return total
        return self._sum(function, zeros, copies, *self._in_memory(), *extra)

    def _sum(self, function, zeros, copies, *data):
        """Return zeros + the sum of function(*batch) over batches of tensors in memory."""
        total, n, step = zeros, data[1].shape[0], self.rows_for(copies)
        if n <= step:
            total += function(*data)
        else:
            for start in tf.range(0, n, step):
                rows = slice(start, start + step)
                total += function(*keras.tree.map_structure(lambda a, r=rows: a[r], data))
        return total

    def gather(self, rows):
        """Return (x, y, weight) of the training examples with these indices."""
        return keras.tree.map_structure(lambda a: tf.gather(a, rows), self._in_memory())

    def _in_memory(self):
        if self._dataset is not None:
            raise ValueError(
                "Single examples can be picked from arrays only: pass the training data as arrays "
                "in memory, not as a tf.data.Dataset or memory-mapped."
            )
        return self._data

    def subset(self, rows):
        """Return the same objective over these training examples only."""
        part = copy.copy(self)
        part._data, part.n = self.gather(rows), len(rows)
        part.batch_size = min(self.batch_size, part.n)
        part.compiled = {}
        if self.strategy is not None:
            part.shares = part._shared_out(*part._data)
        for cached in ("head", "_compiled_losses"):
            part.__dict__.pop(cached, None)
        return part

    def affordable_batch(self, bytes_an_example):
        """Return how many examples fit the memory budget, at least 1."""
        return max(1, int(self.memory_budget // max(1, bytes_an_example)))

    def rows_for(self, copies):
        """Return how many examples a pass may hold that keeps `copies` of their activations."""
        return min(self.batch_size, self.affordable_batch(copies * self.bytes_an_example))

    def _bytes_an_example(self, x):
        """About eight copies of every activation live during a Hessian-vector product."""
        inputs = sum(np.prod(a.shape[1:]) for a in keras.tree.flatten(x))
        layers = 0
        for layer in self.model._flatten_layers(include_self=False):
            try:
                shapes = [t.shape[1:] for t in keras.tree.flatten(layer.output)]
                layers += sum(np.prod([s or 1 for s in shape]) for shape in shapes)
            except AttributeError:  # a layer of a subclassed model knows no output shape
                layers += 32 * inputs
        return 8 * tf.as_dtype(self.dtype).size * (inputs + layers)

    # ---------------------------------------------------------------- parameters

    @property
    def tensors(self):
        """The selected parameters as TensorFlow variables, in the order of theta."""
        return [v.value for v in self.variables]

    @cached_property
    def sizes(self):
        return [int(np.prod(v.shape)) for v in self.variables]

    @property
    def p(self):
        """Number of selected parameters."""
        return sum(self.sizes)

    @property
    def theta(self):
        """The selected parameters as one float64 vector (p,)."""
        return np.concatenate([np.asarray(v).ravel() for v in self.tensors]).astype(np.float64)

    @theta.setter
    def theta(self, vector):
        self._assign(tf.constant(np.asarray(vector), self.dtype))

    @cached_property
    def _assign(self):
        def assign(vector):
            for variable, part in zip(self.variables, self.unflatten(vector), strict=True):
                variable.assign(part)

        return tf.function(assign)  # ten times as fast as one by one, and descents do it often

    @cached_property
    def head(self):
        """The closed forms of a last Dense layer (`helpers.head`), or None for other parameters.

        The layers below are taken as they are at the first use. Data on disk whose features would
        exceed the memory budget are read block by block (`head.StreamedHead`).
        """
        return Head.of(self)

    @property
    def in_memory(self):
        """Whether the training data are tensors in memory, and not read from disk."""
        return self._dataset is None

    def flatten(self, tensors):
        """Return a list shaped like the variables as one vector (p,); None counts as zero."""
        parts = [
            tf.zeros(size, self.dtype) if t is None else tf.reshape(tf.convert_to_tensor(t), [-1])
            for t, size in zip(tensors, self.sizes, strict=True)
        ]
        return tf.concat(parts, 0)

    def unflatten(self, vector):
        """Return one vector (p,) as a list of tensors shaped like the variables."""
        parts = tf.split(tf.convert_to_tensor(vector), self.sizes)
        return [tf.reshape(t, v.shape) for t, v in zip(parts, self.variables, strict=True)]

    # ---------------------------------------------------------------- losses

    def example_losses(self, x, y):
        """Return loss(z_i, theta) of a batch, (b,), in nats for cross-entropies; no regulariser."""
        return self.loss_of_outputs(y, self.outputs(x))

    def outputs(self, x):
        """Return what the loss is convex in, (b, ...): logits, below a last softmax or sigmoid."""
        with exact_moments():
            if self._logits is None:
                return self.model(x, training=False)
            body, dense = self._logits
            logits = keras.ops.matmul(body(x, training=False), dense.kernel)
            return logits + dense.bias if dense.use_bias else logits

    def loss_of_outputs(self, y, outputs):
        """Return the loss of each example, (b,), from what `outputs` returned."""
        return self.loss_of_predictions(
            y, outputs if self._logits is None else self._logits[1].activation(outputs)
        )

    @cached_property
    def _logits(self):
        """The network below a last Dense layer with softmax or sigmoid, and that layer, or None."""
        dense = self.model.layers[-1] if self.model.layers else None
        last = isinstance(dense, keras.layers.Dense) and dense.activation in (
            keras.activations.softmax,
            keras.activations.sigmoid,
        )
        if not last or getattr(self.model, "outputs", [None])[0] is not dense.output:
            return None
        return keras.Model(self.model.inputs, dense.input), dense

    def loss_in(self, dtype):
        """Return the loss as a callable (y, predictions) -> one value an example, in `dtype`."""
        return _per_example(self._loss, dtype)

    def loss_of_predictions(self, y, predictions):
        """Return the loss of each prediction, (b,): extra axes (pixels, time) are averaged."""
        values = self.loss_in(self.dtype)(y, predictions)
        if values.shape.rank > 1:
            values = tf.reduce_mean(values, axis=list(range(1, values.shape.rank)))
        return values

    def losses(self, x, y):
        """Return the loss of each given example, (m,) float64."""
        x = _as_arrays(x)
        parts = [self._compiled_losses(xb, yb) for xb, yb, _ in self.batches_of(x, np.asarray(y))]
        return np.concatenate([part.numpy() for part in parts]).astype(np.float64)

    @cached_property
    def _compiled_losses(self):
        return tf.function(self.example_losses, reduce_retracing=True)

    def regulariser(self):
        """Return (1/2) theta . (decay * theta), a float."""
        return 0.5 * float(self.decay @ self.theta**2)

    def training_loss(self):
        """Return L(theta), the mean weighted training loss with the regulariser, a float."""
        total = sum(
            float(tf.tensordot(w, self._compiled_losses(x, y), 1)) for x, y, w in self.batches()
        )
        return total / self.n + self.regulariser()

    def _check_loss(self):
        x, y, _ = next(iter(self.batches(batch_size=3)))
        predictions = self.model(x, training=False)
        if len(keras.tree.flatten(predictions)) > 1:
            raise ValueError(
                "The model has several outputs. Bind one: "
                "keras.Model(model.inputs, model.outputs[0])."
            )
        self._check_labels(int(predictions.shape[-1] or 1))
        values = self.loss_in(self.dtype)(y, predictions)
        b = int(predictions.shape[0])
        if values.shape.rank == 0 or int(values.shape[0]) != b:
            raise ValueError(
                f"The loss must return one value an example, shape ({b}, ...); it "
                f"returned shape {tuple(values.shape)}. Do not average over examples."
            )
        if y.shape.rank == 1 and predictions.shape.rank == 2 and values.shape == (b, b) and b > 1:
            raise ValueError(
                f"y has shape (n,) and the predictions (n, {predictions.shape[1]}): "
                "the loss broadcast one against the other. Give y the shape (n, 1)."
            )

    def _check_labels(self, classes):
        """Refuse labels for which a cross-entropy is defined as a formula and not as a loss."""
        loss, (least, most) = self.loss_in(self.dtype), self._labels
        whole = isinstance(loss, keras.losses.SparseCategoricalCrossentropy)
        if whole and loss.ignore_class is not None:
            return
        high = classes - 1 if whole else 1
        known = whole or isinstance(loss, keras.losses.BinaryCrossentropy)
        if known and not (least >= 0 and most <= high):
            raise ValueError(
                f"Labels go from {least:g} to {most:g}, but {loss.name} needs "
                f"{'class numbers' if whole else 'probabilities'} from 0 to {high}."
            )


def _ends(y):
    """Return the smallest and the largest of the labels."""
    return float(np.min(y)), float(np.max(y))


@contextmanager
def exact_moments():
    """Let TensorFlow differentiate normalisation layers twice.

    `tf.nn.moments` stops the gradient of the mean inside the variance. That changes no first
    derivative, because deviations from the mean sum to zero, but every second one: Hessians of
    models with LayerNormalization or GroupNormalization come out wrong by several per cent.
    """

    def moments(x, axes, shift=None, keepdims=False, name=None):
        mean = tf.reduce_mean(x, axes, keepdims=True)
        variance = tf.reduce_mean(tf.square(x - mean), axes, keepdims=keepdims)
        return (mean if keepdims else tf.squeeze(mean, axes)), variance

    original, tf.nn.moments = tf.nn.moments, moments
    try:
        yield
    finally:
        tf.nn.moments = original


# -------------------------------------------------------------------- what a model brings along


def _is_on_disk(array):
    """Return whether an array is read in parts: a memory map, or chunks as in Zarr and HDF5."""
    return isinstance(array, np.memmap) or hasattr(array, "chunks")


def _stream(x, y, weight, batch_size):
    """Return a data set that reads arrays on disk batch by batch."""
    flat = [*keras.tree.flatten(x), np.asarray(y), np.asarray(weight)]

    def read(start):
        parts = tf.numpy_function(
            lambda s: [np.asarray(a[s : s + batch_size]) for a in flat],
            [start],
            [tf.as_dtype(a.dtype) for a in flat],
        )
        for part, a in zip(parts, flat, strict=True):
            part.set_shape((None, *a.shape[1:]))
        return keras.tree.pack_sequence_as(x, parts[:-2]), parts[-2], parts[-1]

    return tf.data.Dataset.range(0, len(y), batch_size).map(read)


def _check_numbers(x, y, weight):
    """Refuse labels that are text, and examples in memory that hold NaN or infinity."""
    if np.asarray(y[:1]).dtype.kind in "OSU":
        raise ValueError(
            "The labels are text: number them, as np.unique(y, return_inverse=True)[1]."
        )
    for values in (*keras.tree.flatten(x), y, weight):
        if _is_on_disk(values):
            continue
        values = np.asarray(values)
        bad = ~np.isfinite(values.reshape(len(values), -1)).all(1)
        if bad.any():
            raise ValueError(
                f"{bad.sum()} training examples hold NaN or infinity, the first is number "
                f"{bad.argmax()}: repair them or leave them out."
            )


def _as_arrays(x):
    return keras.tree.map_structure(lambda a: a if hasattr(a, "shape") else np.asarray(a), x)


def _first(x, k):
    return keras.tree.map_structure(lambda a: tf.convert_to_tensor(a[:k]), x)


def _select(model, parameters):
    if parameters is None:
        chosen = list(model.trainable_variables)
    elif parameters == "last_layer":
        layers = [la for la in model._flatten_layers(include_self=False) if la._trainable_variables]
        chosen = layers[-1].trainable_variables if layers else []
    elif isinstance(parameters, str):
        raise ValueError(
            f"parameters='{parameters}' is not known: use None, 'last_layer', or a "
            "list of layer names or variables."
        )
    else:
        named = {la.name: la for la in model._flatten_layers(include_self=False)}
        unknown = [q for q in parameters if isinstance(q, str) and q not in named]
        if unknown:
            raise ValueError(f"No layer is called {unknown}; the model has {sorted(named)}.")
        chosen = [
            v
            for q in parameters
            for v in (named[q].trainable_variables if isinstance(q, str) else [q])
        ]
    unique = list({id(v): v for v in chosen}.values())  # a shared layer is listed once
    if not unique:
        raise ValueError("No trainable parameter is selected: are all layers frozen?")
    return unique


def _dtype(model, variables):
    mixed = [la.name for la in model._flatten_layers() if la.variable_dtype != la.compute_dtype]
    if mixed:
        raise ValueError(
            f"Layers {mixed[:3]} compute in {model.compute_dtype} but store {model.variable_dtype}:"
            " second derivatives in mixed precision are too coarse. Load the model under "
            "keras.config.set_dtype_policy('float32') (or 'float64')."
        )
    dtypes = {v.dtype for v in variables}
    if len(dtypes) > 1 or not dtypes <= {"float32", "float64"}:
        raise ValueError(f"The parameters must all be float32 or all float64, not {dtypes}.")
    return dtypes.pop()


def _per_example(loss, dtype):
    """Return a callable (y, predictions) -> one value an example, computed in `dtype`."""
    if loss is None:
        raise ValueError(
            "Name a loss: Objective(model, keras.losses.…(), x, y), or compile the model with one."
        )
    if isinstance(loss, str):
        name = "".join(word.capitalize() for word in loss.split("_"))
        loss = getattr(keras.losses, name, None) or keras.losses.get(loss)
        loss = loss() if isinstance(loss, type) else loss
    if isinstance(loss, (list, tuple, dict)):
        raise ValueError("Several losses are not supported: bind one output and one loss.")
    if isinstance(loss, keras.losses.Loss):
        loss = copy.copy(loss)
        loss.reduction = None
        loss._dtype = dtype  # Keras would cast float64 predictions down to floatx
    return loss


def _decay(model, variables, weight_decay, decayed):
    """Return the weight decay of each parameter, (p,) float64."""
    own = {id(v): _l2(v) for v in variables}
    activity = [la.name for la in model._flatten_layers() if la.activity_regularizer is not None]
    if activity:
        raise ValueError(
            f"Layers {activity} carry an activity regulariser, which is no function "
            "of one example's loss: remove it or put it into the loss."
        )
    tied = sum(v.regularizer is not None for v in model.trainable_variables)
    if len(model.losses) > tied:
        raise ValueError(
            "The model adds losses of its own (add_loss): move them into the "
            "per-example loss, so that each example carries its share."
        )
    if weight_decay is None:
        if getattr(getattr(model, "optimizer", None), "weight_decay", None):
            raise ValueError(
                "The model was compiled with decoupled weight decay (AdamW), which "
                "minimises no fixed objective: pass weight_decay= yourself."
            )
        per_variable = [own[id(v)] for v in variables]
    else:
        if any(own.values()) and weight_decay:
            raise ValueError(
                "The model already decays its weights (kernel_regularizer) and "
                "weight_decay was given too: pass weight_decay=None to use the "
                "model's own (Keras' l2(c) is a weight decay of 2c)."
            )
        if weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {weight_decay}.")
        per_variable = [weight_decay * _is_decayed(v, decayed) + own[id(v)] for v in variables]
    return np.concatenate(
        [
            np.full(int(np.prod(v.shape)), wd, np.float64)
            for v, wd in zip(variables, per_variable, strict=True)
        ]
    )


def _is_decayed(variable, decayed):
    if isinstance(decayed, str) and decayed in ("kernels", "all"):
        return decayed == "all" or len(variable.shape) >= 2
    if isinstance(decayed, str):
        raise ValueError(f"decayed='{decayed}' is not known: 'kernels', 'all' or variables.")
    return any(variable is v for v in decayed)


def _l2(variable):
    regularizer = variable.regularizer
    if regularizer is None:
        return 0.0
    if type(regularizer) is keras.regularizers.L2:
        return 2.0 * float(regularizer.l2)
    if type(regularizer) is keras.regularizers.L1L2 and not float(regularizer.l1):
        return 2.0 * float(regularizer.l2)
    raise ValueError(
        f"{variable.path} has a {type(regularizer).__name__} regulariser; only L2 has "
        "a Hessian that influence functions can use."
    )
