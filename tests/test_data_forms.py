"""Every form that data come in means what it means to Keras's `fit`, or is refused in words."""

from collections import OrderedDict

import keras
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import tensorflow as tf
from conftest import SOFTMAX

from helpers import (
    CG,
    Hessian,
    Objective,
    influence_wrt_input,
    predicted_loss_change,
    s_test,
    solve,
)
from support import stored

layers = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 3)).astype("float32") * (RNG.random((12, 3)) > 0.3)
X[:, 0], Y = np.rint(X[:, 0]), np.arange(12) % 3
W = RNG.uniform(0.5, 2, 12)
FRAME = pd.DataFrame({"a": X[:, 0].astype(int), "b": X[:, 1], "c": X[:, 2]}, index=range(50, 62))


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        rows = slice(5 * i, 5 * i + 5)
        return X[rows], Y[rows], W[rows]


def on_disk(tmp_path, x=X):
    np.save(tmp_path / "x.npy", x)
    return np.load(tmp_path / "x.npy", mmap_mode="r")


def batches():
    return [Sequence()[i] for i in range(3)]


FORMS = {  # the name of a form, as the documentation lists it: x, y, sample_weight
    "arrays": lambda _: (X, Y, W),
    "tensors": lambda _: (tf.constant(X), tf.constant(Y), tf.constant(W)),
    "lists of numbers": lambda _: (X.tolist(), Y.tolist(), W.tolist()),
    "pandas frame and series, any index": lambda _: (FRAME, pd.Series(Y, FRAME.index), W),
    "SciPy sparse matrix": lambda _: (scipy.sparse.csc_matrix(X), Y, W),
    "memory map (Zarr, HDF5 likewise)": lambda path: (on_disk(path), Y, W),
    "memory map of big-endian numbers": lambda path: (on_disk(path, X.astype(">f4")), Y, W),
    "arrays of dtype object, of numbers": lambda _: (X.astype(object), Y.astype(object), W),
    "tf.data.Dataset": lambda _: (tf.data.Dataset.from_tensor_slices((X, Y, W)).batch(5),),
    "keras.utils.PyDataset": lambda _: (Sequence(),),
    "list of batches (x, y, weight)": lambda _: (batches(),),
    "labels as a dict or a list of one": lambda _: (X, {"out": Y}, W[:, None]),
}


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(3)])


def bound(model, x, y=None, weight=None):
    return Objective(model, SOFTMAX, x, y, sample_weight=weight, weight_decay=0.01)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_what_arrays_give(model, form, tmp_path):
    plain, given = bound(model, X, Y, W), bound(model, *FORMS[form](tmp_path))
    assert given.n == 12
    np.testing.assert_allclose(given.training_loss(), plain.training_loss(), rtol=1e-6)
    np.testing.assert_allclose(given.gradient(), plain.gradient(), atol=1e-7)
    x = scipy.sparse.csr_matrix(X) if "SciPy" in form else X
    np.testing.assert_allclose(given.losses(x[:2], Y[:2]), plain.losses(X[:2], Y[:2]), rtol=1e-6)
    asked = FORMS[form](tmp_path)[:2]
    asked = asked if len(asked) > 1 else (*asked, None)
    np.testing.assert_allclose(plain.losses(*asked), plain.losses(X, Y), rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (tf.data.Dataset.from_tensor_slices((X, Y)).batch(5), Y, "pass None for its labels"),
        (tf.data.Dataset.from_tensor_slices(X).batch(5), None, "holds batches"),
        (tf.data.Dataset.from_tensor_slices((X, Y)), None, "first axis that counts the examples"),
        ([(X[:5], Y[:5]), (X[5:, :2], Y[5:])], None, "differ in shape"),
    ],
)
def test_batches_to_ask_about_are_refused_in_words(model, x, y, words):
    with pytest.raises(ValueError, match=words):
        bound(model, X, Y).losses(x, y)


A, B = RNG.normal(size=(2, 12, 3))
PAIRS = {  # forms of two inputs "a" and "b", which a model could mix up
    "a dict": lambda _: ({"b": B, "a": A}, Y),
    "an OrderedDict": lambda _: (OrderedDict(b=B, a=A), Y),
    "a list": lambda _: ([A, B], Y),
    "a list on disk": lambda path: ([on_disk(path, A), B], Y),
    "a Dataset of dicts": lambda _: (halves({"b": B, "a": A}, Y),),
    "a Dataset of OrderedDicts": lambda _: (halves(OrderedDict(b=B, a=A), Y),),
    "batches of lists": lambda _: ([([A[:7], B[:7]], Y[:7]), ([A[7:], B[7:]], Y[7:])],),
    "batches of tuples": lambda _: ([((A[:7], B[:7]), Y[:7]), ((A[7:], B[7:]), Y[7:])],),
    "batches of OrderedDicts": lambda _: ([(OrderedDict(b=B, a=A), Y)],),
}


def halves(*data):
    return tf.data.Dataset.from_tensor_slices(data).batch(6)


@pytest.mark.parametrize(
    ("form", "declared"),
    [(form, list) for form in PAIRS] + [(form, dict) for form in PAIRS if "ict" in form],
)
def test_two_inputs_go_where_fit_puts_them(form, declared, tmp_path):
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((3,), name="b")}
    outputs = layers.Dense(3)(layers.Concatenate()([inputs["a"], 2 * inputs["b"]]))
    model = keras.Model(inputs if declared is dict else list(inputs.values()), outputs)
    model.compile(loss=SOFTMAX)
    expected = model.evaluate({"a": A, "b": B}, Y, verbose=0)
    objective = Objective(model, SOFTMAX, *PAIRS[form](tmp_path))
    np.testing.assert_allclose(objective.training_loss(), expected, rtol=1e-5)


