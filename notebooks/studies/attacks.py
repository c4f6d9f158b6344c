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

import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from scipy.special import expit
from sklearn.utils import gen_batches
from tqdm.auto import tqdm

from studies.many_fits import Replacements
from support import claims, datasets, features, stored, vehicles

SUBSETS = {"1st": slice(1), "2nd": slice(1, 2), **{str(k): slice(k) for k in (2, 3, 5, 10)}}
COUNTS = (1, 2, 3, 5, 10)


class Attacks:
    """Attacks on the test pictures of a fitted logistic head on frozen features.

    data : Vehicles. objective : the head's, at its minimum. backbone : what made the features,
    0..255 -> (b, d). images : training pictures (n, h, w, 3), whole levels 0..255. batch : pictures
    that go through the backbone together. margin : (m,), logit of the true class at the clean head.
    """

    def __init__(self, data, objective, backbone, images, *, batch=20):
        self.data, self.objective, self.backbone, self.images = data, objective, backbone, images
        self.batch, self.theta, self.refits = batch, objective.theta, Replacements(objective)
        kinds = backbone.model.trainable_variables, backbone.model.non_trainable_variables
        self.weights = [[v.numpy() for v in variables] for variables in kinds]
        self.phi, self.y = objective.head.phi, objective.head.y.ravel().astype(float)
        if self.phi.shape[1] != data.x_test.shape[1] or set(np.unique(self.y)) - {0, 1}:
            raise ValueError("Attacks need a head without a bias, and the labels 0 and 1.")
        self.margin = self.true_logits(self.theta, np.arange(len(data.x_test)))

    @tf.function(reduce_retracing=True, autograph=False)
    def _features(self, x):
        # The frozen weights are constants here: of variables the gradients would be computed too.
        model, x = self.backbone.model, self.backbone.preprocess(x)
        return model.stateless_call(*self.weights, x, training=False)[0]

    def see(self, x):
        """Return the features (b, d) of pictures 0..255, and pull(c) -> J' c of each, like x."""
        x = tf.convert_to_tensor(np.asarray(x, self.backbone.model.compute_dtype))
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            phi = self._features(x)

        def pull(c):
            return tape.gradient(phi, x, tf.cast(c, phi.dtype)).numpy()

        return phi.numpy().astype(float), pull

    def features(self, pictures):
        """Return the features (b, d) of any number of pictures 0..255."""
        dtype, parts = self.backbone.model.compute_dtype, gen_batches(len(pictures), self.batch)
        parts = [self._features(np.asarray(pictures[part], dtype)).numpy() for part in parts]
        return np.concatenate(parts).astype(float)

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
        s, scores = self.directions([target])[:, 0], []
        norms = np.linalg.norm(cotangent(s, self.phi, self.y, self.theta), axis=1)
        rows = np.argsort(-norms)[:size]
        for part in gen_batches(len(rows), self.batch):
            phi, pull = self.see(self.images[rows[part]])
            c = cotangent(s, phi, self.y[rows[part]], self.theta)
            scores.extend(np.abs(pull(c)).sum((1, 2, 3)))
        order = np.argsort(-np.array(scores), kind="stable")
        return rows[order], np.array(scores)[order]

    def attack(self, targets, carriers, *, start=None, box=0.5, lengths=(0.02,) * 100, stop=True):
        """Return (altered pictures, true logits of the target, steps taken) of each of k attacks.

        The pictures and logits are those of the step where the target's mean loss was largest.
        Attack j alters the training pictures carriers[j] within `box` levels of the original and
        within 0..255 by sign steps of `lengths` levels, and refits the head after each. It stops
        when every test picture of targets[j] is misnamed; without `stop` it takes all steps. The
        attacks share the passes through the backbone. start : pictures to begin at, one (c, h, w,
        3) an attack, by default the untouched ones.
        """
        k, start = len(targets), start or [self.images[rows] for rows in carriers]
        fit = max(1, np.sum(np.cumsum([*map(len, carriers)]) <= self.batch))
        if fit < k:
            how = {"box": box, "lengths": lengths, "stop": stop}
            first = self.attack(targets[:fit], carriers[:fit], start=start[:fit], **how)
            return first + self.attack(targets[fit:], carriers[fit:], start=start[fit:], **how)
        rows, owner = joined(carriers)
        original = self.images[rows].astype(self.backbone.model.compute_dtype)
        low, high = np.maximum(original - box, 0), np.minimum(original + box, 255)
        x = np.concatenate(start).astype(original.dtype)
        best, best_phi = x.copy(), np.empty((len(x), len(self.theta)))
        theta, live = np.repeat(self.theta[:, None], k, 1), np.arange(k)
        worst, steps = np.full(k, -np.inf), np.zeros(k, int)
        for length in (*lengths, None):
            at = np.flatnonzero(np.isin(owner, live))
            mine, (phi, pull) = np.searchsorted(live, owner[at]), self.see(x[at])
            fits, solve = self.refits.fit(rows[at], mine, phi, start=theta[:, live], tol=1e-7)
            theta[:, live] = fits.theta
            z = [self.true_logits(theta[:, j], targets[j]) for j in live]
            losses = np.array([np.logaddexp(0, -own).sum() for own in z])
            better = (losses > worst[live])[mine]
            best[at[better]], best_phi[at[better]] = x[at[better]], phi[better]
            worst[live] = np.maximum(losses, worst[live])
            goes_on = np.array([not stop or (own >= 0).any() for own in z])
            if length is None or not goes_on.any():
                break
            s = self.directions([targets[j] for j in live], fits.theta, solve)
            c = cotangent(s[:, mine].T, phi, self.y[rows[at]], fits.theta[:, mine].T)
            c[~goes_on[mine]] = 0
            x[at] = np.clip(x[at] - length * np.sign(pull(c)), low[at], high[at])
            live = live[goes_on]
            steps[live] += 1
        pictures = np.split(best, np.flatnonzero(np.diff(owner)) + 1)
        logits = self.refitted(targets, carriers, best_phi)
        return list(zip(pictures, logits, steps, strict=True))

    def refitted(self, targets, carriers, phi):
        """Return the true logits of each target after a refit with features phi of all carriers."""
        theta = self.refits.fit(*joined(carriers), phi)[0].theta
        return [self.true_logits(own, t) for own, t in zip(theta.T, targets, strict=True)]

    def against(self, pictures, label):
        """Return the same Attacks with other test pictures, all of one label 0 or 1."""
        x, y = self.features(pictures), np.full(len(pictures), float(label))
        other = copy.copy(self)
        other.data = self.data._replace(x_test=x, y_test=y)
        other.margin = other.true_logits(self.theta, np.arange(len(x)))
        return other


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


