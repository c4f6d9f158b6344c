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

import copy
import json
from itertools import chain
from typing import NamedTuple

import cv2
import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from scipy.special import expit
from sklearn.metrics import euclidean_distances
from tqdm.auto import tqdm

from studies.many_fits import Replacements
from support import claims, datasets, features, stored, vehicles

SUBSETS = {"1st": slice(1), "2nd": slice(1, 2), **{str(k): slice(k) for k in (2, 3, 5, 10)}}


class Altered(NamedTuple):
    """What k attacks reached: lists of altered pictures, true logits of the targets, and steps."""

    pictures: list
    logits: list
    steps: np.ndarray


class Attacks:
    """Attacks on the test pictures of a fitted logistic head on frozen features.

    data : Vehicles. objective : the head's, at its minimum. backbone : what made the features,
    0..255 -> (b, d). images : training pictures (n, h, w, 3), whole levels 0..255. batch : pictures
    that go through the backbone together. margin : (m,), logit of the true class at the clean head.
    """

    def __init__(self, data, objective, backbone, images, *, batch=20):
        self.data, self.objective, self.backbone, self.images = data, objective, backbone, images
        self.batch, self.theta, self.refits = batch, objective.theta, Replacements(objective)
        self.phi, self.y = objective.head.phi, objective.head.y.ravel().astype(float)
        if self.phi.shape[1] != data.x_test.shape[1] or set(np.unique(self.y)) - {0, 1}:
            raise ValueError("Attacks need a head without a bias, and the labels 0 and 1.")
        self.margin = self.true_logits(self.theta, np.arange(len(data.x_test)))
        self.passes = 0  # pictures that went through the backbone and back

    @tf.function(reduce_retracing=True, autograph=False)
    def _features(self, x):
        return self.backbone.model(self.backbone.preprocess(x), training=False)

    def see(self, x):
        """Return the features (b, d) of pictures 0..255, and pull(c) -> J' c of each, like x."""
        x = tf.convert_to_tensor(np.asarray(x, self.backbone.model.compute_dtype))
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            phi = self._features(x)
        self.passes += len(x)

        def pull(c):
            return tape.gradient(phi, x, tf.cast(c, phi.dtype)).numpy()

        return phi.numpy().astype(float), pull

    def features(self, pictures):
        """Return the features (b, d) of any number of pictures 0..255."""
        dtype, parts = self.backbone.model.compute_dtype, range(0, len(pictures), self.batch)
        parts = [np.asarray(pictures[k : k + self.batch], dtype) for k in parts]
        return np.concatenate([self._features(x).numpy() for x in parts]).astype(float)

    def true_logits(self, theta, tests):
        """Return the logit of the true class of test pictures, (len(tests),)."""
        return (2 * self.data.y_test[tests] - 1) * (self.data.x_test[tests] @ theta)

    def directions(self, targets, theta=None, solve=None):
        """Return s = H^-1 mean grad loss over each target's test pictures, (p, k).

        At the clean head, or at refits with their own `solve`. Each column is scaled to a gradient
        of length 1, because the loss of a sure test picture is tiny and only signs are used.
        """
        theta = np.repeat(self.theta[:, None], len(targets), 1) if theta is None else theta
        gradient = np.empty_like(theta)
        for j, tests in enumerate(targets):
            push = expit(-self.true_logits(theta[:, j], tests)) * (1 - 2 * self.data.y_test[tests])
            gradient[:, j] = push @ self.data.x_test[tests]
        gradient /= np.linalg.norm(gradient, axis=0)
        return self.refits.basis.factor.solve(gradient) if solve is None else solve(gradient, 1e-3)

    def shortlist(self, target, size):
        """Return the training pictures with the largest ||c||, and the L1 norms of their J' c.

        The paper's criterion, largest first, both (size,); its gradient in the features alone,
        which costs nothing, decides which pictures are looked at.
        """
        s = self.directions([target])[:, 0]
        rows = np.argsort(-np.linalg.norm(cotangent(s, self.phi, self.y, self.theta), axis=1))
        rows, scores = rows[:size], []
        for part in np.split(rows, range(self.batch, len(rows), self.batch)):
            phi, pull = self.see(self.images[part])
            scores.append(np.abs(pull(cotangent(s, phi, self.y[part], self.theta))).sum((1, 2, 3)))
        order = np.argsort(-np.concatenate(scores), kind="stable")
        return rows[order], np.concatenate(scores)[order]

    def attack(self, targets, carriers, *, start=None, box=0.5, lengths=(0.02,) * 100, stop=True):
        """Return the Altered of k attacks: each at the step where its mean test loss was largest.

        Attack j alters the training pictures carriers[j] within `box` levels of the original and
        within 0..255 by sign steps of `lengths` levels, and refits the head after each. It stops
        when every test picture of targets[j] is misnamed; without `stop` it takes all steps. The
        attacks share the passes through the backbone. start : pictures to begin at, one (c, h, w,
        3) an attack, by default the untouched ones.
        """
        start = [self.images[rows] for rows in carriers] if start is None else start
        pieces, room = [], 0
        for j, rows in enumerate(carriers):
            if room < len(rows):
                pieces.append([])
                room = max(self.batch, len(rows))
            pieces[-1].append(j)
            room -= len(rows)
        parts = []
        for piece in pieces:
            chosen = ([values[j] for j in piece] for values in (targets, carriers, start))
            parts.append(self._attack(*chosen, box, lengths, stop))
        pictures, logits, steps = zip(*parts, strict=True)
        return Altered([*chain(*pictures)], [*chain(*logits)], np.concatenate(steps))

    def _attack(self, targets, carriers, start, box, lengths, stop):
        rows, owner, k = *joined(carriers), len(targets)
        original = self.images[rows].astype(self.backbone.model.compute_dtype)
        low, high = np.maximum(original - box, 0), np.minimum(original + box, 255)
        x = np.concatenate(start).astype(original.dtype)
        theta, kept, live = np.repeat(self.theta[:, None], k, 1), x.copy(), np.arange(k)
        kept_phi, worst, steps = (
            np.empty((len(x), len(theta))),
            np.full(k, -np.inf),
            np.zeros(k, int),
        )
        for length in (*lengths, None):
            at = np.isin(owner, live)
            phi, pull = self.see(x[at])
            mine, y = np.searchsorted(live, owner[at]), self.y[rows[at]]
            fits, solve = self.refits.fit(rows[at], mine, phi, start=theta[:, live], tol=1e-7)
            theta[:, live] = fits.theta
            z = [self.true_logits(theta[:, j], targets[j]) for j in live]
            losses = np.array([np.logaddexp(0, -own).sum() for own in z])
            better = losses > worst[live]
            worst[live[better]], own = losses[better], better[mine]
            kept[np.flatnonzero(at)[own]], kept_phi[np.flatnonzero(at)[own]] = x[at][own], phi[own]
            goes_on = np.array([not stop or (own >= 0).any() for own in z])
            if length is None or not goes_on.any():
                break
            s = self.directions([targets[j] for j in live], fits.theta, solve)
            c = cotangent(s[:, mine].T, phi, y, fits.theta[:, mine].T)
            c[~goes_on[mine]] = 0
            x[at] = np.clip(x[at] - length * np.sign(pull(c)), low[at], high[at])
            live = live[goes_on]
            steps[live] += 1
        fits, _ = self.refits.fit(rows, owner, kept_phi)
        logits = [self.true_logits(own, t) for own, t in zip(fits.theta.T, targets, strict=True)]
        return np.split(kept, np.flatnonzero(np.diff(owner)) + 1), logits, steps

    def against(self, pictures, label):
        """Return the same Attacks with other test pictures, all of one label 0 or 1."""
        x, y = self.features(pictures), np.full(len(pictures), float(label))
        other = copy.copy(self)
        other.data = self.data._replace(x_test=x, y_test=y)
        other.margin = other.true_logits(self.theta, np.arange(len(x)))
        return other

    def refitted(self, targets, carriers, pictures):
        """Return the true logits of each target after the refit, and the refits' Fits."""
        rows, owner = joined(carriers)
        fits, _ = self.refits.fit(rows, owner, self.features(np.concatenate(pictures)))
        return [self.true_logits(fits.theta[:, j], t) for j, t in enumerate(targets)], fits


