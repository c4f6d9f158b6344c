"""Training-set attacks: pictures altered by less than anyone sees, so that a test picture flips.

Koh & Liang 2017, section 5.2. For the logistic head p = sigmoid(theta . f) on features f(x) and
s = H^-1 grad loss(z_test) at the refitted head, the influence of training picture x_i has the pixel
gradient

    d(s . grad loss_i) / dx = J' c,    c = (p - y) s + p (1 - p)(s . f) theta,    J = df/dx,

one vector-Jacobian product of the backbone (the weight decay's share is constant in x). The test
loss after a refit moves by -1/n times that, so an attack steps along -sign(J' c).

A *target* is an array of test pictures to flip together, mostly one; its *carriers* are the
training pictures that are altered, an array of their numbers; k targets have k arrays of carriers.
"""

from functools import partial
from typing import NamedTuple

import cv2
import keras
import numpy as np
import tensorflow as tf
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from tqdm.auto import tqdm

from helpers import CG, Objective, Removals, influence_wrt_input, s_test
from studies.many_fits import Replacements
from support import backbone as demo
from support import datasets, features, vehicles
from support.evaluation import time_ratio
from support.stored import keep_nothing

KINDS = ("as altered", "saved in 8 bits", "JPEG 90")


class Attacks:
    """Attacks on the test pictures of a fitted logistic head on frozen features.

    objective : the head's, at its minimum. backbone : what made its features, 0..255 -> (b, d).
    images : training pictures (n, h, w, 3), whole levels 0..255. x_test, y_test : (m, d), (m,).
    batch : pictures that go through the backbone together; as many as memory allows.
    keep : what `stored.checkpoint(folder)` returned: finished batches are kept there and an
    interrupted run goes on where it was. margin : (m,), logit of the true class at the clean head.
    """

    def __init__(self, objective, backbone, images, x_test, y_test, *, batch=32, keep=keep_nothing):
        self.objective, self.backbone, self.images = objective, backbone, images
        self.x_test, self.y_test, self.batch = x_test, np.asarray(y_test, float), batch
        self.refits, self.theta, self.keep = Replacements(objective), objective.theta, keep
        self.phi, self.y = objective.head.phi, objective.head.y.ravel().astype(float)
        if self.phi.shape[1] != x_test.shape[1] or set(np.unique(self.y)) - {0, 1}:
            raise ValueError("Attacks need a head without a bias, and the labels 0 and 1.")
        self.margin = self.true_logits(self.theta, np.arange(len(x_test)))

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

    def certainty(self):
        """Return p(label) of every training picture at the clean head, (n,)."""
        return expit((2 * self.y - 1) * (self.phi @ self.theta))

    def directions(self, targets, theta=None, solve=None):
        """Return s = H^-1 mean grad loss over each target's test pictures, (p, k).

        At the clean head, or at refits with their own `solve`.
        """
        theta = np.repeat(self.theta[:, None], len(targets), 1) if theta is None else theta
        gradient = np.empty_like(theta)
        for j, tests in enumerate(targets):
            push = (1 - 2 * self.y_test[tests]) * expit(-self.true_logits(theta[:, j], tests))
            gradient[:, j] = push @ self.x_test[tests] / len(tests)
        return self.refits.basis.factor.solve(gradient) if solve is None else solve(gradient, 1e-3)

    def cotangent_norms(self, s):
        """Return ||c|| of every training picture for s (p, k) at the clean head, (n, k)."""
        p = expit(self.phi @ self.theta)[:, None]
        r, along = p - self.y[:, None], p * (1 - p) * (self.phi @ s)
        square = r**2 * (s**2).sum(0) + along**2 * (self.theta @ self.theta)
        return np.sqrt(np.maximum(square + 2 * r * along * (self.theta @ s), 0))

    def scores(self, s, rows):
        """Return the L1 norm of J' c of training pictures for one s (p,) at the clean head, (b,).

        The paper's criterion for which training pictures to alter.
        """
        scores = []
        for part in np.split(rows, range(self.batch, len(rows), self.batch)):
            phi, pull = self.see(self.images[part])
            c = cotangent(s, phi, self.y[part], self.theta)
            scores.append(np.abs(pull(c)).sum((1, 2, 3)))
        return np.concatenate(scores)

    def attack(self, targets, carriers, *, start=None, box=0.5, step=0.25, steps=4, stop=0.5):
        """Return the altered training pictures of each attack, (carriers, h, w, 3).

        Attack j alters the training pictures carriers[j] within `box` levels of the original and
        within 0..255, by `steps` sign steps, until p(true class) is below `stop` for every test
        picture of targets[j]; with stop = 0 it takes all steps. The head is refitted after every
        step. Carriers of different attacks go through the backbone together, as many as make a
        batch. start : altered pictures to begin at, as returned.
        """
        start = [self.images[rows] for rows in carriers] if start is None else start
        options = box, step, steps, stop
        # rounded: the last digits of a fit may differ from run to run
        settings, done = [np.float32(self.theta), np.float32(self.x_test), *options], []
        for part in tqdm(self._batches(carriers), desc="attacks", unit="batch", leave=False):
            pieces = [targets[j] for j in part], [carriers[j] for j in part]
            begin = np.concatenate([start[j] for j in part])
            numbers = [*settings, begin, *_joined(pieces[0]), *_joined(pieces[1])]
            found = self.keep(numbers, lambda a=(*pieces, begin): self._attack(*a, *options))
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
        """Return the true-class logits of each target after the refit, and the refits' Fits.

        pictures : what `attack` returned, or other versions of them (rounded, compressed).
        """
        rows, owner = _joined(carriers)
        fits, _ = self.refits.fit(rows, owner, self.features(np.concatenate(pictures)))
        return [self.true_logits(fits.theta[:, j], t) for j, t in enumerate(targets)], fits

    def falls(self, targets, carriers, pictures):
        """Return by how much each margin of single test pictures falls by the refit, (k,)."""
        logits, _ = self.judge(targets, carriers, pictures)
        return self.margin[np.concatenate(targets)] - np.concatenate(logits)


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