def load(size, pictures, n_train, backbone_name, weights, layer, weight_decay, *, seed, batch):
    """Return the Attacks on a head that is fitted to all training pictures; its `shown` has the
    test pictures (m, h, w, 3).

    size : side of the pictures. pictures : "rendered", "photos" or "ilsvrc" of `datasets.vehicles`,
    or "dog_fish", n_train of each class, and 300 for testing or what is left of photographs.
    layer : where the features come from, averaged over space; "" for the backbone's last.
    batch : half as many together from 250 pixels a side.
    """
    backbone = features.load_backbone(backbone_name, weights=weights, size=size)
    if layer:
        pooled = keras.layers.GlobalAveragePooling2D(dtype="float32")
        model = keras.Model(backbone.model.input, pooled(backbone.model.get_layer(layer).output))
        backbone = backbone._replace(name=f"{backbone_name} up to {layer}", model=model)
    sizes, fish = {"seed": seed, "n_train": n_train}, pictures == "dog_fish"
    if fish or pictures == "photos":
        sizes["n_test"] = None
    table = datasets.dog_fish(**sizes) if fish else datasets.vehicles(pictures, **sizes)
    phi = features.extract(table, backbone, batch_size=16).astype(float)
    data = vehicles.split(table, phi, positive="fish" if fish else None)
    images, train = datasets.pictures(table, backbone.size), (table["split"] == "train").to_numpy()
    head, batch = vehicles.fitted_head(data, weight_decay), batch if size < 250 else batch // 2
    attacker = Attacks(data, head, backbone, images[train], batch=batch)
    attacker.shown = images[~train]
    return attacker


def clean_numbers(attacker):
    """Return what describes a bed before any attack: losses, accuracies, norms, margins."""
    train, margin = (2 * attacker.y - 1) * (attacker.phi @ attacker.theta), attacker.margin
    square = np.linalg.norm(attacker.phi) ** 2 / len(train)
    return {
        "training loss": np.logaddexp(0, -train).mean(),
        "test loss": np.logaddexp(0, -margin).mean(),
        "training accuracy": np.mean(train > 0),
        "test accuracy": np.mean(margin > 0),
        "|w|": np.linalg.norm(attacker.theta),
        "feature norm": np.sqrt(square),
        "weight decay / norm^2": attacker.objective.decay[0] / square,
        "median margin": np.median(margin[margin > 0]),
    }


