"""Attacks on training pictures: gradients by finite differences, refits one by one, invariants."""

import keras
import numpy as np
import pytest
from conftest import BINARY

from helpers import Objective, fit_head, influence_wrt_input, s_test
from studies import attacks
from support import models, stored
from support.features import Backbone

TARGETS = [np.array([0]), np.array([1]), np.array([2, 3, 4])]
CARRIERS = [np.array([3]), np.array([7, 3]), np.array([11, 20, 5])]


@pytest.fixture(scope="module")
def setting():
    """A smooth backbone of random weights, 60 pictures with levels at both ends, a fitted head."""
    keras.utils.set_random_seed(5)
    layers = keras.layers
    network = keras.Sequential(
        [
            keras.Input((10, 10, 3)),
            layers.Conv2D(6, 3, activation="tanh"),
            layers.Conv2D(9, 3, strides=2, activation="tanh"),
            layers.GlobalAveragePooling2D(),
        ]
    )
    backbone = Backbone("smooth", network, lambda x: x / 64 - 2, 10)
    rng = np.random.default_rng(5)
    images = np.clip(rng.normal(128, 90, (75, 10, 10, 3)), 0, 255).astype(np.uint8)
    phi = network.predict(images / 64 - 2, verbose=0)
    scores = phi @ rng.normal(size=9)
    y = (scores > np.median(scores)).astype(float)
    objective = Objective(models.linear_head(9), BINARY, phi[:60], y[:60], weight_decay=1e-3)
    fit_head(objective)
    return attacks.Attacks(objective, backbone, images[:60], phi[60:], y[60:], batch=4)


def mean_losses(setting, targets, carriers, pictures):
    logits, _ = setting.judge(targets, carriers, pictures)
    return np.array([np.logaddexp(0, -z).mean() for z in logits])


def test_the_pull_is_the_derivative_of_the_influence_in_the_pixels(setting):
    """J' c against reverse-over-reverse through backbone and head, in the picture's own levels."""
    rows, s = np.array([0, 9, 31]), setting.directions(TARGETS[:1])[:, 0]
    phi, pull = setting.see(setting.images[rows])
    ours = pull(attacks.cotangent(s, phi, setting.y[rows], setting.theta))
    inputs = keras.Input((10, 10, 3))
    head = keras.layers.Dense(1, use_bias=False)
    whole = keras.Model(
        inputs, head(setting.backbone.model(keras.layers.Rescaling(1 / 64, offset=-2)(inputs)))
    )
    head.kernel.assign(setting.theta[:, None])
    images = setting.images.astype(float)
    objective = Objective(whole, BINARY, images, setting.y, parameters="last_layer")
    reference = influence_wrt_input(objective, s, images[rows], setting.y[rows])
    np.testing.assert_allclose(ours, reference, rtol=1e-9, atol=1e-14)


def test_the_test_loss_after_a_refit_moves_by_minus_the_gradient_over_n(setting):
    """Finite differences through picture, backbone, refit and test loss: sign and size."""
    rows, v = np.array([9]), np.random.default_rng(0).normal(size=(1, 10, 10, 3))
    s = setting.directions(TARGETS[2:])
    phi, pull = setting.see(setting.images[rows])
    g = pull(attacks.cotangent(s.T, phi, setting.y[rows], setting.theta))
    losses = [
        mean_losses(setting, TARGETS[2:], [rows], [setting.images[rows] + e * v])[0]
        for e in (0.02, -0.02)
    ]
    slope = (losses[0] - losses[1]) / 0.04
    np.testing.assert_allclose(slope, -(g * v).sum() / len(setting.y), rtol=1e-4)


def test_an_attack_raises_the_test_loss_and_the_opposite_lowers_it(setting):
    clean = mean_losses(setting, TARGETS, CARRIERS, [setting.images[c] for c in CARRIERS])
    pictures = setting.attack(TARGETS, CARRIERS, box=1.0, step=0.5, steps=4)
    mirrored = [2.0 * setting.images[c] - x for c, x in zip(CARRIERS, pictures, strict=True)]
    live = clean < np.log(2)  # an attack stops where its test pictures are misnamed already
    assert live.any()
    assert (mean_losses(setting, TARGETS, CARRIERS, pictures) > clean)[live].all()
    assert (mean_losses(setting, TARGETS, CARRIERS, mirrored) < clean)[live].all()


def replaced(setting, carriers, phi):
    """Return the Objective, at its minimum, of the data with one attack's features."""
    x = setting.phi.copy()
    x[carriers] = phi
    objective = Objective(models.linear_head(9), BINARY, x, setting.y, weight_decay=1e-3)
    fit_head(objective)
    return objective


def test_refits_together_equal_refits_one_by_one(setting):
    phi = setting.phi[np.concatenate(CARRIERS)] + np.random.default_rng(1).normal(size=(6, 9))
    owner, parts = np.repeat([0, 1, 2], [1, 2, 3]), np.split(phi, [1, 3])
    fits, solve = setting.refits.fit(np.concatenate(CARRIERS), owner, phi, tol=1e-11)
    g = np.random.default_rng(2).normal(size=(9, 3))
    s = solve(g, rtol=1e-12)
    for j, (rows, part) in enumerate(zip(CARRIERS, parts, strict=True)):
        single = replaced(setting, rows, part)
        np.testing.assert_allclose(fits.theta[:, j], single.theta, atol=1e-8)
        assert np.linalg.norm(single.head.gradient(fits.theta[:, j])) <= 1e-10
        np.testing.assert_allclose(single.head.hessian(single.theta) @ s[:, j], g[:, j], atol=1e-7)