def test_texts_go_into_the_model_as_they_are():
    texts, y = np.array(["good film", "bad film", "fine", "awful"] * 3), np.arange(12) % 2
    words = layers.TextVectorization(output_sequence_length=2)
    words.adapt(texts)
    body = [layers.Embedding(9, 2), layers.GlobalAveragePooling1D(), layers.Dense(1)]
    model = keras.Sequential([keras.Input((), dtype="string"), words, *body])
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    for given in (texts, texts.tolist(), pd.Series(texts)):
        objective = Objective(model, loss, given, y, weight_decay=0.1)
        s = s_test(objective, given[:2], y[:2], CG(0.1))
        assert predicted_loss_change(objective, s).shape == (2, 12)


def test_the_documentation_lists_every_form():
    listed = (stored.ROOT / "docs" / "tried.md").read_text(encoding="utf-8")
    assert all(f"\n- {form}\n" in listed for form in FORMS)


def test_a_dict_weighs_classes_as_fit_does(model):
    by_class = {0: 1.0, 1: 5.0, 2: 0.5}
    weight = np.array([by_class[label] for label in Y])
    expected = bound(model, X, Y, weight).training_loss()
    np.testing.assert_allclose(bound(model, X, Y, by_class).training_loss(), expected)
    with pytest.raises(ValueError, match="no weight for class 2"):
        bound(model, X, Y, {0: 1.0, 1: 2.0})


def broken(row):
    x = X.copy()
    x[row, 1] = np.nan
    return x


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda _: (iter(batches()),), r"list\(generator\)"),
        (lambda _: (tf.ragged.constant([[1.0], [1.0, 2.0]]), [0, 1]), "pad it"),
        (lambda _: ([[1.0, 2.0, 3.0], [1.0]], [0, 1]), "differ in length"),
        (lambda _: (FRAME.assign(c="text"), Y), "columns c hold no numbers"),
        (lambda _: (FRAME.assign(c=pd.Timestamp("2020-01-01")), Y), "columns c hold no numbers"),
        (lambda _: (FRAME.convert_dtypes().replace(2.0, pd.NA).mask(FRAME < 0), Y), "is number"),
        (lambda _: (X, pd.Series([0, 1, pd.NA] * 4, dtype="Int64")), "labels hold NaN"),
        (lambda path: (on_disk(path, broken(7)), Y), "first is number 7"),
        (
            lambda _: (tf.data.Dataset.from_tensor_slices((broken(7), Y)).batch(5),),
            "first is number 7",
        ),
        (lambda _: ([],), "no example"),
        (lambda _: ([("good", 1), ("bad", 0)],), "first axis"),
        (lambda _: (tf.data.Dataset.from_tensor_slices((X[:0], Y[:0])).batch(5),), "no example"),
    ],
)
def test_what_can_not_be_is_refused_in_words(model, data, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        bound(model, *data(tmp_path))


def test_a_layer_with_a_state_is_refused():
    lstm = layers.LSTM(2, stateful=True)
    model = keras.Sequential([keras.Input((4, 1), batch_size=4), lstm, layers.Dense(3)])
    with pytest.raises(ValueError, match="stateful=False"):
        Objective(model, SOFTMAX, RNG.normal(size=(4, 4, 1)), Y[:4], weight_decay=0.01)


def test_influence_on_each_of_several_inputs():
    keras.utils.set_random_seed(0)
    real, number = keras.Input((3,), name="real"), keras.Input((1,), dtype="int32", name="number")
    both = layers.Concatenate()([real, layers.Flatten()(layers.Embedding(4, 2)(number))])
    model = keras.Model({"real": real, "number": number}, layers.Dense(3)(both))
    x = {"real": X, "number": (np.arange(12) % 4)[:, None]}
    objective = Objective(model, SOFTMAX, x, Y, weight_decay=0.01)
    first = {name: a[:1] for name, a in x.items()}
    s = s_test(objective, first, Y[:1], CG(0.1))
    slopes = influence_wrt_input(objective, s, x, Y)
    assert slopes["number"].shape == (12, 1, 2)  # of what the embedding makes of it
    moved = []
    for step in (1e-2, -1e-2):
        nudged = x | {"real": X + step * (np.arange(3) == 1)}
        other = Objective(model, SOFTMAX, nudged, Y, weight_decay=0.01)
        moved.append(12 * predicted_loss_change(other, s)[0])
    np.testing.assert_allclose(slopes["real"][:, 1], (moved[0] - moved[1]) / 2e-2, atol=1e-3)


def test_an_indefinite_system_is_solved_and_said():
    """Where H + damping I has a negative eigenvalue the default solver still solves, with words."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(3)])
    objective = bound(model, X, Y)
    h = Hessian(objective).dense()
    low = np.linalg.eigvalsh(h)[0]
    assert low < 0
    b = RNG.normal(size=objective.p)
    found = solve(objective, b, damping=-low / 2)
    np.testing.assert_allclose((h - low / 2 * np.eye(len(h))) @ found.x, b, atol=1e-3)
    assert "NEGATIVE CURVATURE" in str(found)
