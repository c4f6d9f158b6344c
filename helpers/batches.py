"""How training examples arrive, and every pass over them: arrays, files on disk, tf.data, replicas.

An example is (x, y, weight): x a tensor, or lists and dicts of them, as the model takes it.
"""

import copy
from functools import partial
from numbers import Number

import keras
import numpy as np
import tensorflow as tf

from . import checks


class Batches:
    """The n training examples of an objective, read in order as often as it takes.

    Attributes
    ----------
    n : number of examples; batch_size : how many a pass holds at once; in_memory : whether they
    are tensors, from which single examples can be picked.

    x, y, weight : as `Objective` takes them. check : function of labels y that refuses wrong ones.
    bytes_an_example : what the model keeps of one example during a pass.
    """

    def __init__(
        self, x, y, weight, *, dtype, check, bytes_an_example, batch_size, memory_budget, strategy
    ):
        self.dtype, self.memory_budget, self.strategy = dtype, memory_budget, strategy
        self.bytes_an_example = 0 if isinstance(x, tf.data.Dataset) else bytes_an_example
        self._most = int(np.clip(2e8 // max(1, bytes_an_example), 2, 8))  # few of large ones
        self._dataset, self._data = None, None
        if isinstance(x, tf.data.Dataset):
            if strategy is not None:
                raise ValueError("Under a strategy pass arrays, memory-mapped or not: no Dataset.")
            if y is not None or weight is not None:
                raise ValueError(
                    "With a tf.data.Dataset pass y and weights inside it, as "
                    "(x, y) or (x, y, weight) batches."
                )
            self._dataset = x.map(self._complete)
            self._read(x, check)
            return
        self.n = len(y)
        most = self.affordable(bytes_an_example)
        if batch_size is not None:
            most = max(1, int(checks.number("batch_size", batch_size, positive=True)))
        self.batch_size = min(self.n, most)
        check(y)
        weight = checks.weights(weight, self.n, y)
        for values in (*keras.tree.flatten(x), y):
            if strategy is not None and _is_on_disk(values):
                continue  # each process reads its own share alone
            step = self.batch_size if _is_on_disk(values) else self.n
            for start in range(0, self.n, step):
                checks.finite(values[start : start + step], "training examples", start)
        self._few = spread((x, y, weight))
        if any(_is_on_disk(a) for a in keras.tree.flatten(x)):
            self._dataset = _stream(x, y, weight, self.batch_size).map(self._complete)
        else:
            self._data = self._complete(x, y, weight)
        if strategy is not None:
            self._shares = self._shared_out(x, y, weight)

    @property
    def in_memory(self):
        return self._dataset is None

    def _read(self, dataset, check):
        """Count a Dataset's examples, check its batches, and that a second pass gives the same."""
        sizes, first, total, few, stride = [], 0, 0.0, [], 1
        for x, y, *weight in dataset:
            checks.lengths(x, y)
            for values in (*keras.tree.flatten(x), y):
                checks.finite(values, "training examples", sum(sizes))
            check(y)
            total += checks.weights(weight[0] if weight else None, len(y), y, some=False).sum()
            first = checks.checksum((x, y, *weight), first)
            if len(sizes) % stride == 0:
                few.append(spread((x, y, *weight)))
            if len(few) > 16:
                few, stride = few[::2], 2 * stride
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
        self.n, self.batch_size, self._few = sum(sizes), max(sizes), _joined(few)

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
        y = tf.convert_to_tensor(one_array(y))
        weight = tf.ones(tf.shape(y)[0]) if weight is None else tf.reshape(weight, [-1])
        return self.cast(x), y, tf.cast(weight, self.dtype)

    def cast(self, x):
        """Return x as tensors: floating ones in the model's dtype, integers as they are."""

        def one(a):
            a = tf.convert_to_tensor(a)
            return tf.cast(a, self.dtype) if a.dtype.is_floating else a

        return keras.tree.map_structure(one, x)

    def each(self, batch_size=None):
        """Yield (x, y, weight) tensors that cover the training data once, in order."""
        for x, y, weight in [self._data] if self.in_memory else self._dataset:
            yield from self.of(x, y, weight, batch_size=batch_size)

    def first(self, k):
        """Return (x, y, weight) of the first k examples, or of fewer if a batch holds fewer."""
        return next(self.each(k))

    def few(self, least=2):
        """Return (x, y, weight) of `least` to 8 examples, spread over all: data may be sorted."""
        return self._complete(*spread(self._few, max(least, self._most)))

    def of(self, x, y, weight=None, batch_size=None):
        """Yield (x, y, weight) tensors of other examples in batches; the last is smaller."""
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
            return self.strategy.reduce("SUM", self.strategy.run(run, args=self._shares), axis=None)
        if not self.in_memory and not extra:
            every = iter(self._dataset)
            return tf.while_loop(
                lambda batch, total: batch.has_value(),
                lambda batch, total: (
                    every.get_next_as_optional(),
                    total + function(*batch.get_value()),
                ),
                (every.get_next_as_optional(), zeros),
            )[1]
        return self._sum(function, zeros, copies, *self._tensors(), *extra)

    def _sum(self, function, zeros, copies, *data):
        """Return zeros + the sum of function(*batch) over batches of tensors in memory."""
        n, step = data[1].shape[0], self.rows_for(copies)
        if n <= step:
            return zeros + function(*data)

        def add(start, total):
            batch = keras.tree.map_structure(lambda a: a[start : start + step], data)
            return start + step, total + function(*batch)

        return tf.while_loop(lambda start, total: start < n, add, (0, zeros))[1]

    def over_replicas(self, function):
        """Return rows function(*batch) (b, k) of every replica's share, in the examples' order.

        Under a strategy, to be called inside a `tf.function`.
        """

        def of_a_share(*share):
            n, step = share[1].shape[0], self.batch_size
            parts = tf.TensorArray(self.dtype, -(-n // step), element_shape=(None, None))

            def one(i, parts):
                rows = slice(i * step, (i + 1) * step)
                batch = keras.tree.map_structure(lambda a: a[rows], share)
                return i + 1, parts.write(i, function(*batch))

            return tf.while_loop(lambda i, _: i < -(-n // step), one, (0, parts))[1].concat()

        parts = self.strategy.run(of_a_share, args=self._shares)
        return self.strategy.gather(parts, axis=0)

    def gather(self, rows):
        """Return (x, y, weight) of the training examples with these numbers (`checks.rows`)."""
        if not tf.is_tensor(rows):
            rows = checks.rows(rows, self.n)
        return keras.tree.map_structure(lambda a: tf.gather(a, rows), self._tensors())

    def _tensors(self):
        if not self.in_memory:
            raise ValueError(
                "Single examples can be picked from arrays only: pass the training data as arrays "
                "in memory, not as a tf.data.Dataset or memory-mapped."
            )
        if self._data[2].dtype != self.dtype:  # of an objective's copy in float64
            with tf.init_scope():
                self._data = self._complete(*self._data)
        return self._data

    def subset(self, rows):
        """Return these training examples only."""
        part, rows = copy.copy(self), checks.rows(rows, self.n)
        if not len(rows):
            raise ValueError("A subset of no training point is no objective.")
        part._data, part.n = self.gather(rows), len(rows)
        part.batch_size = min(self.batch_size, part.n)
        if self.strategy is not None:
            part._shares = part._shared_out(*part._data)
        return part

    def affordable(self, bytes_an_example):
        """Return how many examples fit the memory budget, at least 1."""
        return max(1, int(self.memory_budget // max(1, bytes_an_example)))

    def rows_for(self, copies):
        """Return how many examples a pass may hold that keeps `copies` of their activations."""
        return min(self.batch_size, self.affordable(copies * self.bytes_an_example))


def of_any_form(x, y):
    """Return x, y as arrays that can be sliced, or a tf.data.Dataset and None.

    x may be what `keras.Model.fit` takes: arrays, nested as the model's inputs are, lists of
    numbers, frames, SciPy's sparse matrices (dense a batch at a time), a Dataset, or, with the
    labels inside, a PyDataset or a list of batches (x, y) or (x, y, weight).
    """
    if hasattr(x, "__next__"):
        raise ValueError(
            "A generator can be read only once, and the examples are read many times: pass "
            "list(generator), its batches."
        )
    if isinstance(x, keras.utils.PyDataset) or (y is None and _is_list_of_batches(x)):
        return _as_dataset(x), y
    if not isinstance(x, tf.data.Dataset):
        return arrays(x), one_array(y)
    spec = x.element_spec
    if not isinstance(spec, tuple) or not any(isinstance(part, dict) for part in spec[:2]):
        return x, y
    return x.map(lambda x, y, *weight: (_by_key(x), one_array(y), *weight)), y


def gathered(x, y):
    """Return examples in any form as arrays x, y; weights that come with them are left out."""
    x, y = of_any_form(x, y)
    if isinstance(x, tf.data.Dataset):
        if y is not None or not isinstance(x.element_spec, tuple) or len(x.element_spec) < 2:
            raise ValueError(
                "A Dataset of examples holds batches (x, y): pass None for its labels."
            )
        checks.once(x)
        parts = [batch[:2] for batch in x]
        for part in parts:
            checks.lengths(*part)
        if not parts:
            raise ValueError("There is no test example.")
        try:
            x, y = keras.tree.map_structure(lambda *several: np.concatenate(several), *parts)
        except ValueError:
            raise ValueError("The batches differ in shape: pad them, or ask one by one.") from None
    return keras.tree.map_structure(np.asarray, x), np.asarray(y)


def spread(batch, k=8):
    """Return at most k examples of a batch (x, y, ...), from the first to the last, as arrays."""

    def picked(a):
        return np.concatenate([np.asarray(a[i : i + 1]) for i in rows])  # `a` may lie on disk

    rows = np.unique(np.linspace(0, len(batch[1]) - 1, k).astype(int))
    return keras.tree.map_structure(picked, batch)


def _joined(batches):
    """Return batches as one, without those of another length of sequences than the first."""

    def shapes(batch):
        return [a.shape[1:] for a in keras.tree.flatten(batch)]

    alike = [batch for batch in batches if shapes(batch) == shapes(batches[0])]
    return keras.tree.map_structure(lambda *parts: np.concatenate(parts), *alike)


def _is_list_of_batches(x):
    return isinstance(x, list) and all(
        isinstance(part, (tuple, list))
        and len(part) > 1
        and (isinstance(part[0], (tuple, list, dict)) or np.ndim(part[0]))
        for part in x
    )


def _as_dataset(batches):
    """Return a PyDataset or list of batches (x, y) or (x, y, weight) as a tf.data.Dataset."""

    def read():
        every = (batches[k] for k in range(len(batches)))
        parts = ((arrays(x), one_array(y), *weight) for x, y, *weight in every)
        return map(keras.tree.lists_to_tuples, parts)  # tf.data would stack a list

    first = next(read(), None)
    if first is None:
        raise ValueError("The training data hold no example.")

    def common(a, spec=None):
        shape, dtype = tf.TensorShape((None, *np.shape(a)[1:])), np.asarray(a).dtype
        if spec is not None:
            shape = shape.most_specific_compatible_shape(spec.shape)
            dtype = np.result_type(dtype, spec.dtype.as_numpy_dtype)
        return tf.TensorSpec(shape, dtype)

    specs = keras.tree.map_structure(common, first)
    for batch in read():  # whole numbers here, fractions there; sequences of other lengths
        specs = keras.tree.map_structure(common, batch, specs)
    return tf.data.Dataset.from_generator(read, output_signature=specs)


def arrays(x):
    """Return x as arrays that can be sliced, nested as the model's inputs are."""
    parts = keras.tree.flatten(x := _by_key(x))
    if isinstance(x, (list, tuple)) and not any(len(getattr(a, "shape", ())) for a in parts):
        return _array(x)  # rows of numbers, not inputs
    return keras.tree.map_structure(_array, x)


def _by_key(x):
    """Return an OrderedDict as a dict: a model would take it by position, `fit` by its keys."""
    return dict(x) if isinstance(x, dict) else x


def one_array(y):
    """Return the labels of the one output, which may come as a dict or a list of one."""
    if isinstance(y, dict) and len(y) == 1:
        (y,) = y.values()
    elif isinstance(y, (list, tuple)) and len(y) == 1 and len(getattr(y[0], "shape", ())):
        (y,) = y
    if isinstance(y, dict):
        raise ValueError(f"The labels are those of several outputs, {sorted(y)}: bind one output.")
    return _array(y)


def _array(a):
    """Return one input as an array: frames as numbers, sparse matrices by their rows."""
    if hasattr(a, "tocsr"):
        return _SparseRows(a.tocsr())
    if isinstance(a, tf.RaggedTensor):
        raise ValueError("A ragged tensor has no shape: pad it, a.to_tensor(), and mask.")
    if hasattr(a, "to_numpy"):
        return checks.numbers(a)
    if isinstance(a, np.ndarray) and a.dtype == object:  # numbers of a frame whose columns differ
        numbers = a.size and all(isinstance(v, (Number, np.bool_)) for v in a.flat)
        return np.array(a.tolist()) if numbers else a
    if hasattr(a, "shape"):
        return a
    try:
        return np.asarray(a)
    except ValueError:
        raise ValueError("Rows of a list differ in length: pad them to one length.") from None


class _SparseRows:
    """A SciPy sparse matrix whose rows are dense when they are read, as those of a file are."""

    chunks = True

    def __init__(self, matrix):
        self.matrix, self.shape, self.dtype = matrix, matrix.shape, matrix.dtype

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        return self.matrix[rows].toarray()

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.matrix.toarray(), dtype)


def _is_on_disk(array):
    """Return whether an array is read in parts: a memory map, or chunks as in Zarr and HDF5."""
    return isinstance(array, np.memmap) or hasattr(array, "chunks")


def _stream(x, y, weight, batch_size):
    """Return a data set that reads arrays on disk batch by batch."""
    examples = keras.tree.lists_to_tuples((x, np.asarray(y), weight))  # tf.data would stack a list
    flat = keras.tree.flatten(examples)

    def rows(start):  # in the machine's order of bytes: TensorFlow does not ask
        parts = [np.asarray(a[start : start + batch_size]) for a in flat]
        return [a if a.dtype.isnative else a.astype(a.dtype.newbyteorder("=")) for a in parts]

    def read(start):
        parts = tf.numpy_function(rows, [start], [tf.as_dtype(a.dtype) for a in flat])
        for part, a in zip(parts, flat, strict=True):
            part.set_shape((None, *a.shape[1:]))
        return keras.tree.pack_sequence_as(examples, parts)

    return tf.data.Dataset.range(0, len(y), batch_size).map(read)
