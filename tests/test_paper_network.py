"""The paper's network: its training against Keras's own Adam, copies together against one alone."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import SOFTMAX

from studies.paper_network import Protocol
from support import datasets, stored

TOGETHER = """
import numpy as np, keras, sys
from studies.paper_network import Protocol
from support import datasets
rng = np.random.default_rng(0)
x, y = rng.random((60, 28, 28, 1)), rng.integers(0, 10, 60)
protocol = Protocol(datasets.Arrays(x, y, x, y), width=4, batch=20, c=100_000)
state = protocol.train([0])[0][0]
removed = [-1, 3, 5]
together = protocol.retrain(state, removed, c=1000, looks=(4_000,))[0]
alone = [protocol.retrain(state, [i], c=1000, looks=(4_000,))[0, 0] for i in removed]
assert np.abs(together[1] - together[0]).max() > 1e-4
np.testing.assert_allclose(together, alone, atol=2e-5)
"""


@pytest.fixture(scope="module")
def protocol():
    rng = np.random.default_rng(0)
    x, y = rng.random((60, 28, 28, 1)), rng.integers(0, 10, 60)
    digits = datasets.Arrays(x, y, x[:9], y[:9])
    return Protocol(digits, width=4, batch=20, c=100_000, dtype="float64")


def test_the_network_is_the_papers():
    digits = datasets.Arrays(np.zeros((1, 28, 28, 1)), np.zeros(1), None, None)
    paper = Protocol(digits)
    states = paper.start(range(200))
    assert states.shape == (200, 3, 2616)
    assert states.dtype == np.float32
    assert paper.model.layers[-3].output.shape == (None, 2, 2, 10)
    assert paper.decayed.sum() == 2616 - 5 * 8 - 2 * 10
    kernel = states[:, 0, 80 : 80 + 576]  # the second convolution: 72 inputs a channel
    assert np.abs(kernel).max() <= 4 / np.sqrt(72)
    np.testing.assert_allclose(kernel.std(), 0.8796 * 2 / np.sqrt(72), rtol=0.01)
    assert (states[:, 0, paper.decayed == 0] == 0).all()
    assert (states[:, 1:] == 0).all()


def test_a_batch_is_averaged_over_the_digits_that_are_left(protocol):
    x, y = protocol.digits.x_train[:20], protocol.digits.y_train[:20]
    theta = protocol.start([4, 5])[:, 0]
    weight = np.ones((2, 20))
    weight[1, 7] = 0
    found = protocol._gradients(*(tf.constant(a) for a in (theta, x, y, weight))).numpy()
    for one, kept, expected in zip(theta, weight == 1, found, strict=True):
        objective = protocol.objective(one)
        with tf.GradientTape() as tape:
            loss = SOFTMAX(y[kept], protocol.model(x[kept]))
        gradient = tape.gradient(loss, objective.tensors)
        np.testing.assert_allclose(objective.flatten(gradient), expected, atol=1e-12)


def test_training_is_keras_adam_with_decayed_kernels(protocol):
    found = protocol._adam(protocol.start([3]), None, 1e-3, 0, 9, 0)[0, 0]
    protocol.objective(protocol.start([3])[0, 0])
    model = keras.models.clone_model(protocol.model)
    model.set_weights(protocol.model.get_weights())
    rng, x, y = np.random.default_rng([0, 63]), protocol.digits.x_train, protocol.digits.y_train
    rows = np.concatenate([rng.permutation(60).reshape(3, 20) for _ in range(3)])
    adam, tensors = keras.optimizers.Adam(1e-3, epsilon=1e-8), model.trainable_variables
    for some in rows:
        with tf.GradientTape() as tape:
            decay = sum(tf.reduce_sum(v.value**2) for v in tensors if len(v.shape) > 1) / 2
            loss = SOFTMAX(y[some], model(x[some])) + protocol.weight_decay * decay
        adam.apply(tape.gradient(loss, [v.value for v in tensors]), tensors)
    expected = np.concatenate([np.ravel(v) for v in tensors])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - protocol.start([3])[0, 0]).max() > 1e-3


def test_rates_and_steps_are_the_papers_compressed(protocol):
    done = protocol.train([3])[1]
    assert done == 1 + 1 + 3  # 110,000, 110,000 and 280,000 steps over 100,000


def test_copies_together_are_each_alone():
    """In float32, where convolutions of many copies are grouped: only with oneDNN on."""
    paths = os.pathsep.join(("notebooks", str(stored.ROOT)))
    env = os.environ | {"TF_ENABLE_ONEDNN_OPTS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", TOGETHER], env=env, cwd=stored.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_retraining_moves_no_parameter_far_and_goes_on_where_it_was(protocol, tmp_path):
    from dataclasses import replace

    state = protocol.train([0])[0][0]
    whole = protocol.retrain(state, [-1, 2], c=1000, looks=(2_000, 5_000))
    assert 0 < np.abs(whole[-1] - state[0]).max() < 10 * 5_000 * 1e-6
    kept = replace(protocol, keep=stored.checkpoint(tmp_path))
    first = kept.retrain(state, [-1, 2], c=1000, looks=(2_000,))
    np.testing.assert_array_equal(first[0], whole[0])
    again = kept.retrain(state, [-1, 2], c=1000, looks=(2_000, 5_000))
    np.testing.assert_array_equal(again, whole)
    assert len(list(tmp_path.glob("*.npz"))) == 2
