"""Shifted test pictures: light, rain, cover, two controls, adversarial noise; what they change.

A corruption is a pure function of (picture, severity, generator): uint8 RGB (h, w, 3) in, a new one
out. Severities go from 1 to 5 as in ImageNet-C (Hendrycks & Dietterich 2019); 3 is the thesis's own
strength where it states one. Numbers in pixels are the thesis's, for 299 pixels a side, and scale.
n training pictures, m test pictures, d features.
"""

import functools
from typing import NamedTuple

import cv2
import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from tqdm.auto import tqdm

from helpers import fit_head, predicted_loss_change, s_test
from support import drawings, evaluation, features

LIGHT = (40, 70, 100, 130, 160)  # grey levels; thesis: 100
GAMMA = (1.5, 2.0, 2.5, 3.0, 4.0)
# how many drops (thesis: 200), streak length in pixels (30), weight of the rain in the blend (0.1)
RAIN = ((100, 20, 0.05), (150, 25, 0.07), (200, 30, 0.1), (250, 35, 0.2), (300, 40, 0.35))
COVER = (0.1, 0.2, 0.3, 0.5, 0.7)  # fraction of the object's area
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # ImageNet-C: standard deviation of pixels in 0..1
JPEG = (25, 18, 15, 10, 7)  # ImageNet-C: quality
STEP, BOX = 0.008 * 127.5, 0.01 * 127.5  # thesis: 0.008 and 0.01 of [-1, 1], here grey levels
SPREAD = np.array([[0, 0.1, 0], [0.1, 8, 0.1], [0, 0.1, 0]], np.float32)


def _level(levels, severity):
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity!r}.")
    return levels[severity - 1]


def _bytes(picture):
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def bright(picture, severity, rng=None):
    """Return the picture with grey levels added to every channel, cut off at 255."""
    return _bytes(picture.astype(float) + _level(LIGHT, severity))


def dark(picture, severity, rng=None):
    """Return the picture with grey levels taken from every channel, cut off at 0."""
    return _bytes(picture.astype(float) - _level(LIGHT, severity))


def gamma(picture, severity, rng=None):
    """Return the picture darkened by a gamma curve, which cuts nothing off."""
    return _bytes(255 * (picture / 255) ** _level(GAMMA, severity))


def rain(picture, severity, rng):
    """Return the picture behind rain: sparse noise smeared along a slanted line, blended in."""
    drops, length, weight = _level(RAIN, severity)
    noise = rng.uniform(0, 256, picture.shape[:2]).astype(np.float32)
    noise[noise < 256 - 0.1 * drops] = 0
    streaks = cv2.filter2D(cv2.filter2D(noise, -1, SPREAD), -1, _streak(length, len(picture)))
    streaks = cv2.normalize(streaks, None, 0, 255, cv2.NORM_MINMAX)
    return _bytes((1 - weight) * picture + weight * streaks[..., None] + 1)


def _streak(length, side):
    """Return the thesis's kernel: a diagonal turned by -75 degrees, shrunk and blurred."""
    pixels = max(3, round(length * side / 299))
    turn = cv2.getRotationMatrix2D((pixels / 2, pixels / 2), -30 - 45, 1 - length / 100)
    line = cv2.warpAffine(np.eye(pixels, dtype=np.float32), turn, (pixels, pixels))
    return cv2.GaussianBlur(line, (3, 3), 0)


