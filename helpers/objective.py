"""The empirical risk of a Keras model: what every Hessian, solve and influence is taken of.

    L(theta) = (1/n) sum_i w_i loss(z_i, theta) + (1/2) theta . (decay * theta)

theta are the selected parameters as one vector, `decay` is the weight decay on the decayed ones and
zero on the others (`wd * theta` below always means `decay * theta`), w_i are sample weights (1).
"""

import copy
from functools import cached_property, partial

import keras
import numpy as np
import tensorflow as tf

from helpers import checks, keras_facts
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
        batch normalisation uses its moving statistics. Layers of a float64 model that resize
        pictures in float32, as Keras's do, resize in float64 from then on.
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
    decayed : "kernels", "all", or a list of variables or their names
        What `weight_decay` applies to; "kernels" are the variables of rank two or more that are no
        bias, scale or offset.
    parameters : None (all trainable), "last_layer", or a list of layer names or variables
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
        self.model, self.strategy = model, strategy
        self.compiled = {}  # one tf.function a kind of product, freed with the objective
        self.memory_budget = memory_budget
        if isinstance(x, tf.data.Dataset):
            checks.once(x)
            first, labels = next(iter(x))[:2]
        else:
            x, y = _as_arrays(x), _one_array(y)
            checks.lengths(x, y)
            if not len(y):
                raise ValueError("The training data hold no example.")
            first, labels = _first(x, 3), y[:3]
        keras_facts.resize_in_float64(model)
        checks.inputs(model, first)
        self._input_shapes = [tuple(a.shape) for a in keras.tree.flatten(first)]
        predictions = self._predict(first)  # builds a model that has not been called yet
        self.variables = _select(model, parameters, first)
        self.dtype = _dtype(model, self.variables)
        self._bind_loss(loss, labels, predictions)
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
            self._read_dataset(x)
        else:
            self.n = len(y)
            self.bytes_an_example = self._bytes_an_example(x)
            affordable = self.affordable_batch(self.bytes_an_example)
            self.batch_size = min(self.n, batch_size or affordable)
            weight = checks.weights(sample_weight, self.n)
            checks.labels(self._loss, y, self._predicted)
            for values in (*keras.tree.flatten(x), y):
                if not _is_on_disk(values):
                    checks.finite(values, "training examples")
            if any(_is_on_disk(a) for a in keras.tree.flatten(x)):
                self._dataset = _stream(x, y, weight, self.batch_size).map(self._complete)
                self._data = None
            else:
                self._dataset, self._data = None, self._complete(x, y, weight)
            if self.strategy is not None:
                self.shares = self._shared_out(x, y, weight)

    def _read_dataset(self, dataset):
        """Count a Dataset's examples, check its batches, and that a second pass gives the same."""
        sizes, first, total = [], 0, 0.0
        for x, y, *weight in dataset:
            checks.lengths(x, y)
            for values in (*keras.tree.flatten(x), y):
                checks.finite(values, f"examples of batch {len(sizes)}")
            checks.labels(self._loss, y, self._predicted)
            total += checks.weights(weight[0] if weight else None, len(y), some=False).sum()
            first = checks.checksum((x, y, *weight), first)
            sizes.append(len(y))
        if not sum(sizes):
            raise ValueError("The training data hold no example.")
        if not total:
            raise ValueError("All sample weights are zero: no example counts.")
        second = 0
        for batch in dataset:
            second = checks.checksum(batch, second)
        if first != second:
            raise ValueError(
                "Two passes over the Dataset differ, so its examples have no number: leave out "
                "shuffle(), random augmentation and what else changes from pass to pass."
            )
        self.n, self.batch_size = sum(sizes), max(sizes)

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
        y = tf.convert_to_tensor(_one_array(y))
        weight = tf.ones(tf.shape(y)[0]) if weight is None else tf.reshape(weight, [-1])
        return self.cast(x), y, tf.cast(weight, self.dtype)

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
        """Return (x, y, weight) of the training examples with these numbers (`checks.rows`)."""
        if not tf.is_tensor(rows):
            rows = checks.rows(rows, self.n)
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
        part, rows = copy.copy(self), checks.rows(rows, self.n)
        if not len(rows):
            raise ValueError("A subset of no training point is no objective.")
        part._data, part.n = self.gather(rows), len(rows)
        part.batch_size = min(self.batch_size, part.n)
        part.compiled = {}
        if self.strategy is not None:
            part.shares = part._shared_out(*part._data)
        for cached in ("head", "_compiled_losses"):
            part.__dict__.pop(cached, None)
        part._count_steps()
        return part

    def examples(self, x, y):
        """Return (x, y) of examples to ask about as arrays, held against the training data."""
        x, y = keras.tree.map_structure(np.asarray, _as_arrays(x)), np.asarray(_one_array(y))
        checks.lengths(x, y)
        if not len(y):
            raise ValueError("There is no test example.")
        checks.inputs(self.model, x, self._input_shapes)
        checks.labels(self._loss, y, self._predicted)
        for values in (*keras.tree.flatten(x), y):
            checks.finite(values, "examples")
        return x, y

    def in_float64(self):
        """Return this objective on a float64 copy of its model; None where none can be made."""
        first, _, _ = next(iter(self.batches(batch_size=2)))
        model = keras_facts.in_float64(self.model, first)
        if model is None:
            return None
        part, place = copy.copy(self), {id(v): k for k, v in enumerate(self.model.weights)}
        part.model, part.dtype, part.compiled = model, "float64", {}
        part.variables = [model.weights[place[id(v)]] for v in self.variables]
        for cached in ("head", "_compiled_losses", "_compiled_outputs", "_assign"):
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

    def move(self, parts):
        """Give the selected parameters the values of a list of arrays shaped like them."""
        for variable, part in zip(self.variables, parts, strict=True):
            variable.assign(part)

    @cached_property
    def _assign(self):
        def assign(vector):
            self.move(self.unflatten(vector))

        return tf.function(assign)  # ten times as fast as one by one, and descents do it often

    @cached_property
    def head(self):
        """The closed forms of a last Dense layer (`helpers.head`), or None for other parameters.

        The layers below are taken as they are at the first use. Data on disk whose features would
        exceed the memory budget are read block by block (`head.StreamedHead`).
        """
        head = Head.of(self)
        if "derivatives" not in self.__dict__:  # whatever is computed asks for the head first
            self.derivatives = checks.probe(self, head)
        return None if self.derivatives.by_differences else head

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
        return tf.concat([tf.cast(part, self.dtype) for part in parts], 0)

    def unflatten(self, vector):
        """Return one vector (p,) as a list of tensors shaped like the variables."""
        parts = tf.split(tf.convert_to_tensor(vector), self.sizes)
        pairs = zip(parts, self.variables, strict=True)
        return [tf.cast(tf.reshape(t, v.shape), v.dtype) for t, v in pairs]

    # ---------------------------------------------------------------- losses

    def example_losses(self, x, y):
        """Return loss(z_i, theta) of a batch, (b,), in nats for cross-entropies; no regulariser."""
        return self.loss_of_outputs(y, self.outputs(x))

    def _predict(self, x):
        """Return the predictions of a batch, (b, ...), with what Keras hangs on them."""
        with keras_facts.exact_derivatives():
            predictions = keras.tree.flatten(self.model(x, training=False))
        if len(predictions) > 1:
            raise ValueError(
                "The model has several outputs. Bind one: "
                "keras.Model(model.inputs, model.outputs[0])."
            )
        return predictions[0]

    def outputs(self, x):
        """Return what the loss is convex in, (b, ...): logits, below a last softmax or sigmoid.

        The predictions themselves, where the loss is no function convex in the logits: for a
        squared error of probabilities, say.
        """
        predictions = self._predict(x)
        logits = predictions if self.activation is None else keras_facts.logits_of(predictions)
        if logits is None:  # not hung on the tensor, but every graph shows them
            return keras_facts.with_mask(*self._compiled_outputs(x))
        return keras_facts.with_mask(tf.identity(logits), keras_facts.mask_of(predictions))

    @cached_property
    def _compiled_outputs(self):
        def both(x):
            outputs = self.outputs(x)
            return outputs, keras_facts.mask_of(outputs)

        return tf.function(both, reduce_retracing=True)

    def loss_of_outputs(self, y, outputs):
        """Return the loss of each example, (b,), from what `outputs` returned."""
        if self.activation is None:
            return self.loss_of_predictions(y, outputs)
        mask = keras_facts.mask_of(outputs)
        return self.loss_of_predictions(y, keras_facts.with_mask(self.activation(outputs), mask))

    @property
    def loss_name(self):
        """What the loss is called."""
        return self._loss.name

    def _bind_loss(self, loss, y, predictions):
        weight = keras_facts.loss_weight(self.model) if loss is None else 1.0
        given = loss if loss is not None else getattr(self.model, "loss", None)
        self._loss = keras_facts.as_loss(given, y, predictions)
        self._loss_weight, self._steps = weight, None
        if self._loss.reduction in ("sum", "mean_with_sample_weight"):
            raise ValueError(
                f"The loss has reduction='{self._loss.reduction}', which weighs examples against "
                "the weight decay by the batch they are in. Use reduction='sum_over_batch_size', "
                "and put factors into sample_weight or weight_decay."
            )
        declared = getattr(self.model, "outputs", None) or [None]
        middle = getattr(declared[0], "shape", [None] * len(predictions.shape))[1:-1]
        self._predicted = (
            predictions.shape if not middle else ((None, *middle, predictions.shape[-1]))
        )

    def loss_in(self, dtype):
        """Return the loss as a callable (y, predictions) -> values (b, ...) in `dtype`.

        A loss that computes in a type of its own whatever it is given, gets that and is cast.
        """
        inner = self._loss_dtypes[dtype]

        def values(y, predictions):
            return tf.cast(self._entries(y, predictions, inner), dtype)

        return values

    def _entries(self, y, predictions, dtype):
        """Return the weighed loss of each entry, zero where Keras masks it."""
        values = keras_facts.unreduced(self._loss, y, predictions, dtype)
        mask = keras_facts.mask_of(values)
        values *= self._loss_weight
        if mask is None or self._steps is None:
            return values
        entries = tf.size(values[:1], tf.int32) / 1
        share = tf.cast(entries, dtype) / tf.cast(self._steps, dtype)
        return tf.where(mask, values, 0) * share

    def loss_of_predictions(self, y, predictions):
        """Return the loss of each prediction, (b,): extra axes (pixels, time) are averaged."""
        values = self.loss_in(self.dtype)(y, predictions)
        if values.shape.rank > 1:
            values = tf.reduce_mean(values, axis=list(range(1, values.shape.rank)))
        return values

    def losses(self, x, y):
        """Return the loss of each given example, (m,) float64."""
        batches = self.batches_of(*self.examples(x, y))
        parts = [self._compiled_losses(xb, yb) for xb, yb, _ in batches]
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
        """Hold the bound loss against Keras's own evaluation of a few examples."""
        x, y, _ = next(iter(self.batches(batch_size=3)))
        predictions = self._predict(x)
        if not np.array_equal(predictions, self._predict(x), equal_nan=True):
            raise ValueError(
                "The model gives other predictions when it is called again with training=False: "
                "a layer draws random numbers. Make it depend on `training`."
            )
        self._loss_dtypes = {}
        for dtype in dict.fromkeys(("float64", self.dtype)):
            try:
                values = keras_facts.unreduced(self._loss, y, predictions, dtype)
                self._loss_dtypes[dtype] = dtype
            except (TypeError, tf.errors.InvalidArgumentError):
                self._loss_dtypes[dtype] = dtype = self._loss.dtype
                values = keras_facts.unreduced(self._loss, y, predictions, dtype)
        b = int(predictions.shape[0])
        if values.shape.rank == 0 or int(values.shape[0]) != b:
            raise ValueError(
                f"The loss must return one value an example, shape ({b}, ...); it "
                f"returned shape {tuple(values.shape)}. Do not average over examples."
            )
        for k in (b, 1):  # one example alone must have the loss it has among others
            mine, theirs = keras_facts.both_means(self._loss, y, predictions, values, k, dtype)
            if not np.isclose(mine, theirs, rtol=1e-3, atol=1e-5, equal_nan=True):
                raise ValueError(
                    f"Keras evaluates the loss of {k} examples to {theirs:.6g}, but the mean of "
                    f"one value an example is {mine:.6g}: the loss couples the examples of a batch "
                    "or averages in a way of its own, and then no example has an influence."
                )
        self.activation = self.last_activation = keras_facts.last_activation(self._predict, x)
        if self.activation is not None and not self._is_convex(x, y):
            self.activation = None
        self._count_steps()

    def _is_convex(self, x, y):
        """Return whether the loss is convex in the logits: of some losses known, else measured."""
        if keras_facts.function_of(self._loss) in keras_facts.OF_LOGITS:
            return True
        logits = self.outputs(x)
        rng, shape = np.random.default_rng(0), logits.shape
        for spread in (0.0, 1.0, 3.0):
            at = logits + tf.constant(spread * rng.normal(size=shape), logits.dtype)
            v = tf.constant(rng.normal(size=shape), logits.dtype)
            with tf.GradientTape() as outer:
                outer.watch(at)
                with tf.GradientTape() as inner:
                    inner.watch(at)
                    loss = tf.reduce_sum(self.loss_of_outputs(y, at))
                slope = inner.gradient(loss, at)
            bent = None if slope is None else outer.gradient(slope, at, output_gradients=v)
            if bent is None:
                return False
            quadratic = tf.reduce_sum(tf.reshape(bent * v, (shape[0], -1)), 1)
            if np.min(quadratic) < -1e-6 * np.max(np.abs(quadratic)):
                return False
        return True

    def _count_steps(self):
        """Count what Keras does not mask, in the mean over the training examples."""
        x, y, _ = next(iter(self.batches(batch_size=1)))
        self._steps = None
        if self._mask(x, y) is None:
            return
        count = tf.function(lambda x, y: tf.math.count_nonzero(self._mask(x, y)))
        total = sum(int(count(x, y)) for x, y, _ in self.batches())
        if not total:
            raise ValueError("Every step of the training data is masked: nothing counts.")
        self._steps = total / self.n

    def _mask(self, x, y):
        values = keras_facts.unreduced(
            self._loss, y, self._predict(x), self._loss_dtypes[self.dtype]
        )
        return keras_facts.mask_of(values)


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