def cotangent(s, phi, y, theta):
    """Return c = (p - y) s + p (1 - p)(s . f) theta of pictures with features f = phi (b, d).

    s, theta : (d,), or (b, d) for another one a picture; y : (b,) labels 0 and 1.
    """
    p = expit((phi * theta).sum(-1))
    along = p * (1 - p) * (phi * s).sum(-1)
    return (p - y)[:, None] * s + along[:, None] * theta


def joined(carriers):
    """Return all carriers in one array, and the number of the attack that each belongs to."""
    owner = np.repeat(np.arange(len(carriers)), [len(rows) for rows in carriers])
    return np.concatenate(carriers), owner


def load(pictures, backbone, weight_decay, *, seed=0, n_train=900, n_test=300, **options):
    """Return the Attacks on a head that is fitted to all training pictures; its `shown` has the
    test pictures (m, h, w, 3).

    pictures : "rendered", "photos" or "ilsvrc" of `datasets.vehicles`, or "dog_fish"; n_train and
    n_test of each class.
    """
    sizes, fish = {"seed": seed, "n_train": n_train, "n_test": n_test}, pictures == "dog_fish"
    table = datasets.dog_fish(**sizes) if fish else datasets.vehicles(pictures, **sizes)
    phi = features.extract(table, backbone, batch_size=16).astype(float)
    data = vehicles.split(table, phi, positive="fish" if fish else None)
    images, train = datasets.pictures(table, backbone.size), (table["split"] == "train").to_numpy()
    head = vehicles.fitted_head(data, weight_decay)
    attacker = Attacks(data, head, backbone, images[train], **options)
    attacker.shown = images[~train]
    return attacker


