"""Attacks on training pictures: gradients by finite differences, refits one by one, invariants."""

import json
from inspect import signature
from types import SimpleNamespace

import keras
import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import BINARY

from helpers import Objective, fit_head, influence_wrt_input, s_test
from studies import attacks
from support import models, run
from support.features import Backbone
from support.vehicles import Vehicles, fitted_head

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
    rows = pd.DataFrame(index=range(75))
    data = Vehicles(rows[:60], rows[60:], phi[:60], y[:60], phi[60:], y[60:])
    return attacks.Attacks(data, fitted_head(data, 1e-3), backbone, images[:60], batch=4)


def mean_losses(setting, targets, carriers, pictures):
    logits = setting.refitted(targets, carriers, setting.features(np.concatenate(pictures)))
    return np.array([np.logaddexp(0, -z).mean() for z in logits])


def gradient_norm(setting, tests):
    """Return the length of the mean loss gradient that `directions` scales to 1."""
    push = 1 / (1 + np.exp(setting.true_logits(setting.theta, tests)))
    return np.linalg.norm(
        (push * (1 - 2 * setting.data.y_test[tests])) @ setting.data.x_test[tests]
    ) / len(tests)


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
    s = setting.directions(TARGETS[2:]) * gradient_norm(setting, TARGETS[2])
    phi, pull = setting.see(setting.images[rows])
    g = pull(attacks.cotangent(s.T, phi, setting.y[rows], setting.theta))
    losses = [
        mean_losses(setting, TARGETS[2:], [rows], [setting.images[rows] + e * v])[0]
        for e in (0.02, -0.02)
    ]
    slope = (losses[0] - losses[1]) / 0.04
    np.testing.assert_allclose(slope, -(g * v).sum() / len(setting.y), rtol=1e-4)


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
        x, y = setting.data.x_test[tests], setting.data.y_test[tests]
        reference = s_test(setting.objective, x, y, damping=0.0).x.mean(1)
        ours = ours * gradient_norm(setting, tests)
        np.testing.assert_allclose(ours, reference, rtol=1e-8, atol=1e-12)


def test_the_shortlist_is_in_the_order_of_the_papers_criterion(setting):
    """With everything on it: by L1 norm of J' c of all training pictures, one by one."""
    s = setting.directions(TARGETS[:1])[:, 0]
    scores = []
    for i in range(60):
        phi, pull = setting.see(setting.images[[i]])
        scores.append(np.abs(pull(attacks.cotangent(s, phi, setting.y[[i]], setting.theta))).sum())
    rows, found = setting.shortlist(TARGETS[0], 60)
    np.testing.assert_array_equal(rows, np.argsort(-np.array(scores)))
    np.testing.assert_allclose(found, np.array(scores)[rows], rtol=1e-9)
    c = attacks.cotangent(s, setting.phi, setting.y, setting.theta)
    np.testing.assert_array_equal(
        np.sort(setting.shortlist(TARGETS[0], 7)[0]),
        np.sort(np.argsort(-np.linalg.norm(c, axis=1))[:7]),
    )


STEPS = (0.5,) * 4


def attacked(setting, targets, carriers, **how):
    """Return pictures, logits and steps, each of all attacks."""
    return zip(*setting.attack(targets, carriers, **how), strict=True)


def test_an_attack_raises_the_test_loss_and_the_opposite_lowers_it(setting):
    clean = mean_losses(setting, TARGETS, CARRIERS, [setting.images[c] for c in CARRIERS])
    pictures, _, _ = attacked(setting, TARGETS, CARRIERS, box=1.0, lengths=STEPS, stop=False)
    mirrored = [2.0 * setting.images[c] - x for c, x in zip(CARRIERS, pictures, strict=True)]
    assert (mean_losses(setting, TARGETS, CARRIERS, pictures) > clean).all()
    assert (mean_losses(setting, TARGETS, CARRIERS, mirrored) < clean).all()


