"""Verdicts, figures and the README's tables."""

import json

import matplotlib
import numpy as np
import pandas as pd
import pytest

from helpers import evaluation, reporting, runtime

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def _in_a_scratch_project(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    monkeypatch.setattr(reporting, "ROOT", tmp_path)


def verdicts():
    return [
        reporting.verdict("a", "claim a", "value >= 1", np.float64(1.2345), np.True_),
        reporting.verdict("b", "claim b", "value >= 1", 0.5, False, partly=True),
        reporting.verdict("c", "claim c", "value >= 1", 3e-14, False),
        reporting.verdict("d", "claim d", "value >= 1", None, None),
    ]


def test_verdicts_are_written_and_read_back(tmp_path):
    table = reporting.write_verdicts("04_influence", "demo", {"seed": 0}, verdicts())
    assert table["verdict"].tolist() == ["reproduced", "partly", "not reproduced", "not run"]
    assert table["value"].tolist() == ["1.23", "0.5", "below 1e-9", "-"]
    record = json.loads(
        (tmp_path / "runs" / "demo" / "figures" / "04_verdicts.json").read_text(encoding="utf-8")
    )
    assert record["parameters"] == {"seed": 0}
    assert record["verdicts"][0] == {
        "id": "a",
        "claim": "claim a",
        "criterion": "value >= 1",
        "value": 1.2345,
        "verdict": "reproduced",
    }
    assert "commit" not in record
    read = reporting.verdicts_of(reporting.results("demo"))
    assert read["id"].tolist() == ["a", "b", "c", "d"]


def test_results_are_those_of_the_last_run_or_the_committed_ones(tmp_path):
    assert reporting.results("demo") == tmp_path / "figures" / "demo"
    reporting.write_verdicts("16_summary", "demo", {}, verdicts())  # sums up, is no run
    assert reporting.results("demo") == tmp_path / "figures" / "demo"
    for name in ("03_curvature", "04_influence"):
        reporting.write_verdicts(name, "demo", {}, verdicts())
    assert reporting.results("demo") == tmp_path / "runs" / "demo" / "figures"
    some = reporting.verdicts_of(reporting.results("demo"), [tmp_path / "04_influence.ipynb"])
    assert set(some["notebook"]) == {"04_influence"}


def test_an_interval_is_shown_with_its_value_and_read_back(tmp_path):
    assert reporting.verdict("a", "", "", evaluation.Mean(2, 1), True).interval == [1, 3]
    shares = {"known": (0.02, 0.21), "unknown": (np.nan, np.nan), "absent": None}
    found = [
        reporting.verdict(id, "claim", "share >= 0.1", 0.0667, True, interval=interval)
        for id, interval in shares.items()
    ]
    table = reporting.write_verdicts("11_attack_study", "demo", {}, found)
    assert table["value"].tolist() == ["0.0667 (0.02 to 0.21)", "0.0667", "0.0667"]
    read = reporting.verdicts_of(reporting.results("demo"))
    shown = [reporting.show_value(row) for row in read.itertuples()]
    assert shown == table["value"].tolist()
    text = (tmp_path / "runs" / "demo" / "figures" / "11_verdicts.json").read_text(encoding="utf-8")
    assert json.loads(text)["verdicts"][0]["interval"] == [0.02, 0.21]
    assert text.count("interval") == 1


def test_readme_and_verdict_page_are_rewritten_from_what_is_committed(tmp_path):
    reporting.write_verdicts("04_influence", "demo", {}, verdicts())
    written = (tmp_path / "runs" / "demo" / "figures" / "04_verdicts.json").read_bytes()
    (tmp_path / "notebooks").mkdir()
    for name in ("04_influence", "05_other"):
        answer = f"**Answer.** Short. It is\nso, on {'x' * 60}. And more.\n\nNo."
        title = f"# {name[:2]} · Why?\n\n{answer}"
        cell = {"cell_type": "markdown", "source": title.splitlines(keepends=True)}
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text(
            json.dumps({"cells": [cell]}), encoding="utf-8"
        )
    for profile in ("demo", "real"):
        reporting.committed(profile).mkdir(parents=True)
        (reporting.committed(profile) / "04_verdicts.json").write_bytes(written)
        (reporting.committed(profile) / "04_picture.png").touch()
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- notebooks -->\nold\n<!-- end notebooks -->\nafter\n", encoding="utf-8"
    )
    reporting.update_readme(readme)
    text = readme.read_text(encoding="utf-8")
    assert "old" not in text
    answer = f"Short. It is so, on {'x' * 60}."
    assert (
        f"| [04](notebooks/04_influence.ipynb) | Why? | {answer} | 1 / 1 / 1 / 1 | 1 / 1 / 1 / 1 |"
        in text
    )
    assert f"| [05](notebooks/05_other.ipynb) | Why? | {answer} | - | - |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    page = (tmp_path / "figures" / "demo" / "VERDICTS.md").read_text(encoding="utf-8")
    assert "| claim b (`b`) | value >= 1 | 0.5 | partly |" in page
    assert "![04 picture](04_picture.png)" in page
    assert "Not run yet." in page
    assert answer in page
    page = (tmp_path / "figures" / "real" / "VERDICTS.md").read_text(encoding="utf-8")
    assert "| claim b (`b`) | value >= 1 | 0.5 | partly |" in page
    assert ".png" not in page
    assert "It is" not in page  # the answer is the demo's


def test_figures_store_their_numbers(tmp_path):
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots()
    axis.plot([1, 2])
    shown = reporting.save_figure(
        figure, "00_line", "demo", y=np.array([1 / 3, np.nan]), n=np.int64(2)
    )
    assert (tmp_path / "runs" / "demo" / "figures" / "00_line.png").read_bytes() == shown.data
    stored = json.loads(
        (tmp_path / "runs" / "demo" / "figures" / "00_line.json").read_text(encoding="utf-8")
    )
    assert stored == {"y": [0.333333, None], "n": 2}
    assert not plt.get_fignums()


def test_picture_grids_hold_colour_and_grey_pictures():
    grid = reporting.picture_grid(
        [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8))], ["a", "b"], columns=3, titles=["row"]
    )
    assert len(grid.axes) == 3
    assert grid.axes[0].get_xlabel() == "a"


def test_captions_name_index_kind_and_influence():
    table = pd.DataFrame({"subtype": ["jeep", "sports_car"]})
    assert reporting.captions(table, [1, 0], [0.01234, -2e-5]) == [
        "1 sports car\n+0.012",
        "0 jeep\n-2e-05",
    ]


def test_agreement_has_slope_and_refuses_constants():
    predicted = np.array([1.0, 2.0, 3.0, -1.0])
    perfect = evaluation.agreement(predicted, 2 * predicted)
    assert perfect == pytest.approx((1.0, 1.0, 2.0, 0.5))
    with pytest.raises(ValueError, match="different loss changes"):
        evaluation.agreement(np.zeros(5), predicted[:1].repeat(5))


def test_test_points_are_chosen_by_rule():
    losses = np.array([0.1, 3.0, 0.2, 0.9, 0.05, 0.01, 2.0, 0.02])
    correct = losses < 1
    points = evaluation.choose_test_points(losses, correct, k=2)
    assert points["hardest correct"].tolist() == [3, 2]
    assert points["misclassified"].tolist() == [1, 6]
    assert not set(points["random correct"]) & {1, 2, 3, 6}