def backbone_of(name, weights, size, layer=""):
    """Return a Backbone for pictures of this side; up to `layer`, averaged over space, if named."""
    whole = features.load_backbone(name, weights=weights, size=size)
    if not layer:
        return whole
    pooled = keras.layers.GlobalAveragePooling2D(dtype="float32")
    model = keras.Model(whole.model.input, pooled(whole.model.get_layer(layer).output))
    return whole._replace(name=f"{name} up to {layer}", model=model)


def clean_numbers(attacker):
    """Return what describes a bed before any attack: losses, accuracies, norms, margins."""
    theta = attacker.theta
    train, norm = (2 * attacker.y - 1) * (attacker.phi @ theta), np.linalg.norm(attacker.phi)
    square = norm**2 / len(train)
    return {
        "training loss": np.logaddexp(0, -train).mean(),
        "test loss": np.logaddexp(0, -attacker.margin).mean(),
        "training accuracy": np.mean(train > 0),
        "test accuracy": np.mean(attacker.margin > 0),
        "|w|": np.linalg.norm(theta),
        "feature norm": np.sqrt(square),
        "weight decay / norm^2": attacker.objective.decay[0] / square,
        "median margin": np.median(attacker.margin[attacker.margin > 0]),
    }


def draw(attacker, seed, count):
    """Return `count` test pictures that the clean head names correctly, in a random order."""
    order = np.random.default_rng([seed, 11]).permutation(len(attacker.margin))
    return order[attacker.margin[order] > 0][:count]


class Record:
    """Finished targets, after each group of them in a JSON file: a run cut off goes on from it.

    The file is runs/<profile>/11_<name>.json and begins as figures/<profile>/11_<name>.json, the
    committed one, if that is of the same bed (of the same pictures: margins tell); in `demo` there
    is none. about : the bed and the rule.
    """

    def __init__(self, name, profile, about, attacker):
        self.path = stored.folder("runs", profile) / f"11_{name}.json"
        self.content, self.kept = {"about": claims.plain(about), "targets": {}}, profile != "demo"
        for begun in (self.path, claims.committed(profile) / self.path.name) if self.kept else ():
            if begun.exists():
                content = json.loads(begun.read_text(encoding="utf-8"))
                if content["about"] == self.content["about"] and _same_margins(content, attacker):
                    self.content = content
                    return
                if begun == self.path:
                    raise ValueError(f"{begun} holds another attack than asked for: move it away.")

    def known(self, tests):
        """Return {test picture: dict} of those finished."""
        done = self.content["targets"]
        return {t: done[str(t)] for t in tests if str(t) in done}

    def fill(self, attacker, tests, compute, *, at_once=8):
        """Add compute([tests]) -> [dict] of test pictures, so many at once."""
        for k in tqdm(range(0, len(tests), at_once), self.path.stem, leave=False):
            part = tests[k : k + at_once]
            for t, found in zip(part, compute(part), strict=True):
                one = {"margin": attacker.margin[t], **found}
                self.content["targets"][str(t)] = claims.plain(one)
            self.write(self.path.parent)

    def write(self, folder):
        """Write the file to a folder; nothing in `demo`."""
        if self.kept:
            stored.write(folder / self.path.name, json.dumps(self.content) + "\n")


def _same_margins(content, attacker):
    """Return whether the finished targets have the margins of this attacker's."""
    known = [(int(t), one["margin"]) for t, one in content["targets"].items()]
    return all(t < len(attacker.margin) and abs(z - attacker.margin[t]) < 0.05 for t, z in known)