def load(dataset, profile, backbone, weight_decay, *, seed=0, **options):
    """Return (Vehicles, test pictures (m, h, w, 3), Attacks) of a data set.

    "vehicles" are those of notebooks 00 and 01, "dog_fish" photographs in the data root. The head
    is fitted to all training pictures. options : batch and keep of Attacks.
    """
    if dataset == "vehicles":
        table, data = vehicles.manifest(profile), vehicles.load(profile)
    else:
        table = datasets.dog_fish(seed=seed)
        phi = features.extract(table, backbone).astype(float)
        data = vehicles.split(table, phi, positive="fish")
    pictures = datasets.pictures(table, backbone.size)
    train = (table["split"] == "train").to_numpy()
    images, head = np.ascontiguousarray(pictures[train]), vehicles.fitted_head(data, weight_decay)
    attacker = Attacks(head, backbone, images, data.x_test, data.y_test, **options)
    return data, pictures[~train], attacker


def whole_model(attacker):
    """Return a Keras model from pixels 0..255 to the logit: preprocessing, backbone and head."""
    pixels, backbone = keras.Input(attacker.images.shape[1:]), attacker.backbone
    dense = keras.layers.Dense(1, use_bias=False)
    model = keras.Model(pixels, dense(backbone.model(backbone.preprocess(pixels))))
    dense.kernel.assign(attacker.theta[:, None])
    return model


def check_pixels(attacker, tests, test_images):
    """Assert that pixels give what cached features give, up to the rounding of the backbone.

    The whole model's probabilities of test pictures, and the features of training pictures.
    """
    atol = 1e-3 if attacker.backbone.model.compute_dtype == "float32" else 1e-6
    logits = whole_model(attacker).predict(test_images.astype(float), verbose=0)[:, 0]
    known = expit(attacker.x_test[tests] @ attacker.theta)
    np.testing.assert_allclose(expit(logits), known, rtol=0, atol=atol)
    shown = attacker.features(attacker.images[:16])
    np.testing.assert_allclose(shown, attacker.phi[:16], rtol=0, atol=10 * atol)


def choose(attacker, targets, shortlist):
    """Return carriers for k targets, best first: (rows, their L1 norms of J' c), (k, shortlist).

    Only the training pictures with the largest ||c|| are looked at.
    """
    s = attacker.directions(targets)
    short = np.argsort(-attacker.cotangent_norms(s), axis=0, kind="stable")[:shortlist].T
    scores = np.empty(short.shape)
    for j, (target, rows) in enumerate(zip(targets, short, strict=True)):
        numbers, own = [np.float32(attacker.theta), target, rows], (s[:, j], rows)
        scores[j] = attacker.keep(numbers, lambda own=own: attacker.scores(*own))
    order = np.argsort(-scores, axis=1, kind="stable")
    return tuple(np.take_along_axis(values, order, 1) for values in (short, scores))