def cover(picture, severity, rng, *, mask, position="centre", fill="mean", saliency=None):
    """Return the picture with a rectangle over a stated fraction of the object's area.

    mask : (h, w) bool, where the object is; the rectangle has the proportions of its bounding box.
    position : "centre" of the object, "random" in it, or "salient", its point of greatest
        `saliency` (h, w). fill : "mean" colour of the picture, "grey", or "blur".
    """
    rows, columns = np.nonzero(mask)
    if not len(rows):
        raise ValueError("The mask is empty: there is no object to cover.")
    if position == "centre":
        y, x = rows.mean(), columns.mean()
    elif position == "random":
        y, x = np.transpose([rows, columns])[rng.integers(len(rows))]
    elif position == "salient":
        smooth = cv2.GaussianBlur(saliency.astype(np.float32), (0, 0), len(picture) / 24)
        y, x = np.unravel_index(np.where(mask, smooth, -np.inf).argmax(), mask.shape)
    else:
        raise ValueError(f"position='{position}' is not known: 'centre', 'random' or 'salient'.")
    grid_y, grid_x = np.indices(mask.shape)
    high, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
    distance = np.maximum(abs(grid_y - y) / high, abs(grid_x - x) / wide)
    hidden = int(np.ceil(_level(COVER, severity) * len(rows)))
    covered = distance <= np.partition(distance[mask], hidden - 1)[hidden - 1]
    fills = {
        "mean": lambda: _bytes(picture.mean((0, 1))),
        "grey": lambda: np.uint8(128),
        "blur": lambda: cv2.GaussianBlur(picture, (0, 0), len(picture) / 8),
    }
    if fill not in fills:
        raise ValueError(f"fill='{fill}' is not known: {', '.join(fills)}.")
    return np.where(covered[..., None], fills[fill](), picture)


def noise(picture, severity, rng):
    """Return the picture with Gaussian noise in every channel (ImageNet-C)."""
    return _bytes(picture + 255 * _level(NOISE, severity) * rng.normal(size=picture.shape))


