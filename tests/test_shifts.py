"""Shifted pictures: pure, seeded, as strong as asked; attacks in their box, with true slopes."""

import functools

import keras
import numpy as np
import pytest

from studies import shifts
from support import datasets, drawings, features

SIZE = 48
PLAIN = ("bright", "dark", "gamma", "rain", "noise", "jpeg")
MANIFEST = datasets.rendered(seed=0).iloc[:2600:300].reset_index(drop=True)


@pytest.fixture(scope="module")
def pictures():
    return datasets.pictures(MANIFEST, SIZE)


@pytest.fixture(scope="module")
def masks():
    return np.stack([drawings.silhouette(row, size=SIZE) for row in MANIFEST.to_dict("records")])


@pytest.fixture(scope="module")
def backbone():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((SIZE, SIZE, 3), dtype="float64")
    x = keras.layers.Conv2D(4, 5, strides=3, activation="tanh")(inputs)
    outputs = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(6, 3)(x))
    return features.Backbone("small", keras.Model(inputs, outputs), lambda x: x / 127.5 - 1, SIZE)


@pytest.fixture(scope="module")
def problem(pictures, backbone):
    """Weights and a bias that put the pictures on both sides, and the labels the model predicts."""
    phi = features.measure(pictures, backbone).astype(float)
    weights = 400 * np.linalg.svd(phi - phi.mean(0))[2][0]
    bias = -float(np.median(phi @ weights))
    return weights, bias, (phi @ weights + bias > 0).astype(float)


def shifted(name, pictures, masks, severity, seed=0):
    each = {"mask": masks} if name == "cover" else {}
    return shifts.corrupt(pictures, getattr(shifts, name), severity, seed=seed, **each)


@pytest.mark.parametrize("name", [*PLAIN, "cover"])
def test_pure_seeded_bytes(name, pictures, masks):
    before = pictures.copy()
    first = shifted(name, pictures, masks, 3)
    np.testing.assert_array_equal(pictures, before)
    assert first.dtype == np.uint8
    assert first.shape == pictures.shape
    assert not np.shares_memory(first, pictures)
    np.testing.assert_array_equal(first, shifted(name, pictures, masks, 3))
    np.testing.assert_array_equal(first[:3], shifted(name, pictures[:3], masks[:3], 3))
    other = shifted(name, pictures, masks, 3, seed=1)
    assert (first != other).any() == (name in ("rain", "noise"))


@pytest.mark.parametrize("name", [*PLAIN, "cover"])
def test_severity_takes_every_picture_farther_away(name, pictures, masks):
    levels = [shifted(name, pictures, masks, severity) for severity in (1, 2, 3, 4, 5)]
    away = [np.abs(p.astype(float) - pictures).mean((1, 2, 3)) for p in levels]
    assert (away[0] > 0).all()
    # compression artefacts of one picture may shrink from one quality to the next
    steps = np.diff(away, axis=0).mean(1) if name == "jpeg" else np.diff(away, axis=0)
    assert (steps > 0).all()
    for severity in (0, 6, 2.5):
        with pytest.raises(ValueError, match="severity"):
            shifted(name, pictures, masks, severity)


def test_the_thesis_numbers_are_severity_three(pictures):
    picture = pictures[0].astype(int)
    np.testing.assert_array_equal(shifts.bright(pictures[0], 3), np.clip(picture + 100, 0, 255))
    np.testing.assert_array_equal(shifts.dark(pictures[0], 3), np.clip(picture - 100, 0, 255))
    assert np.isclose(shifts.STEP / 127.5, 0.008)
    assert np.isclose(shifts.BOX / 127.5, 0.01)


def test_rain_is_a_blend_of_the_picture_and_sparse_bright_streaks(pictures):
    rained = shifts.rain(pictures[0], 3, np.random.default_rng(0))
    rain = (rained - 0.9 * pictures[0] - 1) / 0.1  # what was blended in, up to rounding
    assert rain.min() > -6
    assert rain.max() < 261
    assert np.abs(np.diff(rain, axis=2)).max() < 11  # grey
    drops = (np.random.default_rng(0).uniform(0, 256, (2000, 2000)) >= 236).mean()
    assert drops == pytest.approx(20 / 256, rel=0.02)


def test_streaks_slant_and_grow_with_the_picture():
    small, large = shifts._streak(30, 100), shifts._streak(30, 299)
    assert (small.shape, large.shape) == ((10, 10), (30, 30))
    rows, columns = np.nonzero(large > 0.1)
    lean = np.polyfit(rows, columns, 1)[0]  # across per down: -75 degrees from the diagonal
    assert abs(lean) == pytest.approx(np.tan(np.deg2rad(30)), abs=0.1)