def ladders(attacker, name, profile, bed, counts, *, seed=0, go_on=True, **how):
    """Return (test pictures, what `ladder` found on each) of those that a Record has or gets.

    bed : dict of what the attacker was made from, kept in the file. counts : how many pictures of
    the `draw` are attacked by one carrier, by up to five, and by up to ten, in this order; of the
    better attacker those for ten come first. Without `go_on` only what is known is returned. The
    file goes to runs/<profile>/figures too, from where a run is promoted.
    """
    tests, better = draw(attacker, seed, counts[0]), how.get("better", False)
    about = {"size": attacker.backbone.size, "attack": "better" if better else "original"}
    drawn = "random order of the test pictures that the clean head names correctly"
    about |= {"bed": bed, "targets": tests, "counts": counts, "drawn": drawn, "seed": seed}
    record = Record(name, profile, about, attacker)
    parts = list(zip(counts, (2, 5, 6), strict=True))
    for count, stop in (parts[::-1] if better else parts) if go_on else ():
        known, names = record.known(tests), tuple(SUBSETS)[:stop]

        def over(t, known=known, names=names):
            return t in known and (flipped(known[t]) or set(names) <= set(known[t]))

        def climb(some, known=known, names=names):
            begun = [known.get(t, {}) for t in some]
            return ladder(attacker, some, begun, subsets=names, **how)

        record.fill(attacker, [t for t in tests[:count] if not over(t)], climb)
    known = record.known(tests)
    record.write(stored.folder("runs", profile, "figures"))
    return np.array([*known]), [*known.values()]


def ladder(
    attacker,
    tests,
    begun=None,
    *,
    better=False,
    subsets=tuple(SUBSETS),
    size=40,
    steps=100,
    box=0.5,
):
    """Return what attacks on single test pictures (k,) reached, a dict each.

    `subsets` of ten carriers in turn, until one flips the picture: {name: [margin, steps]}. As the
    original: the carriers largest in L1 among `size` that are looked at, every subset from
    untouched pictures, steps of 0.02 levels. better : 12 carriers ranked by the fall that five
    steps realise (`tried`, `falls`), without those that bring less than a tenth of the best one's;
    a subset begins where the smaller ones ended, and its steps, 0.7 times as many, shorten.
    forecast : what each carrier would take off the margin to first order. passes : pictures that
    went through the backbone and back. begun : dicts to which further subsets are added, {} if new.
    """
    targets, found, made = [np.array([t]) for t in tests], [], []
    for t, old in zip(tests, begun or [{}] * len(tests), strict=True):
        one, alone = first(attacker, t, better, size, box) if not old else (dict(old), {})
        found.append(one)
        made.append(alone)
    falling = np.geomspace(box / 5, box / 50, round(0.7 * steps))
    for name in subsets:
        live = [j for j, one in enumerate(found) if not flipped(one) and name not in one]
        tried = [np.array(found[j]["carriers"])[SUBSETS[name]] for j in live]
        start = [
            np.stack([made[j].get(i, attacker.images[i]) for i in own])
            for j, own in zip(live, tried, strict=True)
        ]
        aims, lengths = [targets[j] for j in live], falling if better else (0.02,) * steps
        done = attacker.attack(aims, tried, start=start, box=box, lengths=lengths) if live else []
        for j, own, x, (z,), taken in zip(live, tried, *(done or [[]] * 3), strict=True):
            found[j] |= {name: [z, taken], "passes": found[j]["passes"] + len(own) * (taken + 1)}
            if better:
                made[j].update(zip(own, x, strict=True))
    return found


def first(attacker, t, better, size, box):
    """Return what `ladder` knows of a target before its subsets, and pictures made so far."""
    rows, scores = attacker.shortlist(np.array([t]), size)
    slope = box / len(attacker.y) * np.linalg.norm(attacker.data.x_test[t])
    one = {"carriers": rows[:10], "forecast": slope * scores[:10], "passes": size}
    if not better:
        return one, {}
    tried, lengths = rows[:12], (box / 5,) * 5
    done = attacker.attack([np.array([t])] * len(tried), tried[:, None], box=box, lengths=lengths)
    falls = attacker.margin[t] - np.concatenate(done.logits)
    order = np.argsort(-falls)[: max(2, (falls > 0.1 * falls.max()).sum())]
    one |= {"carriers": rows[order[:10]], "tried": tried, "falls": falls}
    one["passes"] += (done.steps + 1).sum()
    return one, {rows[j]: done.pictures[j][0] for j in order}


def flipped(found, count=10):
    """Return whether one of `ladder`'s dicts has flipped by at most `count` carriers."""
    names = [name for name in SUBSETS if name in found and number(name) <= count]
    return any(found[name][0] < 0 for name in names)