class Ladder(NamedTuple):
    """Single test pictures attacked by more and more carriers, until each flips.

    needed : (k,), how many flipped it, 0 where none did. left : (k,), its smallest margin.
    carriers, pictures : the training pictures that left it, and what they became.
    gradient_norm : the largest of the last refits'.
    """

    needed: np.ndarray
    left: np.ndarray
    carriers: list
    pictures: list
    gradient_norm: float


def one_by_one(attacker, targets, rows, counts, **settings):
    """Return the Ladder of single test pictures, rows[j] their carriers, best first.

    The best carrier alone, the second alone, then as many together as `counts` says. A stage
    begins where the stages before left its pictures. settings : box, step, steps of an attack.
    """
    needed, left = np.zeros(len(targets), int), attacker.margin[np.concatenate(targets)]
    carriers, made, norm = [own[:1] for own in rows], [{} for _ in targets], 0.0
    pictures = [attacker.images[own] for own in carriers]
    for part in (slice(1), slice(1, 2), *map(slice, counts[1:])):
        live = np.flatnonzero(needed == 0)
        if not len(live):
            break
        aims, tried = [targets[j] for j in live], [rows[j][part] for j in live]
        start = [
            np.stack([made[j].get(i, attacker.images[i]) for i in own])
            for j, own in zip(live, tried, strict=True)
        ]
        altered = attacker.attack(aims, tried, start=start, **settings)
        logits, fits = attacker.judge(aims, tried, altered)
        norm = max(norm, fits.gradient_norm.max())
        for j, own, x, (z,) in zip(live, tried, altered, logits, strict=True):
            made[j].update(zip(own, x, strict=True))
            if z < left[j]:
                carriers[j], pictures[j], left[j] = own, x, z
                needed[j] = len(own) * (z < 0)
    return Ladder(needed, left, carriers, pictures, norm)


def reach(attacker, targets, scores, box):
    """Return how far the first 1, 2, ... 10 carriers lower each margin to first order, (k, 10).

    No head is refitted: a carrier lowers the loss by box * L1 / n, the margin by that / (1 - p).
    """
    doubt = expit(-attacker.margin[np.concatenate(targets)])[:, None]
    return np.cumsum(box * scores[:, :10] / (len(attacker.y) * doubt), axis=1)


def triptychs(attacker, kinds, rows, pictures):
    """Return pictures and captions, three a training picture: original, difference, altered.

    kinds : (n,), what they show. The difference is grey where there is none; its largest fills the
    scale.
    """
    shown, text = [], []
    for i, x in zip(rows, pictures, strict=True):
        original = attacker.images[i]
        change = x - original.astype(float)
        most = np.abs(change).max()
        grey = np.uint8(127.5 + 127 * change / most)
        shown += [original, grey, np.uint8(np.clip(np.rint(x), 0, 255))]
        text += [f"training picture {i}\n{kinds[i].replace('_', ' ')}"]
        text += [f"difference, largest\n{most:.2f} levels, amplified", "altered"]
    return shown, text


def levels(attacker, targets, carriers, boxes, *, stride, steps):
    """Return (falls, saved, clean) of single test pictures, one carrier each, in several boxes.

    Every attack takes all steps, of stride * box. falls : of the margins (boxes, KINDS, k), by
    altered pictures kept in several ways. saved : {box: those in whole levels}. clean : fall by a
    JPEG of the carrier that nobody altered, (k,).
    """
    originals, falls, kept = [attacker.images[rows] for rows in carriers], [], {}
    for box in boxes:
        options = {"box": box, "step": box * stride, "steps": steps, "stop": 0}
        made = attacker.attack(targets, carriers, **options)
        kept[box] = [saved(x, original) for x, original in zip(made, originals, strict=True)]
        versions = made, kept[box], [jpeg(x) for x in kept[box]]
        falls.append([attacker.falls(targets, carriers, x) for x in versions])
    clean = attacker.falls(targets, carriers, [jpeg(x) for x in originals])
    return np.array(falls), kept, clean


