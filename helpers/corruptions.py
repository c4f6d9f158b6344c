"""Shifted test pictures: light, rain, cover, two controls, and adversarial noise.

A corruption is a pure function of (picture, severity, generator): uint8 RGB (h, w, 3) in, a new one
out. Severities go from 1 to 5 as in ImageNet-C (Hendrycks & Dietterich 2019); 3 is the thesis's own
strength where it states one. Numbers in pixels are the thesis's, for 299 pixels a side, and scale.
"""

import functools
from typing import NamedTuple

import cv2
import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

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


class Attack(NamedTuple):
    """Adversarial pictures (m, h, w, 3) in 0..255, not rounded to 8 bits, and rounds taken (m,)."""

    pictures: np.ndarray
    rounds: np.ndarray


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
    """Return the Attack on the model `backbone`, then sigmoid(weights . features + bias).

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
    return Attack(x, taken)