def number(subset):
    """Return how many carriers a subset of SUBSETS has."""
    return 1 if subset in ("1st", "2nd") else int(subset)


def shares(found, counts):
    """Return {1, 2, 3, 5, 10: hits (k,)}: which of the first k targets so many carriers flipped.

    found : of `ladders`, in the order of the draw; counts : as there. Where a run was cut off only
    whole groups of eight count: where it stopped must not depend on what flipped.
    """
    hits = {}
    for count, limit in zip(
        (1, 2, 3, 5, 10), (counts[0], *[counts[1]] * 3, counts[2]), strict=True
    ):
        last = "2nd" if count == 1 else str(count)
        over = [flipped(one) or last in one for one in found[:limit]] + [False]
        k = over.index(False)
        k = k if k == limit else k - k % 8
        hits[count] = np.array([flipped(one, count) for one in found[:k]], bool)
    return hits


def together(attacker, name, profile, bed, tests, *, size, steps, without=(), go_on=True):
    """Return the one dict of an attack on test pictures all at once, by one carrier; or None.

    The carrier is the training picture with the largest L1 norm that is not in `without`; all steps
    of 0.005 levels are taken. before, after : margins. moved : length of the carrier's way in
    feature space, over the mean distance of its class to its centroid.
    """
    about = {"bed": bed, "tests": tests, "steps": steps, "without": without}
    record, key = Record(name, profile, about, attacker), [tests[0]]

    def attack(_):
        rows = attacker.shortlist(tests, size)[0]
        rows = rows[~np.isin(attacker.data.train["id"].iloc[rows], without)][:1]
        done = attacker.attack([tests], [rows], lengths=(0.005,) * steps, stop=False)
        own = attacker.phi[attacker.y == attacker.y[rows[0]]]
        away = np.linalg.norm(attacker.features(done.pictures[0])[0] - attacker.phi[rows[0]])
        radius = np.linalg.norm(own - own.mean(0), axis=1).mean()
        found = {"carrier": rows[0], "moved": away / radius}
        return [found | {"before": attacker.margin[tests], "after": done.logits[0]}]

    if go_on and not record.known(key):
        record.fill(attacker, key, attack)
    record.write(stored.folder("runs", profile, "figures"))
    return record.known(key).get(tests[0])


def alike(attacker, label, k):
    """Return the k test pictures of a class, named correctly, that lie closest together."""
    rows = np.flatnonzero((attacker.data.y_test == label) & (attacker.margin > 0))
    away = euclidean_distances(attacker.data.x_test[rows])
    centre = np.sort(away, axis=1)[:, k - 1].argmin()
    return rows[np.argsort(away[centre])[:k]]


def versions(picture, count, seed):
    """Return crops and exposures of a picture, (count, h, w, 3) whole levels."""
    rng, side, made = np.random.default_rng([seed, 13]), len(picture), []
    for _ in range(count):
        wide = int(side * rng.uniform(0.8, 1))
        top, left = rng.integers(0, side - wide + 1, 2)
        crop = datasets.resize(picture[top : top + wide, left : left + wide], side)
        crop = crop[:, :: rng.choice([-1, 1])] * rng.uniform(0.7, 1.3)
        made.append(np.uint8(np.clip(np.rint(crop), 0, 255)))
    return np.stack(made)


def by_one(found):
    """Return margin, fall, forecast and whether it flipped, by the better of two carriers."""
    rows = [
        (
            one["margin"],
            min(one[name][0] for name in ("1st", "2nd") if name in one),
            one["forecast"][0],
        )
        for one in found
    ]
    table = pd.DataFrame(rows, columns=["margin", "fall", "forecast"])
    table["flipped"], table["fall"] = table["fall"] < 0, table["margin"] - table["fall"]
    return table


def saved(picture, original):
    """Return a picture in whole levels; what lies half-way between two keeps the original's.

    So a change of half a level, the paper's box, is one that 8 bits do not hold.
    """
    change = picture.astype(float) - original
    return original + np.sign(change) * np.ceil(np.abs(change) - 0.5 - 1e-6)


def jpeg(pictures):
    """Return pictures in whole levels (k, h, w, 3) after a JPEG of quality 90."""
    quality, seen = [cv2.IMWRITE_JPEG_QUALITY, 90], []
    for picture in np.uint8(pictures):
        _, file = cv2.imencode(".jpg", picture[..., ::-1], quality)
        seen.append(cv2.imdecode(file, cv2.IMREAD_COLOR)[..., ::-1])
    return np.stack(seen)
