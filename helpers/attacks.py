"""Training-set attacks: pictures altered by less than anyone sees, so that a test picture flips.

Koh & Liang 2017, section 5.2. For the logistic head p = sigmoid(theta . f) on features f(x) and
s = H^-1 grad loss(z_test) at the refitted head, the influence of training picture x_i has the pixel
gradient

    d(s . grad loss_i) / dx = J' c,    c = (p - y) s + p (1 - p)(s . f) theta,    J = df/dx,

one vector-Jacobian product of the backbone (the weight decay's share is constant in x). The test
loss after a refit moves by -1/n times that, so an attack steps along -sign(J' c).
"""

import numpy as np
import tensorflow as tf
from scipy.special import expit
from tqdm.auto import tqdm

from helpers.many_fits import Replacements
from helpers.runtime import keep_nothing


class Attacks:
    """Attacks on the test pictures of a fitted logistic head on frozen features.

    objective : the head's, at its minimum. backbone : what made its features, 0..255 -> (b, d).
    images : training pictures (n, h, w, 3), whole levels 0..255. x_test, y_test : (m, d), (m,).
    batch : pictures that go through the backbone together; as many as memory allows.
    """

    def __init__(self, objective, backbone, images, x_test, y_test, *, batch=32):
        self.objective, self.backbone, self.images = objective, backbone, images
        self.x_test, self.y_test, self.batch = x_test, np.asarray(y_test, float), batch
        self.refits, self.theta = Replacements(objective), objective.theta
        self.phi, self.y = objective.head.phi, objective.head.y.ravel().astype(float)
        if self.phi.shape[1] != x_test.shape[1] or set(np.unique(self.y)) - {0, 1}:
            raise ValueError("Attacks need a head without a bias, and the labels 0 and 1.")

    @tf.function(reduce_retracing=True, autograph=False)
    def _features(self, x):
        return self.backbone.model(self.backbone.preprocess(x), training=False)

    def see(self, x):
        """Return the features (b, d) of pictures 0..255, and pull(c) -> J' c of each, like x.

        The pull takes what the forward pass has kept: both cost one pass forward and one back.
        """
        x = tf.convert_to_tensor(np.asarray(x, self.backbone.model.compute_dtype))
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            features = self._features(x)

        def pull(c):
            return tape.gradient(features, x, tf.cast(c, features.dtype)).numpy()

        return features.numpy().astype(float), pull

    def features(self, x):
        """Return the features (b, d) of any number of pictures 0..255."""
        dtype, parts = self.backbone.model.compute_dtype, range(0, len(x), self.batch)
        return np.concatenate(
            [self._features(np.asarray(x[k : k + self.batch], dtype)).numpy() for k in parts]
        ).astype(float)

    def true_logits(self, theta, tests):
        """Return the logit of the true class of test pictures (m,), or (m, k) for heads (p, k)."""
        sign = 2 * self.y_test[tests] - 1
        return ((self.x_test[tests] @ theta).T * sign).T

    def directions(self, targets, theta=None, solve=None):
        """Return s = H^-1 mean grad loss over each target's test pictures, (p, k).

        At the clean head, or at refits with their own `solve`.
        """
        k = len(targets)
        theta = np.repeat(self.theta[:, None], k, 1) if theta is None else theta
        gradient = np.empty_like(theta)
        for j, tests in enumerate(targets):
            sign = 2 * self.y_test[tests] - 1
            pull = -sign * expit(-self.true_logits(theta[:, j], tests))
            gradient[:, j] = pull @ self.x_test[tests] / len(tests)
        if solve is None:
            return self.refits.basis.factor.solve(gradient)
        return solve(gradient, 1e-3)

    def cotangent_norms(self, s):
        """Return ||c|| of every training picture for s (p, k) at the clean head, (n, k)."""
        p = expit(self.phi @ self.theta)[:, None]
        r, along = p - self.y[:, None], p * (1 - p) * (self.phi @ s)
        square = r**2 * (s**2).sum(0) + along**2 * (self.theta @ self.theta)
        return np.sqrt(np.maximum(square + 2 * r * along * (self.theta @ s), 0))

    def scores(self, s, rows):
        """Return the L1 norm of J' c of training pictures (b,) for s (p, k), clean: (b, k).

        The paper's criterion for which training pictures to alter.
        """
        scores = np.empty((len(rows), s.shape[1]))
        for first in range(0, len(rows), self.batch):
            part = slice(first, first + self.batch)
            phi, pull = self.see(self.images[rows[part]])
            for j, column in enumerate(s.T):
                c = cotangent(column, phi, self.y[rows[part]], self.theta)
                scores[part, j] = np.abs(pull(c)).sum((1, 2, 3))
        return scores

    def attack(
        self,
        targets,
        carriers,
        *,
        start=None,
        box=0.5,
        step=0.25,
        steps=4,
        stop=0.5,
        checkpoint=keep_nothing,
    ):
        """Return the altered training pictures of each attack, (carriers, h, w, 3).

        Attack j alters the training pictures carriers[j] within `box` levels of the original and
        within 0..255, by `steps` sign steps, until p(true class) is below `stop` for every test
        picture of targets[j]; with stop = 0 it takes all steps. The head is refitted after every
        step. Carriers of different attacks go through the backbone together, as many as make a
        batch.

        start : altered pictures to begin at, as returned.
        checkpoint : what `runtime.checkpoint(folder)`
            returned: finished batches are kept there and an interrupted run goes on where it was.
        """
        start = [self.images[rows] for rows in carriers] if start is None else start
        options = box, step, steps, stop
        # rounded: the last digits of a fit may differ from run to run
        settings, done = [np.float32(self.theta), np.float32(self.x_test), *options], []
        for part in tqdm(self._batches(carriers), desc="attacks", unit="batch", leave=False):
            pieces = [targets[j] for j in part], [carriers[j] for j in part]
            begin = np.concatenate([start[j] for j in part])
            numbers = [*settings, begin, *_joined(pieces[0]), *_joined(pieces[1])]
            found = checkpoint(numbers, lambda a=(*pieces, begin): self._attack(*a, *options))
            done += np.split(found, np.cumsum([len(rows) for rows in pieces[1]])[:-1])
        return done

    def _batches(self, carriers):
        """Return lists of attacks whose carriers fill a batch."""
        batches, room = [], 0
        for j, rows in enumerate(carriers):
            if room < len(rows):
                batches.append([])
                room = max(self.batch, len(rows))
            batches[-1].append(j)
            room -= len(rows)
        return batches

    def _attack(self, targets, carriers, x, box, step, steps, stop):
        rows, owner = _joined(carriers)
        original = self.images[rows].astype(self.backbone.model.compute_dtype)
        low, high = np.maximum(original - box, 0), np.minimum(original + box, 255)
        x, theta = x.astype(original.dtype), np.repeat(self.theta[:, None], len(targets), 1)
        live = np.arange(len(targets))
        for taken in range(steps + 1):
            at = np.isin(owner, live)
            phi, pull = self.see(x[at])
            mine, y = np.searchsorted(live, owner[at]), self.y[rows[at]]
            fits, solve = self.refits.fit(rows[at], mine, phi, start=theta[:, live], tol=1e-6)
            theta[:, live] = fits.theta
            chances = [expit(self.true_logits(theta[:, j], targets[j])) for j in live]
            goes_on = np.array([(p >= stop).any() for p in chances])
            if taken == steps or not goes_on.any():
                return x
            s = self.directions([targets[j] for j in live], fits.theta, solve)
            c = cotangent(s[:, mine].T, phi, y, fits.theta[:, mine].T)
            c[~goes_on[mine]] = 0
            x[at] = np.clip(x[at] - step * np.sign(pull(c)), low[at], high[at])
            live = live[goes_on]

    def judge(self, targets, carriers, pictures):
        """Return p(true class) of each attack's test pictures after the refit, and its Fits.

        pictures : what `attack` returned, or other versions of them (rounded, compressed).
        """
        rows, owner = _joined(carriers)
        fits, _ = self.refits.fit(rows, owner, self.features(np.concatenate(pictures)))
        logits = [self.true_logits(fits.theta[:, j], tests) for j, tests in enumerate(targets)]
        return [expit(z) for z in logits], fits


def cotangent(s, phi, y, theta):
    """Return c = (p - y) s + p (1 - p)(s . f) theta of pictures with features f = phi (b, d).

    s, theta : (d,), or (b, d) for another one a picture; y : (b,) labels 0 and 1.
    """
    p = expit((phi * theta).sum(-1))
    along = p * (1 - p) * (phi * s).sum(-1)
    return (p - y)[:, None] * s + along[:, None] * theta


def saved(picture, original):
    """Return a picture in whole levels; what lies half-way between two keeps the original's.

    So a change of half a level, the paper's box, is one that 8 bits do not hold.
    """
    change = picture.astype(float) - original
    return original + np.sign(change) * np.ceil(np.abs(change) - 0.5 - 1e-6)


def _joined(carriers):
    owner = np.repeat(np.arange(len(carriers)), [len(rows) for rows in carriers])
    return np.concatenate(carriers), owner
