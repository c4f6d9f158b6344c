"""Training sets on disk: block by block the same numbers as with all examples in memory."""

import h5py
import numpy as np
import pytest
import tensorflow as tf
from conftest import BINARY, SOFTMAX

from helpers import (
    Hessian,
    Objective,
    Removals,
    fit_head,
    most_influential,
    predicted_loss_change,
    s_test,
)
from support import models


def on_disk(folder, x):
    np.save(folder / "x.npy", x)
    return np.load(folder / "x.npy", mmap_mode="r")


def data(n, d=5, classes=2):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, d)), rng.integers(0, classes, n)
    return x, y, rng.normal(size=(3, d)), rng.integers(0, classes, 3), rng.uniform(0.5, 2, n)


def bind(x, y, weight, classes=2, **options):
    """Return an objective, streamed in blocks of 37 where x is on disk: the budget is too small."""
    model = models.linear_head(x.shape[1], classes, use_bias=True)
    small = {"memory_budget": 4 * len(y) * x.shape[1], "batch_size": 37}
    options = {"weight_decay": 0.01, "decayed": "all", "sample_weight": weight, **small, **options}
    return Objective(model, BINARY if classes == 2 else SOFTMAX, x, y, **options)


@pytest.fixture(params=[2, 3], ids=["logistic", "softmax"])
def pair(request, tmp_path):
    """The same fitted objective in memory and on disk, and its test points."""
    x, y, x_test, y_test, weight = data(200, classes=request.param)
    both = [bind(a, y, weight, request.param) for a in (x, on_disk(tmp_path, x))]
    fits = [fit_head(objective) for objective in both]
    assert all(fit.converged for fit in fits)
    assert fits[0].steps == fits[1].steps
    assert [type(o.head).__name__ for o in both] == ["Head", "StreamedHead"]
    return *both, x_test, y_test


def test_fit_hessian_and_influence_equal_those_in_memory(pair, tmp_path):
    dense, streamed, x_test, y_test = pair
    np.testing.assert_allclose(streamed.theta, dense.theta, atol=1e-10)
    streamed.theta = dense.theta
    v = np.random.default_rng(1).normal(size=dense.p)
    h = Hessian(dense).dense()
    np.testing.assert_allclose(Hessian(streamed).dense(), h, atol=1e-14)
    np.testing.assert_allclose(streamed.head.product(streamed.theta)(v), h @ v, atol=1e-13)
    assert abs(streamed.head.loss(dense.theta) - dense.training_loss()) <= 1e-14
    s, s_streamed = (s_test(o, x_test, y_test) for o in (dense, streamed))
    np.testing.assert_allclose(s_streamed.x, s.x, atol=1e-10)
    expected = predicted_loss_change(dense, s)
    found = predicted_loss_change(streamed, s_streamed)
    np.testing.assert_allclose(found, expected, atol=1e-10)
    out = np.lib.format.open_memmap(tmp_path / "changes.npy", "w+", float, expected.shape)
    predicted_loss_change(streamed, s_streamed, out=out).flush()
    np.testing.assert_array_equal(np.load(tmp_path / "changes.npy"), found)


@pytest.mark.parametrize("k", [1, 50, 200])
def test_the_strongest_are_those_of_the_whole_matrix(pair, k):
    _, streamed, x_test, y_test = pair
    s = s_test(streamed, x_test, y_test)
    changes = predicted_loss_change(streamed, s)
    order = np.argsort(changes, axis=1)
    found = most_influential(streamed, s, k)
    np.testing.assert_array_equal(found.harmful, order[:, :k])
    np.testing.assert_array_equal(found.helpful, order[:, ::-1][:, :k])
    for ids, values in ((found.harmful, found.harmful_change), found[:2]):
        np.testing.assert_array_equal(values, np.take_along_axis(changes, ids, 1))


def test_of_equal_changes_the_earlier_point_comes_first(tmp_path):
    """Whole numbers and theta = 0: no block rounds a copy of an example differently."""
    rng = np.random.default_rng(0)
    x, y = np.tile(rng.integers(-9, 9, (20, 5)) * 1.0, (10, 1)), np.tile(rng.integers(0, 2, 20), 10)
    objective, s = bind(on_disk(tmp_path, x), y, None), rng.integers(-9, 9, (6, 3))
    changes = predicted_loss_change(objective, s)
    found = most_influential(objective, s, 25)
    for ids, sign in ((found.helpful, -1), (found.harmful, 1)):
        expected = [np.lexsort((np.arange(200), row)) for row in sign * changes]
        np.testing.assert_array_equal(ids, np.array(expected)[:, :25])
        assert (np.diff(ids[:, :10]) > 0).all()


def test_arrays_in_chunks_and_other_models_are_streamed_too(tmp_path, network):
    x, y, x_test, y_test, weight = data(200)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=x, chunks=(16, 5))
        chunked, dense = bind(file["x"], y, weight), bind(x, y, weight)
        assert not chunked.data.in_memory
        s = s_test(dense, x_test, y_test)
        expected = predicted_loss_change(dense, s)
        found = predicted_loss_change(chunked, s)
        np.testing.assert_allclose(found, expected, atol=1e-12)
    objective, x, y = network
    stored = Objective(
        objective.model, SOFTMAX, on_disk(tmp_path, x), y, weight_decay=0.05, batch_size=7
    )
    v = np.random.default_rng(0).normal(size=(objective.p, 2)) / 10
    changes = predicted_loss_change(objective, v)
    found = most_influential(stored, v, 61)
    np.testing.assert_allclose(found.harmful_change, np.sort(changes, axis=1), atol=1e-6)


def test_what_can_not_be_streamed_is_refused_in_words(tmp_path):
    x, y, x_test, y_test, weight = data(200)
    objective = bind(on_disk(tmp_path, x), y, weight)
    s = s_test(objective, x_test, y_test)
    for k in (0, 201):
        with pytest.raises(ValueError, match=f"from 1 to n = 200, got {k}"):
            most_influential(objective, s, k)
    with pytest.raises(ValueError, match=r"shape \(4,\), the objective 6 parameters"):
        most_influential(objective, np.ones(4), 1)
    with pytest.raises(ValueError, match=r"out has shape \(3, 7\), the influences \(3, 200\)"):
        predicted_loss_change(objective, s, out=np.empty((3, 7)))
    with pytest.raises(ValueError, match=r"all features in memory, 0\.0 GB, and the objective's"):
        Removals(objective)
    with pytest.raises(ValueError, match="weight_decay > 0"):
        fit_head(bind(on_disk(tmp_path, x), y, None, weight_decay=0.0))
    batches = tf.data.Dataset.from_tensor_slices((x, 2 * y - 1)).batch(64)
    for wrong in ((on_disk(tmp_path, x), 2 * y - 1), (batches, None)):
        with pytest.raises(ValueError, match="Labels go from -1 to 1"):
            Objective(models.linear_head(5), BINARY, *wrong, weight_decay=0.01)
    x[150, 2] = np.nan
    with pytest.raises(ValueError, match="the first is number 150"):
        bind(on_disk(tmp_path, x), y, weight)