def jpeg(picture, severity, rng=None):
    """Return the picture after JPEG compression (ImageNet-C's qualities)."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, _level(JPEG, severity)]
    file = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), quality)[1]
    return cv2.cvtColor(cv2.imdecode(file, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


CAMERA = {
    "bright": bright,
    "dark": dark,
    "gamma": gamma,
    "rain": rain,
    "cover": cover,
    "JPEG": jpeg,
    "noise": noise,
}


def corrupt(pictures, corruption, severity, *, seed=0, **each):
    """Return the corruption of all pictures (m, h, w, 3) uint8, as a new array.

    Picture j has a generator of its own, from (seed, j): it meets the same drops at every severity
    and in every selection that keeps its place. each : arguments with one entry a picture.
    """
    shifted = np.empty_like(pictures)
    for j, picture in enumerate(tqdm(pictures, desc="corrupting", unit="picture", leave=False)):
        own = {name: values[j] for name, values in each.items()}
        shifted[j] = corruption(picture, severity, np.random.default_rng([seed, j]), **own)
    return shifted


@functools.lru_cache(maxsize=4)
def _graphs(backbone):
    """Return the compiled (slope, ascend) of a backbone and any linear head on it."""

    def slope(x, weights):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            logit = tf.linalg.matvec(
                backbone.model(backbone.preprocess(x), training=False), weights
            )
        return logit, tape.gradient(logit, x)

    def ascend(x, low, high, taken, towards, weights, bias, step, stop, rounds):
        for _ in tf.range(rounds):
            logit, gradient = slope(x, weights)
            active = tf.sigmoid(towards * (logit + bias)) < stop
            if not tf.reduce_any(active):
                break
            along = step * towards[:, None, None, None] * tf.sign(gradient)
            moved = tf.clip_by_value(x + along, low, high)
            x = tf.where(active[:, None, None, None], moved, x)
            taken += tf.cast(active, tf.int32)
        return x, taken

    return tuple(tf.function(f, reduce_retracing=True) for f in (slope, ascend))


def input_gradient(pictures, backbone, weights, *, batch_size=32):
    """Return d(weights . features) / d picture, (m, h, w, 3) per grey level: one VJP a batch."""
    dtype = backbone.model.compute_dtype
    slope, weights = _graphs(backbone)[0], tf.constant(np.ravel(weights), dtype)
    starts = range(0, len(pictures), batch_size)
    batches = (tf.constant(np.asarray(pictures[i : i + batch_size], dtype)) for i in starts)
    return np.concatenate([slope(x, weights)[1].numpy() for x in batches])


def attack(pictures, labels, backbone, weights, *, bias=0.0, step=STEP, box=BOX, rounds=51,
           stop=0.9, seed=None, batch_size=32):  # fmt: skip
    """Return adversarial pictures (m, h, w, 3) in 0..255, not rounded, and rounds taken (m,).

    They attack the model `backbone`, then sigmoid(weights . features + bias):

    x <- clip(x + step sign(d p(wrong) / d x)) in the box around the picture and in 0..255, until
    p(wrong) >= stop before the step, or for all rounds; the logit's gradient has the same sign.
    Rounds run on the device; between 3, 6, 12, ... of them what is unfinished is batched anew.

    step, box : grey levels. stop : above 1 never. seed : a random start in the box (PGD).
    """
    dtype = backbone.model.compute_dtype
    clean, taken = np.asarray(pictures, dtype), np.zeros(len(pictures), np.int32)
    low, high = np.maximum(clean - box, 0), np.minimum(clean + box, 255)
    x, towards = clean.copy(), (1 - 2 * np.ravel(labels)).astype(dtype)
    if seed is not None:
        x = np.random.default_rng(seed).uniform(low, high).astype(dtype)
    head = [tf.constant(v, dtype) for v in (np.ravel(weights), bias, step, stop)]
    done, active = 0, np.arange(len(x))
    with tqdm(total=len(x), desc="attacking", unit="picture", leave=False) as bar:
        while done < rounds and len(active):
            some = min(max(3, done), rounds - done)
            for start in range(0, len(active), batch_size):
                j = active[start : start + batch_size]
                state = (tf.constant(a[j]) for a in (x, low, high, taken, towards))
                x[j], taken[j] = _graphs(backbone)[1](*state, *head, tf.constant(some))
            done, active = done + some, active[taken[active] == done + some]
            bar.update(len(x) - len(active) - bar.n)
    return x, taken


# ---------------------------------------------------------------- the study


def in_turn(labels, k, *, seed=0):
    """Return k row numbers of labels (m,) 0 or 1, one of each class in turn, else at random."""
    rngs = [np.random.default_rng([seed, 12, c]) for c in (0, 1)]
    rows = [rng.permutation(np.flatnonzero(labels == c))[: k // 2] for c, rng in enumerate(rngs)]
    return np.stack(rows, axis=1).ravel()


def is_drawn(table):
    """Return whether all pictures of a manifest are drawings, whose outlines are known."""
    return "scene" in table.columns


def object_masks(table, size):
    """Return where the objects are, (m, size, size) bool.

    The outline of a drawing; of a photograph the centred box of half the side.
    """
    if is_drawn(table):
        rows = table.to_dict("records")
        return np.stack([drawings.silhouette(r, seed=r["seed"], size=size) for r in rows])
    half = np.abs(np.arange(size) - (size - 1) / 2) < size / 4
    return np.repeat((half[:, None] & half)[None], len(table), axis=0)


def surrogate(data, epochs):
    """Return the thesis's attacked head on Vehicles, {"weights": (d,), "bias": number} of a logit.

    A softmax with a bias, trained by gradient descent on the features.
    """
    layers = [keras.Input((data.x_train.shape[1],)), keras.layers.Dense(2, activation="softmax")]
    model, decaying = keras.Sequential(layers), keras.optimizers.schedules.InverseTimeDecay
    rate = decaying(0.001, 1, 0.001)
    model.compile(keras.optimizers.SGD(rate), keras.losses.SparseCategoricalCrossentropy())
    model.fit(data.x_train, data.y_train, batch_size=100, epochs=epochs, verbose=0)
    kernel, bias = model.get_weights()
    return {"weights": kernel[:, 1] - kernel[:, 0], "bias": bias[1] - bias[0]}


class Attacked(NamedTuple):
    """Features (m, d) of attacked pictures and of the same in 8 bits, and rounds taken (m,)."""

    phi: np.ndarray
    rounded: np.ndarray
    rounds: np.ndarray


def measure(pictures, backbone, keep):
    """Return the features (m, d) of pictures, float64; `keep` is a stored.checkpoint."""
    found = keep([pictures, backbone], lambda: features.measure(pictures, backbone))
    return found.astype(float)


def measure_attacked(pictures, y, backbone, keep, weights, *, bias=0.0, **options):
    """Return the Attacked of pictures with labels y (m,); options as in `attack`."""

    def compute():
        attacked, rounds = attack(pictures, y, backbone, weights, bias=bias, **options)
        both = [features.measure(x, backbone) for x in (attacked, np.rint(attacked))]
        return np.hstack([*both, rounds[:, None]])

    values = keep([pictures, y, weights, bias, options, backbone], compute)
    phi, rounded = np.split(values[:, :-1].astype(float), 2, axis=1)
    return Attacked(phi, rounded, values[:, -1])


def kept(changes, clean):
    """Return how much of the most helpful training pictures stays, a row a test picture.

    changes, clean : (m, n), predicted loss changes on the shifted and on the clean pictures.
    "shared of k" of the k most helpful.
    """
    found = {}
    for k in (5, 10):
        new, old = (np.argsort(-c, axis=1, kind="stable")[:, :k] for c in (changes, clean))
        found[f"shared of {k}"] = (new[:, :, None] == old[:, None]).sum((1, 2)) / k
    return pd.DataFrame(found)


def describe(changes, clean, wrong, wrong_clean, same_kind):
    """Return what a shift does to the influences on m test pictures, a row a picture.

    "loss" and "logit" are ratios of variances, shifted over clean, of the influences on the loss
    and on the logit, which are those without the residual.
    changes, clean : (m, n), as in `kept`; wrong, wrong_clean : (m,), 1 - p(true) on both;
    same_kind : (m, n) bool, training pictures of the test picture's kind.
    """
    size, norms = np.abs(changes), np.linalg.norm(changes, axis=1) * np.linalg.norm(clean, axis=1)
    scale, ratio = wrong / wrong_clean, changes.var(1) / clean.var(1)
    columns = {
        "p drop": wrong - wrong_clean,
        "scale": scale,
        "variance": changes.var(1),
        "loss": ratio,
        "logit": ratio / scale**2,
        "r with clean": (changes * clean).sum(1) / norms,
        "same kind": (size * same_kind).sum(1) / size.sum(1),
    }
    return pd.DataFrame(columns).join(kept(changes, clean))


def bootstrap_changes(head, x, y, seed):
    """Return the predicted loss changes (m, n) of a head trained on a bootstrap sample.

    The influences of all n training pictures, each once, on examples x (m, d), y; only theta is
    that of the sample. head : the objective of all pictures, which stays as it is.
    """
    rows = np.random.default_rng(seed).integers(0, head.n, head.n)
    sample = head.subset(rows)
    with head.at(head.theta):
        fit_head(sample)  # the model is shared
        return predicted_loss_change(head, s_test(head, x, y, damping=0.0))


def speedups(pictures, y, backbone, weights):
    """Return the time a picture of two other ways to attack, over that of batches of 16.

    "compiled": a compiled loop over single pictures; "original": a new graph for each picture.
    """
    how = {"backbone": backbone, "weights": weights, "rounds": 2, "stop": 2.0}
    batched = functools.partial(attack, pictures[:16], y[:16], **how)
    compiled = functools.partial(attack, pictures[:4], y[:4], **how, batch_size=1)
    original = functools.partial(_one_graph, pictures[0], y[0], backbone, weights)
    ways = {"compiled": (compiled, 4), "original": (original, 1)}
    ratio = functools.partial(evaluation.time_ratio, batched, repeats=3)
    return {name: 16 / k / ratio(way) for name, (way, k) in ways.items()}


def _one_graph(picture, label, backbone, weights):
    """Attack a picture as the original did, two rounds: its own gradient operations, one by one."""
    dtype = backbone.model.compute_dtype
    slope, _ = _graphs.__wrapped__(backbone)  # traced anew: no other picture meets this graph
    x, weights = picture[None].astype(dtype), tf.constant(weights, dtype)
    for _ in range(2):
        along = (1 - 2 * label) * np.sign(slope(tf.constant(x), weights)[1].numpy())
        x = np.clip(x + STEP * along, picture - BOX, picture + BOX).astype(dtype)