def _as_arrays(x):
    return keras.tree.map_structure(lambda a: a if hasattr(a, "shape") else np.asarray(a), x)


def _one_array(y):
    """Return the labels of the one output, which may come as a dict of one."""
    y = keras.tree.flatten(y)[0] if isinstance(y, dict) and len(y) == 1 else y
    return y if hasattr(y, "shape") else np.asarray(y)


def _first(x, k):
    return keras.tree.map_structure(lambda a: tf.convert_to_tensor(a[:k]), x)


def _select(model, parameters, x):
    if parameters is None:
        chosen = list(model.trainable_variables)
    elif isinstance(parameters, str) and parameters == "last_layer":
        chosen = keras_facts.last_layer(model, x).trainable_variables
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
    if not dtypes <= {"float32", "float64"}:
        raise ValueError(f"The parameters must be float32 or float64, not {dtypes}.")
    return max(dtypes)  # LoRA's are float32 in a float64 model


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
        weight_decay = checks.number("weight_decay", weight_decay)
        chosen = _decayed(model, variables, decayed)
        per_variable = [weight_decay * (id(v) in chosen) + own[id(v)] for v in variables]
    return np.concatenate(
        [
            np.full(int(np.prod(v.shape)), wd, np.float64)
            for v, wd in zip(variables, per_variable, strict=True)
        ]
    )


def _decayed(model, variables, decayed):
    """Return the ids of the variables that `weight_decay` applies to."""
    if isinstance(decayed, str) and decayed in ("kernels", "all"):
        return {id(v) for v in variables if decayed == "all" or keras_facts.is_kernel(v)}
    if isinstance(decayed, str):
        raise ValueError(f"decayed='{decayed}' is not known: 'kernels', 'all' or variables.")
    found = set()
    for each in decayed:
        names = (each,) if isinstance(each, str) else ()
        those = [
            v for v in variables if v is each or any(f"/{v.path}".endswith(f"/{n}") for n in names)
        ]
        for layer in model._flatten_layers(include_self=False) if names and not those else ():
            if layer.name == each:
                inside = {id(v) for v in layer.trainable_variables}
                those += [v for v in variables if id(v) in inside]
        if not those:
            raise ValueError(
                f"decayed names {getattr(each, 'path', each)}, which is none of the selected "
                f"parameters: {[v.path for v in variables]}."
            )
        found |= {id(v) for v in those}
    return found


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