@pytest.mark.parametrize("position", ["centre", "random", "salient"])
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_cover_hides_the_fraction_of_the_object_that_was_asked(position, severity, masks):
    rng = np.random.default_rng(0)
    for mask in masks:
        picture = rng.integers(1, 255, (SIZE, SIZE, 3)).astype(np.uint8)
        saliency = rng.random(mask.shape)
        cover = functools.partial(shifts.cover, mask=mask, saliency=saliency)
        away = cover(picture, severity, rng, position=position, fill="mean") != picture
        hidden = away.any(2)
        asked = shifts.COVER[severity - 1]
        edge = 2 * sum(np.ptp(axis) + 1 for axis in np.nonzero(mask)) / mask.sum()
        assert asked - 0.01 <= hidden[mask].mean() <= asked + edge
        rows, columns = np.nonzero(hidden)
        box = hidden[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.mean() > 0.95  # a rectangle, but for pixels of the very colour of the fill


def test_cover_goes_where_it_is_told_and_fills_as_told(pictures):
    mask = np.zeros((SIZE, SIZE), bool)
    mask[8:40, 8:40] = True
    saliency = np.zeros(mask.shape)
    saliency[12, 34] = saliency[2, 2] = 1  # the second lies outside the object
    picture = pictures[0]

    def hidden(**options):
        rng = np.random.default_rng(3)
        return shifts.cover(picture, 1, rng, mask=mask, fill="grey", **options) == 128

    for options, centre in (
        ({}, (23.5, 23.5)),
        ({"position": "salient", "saliency": saliency}, (12, 34)),
    ):
        where = np.transpose(np.nonzero(hidden(**options).all(2) & mask)).mean(0)
        np.testing.assert_allclose(where, centre, atol=2)
    blurred = shifts.cover(picture, 5, None, mask=mask, fill="blur")
    assert blurred[16:32, 16:32].std() < picture[16:32, 16:32].std()
    with pytest.raises(ValueError, match="position"):
        hidden(position="corner")
    with pytest.raises(ValueError, match="empty"):
        shifts.cover(picture, 1, None, mask=mask & False)
    with pytest.raises(ValueError, match="fill"):
        shifts.cover(picture, 1, None, mask=mask, fill="holes")


def test_the_silhouette_is_where_the_object_was_drawn(masks):
    """Pictures of one scene in two paints differ where the object (or its shadow) is."""
    assert masks.mean((1, 2)).min() > 0.01
    row = MANIFEST.iloc[0].to_dict()
    sub = {**row, "background": "sky", "flag": ""}  # no shadow
    canvas = drawings.draw(sub, size=SIZE).astype(int)
    other = drawings.draw({**sub, "subtype": "taxi"}, size=SIZE).astype(int)
    union = drawings.silhouette(sub, size=SIZE) | drawings.silhouette(
        {**sub, "subtype": "taxi"}, size=SIZE
    )
    changed = np.abs(canvas - other).max(2) > 60
    assert changed.sum() > 20
    assert union[changed].mean() > 0.9


def test_input_gradient_equals_finite_differences(pictures, backbone, problem):
    weights, _, _ = problem
    gradient = shifts.input_gradient(pictures, backbone, weights, batch_size=4)
    rng = np.random.default_rng(0)
    direction = rng.normal(size=pictures.shape)

    def logit(step):
        x = backbone.preprocess(pictures + step * direction)
        return np.asarray(backbone.model(x)) @ weights

    difference = (logit(1e-3) - logit(-1e-3)) / 2e-3
    np.testing.assert_allclose((gradient * direction).sum((1, 2, 3)), difference, rtol=1e-6)


def one_picture_at_a_time(picture, label, backbone, weights, bias, rounds):
    """The thesis's loop, written out: ascend p(wrong), stop before the step at 0.9."""
    x, taken = picture.astype(float), 0
    for _ in range(rounds):
        logit = np.asarray(backbone.model(backbone.preprocess(x[None])))[0] @ weights + bias
        p_wrong = 1 / (1 + np.exp(logit if label else -logit))
        if p_wrong >= 0.9:
            break
        slope = shifts.input_gradient(x[None], backbone, weights)[0] * (-1 if label else 1)
        x = np.clip(x + shifts.STEP * np.sign(slope), picture - 1.275, picture + 1.275)
        x, taken = np.clip(x, 0, 255), taken + 1
    return x, taken


def test_the_batched_attack_is_the_one_picture_loop(pictures, backbone, problem):
    weights, bias, labels = problem
    before = pictures.copy()
    attacked, rounds = shifts.attack(
        pictures, labels, backbone, weights, bias=bias, rounds=7, batch_size=4
    )
    for j, picture in enumerate(pictures):
        x, taken = one_picture_at_a_time(picture, labels[j], backbone, weights, bias, 7)
        np.testing.assert_allclose(attacked[j], x, atol=1e-9)
        assert rounds[j] == taken
    assert len(set(rounds)) > 1  # some stopped early, or the test shows nothing of it
    np.testing.assert_array_equal(pictures, before)


@pytest.mark.parametrize("seed", [None, 5])
def test_attacks_stay_in_the_box_and_the_range_and_lower_p_true(seed, pictures, backbone, problem):
    weights, bias, labels = problem
    extreme = np.where(pictures > 128, np.uint8(255), pictures)  # the range must bite
    attacked, rounds = shifts.attack(
        extreme,
        labels,
        backbone,
        weights,
        bias=bias,
        step=0.5,
        box=2.0,
        rounds=6,
        stop=2,
        seed=seed,
    )
    assert np.abs(attacked - extreme).max() <= 2 + 1e-9
    assert attacked.min() >= 0
    assert attacked.max() <= 255
    assert (rounds == 6).all()
    towards = 1 - 2 * labels
    logit = [features.measure(x, backbone) @ weights * towards for x in (extreme, attacked)]
    assert (logit[1] > logit[0]).all()


def test_measured_features_are_the_manifests_own(tmp_path, pictures, backbone):
    whole = features.extract(MANIFEST, backbone, cache=tmp_path)
    np.testing.assert_allclose(features.measure(pictures, backbone, batch_size=4), whole, rtol=1e-6)
