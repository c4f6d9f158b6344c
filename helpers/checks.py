"""What comes with a model, checked in one place: examples, labels, weights, rows and numbers.

Errors say what came and what to do. What Keras does with the same arguments is what they mean.
"""

import zlib
from itertools import zip_longest

import keras
import numpy as np
import tensorflow as tf

from . import keras_facts


def number(name, value, *, positive=False):
    """Return a finite number >= 0 (> 0 where `positive`) as a float."""
    try:
        checked = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}.") from None
    if not np.isfinite(checked) or checked < 0 or (positive and checked == 0):
        kind = "positive and finite" if positive else "finite and not negative"
        raise ValueError(f"{name} must be {kind}, got {value}.")
    return checked


def rows(chosen, n):
    """Return numbers of training points, (k,) from 0 to n - 1, as NumPy reads an index.

    A boolean mask (n,) names the points where it is True, a negative number counts from the end.
    """
    chosen = np.atleast_1d(np.asarray(chosen))
    if chosen.size == 0:
        return np.zeros(0, int)
    if chosen.ndim != 1 or chosen.dtype.kind not in "biu":
        raise ValueError(
            "Training points are named by whole numbers (k,) or a boolean mask (n,), not by "
            f"{chosen.dtype} of shape {chosen.shape}."
        )
    if chosen.dtype == bool:
        if len(chosen) != n:
            raise ValueError(f"The mask has {len(chosen)} entries, the training data {n} points.")
        return np.flatnonzero(chosen)
    wrong = chosen[(chosen < -n) | (chosen >= n)]
    if wrong.size:
        raise ValueError(f"There is no training point {wrong[0]}: they go from 0 to {n - 1}.")
    return chosen.astype(int) % n


def group(chosen, n):
    """Return `rows`, each once: a set of points that leaves at least one other."""
    chosen = np.unique(rows(chosen, n))
    if len(chosen) == n:
        raise ValueError("A group of all training points leaves none to fit.")
    return chosen


def weights(given, n, y, *, some=True):
    """Return sample weights (n,) float64, >= 0; (n, 1) will do, or a dict {class: weight}.

    y : the labels. some : whether all weights may not be zero.
    """
    if given is None:
        return np.ones(n)
    if isinstance(given, dict):
        y = np.asarray(y)
        classes = y.argmax(1) if y.ndim == 2 and y.shape[1] > 1 else y.reshape(n)
        missing = sorted(set(classes.tolist()) - given.keys())
        if missing:
            raise ValueError(f"sample_weight has no weight for class {missing[0]}.")
        given = [given[label] for label in classes.tolist()]
    given = np.asarray(given, np.float64)
    if given.shape not in ((n,), (n, 1)):
        raise ValueError(
            f"sample_weight has shape {given.shape}; one weight an example is needed, ({n},)."
        )
    if not np.isfinite(given).all() or (given < 0).any():
        raise ValueError("Sample weights must be finite and not negative.")
    if some and not given.any():
        raise ValueError("All sample weights are zero: no example counts.")
    return given.reshape(n)


def inputs(model, x, like=None):
    """Refuse inputs of other names or shapes than the model's, or than those of `like`."""
    declared = keras_facts.declared_inputs(model)
    if isinstance(x, dict) and declared is not None:
        if not isinstance(declared, dict):
            declared = {t.name: t for t in keras.tree.flatten(declared)}
        if set(x) != set(declared):
            raise ValueError(f"The inputs are called {sorted(declared)}; x has {sorted(x)}.")
    flat = keras.tree.flatten(x)
    if declared is not None:
        wanted = [(None, *t.shape[1:]) for t in keras.tree.flatten(declared)]
    elif like is not None:
        wanted = [(*[None] * (len(shape) - 1), *shape[-1:]) for shape in like if len(shape)]
    else:
        return
    if len(flat) != len(wanted):
        raise ValueError(f"x has {len(flat)} inputs, the model {len(wanted)}.")
    for got, want in zip([tuple(a.shape) for a in flat], wanted, strict=True):
        # Keras itself adds a last axis of one, or takes it away
        fits = (got, (*got, 1), got[:-1] if got[-1:] == (1,) else got)
        if not any(_same(s, want) for s in fits):
            raise ValueError(
                f"An input has shape {got}, the model takes {want}: the first axis counts the "
                "examples (one is x[:1]), the others must be the model's."
            )


def stateless(model):
    """Refuse layers that carry a state from one batch to the next."""
    for layer in keras_facts.all_layers(model):
        if getattr(layer, "stateful", False) is True:
            raise ValueError(
                f"The layer {layer.name} keeps its state from batch to batch, so an example has no "
                "loss of its own: build it with stateful=False and give it the weights."
            )


def _same(shape, wanted):
    """Return whether a shape is the wanted one, whose None stand for any length."""
    return len(shape) == len(wanted) and all(
        None in (a, b) or a == b for a, b in zip(shape, wanted, strict=True)
    )


def numbers(frame):
    """Return a pandas frame or series as an array of one type; refuse columns of text."""
    values = frame.to_numpy()
    if values.dtype.kind != "O":
        return values
    try:
        empty = frame.isna() if hasattr(frame, "isna") else False  # pandas' <NA> is no float
        return np.where(empty, np.nan, values).astype(float)
    except (TypeError, ValueError):
        if values.ndim == 1:
            return values  # texts, which may go into the model as they are
    kinds = {str(name): numbers(column).dtype.kind for name, column in frame.items()}
    texts = ", ".join(name for name, kind in kinds.items() if kind not in "biuf")
    raise ValueError(
        f"The columns {texts} hold no numbers: number their values, as pd.get_dummies does."
    )


