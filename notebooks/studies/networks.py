"""Notebook 06: networks trained to a minimum, and what leaving out a training digit does to them.

n training digits, m test digits, k removals, p parameters; changes of losses are in nats.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import keras
import numpy as np
import pandas as pd

from helpers import Cholesky, Hessian, Objective, predicted_loss_change, solve
from helpers.gradients import per_example_gradients
from studies.network_retraining import NetworkRemovals, polish
from support import datasets, evaluation, models, stored


def mnist(source, side, *, seed=0):
    """Return MNIST as Arrays with images (n, side, side, 1): the empty margin is cut off."""
    digits, edge = datasets.mnist(source, seed=seed), (28 - side) // 2
    x, x_test = (
        a.reshape(-1, 28, 28, 1)[:, edge : 28 - edge, edge : 28 - edge]
        for a in (digits.x_train, digits.x_test)
    )
    return digits._replace(x_train=x, x_test=x_test)


@dataclass(frozen=True)
class Recipe:
    """How every network is made: digits, architecture and training; long results are kept.

    digits : as `mnist` returns them; keep : as `stored.checkpoint` returns it.
    """

    digits: datasets.Arrays
    width: int
    weight_decay: float
    epochs: int
    seed: int
    keep: Callable = stored.keep_nothing

    def network(self, draw=0):
        """Return an untrained network; each draw has initial parameters of its own."""
        keras.utils.set_random_seed(self.seed + draw)
        return models.all_cnn(self.digits.x_train.shape[1], width=self.width)

    def objective(self, network, rows):
        """Return the Objective of a network on some training digits, all parameters decayed."""
        x, y = self.digits.x_train[rows], self.digits.y_train[rows]
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return Objective(network, loss, x, y, weight_decay=self.weight_decay, decayed="all")

    def train(self, network, rows, sample_weight=None):
        """Train a network by Adam on some digits, in an order that is the same every time."""
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        def penalised(y, outputs):
            squares = [keras.ops.sum(v**2) for v in network.trainable_variables]
            decay = self.weight_decay / 2 * keras.ops.sum(keras.ops.stack(squares))
            return loss(y, outputs) + decay

        rate = keras.optimizers.schedules.CosineDecay(0.02, self.epochs * -(-len(rows) // 50))
        network.compile(keras.optimizers.Adam(rate), loss=penalised)
        keras.utils.set_random_seed(self.seed)
        x, y = self.digits.x_train[rows], self.digits.y_train[rows]
        options = {"batch_size": 50, "epochs": self.epochs, "verbose": 0}
        network.fit(x, y, sample_weight=sample_weight, **options)

    def at_minimum(self, rows, draw=0):
        """Return the Objective of a network where Adam, and then a polish, end, and H there."""
        network = self.network(draw)
        self.train(network, rows)
        objective = self.objective(network, rows)
        unfinished, some = objective.theta, (self.digits.x_train[rows], self.digits.y_train[rows])
        data = network, self.weight_decay, *some
        objective.theta = self.keep(["polish", unfinished, *data], lambda: polish(objective))
        of_hessian = ["Hessian", objective.theta, *data]
        return objective, self.keep(of_hessian, lambda: Hessian(objective).dense())

    def judges(self, objective):
        """Return test digits to judge a network by: {rule: indices}, images (m, ...), labels (m,).

        They are chosen from the first 1,000; the fourth value is the accuracy on those.
        """
        x, y = self.digits.x_test[:1000], self.digits.y_test[:1000]
        right = objective.model.predict(x, verbose=0).argmax(1) == y
        rules = evaluation.choose_test_points(objective.losses(x, y), right, seed=self.seed)
        points = np.concatenate(list(rules.values()))
        return rules, x[points], y[points], right.mean()

    def removals(self, predicted, n_top, n_random):
        """Return training digits (k,): the largest predictions for a test digit, some at random.

        predicted : (m, n).
        """
        rng = np.random.default_rng([self.seed, 6])
        random = rng.choice(predicted.shape[1], n_random, replace=False)
        return np.unique([*random, *np.ravel([evaluation.top(row, n_top) for row in predicted])])

    def of_shares(self, draw, rows, shares, n_random):
        """Return {share: Agreement over test digits} of first order for another network.

        Removed are shares of the weights of digits that are chosen as for the first network.
        """
        objective, hessian = self.at_minimum(rows, draw)
        _, x, y, _ = self.judges(objective)
        first = predicted(objective, hessian, x, y)
        removed = self.removals(first, 1, n_random)
        without = NetworkRemovals(objective, hessian)
        found = {}
        for share in shares:
            thetas = without.retrain(removed, fraction=share, checkpoint=self.keep).thetas
            change = without.loss_change(thetas, x, y)
            found[share] = agreement(share * first[:, removed], change, self.seed)
        return found

    def from_scratch(self, rows, removed, x_test, y_test):
        """Return changes (m, k) if Adam trains without each digit from the start, not polished."""

        def losses(left_out):
            network = self.network()
            self.train(network, rows, np.where(rows == left_out, 0.0, 1.0))
            return self.objective(network, rows).losses(x_test, y_test)

        return np.stack([losses(row) for row in removed], axis=1) - losses(None)[:, None]


def predicted(objective, matrix, x_test, y_test, *, damping=0.0):
    """Return predicted changes (m, n) with a Hessian (p, p) or what stands in for it."""
    gradients = per_example_gradients(objective, x_test, y_test).T
    solution = solve(matrix, gradients, Cholesky(damping))
    return predicted_loss_change(objective, solution)


class Agreement(NamedTuple):
    """Agreement of predicted with actual changes for each of m test digits, summed up.

    mean : of Pearson's r, interval : 95 %, bootstrap over test digits; worst : the smallest r;
    rank : mean of Spearman's r; slope : median.
    """

    mean: float
    interval: list
    worst: float
    rank: float
    slope: float


def agreement(predicted, actual, seed):
    """Return the Agreement of two arrays of changes (m, k)."""
    rows = zip(predicted, actual, strict=True)
    found = pd.DataFrame([evaluation.agreement(*pair) for pair in rows])
    r = found["r"].to_numpy()
    mean, *interval = evaluation.bootstrap_of_mean(r, [seed, 7])
    return Agreement(mean, interval, r.min(), found["rank"].mean(), found["slope"].median())


def summary(found):
    """Return {name: Agreement} as a table to show."""
    rows = [
        (f"{a.mean:.2f} ({a.interval[0]:.2f} to {a.interval[1]:.2f})", a.worst, a.rank, a.slope)
        for a in found.values()
    ]
    columns = ["mean r (95 % interval)", "worst r", "rank r", "slope"]
    return pd.DataFrame(rows, list(found), columns).round(2)
