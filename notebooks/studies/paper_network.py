"""Notebook 06: Figure 2, right, of Koh & Liang (2017) by the paper's own protocol.

The network stands where Adam in batches left it, and is retrained from there without a digit, with
Adam's averages restored and at the last learning rate: no parameter can move far, so the actual
change is a *local* response. Time is compressed: learning rates times c, steps divided by c.

n training digits, m test digits, k copies of the network trained together, p parameters; a state is
(k, 3, p): the parameters and Adam's two running averages. Changes of losses are in nats.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import keras
import numpy as np
import tensorflow as tf
from scipy import stats
from tqdm.auto import tqdm

from helpers import CG, GaussNewton, Hessian, LiSSA, Objective, predicted_loss_change, s_test, solve
from helpers.ekfac import Blocks
from helpers.gradients import per_example_gradients
from helpers.spectrum import spectrum
from studies import networks
from studies.network_retraining import NetworkRemovals, loss_change
from support import datasets, models, stored

STAGES = {1e-4: 110_000, 1e-5: 110_000, 1e-6: 280_000}  # learning rate: steps at it
LOOKS = (1_000, 3_000, 10_000, 30_000)  # steps of a retraining; the paper's are 30,000
CONTROL = -1  # in the place of a removed digit: none is
TOGETHER = 5  # copies trained together; more do not fit the cache


def tenth(source, n, *, seed=0):
    """Return MNIST as Arrays of images (n, 28, 28, 1), with n training digits drawn at random.

    From 55,000, n = 5,500 and seed = 0, these are the very digits of the released code.
    """
    digits = networks.mnist(source, 28)
    some = np.random.RandomState(seed).permutation(len(digits.x_train))[:n]
    return digits._replace(x_train=digits.x_train[some], y_train=digits.y_train[some])


@dataclass(frozen=True, eq=False)
class Protocol:
    """The paper's network, training and retraining; long results are kept.

    digits : training digits as images (n, side, side, 1), all test digits.
    batch : digits a step of Adam sees; c : compression of the training.
    keep : as `stored.checkpoint` returns it.
    """

    digits: datasets.Arrays
    width: int = 8
    weight_decay: float = 1e-3
    batch: int = 500
    c: int = 1
    damping: float = 0.01
    dtype: str = "float32"
    keep: Callable = stored.keep_nothing

    @cached_property
    def model(self):
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(self.dtype)
        try:
            return models.all_cnn(self.digits.x_train.shape[1], width=self.width)
        finally:
            keras.config.set_dtype_policy(before)

    def start(self, seeds):
        """Return the states (k, 3, p) of untrained networks.

        Kernels are normal, cut off at two standard deviations: 2 / sqrt(inputs) of a convolution,
        1 / sqrt(inputs) of the last layer; biases are zero.
        """
        shapes = [tuple(v.shape) for v in self.model.trainable_variables]

        def draw(shape, rng):
            deviation = (2 if len(shape) == 4 else 1) / np.sqrt(np.prod(shape[:-1]))
            cut = stats.truncnorm.rvs(-2, 2, size=shape, random_state=rng)
            return np.ravel(cut * deviation if len(shape) > 1 else np.zeros(shape))

        rngs = [np.random.default_rng([seed, 62]) for seed in seeds]
        theta = np.stack([np.concatenate([draw(s, rng) for s in shapes]) for rng in rngs])
        return np.stack([theta, 0 * theta, 0 * theta], axis=1).astype(self.dtype)

    def train(self, seeds):
        """Return the states (k, 3, p) of networks after the whole of the training, and the steps.

        They see the digits in the same order; a seed draws the initial parameters.
        """
        states, done = self.start(seeds), 0
        for rate, steps in STAGES.items():
            states = self._adam(states, None, rate * self.c, done, round(steps / self.c), 0)
            done += round(steps / self.c)
        return states, done

    def retrain(self, state, removed, *, c, looks=LOOKS):
        """Return parameters (looks, k, p) after each number of the paper's steps, without a digit.

        state : (3, p), where the training ended. A digit left out has weight zero in its batch,
        which is averaged over the others; all copies see the same batches, so the noise of the
        batches is the same in each. removed : digits (k,); CONTROL leaves none out.
        """
        n, ends = len(self.digits.x_train), []
        for first in tqdm(range(0, len(removed), TOGETHER), "retraining", leave=False):
            some = np.asarray(removed[first : first + TOGETHER])
            states, done, thetas = np.repeat(state[None], len(some), axis=0), 0, []
            weight = (np.arange(n) != some[:, None]).astype(self.dtype)
            for steps in np.divide(looks, c).round().astype(int):
                states = self._adam(states, weight, 1e-6 * c, done, steps - done, 1)
                done = steps
                thetas.append(states[:, 0])
            ends.append(thetas)
        return np.concatenate(ends, axis=1)

    def _adam(self, states, weight, rate, done, steps, order):
        """Return the states after some more steps, of which `done` were made before."""
        x, y = self.digits.x_train, self.digits.y_train
        rng, n = np.random.default_rng([order, 63]), len(x)
        epochs = range(-(-(done + steps) // (n // self.batch)))
        cut = n // self.batch * self.batch  # what is left of an epoch is dropped, as in the paper
        rows = [rng.permutation(n)[:cut].reshape(-1, self.batch) for _ in epochs]
        rows = np.concatenate(rows)[done : done + steps].astype(np.int32)
        weight = np.ones((len(states), n), self.dtype) if weight is None else weight
        corrected = 0 if order else 1  # a retraining begins with averages that are long settled
        numbers = [states, weight, rate, rows, corrected, self.weight_decay * self.decayed, x, y]

        def compute():
            data = (tf.constant(a) for a in (x.astype(self.dtype), y, weight, rows))
            known = states, *data, tf.constant(rate, self.dtype), tf.constant(corrected * done)
            return self._steps(*known, corrected).numpy()

        return self.keep(numbers, compute)

    @tf.function
    def _steps(self, states, x, y, weight, rows, rate, done, corrected):
        theta, m, v = tf.unstack(states, axis=1)
        decay = self.weight_decay * tf.constant(self.decayed, self.dtype)
        for t in tf.range(tf.shape(rows)[0]):
            some = rows[t]
            data = tf.gather(x, some), tf.gather(y, some), tf.gather(weight, some, axis=1)
            gradient = self._gradients(theta, *data) + decay * theta
            m = 0.9 * m + 0.1 * gradient
            v = 0.999 * v + 0.001 * gradient**2
            length = rate
            if corrected:
                k = tf.cast(done + t + 1, rate.dtype)
                length = rate * tf.sqrt(1 - 0.999**k) / (1 - 0.9**k)
            theta -= length * m / (tf.sqrt(v) + 1e-8)
        return tf.stack([theta, m, v], axis=1)

    @cached_property
    def decayed(self):
        """Which parameters decay, (p,): those of kernels, not the biases."""
        shapes = [v.shape for v in self.model.trainable_variables]
        return np.concatenate([np.full(np.prod(s), float(len(s) > 1)) for s in shapes])

    def _gradients(self, theta, x, y, weight):
        """Return the gradients (k, p) of the mean losses of one batch, weight (k, b).

        A few digits at a time, so that the activations stay in the processor's cache.
        """
        if os.environ.get("TF_ENABLE_ONEDNN_OPTS") == "0" and len(theta) > 1:
            alone = zip(tf.split(theta, len(theta)), tf.split(weight, len(theta)), strict=True)
            return tf.concat([self._gradients(one, x, y, w) for one, w in alone], 0)
        rows, total = max(20, 160 // len(theta)), tf.zeros_like(theta)
        for first in tf.range(0, tf.shape(y)[0], rows):
            part = slice(first, first + rows)
            with tf.GradientTape() as tape:
                tape.watch(theta)
                outputs = self._outputs(theta, x[part])
                labels = tf.repeat(y[None, part], len(theta), axis=0)
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, outputs)
                value = tf.reduce_sum(weight[:, part] * losses)
            total += tape.gradient(value, theta)
        return total / tf.reduce_sum(weight, axis=1, keepdims=True)

    def _outputs(self, theta, x):
        """Return the logits (k, b, classes) of copies with parameters theta (k, p).

        The copies lie side by side along the channels: a convolution of all is one of k groups.
        """
        k, shapes = len(theta), [v.shape for v in self.model.trainable_variables]
        flat = tf.split(theta, [int(np.prod(s)) for s in shapes], axis=1)
        parts = (tf.reshape(f, (k, *s)) for f, s in zip(flat, shapes, strict=True))
        for layer in self.model.layers[:-2]:
            kernel, bias = next(parts), next(parts)
            kernel = tf.reshape(tf.transpose(kernel, (1, 2, 3, 0, 4)), (*kernel.shape[1:4], -1))
            bias = tf.reshape(bias, [-1])
            x = tf.tanh(tf.nn.conv2d(x, kernel, layer.strides, "VALID") + bias)
        x = tf.reshape(tf.reduce_mean(x, (1, 2)), (-1, k, x.shape[-1] // k))
        return tf.matmul(tf.transpose(x, (1, 0, 2)), next(parts)) + next(parts)[:, None]

    # ---------------------------------------------------------------- judged

    def objective(self, theta, **options):
        """Return the Objective of the network at parameters (p,), its kernels decayed.

        None leaves the parameters as they are.
        """
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        data = loss, self.digits.x_train, self.digits.y_train
        objective = Objective(self.model, *data, weight_decay=self.weight_decay, **options)
        if theta is not None:
            objective.theta = theta
        return objective

    def predicted(self, theta, rows, *, gauss_newton=False):
        """Return predicted changes (m, n) of test digits by CG on H + damping I, or on G."""

        def compute():
            objective = self.objective(theta)
            gradients = per_example_gradients(objective, *self.test(rows)).T
            solver = CG(self.damping)  # `lowest_curvature` says whether H + damping I is positive
            with warnings.catch_warnings(action="ignore"):
                return predicted_loss_change(objective, solve(kind(objective), gradients, solver))

        kind = GaussNewton if gauss_newton else Hessian
        return self.keep([*self._judged(theta, rows), kind.__name__], compute)

    def _judged(self, theta, rows):
        x, y, *test = self.digits.x_train, self.digits.y_train, *self.test(rows)
        return theta, self.damping, self.weight_decay, x, y, *test

    def lowest_curvature(self, theta):
        """Return the smallest eigenvalue of H at theta that 40 steps of Lanczos find."""
        numbers = [theta, self.weight_decay, *self.digits[:2], "lowest"]
        found = self.keep(numbers, lambda: spectrum(self.objective(theta)).lambda_min)
        return float(found)

    def held_near(self, theta, removed, rows):
        """Return, of the network held near theta, predicted changes and actual ones, (m, k) both.

        Gauss-Newton influence, and the proximal Bregman response with the same damping, in float64;
        third value: the Refits.
        """
        exact, test = replace(self, dtype="float64"), self.test(rows)
        objective, theta = exact.objective(theta), theta.astype(np.float64)
        of_g = ["G", *self._judged(theta, rows)]
        g = self.keep(of_g, lambda: GaussNewton(objective).dense())
        removals = NetworkRemovals(objective, g, damping=self.damping)
        held = removals.proximal(removed, self.damping, tol=1e-7, checkpoint=self.keep)
        first = networks.predicted(objective, g, *test, damping=self.damping)
        return first[:, removed], removals.loss_change(held.thetas, *test), held

    def cheaper(self, theta, rows, *, lissa_depth=1000):
        """Return {method: (predicted changes (m, n), cost)} of what a larger network could afford.

        The cost is in gradients of all training digits, a product with H being two; changes are
        None where a method diverged.
        """
        objective, (x, y), n = self.objective(theta), self.test(rows), len(self.digits.x_train)
        last, shift = self.objective(None, parameters="last_layer"), self.damping
        gradients, classes = per_example_gradients(objective, x, y).T, 10
        change = partial(predicted_loss_change, objective)
        found = {
            "EK-FAC": (change(Blocks(objective, shift).solve(gradients)), 2 * (1 + classes) + 1),
            "gradients alone": (change(gradients / shift), 1),
            "last layer": (predicted_loss_change(last, s_test(last, x, y, damping=shift)), 1),
        }
        how = {"depth": lissa_depth, "batch_size": min(100, n), "rtol": 1.0}
        cost = 2 * lissa_depth * how["batch_size"] / n + 1
        try:
            found["LiSSA"] = change(solve(objective, gradients, LiSSA(shift, **how)).x), cost
        except FloatingPointError:
            found["LiSSA"] = None, cost
        return found

    def test(self, rows):
        """Return test digits (m, side, side, 1) and their labels."""
        return self.digits.x_test[rows], self.digits.y_test[rows]

    def change(self, thetas, before, rows):
        """Return the changes (m, k) of test losses from parameters `before` (p,) to (k, p)."""
        return loss_change(self.objective(before), thetas.T, before, *self.test(rows))

    def judges(self, theta, seed, n_right=3, n_wrong=2, least_loss=0.1):
        """Return test digits (m,) drawn at random: some named right, some wrong; and the accuracy.

        Those named right have a loss of at least `least_loss` nats: a digit the network is sure of
        has a gradient near zero, and no training digit matters for it.
        """
        objective = self.objective(theta)
        losses = objective.losses(self.digits.x_test, self.digits.y_test)
        guess = self.model.predict(self.digits.x_test, verbose=0).argmax(1)
        right, rng = guess == self.digits.y_test, np.random.default_rng([seed, 64])
        kinds = (right & (losses >= least_loss), n_right), (~right, n_wrong)
        drawn = [rng.choice(np.flatnonzero(of), k, replace=False) for of, k in kinds]
        return np.concatenate(drawn), right.mean()