def finite(values, what, start=0):
    """Refuse real values (n, ...) that hold NaN or infinity; `what` they are, from number start."""
    values = np.asarray(values)
    if values.dtype.kind not in "fc" or not values.size:
        return
    bad = ~np.isfinite(values.reshape(len(values), -1)).all(1)
    if bad.any():
        raise ValueError(
            f"{bad.sum()} {what} hold NaN or infinity, the first is number "
            f"{start + bad.argmax()}: repair them or leave them out."
        )


def lengths(x, y):
    """Refuse inputs and labels of different length."""
    if np.ndim(y) == 0 or any(np.ndim(a) == 0 for a in keras.tree.flatten(x)):
        raise ValueError("x and y need a first axis that counts the examples: pass x[:1], y[:1].")
    wrong = {a.shape[0] for a in keras.tree.flatten(x)} - {len(y)}
    if wrong:
        raise ValueError(f"They differ in length: x has {wrong.pop()} examples, y {len(y)} labels.")


def like_training(y, trained, predictions):
    """Return labels with the axes of the training labels, shape `trained`, or refuse them.

    A last axis of one may be there or not. A loss of the user's own would broadcast others: an axis
    of one is no longer one, but where predictions (as `labels` takes them) may have any length.
    """
    shape, lengths = y.shape, zip_longest(trained[1:], predictions[1 : len(trained)], fillvalue=0)
    if y.ndim == len(trained) + 1 and y.shape[-1] == 1:
        y = y[..., 0]
    elif y.ndim == len(trained) - 1 and trained[-1] == 1:
        y = y[..., None]
    triples = zip(y.shape[1:], lengths, strict=False)
    if y.ndim != len(trained) or any(
        (a == 1) != (b == 1) and c is not None for a, (b, c) in triples
    ):
        raise ValueError(f"y has shape {shape}, the training labels {('n', *trained[1:])}.")
    return y


def labels(loss, y, predictions):
    """Refuse labels that the loss would cut, wrap, broadcast or take for others.

    predictions : the shape of the model's, (b, ...), None for what may have any length.
    """
    y, name, function = np.asarray(y), loss.name, keras_facts.function_of(loss)
    if y.dtype.kind in "OSU":
        raise ValueError(
            "The labels are text: number them, as np.unique(y, return_inverse=True)[1]."
        )
    finite(y, "labels")
    _label_shape(name, function, y.shape, tuple(predictions))
    if not y.size or y.dtype.kind == "c":
        return
    least, most = y.min(), y.max()
    words = f"Labels go from {least:g} to {most:g}, but {name} needs "
    if function in keras_facts.SPARSE:
        high, ignored = predictions[-1] - 1, getattr(loss, "ignore_class", None)
        kept = y if ignored is None else y[y != ignored]
        if not np.isin(kept % 1, 0).all():
            raise ValueError(f"{name} needs whole class numbers; some labels are fractions.")
        if kept.size and not (kept.min() >= 0 and kept.max() <= high):
            raise ValueError(f"{words}class numbers from 0 to {high}.")
    elif function in keras_facts.BINARY or function is keras.losses.kl_divergence:
        if not (least >= 0 and most <= 1):
            raise ValueError(f"{words}probabilities from 0 to 1.")
    elif function in (keras.losses.hinge, keras.losses.squared_hinge):
        if not (np.isin(y, (-1, 1)).all() or np.isin(y, (0, 1)).all()):
            raise ValueError(f"{words}-1 and 1, or 0 and 1.")
    elif function is keras.losses.mean_squared_logarithmic_error and least < 0:
        raise ValueError(f"{words}numbers from 0 on; negative ones are cut.")


def _label_shape(name, function, y, predictions):
    free = tuple("…" if a is None else a for a in predictions[1:])
    if function in keras_facts.SPARSE:
        fits = any(_same(y[1:], w) for w in (predictions[1:-1], (*predictions[1:-1], 1)))
        wanted = f"class numbers, {('n', *free[:-1])}"
    elif function in keras_facts.ELEMENTWISE:
        got, want = (s[1:-1] if s[-1:] == (1,) and len(s) > 1 else s[1:] for s in (y, predictions))
        fits, wanted = _same(got, want), f"{('n', *free)}, as the predictions have it"
    else:
        return
    if not fits:
        hint = " One-hot labels go with CategoricalCrossentropy." * _same(y[1:], predictions[1:])
        raise ValueError(f"y has shape {('n', *y[1:])}; {name} needs {wanted}.{hint}")


def once(dataset):
    """Refuse a tf.data.Dataset that never ends."""
    if int(dataset.cardinality()) == tf.data.INFINITE_CARDINALITY:
        raise ValueError("The Dataset never ends: leave out repeat(), or take(...) an epoch.")


def checksum(batch, before=0):
    """Return a checksum of what came before and a batch of tensors."""
    for tensor in keras.tree.flatten(batch):
        values = np.ascontiguousarray(tensor.numpy())
        text = values.dtype == object
        before = zlib.crc32(b"\0".join(values.ravel()) if text else values.tobytes(), before)
    return before