def draw(attacker, seed, count):
    """Return `count` test pictures that the clean head names correctly, in a random order."""
    order = np.random.default_rng([seed, 11]).permutation(len(attacker.margin))
    return order[attacker.margin[order] > 0][:count]


class Record:
    """Finished targets, after each group of them in a JSON file: a run cut off goes on from it.

    The file is runs/<profile>/11_<name>.json, and for a promotion in runs/<profile>/figures too. It
    begins as figures/<profile>/11_<name>.json, the committed one; where that is of another bed, or
    of other pictures (margins tell), this is said and it is not used. In `demo` there is none.
    about : the bed and the rule; `targets` and `counts` in it may have been others. targets : {test
    picture: dict, with its clean `margin`}.
    """

    def __init__(self, name, profile, about, attacker):
        self.profile, self.file, self.targets = profile, f"11_{name}.json", {}
        self.about, own = claims.plain(about), stored.folder("runs", profile) / self.file
        begun = own if own.exists() else claims.committed(profile) / self.file
        if profile == "demo" or not begun.exists():
            return
        content = json.loads(begun.read_text(encoding="utf-8"))
        known = {int(t): one for t, one in content["targets"].items()}
        before, margin = content["about"], dict(enumerate(attacker.margin))
        rule = (before.keys() | self.about.keys()) - {"targets", "counts"}
        differs = sorted(k for k in rule if before.get(k) != self.about.get(k))
        if any(abs(margin.get(t, np.inf) - one["margin"]) > 0.05 for t, one in known.items()):
            differs.append("margins of the test pictures")
        told = f"{begun} holds another attack than asked for. What differs: {', '.join(differs)}."
        if differs and begun == own:
            raise ValueError(f"{told} Move it away.")
        if differs:
            print(f"{told} Its {len(known)} targets are not used.")
        else:
            self.targets = known
            self.write("figures")

    def add(self, found):
        """Add {test picture: dict}, and write the file, except in `demo`."""
        self.targets |= {int(t): claims.plain(one) for t, one in found.items()}
        if self.profile != "demo":
            self.write()
            self.write("figures")

    def write(self, *place):
        """Write the file to runs/<profile>, or to a folder in it."""
        text = json.dumps({"about": self.about, "targets": self.targets}) + "\n"
        stored.write(stored.folder("runs", self.profile, *place) / self.file, text)


def ladders(attacker, name, profile, bed, counts, *, seed=0, go_on=True, **how):
    """Return {test picture: what `ladder` found} of those that a Record has or gets, as drawn.

    bed : dict of what the attacker was made from, kept in the file. counts : how many pictures of
    the `draw` are attacked by one carrier, by up to five, and by up to ten, in this order; of the
    better attacker those for ten come first, and a target that lacks subsets begins anew. Without
    `go_on` only what is known is returned.
    """
    tests, better = draw(attacker, seed, counts[0]), how.get("better", False)
    about = {"size": attacker.backbone.size, "attack": "better" if better else "original"}
    drawn = "random order of the test pictures that the clean head names correctly"
    about |= {"bed": bed, "targets": tests, "counts": counts, "drawn": drawn, "seed": seed}
    about |= {"shortlist": how.get("size", 40), "steps": how.get("steps", 100)}
    record = Record(name, profile, about, attacker)
    parts = list(zip(counts, (2, 5, 6), strict=True))
    for count, stop in (parts[::-1] if better else parts) if go_on else ():
        begun, names = {t: record.targets.get(t, {}) for t in tests[:count]}, [*SUBSETS][:stop]
        left = [t for t, one in begun.items() if not (flipped(one) or names[-1] in one)]
        for k in tqdm(range(0, len(left), 8), record.file, leave=False):
            some = {t: {} if better else begun[t] for t in left[k : k + 8]}
            record.add(ladder(attacker, some, subsets=names, **how))
    return {t: record.targets[t] for t in tests if t in record.targets}