def test_directions_at_the_clean_head_are_s_test(setting):
    for tests, ours in zip(TARGETS, setting.directions(TARGETS).T, strict=True):
        x, y = setting.x_test[tests], setting.y_test[tests]
        reference = s_test(setting.objective, x, y, damping=0.0).x.mean(1)
        np.testing.assert_allclose(ours, reference, rtol=1e-8, atol=1e-12)


def test_scores_and_cotangent_norms(setting):
    s, rows = setting.directions(TARGETS), np.arange(10)
    phi, pull = setting.see(setting.images[rows])
    norms = setting.cotangent_norms(s)[rows]
    for j in range(3):
        c = attacks.cotangent(s[:, j], phi, setting.y[rows], setting.theta)
        np.testing.assert_allclose(norms[:, j], np.linalg.norm(c, axis=1), rtol=1e-9)
        scores = setting.scores(s[:, j], rows)
        np.testing.assert_allclose(scores, np.abs(pull(c)).sum((1, 2, 3)), rtol=1e-9)


@pytest.mark.parametrize("box", [0.5, 3.0])
def test_box_and_range_are_kept_and_used(setting, box):
    pictures = setting.attack(TARGETS, CARRIERS, box=box, step=box / 2, steps=5)
    for rows, x in zip(CARRIERS, pictures, strict=True):
        change = x - setting.images[rows]
        assert np.abs(change).max() <= box + 1e-9
        assert np.abs(change).max() >= box - 1e-9 or not change.any()
        assert x.min() >= 0
        assert x.max() <= 255


def test_the_batch_does_not_matter(setting):
    together = setting.attack(TARGETS, CARRIERS, steps=5)
    other = attacks.Attacks(
        setting.objective, setting.backbone, setting.images, setting.x_test, setting.y_test
    )
    for a, b in zip(together, other.attack(TARGETS, CARRIERS, steps=5), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


def test_an_attack_that_has_succeeded_is_left_alone(setting):
    wrong = np.flatnonzero(setting.true_logits(setting.theta, np.arange(15)) < 0)
    targets = [wrong[:1]] if len(wrong) else pytest.skip("no misnamed test picture")
    np.testing.assert_array_equal(
        setting.attack(targets, CARRIERS[:1])[0], setting.images[CARRIERS[0]]
    )


def test_an_interrupted_run_goes_on_where_it_was(setting, tmp_path, monkeypatch):
    whole = setting.attack(TARGETS, CARRIERS, steps=3)
    calls, see = [], attacks.Attacks.see

    def counted(self, x):
        calls.append(len(x))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return see(self, x)

    monkeypatch.setattr(attacks.Attacks, "see", counted)
    monkeypatch.setattr(setting, "keep", stored.checkpoint(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        setting.attack(TARGETS, CARRIERS, steps=3)
    monkeypatch.setattr(setting, "theta", setting.theta * (1 + 1e-15))  # of another run's fit
    again = setting.attack(TARGETS, CARRIERS, steps=3)
    assert len(calls) == 6 + 4  # the finished batch was not done again, the other one was
    for a, b in zip(whole, again, strict=True):
        np.testing.assert_array_equal(a, b)
    setting.attack(TARGETS, CARRIERS, steps=3, box=0.4)
    assert len(calls) > 10  # other settings, other files


def test_carriers_are_chosen_by_the_papers_criterion(setting):
    """With everything on the shortlist: by L1 norm of all training pictures."""
    rows, scores = attacks.choose(setting, TARGETS, 60)
    for j, s in enumerate(setting.directions(TARGETS).T):
        everyone = setting.scores(s, np.arange(60))
        np.testing.assert_array_equal(rows[j], np.argsort(-everyone))
        np.testing.assert_allclose(scores[j], everyone[rows[j]], rtol=1e-9)


def test_more_and_more_carriers_until_each_flips(setting):
    """What is recorded of each test picture is what refits with its pictures show."""
    targets = list(np.flatnonzero(setting.margin > 0)[:4, None])
    rows, _ = attacks.choose(setting, targets, 10)
    settings = {"box": 8.0, "step": 4.0, "steps": 3}
    ladder = attacks.one_by_one(setting, targets, rows, [1, 2, 5], **settings)
    logits, _ = setting.judge(targets, ladder.carriers, ladder.pictures)
    np.testing.assert_allclose(ladder.left, np.concatenate(logits), atol=1e-9)
    assert (ladder.left <= setting.margin[np.concatenate(targets)]).all()
    np.testing.assert_array_equal(ladder.needed > 0, ladder.left < 0)
    for needed, own, x in zip(ladder.needed, ladder.carriers, ladder.pictures, strict=True):
        assert needed in (0, len(own))
        assert np.abs(x - setting.images[own]).max() <= 8 + 1e-9


def test_half_a_level_is_lost_when_saved_and_a_whole_one_is_kept():
    original = np.array([10.0, 11.0, 0.0, 255.0])
    for change, kept in ((0.5, 0), (-0.5, 0), (0.75, 1), (-1.0, -1), (2.25, 2)):
        np.testing.assert_array_equal(attacks.saved(original + change, original), original + kept)


def test_a_head_with_a_bias_is_refused(setting):
    head = models.linear_head(9, use_bias=True)
    objective = Objective(head, BINARY, setting.phi, setting.y, weight_decay=1e-3, decayed="all")
    fit_head(objective)
    with pytest.raises(ValueError, match="without a bias"):
        attacks.Attacks(objective, setting.backbone, setting.images, setting.x_test, setting.y_test)