@pytest.mark.parametrize("box", [0.5, 3.0])
def test_box_and_range_are_kept_and_used(setting, box):
    done = setting.attack(TARGETS, CARRIERS, box=box, lengths=(box / 2,) * 5, stop=False)
    for rows, (x, _, _) in zip(CARRIERS, done, strict=True):
        assert np.abs(x - setting.images[rows]).max() == pytest.approx(box)
        assert x.min() >= 0
        assert x.max() <= 255


def test_what_is_reported_is_what_refits_with_the_pictures_show(setting):
    """Full refits from nothing, with the altered features in place, against the batched ones."""
    done = setting.attack(TARGETS, CARRIERS, box=4.0, lengths=STEPS)
    for tests, rows, (x, z, _) in zip(TARGETS, CARRIERS, done, strict=True):
        theta = replaced(setting, rows, setting.features(x)).theta
        np.testing.assert_allclose(z, setting.true_logits(theta, tests), atol=1e-5)


def test_the_batch_does_not_matter(setting):
    together = setting.attack(TARGETS, CARRIERS, lengths=STEPS)
    other = attacks.Attacks(
        setting.data, setting.objective, setting.backbone, setting.images, batch=40
    ).attack(TARGETS, CARRIERS, lengths=STEPS)
    for (a, _, steps), (b, _, others) in zip(together, other, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
        assert steps == others


def test_an_attack_stops_when_its_test_pictures_are_misnamed(setting):
    tests = attacks.draw(setting, 0, 6)
    assert (setting.margin[tests] > 0).all()
    targets, carriers = list(tests[:, None]), [CARRIERS[2]] * len(tests)
    how = {"box": 60.0, "lengths": (10.0,) * 12}
    pictures, logits, steps = attacked(setting, targets, carriers, **how)
    flips, steps = np.concatenate(logits) < 0, np.array(steps)
    assert flips.any()
    assert (steps[flips] < 12).any()
    assert (steps[~flips] == 12).all()
    _, _, again = attacked(setting, targets, carriers, start=pictures, **how)
    assert (np.array(again)[flips] == 0).all()


def test_more_carriers_from_where_fewer_ended_never_do_less(setting):
    """The better attacker's falls are monotone in the box and in the number of carriers."""
    targets, rows = [np.array([t]) for t in attacks.draw(setting, 0, 4)], np.array([3, 7, 20])
    left, pictures = setting.margin[np.concatenate(targets)], [setting.images[:0]] * 4
    for box in (0.5, 1.0, 2.0):
        for count in (1, 2, 3) if box == 0.5 else (3,):
            start = [
                np.concatenate([x[:count], setting.images[rows[len(x) : count]]]) for x in pictures
            ]
            how = {"start": start, "box": box, "lengths": (box / 4,) * 4, "stop": False}
            pictures, logits, _ = attacked(setting, targets, [rows[:count]] * 4, **how)
            assert (np.concatenate(logits) <= left + 1e-7).all()
            left = np.concatenate(logits)


@pytest.mark.parametrize("better", [False, True])
def test_a_ladder_says_what_its_subsets_did(setting, better):
    tests = attacks.draw(setting, 0, 4)
    begun = {t: {} for t in tests}
    found = attacks.ladder(setting, begun, better=better, size=20, steps=8, box=4.0)
    left = attacks.reached(found)[[*attacks.COUNTS]]
    for t, (_, least), one in zip(tests, left.iterrows(), found.values(), strict=True):
        names = [name for name in attacks.SUBSETS if name in one]
        assert names == list(attacks.SUBSETS)[: len(names)]
        ends = [one[name][0] for name in names]
        assert all(z >= 0 for z in ends[:-1])
        assert attacks.flipped(one) == (ends[-1] < 0)
        np.testing.assert_allclose(least.dropna(), [min(ends[:2]), *ends[2:]], rtol=1e-12)
        assert len(set(one["carriers"].tolist())) == len(one["carriers"]) <= 10
        assert max(ends) <= setting.margin[t] + 1e-6
        if better:
            assert (np.diff(ends[2:]) <= 1e-6).all()


def test_the_forecast_is_the_first_order_fall_of_the_margin(setting):
    """One tiny step, in a box of a thousandth of a level, against the forecast for that box."""
    t = attacks.draw(setting, 0, 1)
    box = 1e-3
    (one,) = attacks.ladder(setting, {t[0]: {}}, subsets=(), size=20, box=box).values()
    ((_, z, _),) = setting.attack([t], [one["carriers"][:1]], box=box, lengths=(box,), stop=False)
    fall = setting.margin[t] - z
    np.testing.assert_allclose(fall, one["forecast"][0], rtol=0.15)  # pixels at 0 and 255 stay
    assert fall < one["forecast"][0]


def test_ladders_that_were_cut_off_go_on_where_they_were(setting, tmp_path, monkeypatch, capsys):
    """Three by one carrier, two by up to five, one by up to ten; in a second run the rest."""
    monkeypatch.setenv("THESIS_RUNS", str(tmp_path))
    climbed, climb = [], attacks.ladder

    def counted(attacker, begun, **how):
        climbed.append(len(begun))
        if len(climbed) == 2:
            raise KeyboardInterrupt
        return climb(attacker, begun, size=20, steps=4, **how)

    monkeypatch.setattr(attacks, "ladder", counted)

    def all_of_them(weight_decay=1e-3, counts=(3, 2, 1), **how):
        bed = {"weight_decay": weight_decay}
        return attacks.ladders(setting, "some_bed", "real", bed, counts, **how)

    with pytest.raises(KeyboardInterrupt):
        all_of_them()
    found = all_of_them(go_on=False).values()
    assert [sorted(set(one) & set(attacks.SUBSETS)) for one in found] == [["1st", "2nd"]] * 3
    found = all_of_them()
    assert climbed == [3, 2, 2, 1]
    assert list(found) == attacks.draw(setting, 0, 3).tolist()
    t = next(iter(found))
    whole = climb(setting, {t: {}}, size=20, steps=4)[t]
    for name in attacks.SUBSETS:
        np.testing.assert_allclose(found[t][name], whole[name], rtol=1e-4)
    assert found[t]["passes"] == whole["passes"]
    assert list(all_of_them(counts=(4, 2, 1))) == attacks.draw(setting, 0, 4).tolist()
    assert climbed[4:] == [1]  # more of the same targets are added
    assert list(all_of_them(go_on=False)) == list(found)
    with pytest.raises(ValueError, match=r"another attack .* differs: bed.* Move it away"):
        all_of_them(1e-4)
    with pytest.raises(ValueError, match="differs: steps"):
        all_of_them(steps=8)
    committed = tmp_path / "committed"
    committed.mkdir()
    (tmp_path / "real" / "11_some_bed.json").replace(committed / "11_some_bed.json")
    monkeypatch.setattr(attacks.claims, "committed", lambda profile: committed)
    assert len(all_of_them(go_on=False)) == 3  # what is committed of the same pictures counts
    assert not capsys.readouterr().out
    assert all_of_them(1e-4, go_on=False) == {}  # of another bed it does not
    assert "differs: bed. Its 4 targets are not used" in capsys.readouterr().out
    monkeypatch.setattr(setting, "margin", 1.5 * setting.margin)
    assert all_of_them(go_on=False) == {}  # nor of other pictures
    assert "differs: margins of the test pictures. Its 4 targets" in capsys.readouterr().out
    (committed / "11_some_bed.json").rename(tmp_path / "real" / "11_some_bed.json")
    with pytest.raises(ValueError, match="another attack"):
        all_of_them()


COMMITTED = attacks.claims.committed("real")


def asked_for():
    """Yield parameters, bed, name, kind, size and counts of each ladder of params/real.yaml."""
    (path,) = run.choose(["11"])
    _, *beds = signature(attacks.load).parameters.values()
    for job in run.jobs_of("real", [path]):
        p = run.declared_parameters(nbformat.read(path, 4)) | job.parameters
        bed = {one.name: p[one.name] for one in beds if one.kind is one.POSITIONAL_OR_KEYWORD}
        for size, asked in zip(p["sizes"], p["n_targets"], strict=True):
            fewer = np.minimum(asked, (40, 12, 6)).tolist()
            for kind, counts in (("original", asked), ("better", fewer)):
                yield p, bed, f"{p['dataset']}_{size}_{kind}", kind, size, counts
        for change in p["changes"]:
            change = {"n_changed": p["n_changed"]} | change
            counts = [change.pop("n_changed"), 0, 0]
            name = f"{p['dataset']}_{size}_changed_{next(iter(change.values()))}"
            yield p, bed | change, name, "original", change.get("size", size), counts


def committed(name, folder=COMMITTED):
    return json.loads((folder / f"11_{name}.json").read_text(encoding="utf-8"))


def like(record, size=None):
    """Return what a record tells of the attacker that it is of: margins, and who was drawn."""
    margin = np.full(600, -1.0)
    margin[record["about"].get("targets", [])] = 1
    for t, one in record["targets"].items():
        margin[int(t)] = one["margin"]
    return SimpleNamespace(margin=margin, backbone=SimpleNamespace(size=size))


def test_committed_records_are_those_of_todays_parameters(tmp_path, monkeypatch):
    """They are read, copied for the next promotion, and give the committed flips and falls."""
    monkeypatch.setenv("THESIS_RUNS", str(tmp_path))
    seen = set()
    for p, bed, name, kind, size, counts in asked_for():
        if (COMMITTED / f"11_{name}.json").exists():
            record, how = committed(name), {"better": kind == "better", "go_on": False}
            how |= {"size": p["shortlist"], "steps": p["steps"]}
            found = attacks.ladders(like(record, size), name, "real", bed, counts, **how)
            assert {str(t): one for t, one in found.items()} == record["targets"]
            assert committed(name, tmp_path / "real" / "figures") == record
            seen.add(name)
            table = attacks.reached(found)
            hits = {str(count): h.tolist() for count, h in attacks.flips(table, counts).items()}
            ours = table[["margin", "fall", "forecast", "flipped"]].to_dict("list")
            if name.endswith(f"{size}_{kind}"):  # not after a change
                assert hits == committed(f"{p['dataset']}_flipped")[f"{kind}_{size}"]
                falls = committed(f"{p['dataset']}_reach")[f"{kind}_{size}"]
                assert attacks.claims.plain(ours) == falls
        asked = {"at_once": {"steps": p["many_steps"], "without": p["mislabelled"]}}
        asked["at_once"]["shortlist"] = p["shortlist"]
        asked["recall"] = {"bed": bed, "pool": p["pool"], "shortlist": p["shortlist"]}
        for kind, about in asked.items():
            name = f"{p['dataset']}_{kind}"
            if (COMMITTED / f"11_{name}.json").exists() and name not in seen:
                record = committed(name)
                if kind == "at_once":
                    about["bed"] = bed | {"many_of": p["many_of"]}
                    about["tests"] = record["about"]["tests"]
                known = attacks.Record(name, "real", about, like(record)).targets
                assert {str(t): one for t, one in known.items()} == record["targets"]
                seen.add(name)
    of_attacks = (path.stem[3:] for path in COMMITTED.glob("11_*.json"))
    assert seen == {name for name in of_attacks if "about" in committed(name)}


def test_half_a_level_is_lost_when_saved_and_a_whole_one_is_kept():
    original = np.array([10.0, 11.0, 0.0, 255.0])
    for change, kept in ((0.5, 0), (-0.5, 0), (0.75, 1), (-1.0, -1), (2.25, 2)):
        np.testing.assert_array_equal(attacks.saved(original + change, original), original + kept)


def test_a_head_with_a_bias_is_refused(setting):
    head = models.linear_head(9, use_bias=True)
    objective = Objective(head, BINARY, setting.phi, setting.y, weight_decay=1e-3, decayed="all")
    fit_head(objective)
    with pytest.raises(ValueError, match="without a bias"):
        attacks.Attacks(setting.data, objective, setting.backbone, setting.images)