def ladder(attacker, begun, *, better=False, subsets=SUBSETS, size=40, steps=100, box=0.5):
    """Return what attacks on single test pictures reached, {test picture: dict}.

    `subsets` of ten carriers in turn, until one flips the picture: {name: [margin, steps]}. As the
    original: the carriers largest in L1 among `size` that are looked at, every subset from
    untouched pictures, steps of 0.02 levels. better : 12 carriers ranked by the fall that five
    steps realise (`tried`, `falls`), without those that bring less than a tenth of the best one's;
    a subset begins where the smaller ones ended, and its steps, 0.7 times as many, shorten.
    forecast : what each carrier would take off the margin to first order. passes : pictures that
    went through the backbone and back. begun : {test picture: dict}, to which subsets are added.
    """
    found, made = {}, {}
    for t, one in begun.items():
        found[t], made[t] = (dict(one), {}) if one else _first(attacker, t, better, size, box)
    lengths = np.geomspace(box / 5, box / 50, round(0.7 * steps)) if better else (0.02,) * steps
    for name in subsets:
        live = [t for t, one in found.items() if not flipped(one) and name not in one]
        carriers = [np.array(found[t]["carriers"])[SUBSETS[name]] for t in live]
        start = [
            np.stack([made[t].get(i, attacker.images[i]) for i in rows])
            for t, rows in zip(live, carriers, strict=True)
        ]
        aims, how = [np.array([t]) for t in live], {"box": box, "lengths": lengths}
        done = attacker.attack(aims, carriers, start=start, **how) if live else []
        for t, rows, (x, (z,), taken) in zip(live, carriers, done, strict=True):
            passes = found[t]["passes"] + len(rows) * (taken + 1)
            found[t] |= {name: [z, taken], "passes": passes}
            made[t] |= dict(zip(rows, x, strict=True)) if better else {}
    return found


def _first(attacker, t, better, size, box):
    """Return what `ladder` knows of a target before its subsets, and pictures made so far."""
    rows, scores = attacker.shortlist(np.array([t]), size)
    slope = box / len(attacker.y) * np.linalg.norm(attacker.data.x_test[t])
    one = {"margin": attacker.margin[t], "carriers": rows[:10], "forecast": slope * scores[:10]}
    if not better:
        return one | {"passes": size}, {}
    rows = rows[:12]
    targets, lengths = [np.array([t])] * len(rows), (box / 5,) * 5
    done = attacker.attack(targets, rows[:, None], box=box, lengths=lengths)
    pictures, logits, steps = zip(*done, strict=True)
    falls = attacker.margin[t] - np.concatenate(logits)
    order = np.argsort(-falls)[: max(2, (falls > 0.1 * falls.max()).sum())]
    one |= {"carriers": rows[order[:10]], "tried": rows, "falls": falls}
    one["passes"] = size + sum(steps) + len(steps)
    return one, {rows[j]: pictures[j][0] for j in order}


def flipped(one):
    """Return whether what `ladder` knows of a target has a subset that flipped it."""
    return any(one[name][0] < 0 for name in SUBSETS if name in one)


def reached(found):
    """Return a table of what `ladders` found, one row a target in the order of the draw.

    Columns: margin; fall, how far the better of two single carriers lowered it; forecast of the
    best carrier; flipped, by one; and the lowest logit that 1, 2, 3, 5 and 10 carriers left,
    missing where so many were not tried.
    """
    table = pd.DataFrame(found.values(), columns=["margin", "forecast", *SUBSETS])
    table = table.map(lambda v: np.ravel(v)[0]).astype(float)  # of several numbers the first
    table[1] = table[["1st", "2nd"]].min(axis=1)
    table["fall"], table["flipped"] = table["margin"] - table[1], table[1] < 0
    table = table.rename(columns={str(count): count for count in COUNTS})
    return table[["margin", "fall", "forecast", "flipped", *COUNTS]]


def flips(table, counts):
    """Return {1, 2, 3, 5, 10: hits (k,)}: which of the first k targets at most so many flipped.

    table : as `reached` returns; counts : as in `ladders`. Where a run was cut off only whole
    groups of eight count: where it stopped must not depend on what flipped.
    """
    hits = {}
    for count, limit in zip(COUNTS, np.repeat(counts, (1, 3, 1)), strict=True):
        left = table[[*COUNTS]][:limit]
        over = (left < 0).any(axis=1) | left[count].notna()
        k = over.cumprod().sum()
        k = k if k == limit else k - k % 8
        hits[count] = (left[:k].loc[:, :count] < 0).any(axis=1).to_numpy()
    return hits


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


def saved(picture, original):
    """Return a picture in whole levels; what lies half-way between two keeps the original's.

    So a change of half a level, the paper's box, is one that 8 bits do not hold.
    """
    change = picture.astype(float) - original
    return original + np.sign(change) * np.ceil(np.abs(change) - 0.5 - 1e-6)