def jpeg(pictures):
    """Return pictures in whole levels (k, h, w, 3) after a JPEG of quality 90."""
    quality, seen = [cv2.IMWRITE_JPEG_QUALITY, 90], []
    for picture in np.uint8(pictures):
        _, file = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), quality)
        seen.append(cv2.cvtColor(cv2.imdecode(file, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB))
    return np.stack(seen)


def smaller_backbone(backbone, name, side):
    """Return the same architecture and weights for pictures of a smaller side."""
    if name != "demo":
        return features.load_backbone(name, size=side)
    network = demo.demo_backbone(side)
    network.set_weights(backbone.model.get_weights())
    return features.Backbone("demo, smaller", network, backbone.preprocess, side)


def transfer(data, attacker, tests, carriers, pictures, weight_decay, *, smaller=None, seen=None):
    """Return (margins, falls) of test pictures, (k,) each, in a model that somebody else trains.

    pictures : what the single carriers became. smaller : a backbone that gets all pictures shrunk,
    the test pictures `seen` (k, h, w, 3) among them; without it the model has attacker's.
    """
    backbone, x_test = attacker.backbone, data.x_test[tests]
    if smaller:
        small = partial(features.measure, backbone=smaller, batch_size=attacker.batch)
        data = data._replace(x_train=small(shrink(attacker.images, smaller.size)).astype(float))
        x_test = small(shrink(seen, smaller.size)).astype(float)
        backbone, pictures = smaller, [shrink(x, smaller.size) for x in pictures]
    head, aims = vehicles.fitted_head(data, weight_decay), list(np.arange(len(tests))[:, None])
    model = Attacks(
        head, backbone, attacker.images, x_test, data.y_test[tests], batch=attacker.batch
    )
    return model.margin, model.falls(aims, carriers, pictures)


def shrink(pictures, side):
    """Return pictures (k, h, w, 3), whole levels or not, averaged down to a side."""
    return np.stack([datasets.resize(np.asarray(p, np.float32), side) for p in pictures])


def self_influence_places(data, attacker, carriers, pictures, weight_decay):
    """Return the place of each single carrier by self-influence, before and after, (k, 2).

    1 is the training picture with the largest influence on its own loss; "after" it is altered and
    the head refitted.
    """

    def place(objective, i):
        own = Removals(objective).self_influence()
        return (own > own[i]).sum() + 1

    places = []
    for (i,), x in zip(carriers, pictures, strict=True):
        altered = data.x_train.copy()
        altered[i] = attacker.features(x)[0]
        after = vehicles.fitted_head(data._replace(x_train=altered), weight_decay)
        places.append([place(attacker.objective, i), place(after, i)])
    return np.array(places)


def step_costs(data, attacker, targets, carriers, weight_decay, **settings):
    """Return (our step / a pass of the backbone, the original's step / our step), in times.

    Of one carrier each in a batch: three steps with refits and new directions, against three passes
    forward and back, and against `original_step` of one picture.
    """
    x = attacker.images[np.concatenate(carriers)]

    def ours():
        attacker.attack(targets, carriers, **settings | {"steps": 3, "stop": 0})

    def passes():
        for _ in range(3):
            phi, pull = attacker.see(x)
            pull(phi)

    original = original_step(data, attacker, carriers[0], targets[0], weight_decay)
    speedup = 3 * len(targets) / time_ratio(ours, original, repeats=2)
    return time_ratio(ours, passes, repeats=2), speedup


def original_step(data, attacker, i, t, weight_decay):
    """Return step(): one step as the original takes it, for training picture i (1,), test t (1,).

    The gradient of the gradient through the whole model, CG for the direction, and a refit by
    L-BFGS from the last one.
    """
    logistic = keras.losses.BinaryCrossentropy(from_logits=True)
    one, y = attacker.images[i].astype(attacker.backbone.model.compute_dtype), data.y_train
    options = {"parameters": "last_layer", "weight_decay": weight_decay}
    deep = Objective(whole_model(attacker), logistic, one, y[i], **options)
    options = {"fit_intercept": False, "tol": 1e-8, "max_iter": 1000, "warm_start": True}
    refit = LogisticRegression(C=1 / (len(y) * weight_decay), **options).fit(data.x_train, y)

    def step():
        aim, x = (data.x_test[t], data.y_test[t]), data.x_train.copy()
        s = s_test(attacker.objective, *aim, CG(damping=0.0, rtol=1e-6))
        changed = one - 0.25 * np.sign(influence_wrt_input(deep, s.x[:, 0], one, y[i]))
        x[i] = attacker.features(changed)[0]
        refit.fit(x, y)

    return step
