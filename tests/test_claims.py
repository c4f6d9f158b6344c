"""Claims and what becomes of them, figures, and the pages made from what is committed."""

import base64
import html
import json
import re
from itertools import pairwise

import cv2
import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

from support import claims, evaluation, figures, pages, stored
from support.claims import claim

matplotlib.use("agg")
NOTEBOOKS = stored.ROOT / "notebooks"


@pytest.fixture(autouse=True)
def _in_a_scratch_project(tmp_path, monkeypatch):
    for module in (stored, claims, pages):
        monkeypatch.setattr(module, "ROOT", tmp_path)


def four():
    return [
        claim("a", "claim a", np.float64(1.2345), at_least=1, of="paper", published=1.5),
        claim("b", "claim b", 0.95, at_least=1, of="thesis"),
        claim("c", "claim c", 3e-14, at_least=1),
        claim("d", "claim d", None, at_least=1),
    ]


@pytest.mark.parametrize(
    ("value", "interval", "bound", "word"),
    [
        (2, None, {"at_least": 2}, "holds"),
        (1.81, None, {"at_least": 2}, "partly"),
        (0, None, {"above": 0}, "does not hold"),
        (1.79, None, {"at_least": 2}, "does not hold"),
        (1.79, (1.5, 2.1), {"at_least": 2}, "partly"),
        (1.99, (1.98, 1.995), {"at_least": 2}, "does not hold"),  # ruled out, if only just
        (2, None, {"above": 2}, "partly"),
        (2, None, {"at_most": 2}, "holds"),
        (2.3, (1.9, 2.6), {"at_most": 2}, "partly"),
        (2.3, None, {"below": 2}, "does not hold"),
        (1.1, None, {"within": (0.8, 1.25)}, "holds"),
        (1.3, None, {"within": (0.8, 1.25)}, "partly"),
        (1.5, None, {"within": (0.8, 1.25)}, "does not hold"),
        (0.7, (0.5, 0.9), {"within": (0.8, 1.25)}, "partly"),
        (3, None, {"equal": 3}, "holds"),
        (0.2, None, {"equal": 0}, "does not hold"),
        (0.5, (0.1, 0.9), {"interval_above": 0}, "holds"),
        (0.5, (-0.1, 0.9), {"interval_above": 0}, "partly"),
        (-0.5, (-0.9, 0.1), {"interval_above": 0}, "partly"),
        (-0.5, (-0.9, -0.1), {"interval_above": 0}, "does not hold"),
        (0.0, (0.0, 0.0), {"interval_above": 0}, "does not hold"),
        (0.0, (0.0, 0.0), {"above": 0}, "does not hold"),
        (0.9, (0.5, 2.0), {"within": (1.0, 1.5)}, "partly"),
        (0.9, (0.8, 1.0), {"below": 0.8}, "does not hold"),
        (0.5, (0.1, 0.9), {"interval_holds": 0.8}, "holds"),
        (0.5, (0.1, 0.9), {"interval_holds": 0.95}, "does not hold"),
        (None, None, {"at_least": 2}, "not run"),
    ],
)
def test_one_rule_says_what_became_of_a_claim(value, interval, bound, word):
    ours = claim("a", "", value, interval=interval, **bound)
    assert ours["verdict"] == word
    theirs = claim("a", "", value, interval=interval, of="paper", **bound)["verdict"]
    assert theirs == {"holds": "reproduced", "does not hold": "not reproduced"}.get(word, word)


def test_words_of_a_criterion_come_from_its_numbers():
    assert claims.criterion(claim("a", "", 1, at_most=1e-10)) == "at most 1e-10"
    assert claims.criterion(claim("a", "", 1, within=(0.8, 1.25))) == "from 0.8 to 1.25"
    assert (
        claims.criterion(claim("a", "", 1, interval=(0, 2), interval_above=0))
        == "95 % interval above 0"
    )


def test_claims_that_can_not_be_asked_or_are_not_well_put():
    planted = claim("a", "", 0.9, at_least=0.5, interval=(0.8, 1), applies=False)
    assert planted["verdict"] == "not applicable"
    assert planted["value"] is None
    once = claim("a", "", evaluation.mean_of([3.0]), interval_above=0)
    assert (once["verdict"], once["value"]) == ("not applicable", None)
    with pytest.raises(ValueError, match="bounds are at_least"):
        claim("a", "", 1, as_much_as=2)
    with pytest.raises(ValueError, match="bounds"):
        claim("a", "", 1, at_least=2, of="them")
    with pytest.raises(ValueError, match="paper's or the thesis's"):
        claim("a", "", 1, at_least=2, published=3)
    with pytest.raises(ValueError, match="there is none"):
        claim("a", "", 1, interval_above=0)
    with pytest.raises(ValueError, match="unpack"):
        claim("a", "", 1, at_least=2, at_most=3)


def test_claims_are_written_and_read_back(tmp_path):
    table = claims.write("04_influence", "demo", {"seed": 0}, four())
    assert table["verdict"].tolist() == ["reproduced", "partly", "does not hold", "not run"]
    assert table["value"].tolist() == ["1.23", "0.95", "below 1e-9", "-"]
    assert table["published"].tolist() == ["1.5", "-", "-", "-"]
    path = tmp_path / "runs" / "demo" / "figures" / "04_verdicts.json"
    record = claims.read_record(path)
    assert record["runs"]["all"]["parameters"] == {"seed": 0}
    assert record["verdicts"][0] == {
        "id": "a",
        "claim": "claim a",
        "of": "paper",
        "published": 1.5,
        "at_least": 1,
        "value": 1.2345,
        "verdict": "reproduced",
    }
    assert "commit" not in record["runs"]["all"]
    read = claims.written(claims.results("demo"))
    assert read["id"].tolist() == ["a", "b", "c", "d"]
    assert read["criterion"].tolist() == ["at least 1"] * 4


def test_results_are_those_of_the_last_run_or_the_committed_ones(tmp_path):
    assert claims.results("demo") == tmp_path / "figures" / "demo"
    claims.write("16_summary", "demo", {}, four())  # sums up, is no run
    assert claims.results("demo") == tmp_path / "figures" / "demo"
    for name in ("03_curvature", "04_influence"):
        claims.write(name, "demo", {}, four())
    assert claims.results("demo") == tmp_path / "runs" / "demo" / "figures"
    some = claims.written(claims.results("demo"), [tmp_path / "04_influence.ipynb"])
    assert set(some["notebook"]) == {"04_influence"}


def test_an_interval_is_shown_with_its_value_and_read_back():
    assert claim("a", "", evaluation.Mean(2, 1), at_least=1)["interval"] == [1, 3]
    shares = {"known": (0.02, 0.21), "unknown": (np.nan, np.nan), "absent": None}
    found = [claim(id, "", 0.0667, at_least=0.1, interval=i) for id, i in shares.items()]
    table = claims.write("11_attack_study", "demo", {}, found)
    assert table["value"].tolist() == ["0.0667 (0.02 to 0.21)", "0.0667", "0.0667"]
    assert claims.written(claims.results("demo"))["shown"].tolist() == table["value"].tolist()


def test_readme_and_verdict_page_are_rewritten_from_what_is_committed(tmp_path):
    claims.write("04_influence", "demo", {}, four())
    written = (tmp_path / "runs" / "demo" / "figures" / "04_verdicts.json").read_bytes()
    (tmp_path / "notebooks").mkdir()
    for name in ("04_influence", "05_other"):
        answer = f"**Answer.** Short. It is\nso, on {'x' * 60}. And more.\n\nNo."
        answer += "\n\n**Answer (`demo`).** Of\ndrawings.\n\n**Answer (`real`).** Of photographs."
        title = f"# {name[:2]} · Why?\n\n{answer}"
        cell = {"cell_type": "markdown", "source": title.splitlines(keepends=True)}
        text = json.dumps({"cells": [cell]})
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text(text, encoding="utf-8")
    for profile in ("demo", "real"):
        claims.committed(profile).mkdir(parents=True)
        (claims.committed(profile) / "04_verdicts.json").write_bytes(written)
        (claims.committed(profile) / "04_picture.png").touch()
    readme = tmp_path / "README.md"
    frame = "before\n<!-- published -->\nold\n<!-- end published -->\nbetween\n"
    frame += "<!-- notebooks -->\nold\n<!-- end notebooks -->\nafter\n"
    listed = [{"figure": "Fig. 9", "shows": "It.", "claims": {"a": "one", "b": "two"}}]
    listed[0]["why"] = "So."
    (tmp_path / "figures" / "published.yaml").write_text(yaml.dump(listed), encoding="utf-8")
    readme.write_text(frame, encoding="utf-8")
    pages.update_readme(readme)
    text = readme.read_text(encoding="utf-8")
    assert "old" not in text
    answer = f"Short. It is so, on {'x' * 60}."
    told = "1 of 2 | 0 of 1"  # of the published claims one is reproduced; of ours one was asked
    assert f"| [04](notebooks/04_influence.ipynb) | Why? | {answer} | {told} | {told} |" in text
    assert f"| [05](notebooks/05_other.ipynb) | Why? | {answer} | - | - | - | - |" in text
    assert text.startswith("before\n")
    told = "1.5<br>- | one: 1.23; at least 1<br>two: 0.95; at least 1 "
    told += "| reproduced (1 of 2), partly (1 of 2)"
    assert f"| [Fig. 9](notebooks/04_influence.ipynb) | It. | {told} | So. |" in text
    assert text.endswith("after\n")
    page = (tmp_path / "figures" / "demo" / "VERDICTS.md").read_text(encoding="utf-8")
    assert "| claim b (`b`) | thesis | at least 1 | 0.95 | partly |" in page
    assert "![04 picture](04_picture.png)" in page
    assert "Not run yet." in page
    assert f"{answer} And more. Of drawings.\n" in page
    page = (tmp_path / "figures" / "real" / "VERDICTS.md").read_text(encoding="utf-8")
    assert "| claim c (`c`) | ours | at least 1 | below 1e-9 | does not hold |" in page
    assert ".png" not in page  # a file that does not say of itself that it is a plot
    assert f"{answer} And more. Of photographs.\n" in page


def test_figures_store_their_numbers(tmp_path):
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots()
    axis.plot([1, 2])
    numbers = {"y": np.array([1 / 3, np.nan]), "n": np.int64(2)}
    shown = figures.save(figure, "00_line", "demo", **numbers)
    where = tmp_path / "runs" / "demo" / "figures"
    assert (where / "00_line.png").read_bytes() == shown.data
    stored = json.loads((where / "00_line.json").read_text(encoding="utf-8"))
    assert stored == {"y": [0.333333, None], "n": 2}
    assert not plt.get_fignums()


def test_the_palette_of_a_plot_keeps_a_rare_colour():
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.9, 4))
    axis.scatter(*np.random.default_rng(0).normal(size=(2, 3000)), c=np.arange(3000), alpha=0.7)
    axis.plot(0, 3.5, "s", color="#ff00ff", ms=4)
    shown = cv2.imdecode(np.frombuffer(figures.save(figure, "00_plot", "demo").data, np.uint8), 1)
    away = np.abs(shown.astype(int) - (255, 0, 255)).max(2)
    assert away.min() <= 8


@pytest.mark.parametrize("draw", ["imshow", "figimage", "inset"])
def test_a_figure_with_any_raster_is_no_plot(tmp_path, draw):
    import matplotlib.pyplot as plt
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    figure, axis = plt.subplots(figsize=(9, 3))
    points = axis.scatter([1, 2], [3, 4], c=[5, 6])
    figure.colorbar(points)
    figures.save(figure, "00_plot", "real")
    picture = np.zeros((4, 4, 3))
    if draw == "inset":
        axis.add_artist(AnnotationBbox(OffsetImage(picture), (1, 3)))
    else:
        getattr(figure if draw == "figimage" else axis, draw)(picture)
    figures.save(figure, "00_picture", "real")
    where = tmp_path / "runs" / "real" / "figures"
    assert pages.is_plot(where / "00_plot.png")
    assert not pages.is_plot(where / "00_picture.png")
    assert {path.name for path in where.glob("*.pdf")} == {"00_plot.pdf"}
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+)", (where / "00_plot.pdf").read_bytes())
    assert float(box[1]) == pytest.approx(6.9 * 72)


@pytest.mark.parametrize("profile", ["real", "thesis"])
def test_no_committed_figure_of_photographs_shows_a_picture(profile):
    assert all(map(pages.is_plot, (NOTEBOOKS.parent / "figures" / profile).glob("*.png")))


def test_agreement_curves_and_galleries_are_drawn():
    import matplotlib.pyplot as plt

    x = np.array([-1.0, 0.5, 2.0])
    figure = figures.agreement({"first order": (x, 2 * x), "Newton": (x, x)}, colour=x, symlog=0.1)
    assert figure.axes[0].get_title() == "first order\nr 1.00, slope 2.00"
    assert figure.axes[1].get_title() == "Newton\nr 1.00, slope 1.00"
    axis = plt.subplots()[1]
    figures.curves(axis, x, {"a": x, "b": (x, x - 1, x + 1)}, xlabel="step")
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b"]
    assert len(axis.collections) == 1  # the band
    images = [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8))]
    grid = figures.gallery(images, ["a", "b"], columns=3, titles=["row"])
    assert len(grid.axes) == 3
    assert grid.axes[0].get_xlabel() == "a"
    plt.close("all")


@pytest.mark.parametrize("symlog", [None, 0.01])
@pytest.mark.parametrize("scale", [1e-9, 1e-4, 0.3, 40, 1e6])
@pytest.mark.parametrize("low", [-1, -0.01])
def test_agreement_has_few_ticks_that_do_not_overlap(scale, low, symlog):
    import matplotlib.pyplot as plt

    figures.style()
    x = scale * np.linspace(low, 0.7, 30)
    figure = figures.agreement(dict.fromkeys("abc", (x, 0.9 * x)), symlog=symlog, colour=x)
    figure.set_size_inches(6.9, 6.9 / 3.3 / 3 * 4)  # as `save` prints it
    figure.canvas.draw()
    for panel in figure.axes[:3]:
        for axis in (panel.xaxis, panel.yaxis):
            low_end, high_end = axis.get_view_interval()
            ticks = [t for t in axis.get_major_ticks() if low_end <= t.get_loc() <= high_end]
            assert 2 <= len(ticks) <= 5
            boxes = [t.label1.get_window_extent() for t in ticks if t.label1.get_visible()]
            assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    plt.close("all")


def test_captions_name_index_kind_and_influence():
    table = pd.DataFrame({"subtype": ["jeep", "sports_car"]})
    shown = figures.captions(table, [1, 0], [0.01234, -2e-5])
    assert shown == ["1 sports car\n+0.012", "0 jeep\n-2e-05"]


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


# -------------------------------------------------------------------- damaged files, hostile names

RECORDS = ["", '{"runs": {"all"', "[1]", "{}", '{"runs": [], "verdicts": []}', "\0\0"]


@pytest.mark.parametrize("text", RECORDS)
def test_a_damaged_verdict_file_ends_no_run(text):
    """It is said, left out where verdicts are read, and whole again after the next run."""
    where = stored.folder("runs", "demo", "figures")
    path = where / "05_verdicts.json"
    claims.write("05_a", "demo", {}, four(), dataset="vehicles")
    claims.write("06_a", "demo", {}, four())
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"05_verdicts.json is damaged .* run notebook 05 again"):
        claims.read_record(path)
    with pytest.warns(UserWarning, match=r"05_verdicts\.json is damaged"):
        assert set(claims.written(where)["notebook"]) == {"06_a"}
    with pytest.warns(UserWarning, match="Claims on other data sets are lost"):
        claims.forget(path, "digits")
    assert claims.written(where, [path.with_name("05_a.ipynb")]).empty
    path.write_text(text, encoding="utf-8")
    with pytest.warns(UserWarning, match="Claims on other data sets are lost"):
        claims.write("05_a", "demo", {}, four(), dataset="digits")
    assert len(claims.written(where)) == 8


HOSTILE = ["<img src=x onerror=alert(1)>", "</figcaption><script>alert(1)</script>", "a|b", "$\\x$"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_data_are_text_in_every_page(name):
    """A subtype, a file or a data set may be called anything; no page runs it."""
    cells = nbformat.read(NOTEBOOKS / "04_influence.ipynb", 4).cells
    explorer = [c.source for c in cells if "def card(" in c.source or "def explore(" in c.source]
    pictures, kinds = np.zeros((20, 4, 4, 3), np.uint8), pd.Series(20 * [name])
    order = np.argsort(-np.random.default_rng(0).normal(size=(20, 20)))
    page = {"np": np, "cv2": cv2, "base64": base64, "html": html, "HTML": str}
    page |= {"kinds": kinds, "test_kinds": kinds, "train_pictures": pictures, "order": order}
    page |= {"test_pictures": pictures, "changes": np.eye(20), "test_loss": np.ones(20)}
    page |= {"actual_of_all": np.eye(20), "margin": np.ones(20)}
    for source in explorer:
        exec(source, page)
    claim_of_it = claim("a", name, 1, at_least=0)
    claims.write("03_a", "demo", {"name": name}, [claim_of_it], dataset=name.replace("/", ""))
    table = nbformat.v4.new_output(
        "display_data", {"text/html": pd.DataFrame({name: [name]}).to_html()}
    )
    code = nbformat.v4.new_code_cell("f()", outputs=[table], execution_count=1)
    of_notebook = pages.of_notebook(nbformat.v4.new_notebook(cells=[code]))
    explored = page["explore"](0), page["links"]("by margin", [0, 1])
    for text in (*explored, of_notebook, pages._markdown_row([name, name])):
        assert "<img src=x" not in text
        assert "<script>alert" not in text
    rows = pages._markdown_row([name, "end"])
    assert len(re.findall(r"(?<!\\)\|", rows)) == 3
    figures.save(figures.gallery(pictures[:2], [name, name], titles=[name]), "03_a", "demo")


def test_the_explorer_is_read_without_a_mouse_a_script_or_eyes():
    """Every picture has a text, every test picture opens by the keyboard, and the link leads on."""
    page = pages.of_notebook(nbformat.read(NOTEBOOKS / "04_influence.ipynb", 4))
    details = re.findall(r"<details.*?</details>", page, re.DOTALL)
    lists, opened = details[:2], details[2:]
    assert len(opened) >= 6
    for part in opened:
        assert re.match(r"<details ?><summary>test \d+: .+, margin -?\d", part)
        assert part.count("<img") == 9
        assert len(set(re.findall(r'alt="((?:test|training) picture \d+)"', part))) == 9
        assert part.count("actual ") == part.count("predicted ") == 8
    shown = [re.findall(r'href="#(test-\d+)">.*?margin (-?[\d.]+)', text) for text in lists]
    assert sorted(shown[0]) == sorted(shown[1])
    assert len(shown[0]) == len(opened)
    assert all(page.count(f'id="{test}"') == 1 for test, _ in shown[0])
    by_error, by_margin = ([float(margin) for _, margin in rows] for rows in shown)
    assert by_error == sorted(by_error)  # the loss falls as the margin grows: the wrong come first
    assert by_margin == sorted(by_margin, key=abs)
    assert by_error[0] < 0 < by_error[-1]
    assert 'href="#refits"' in page
    assert page.count('id="refits"') == 1


def test_an_executed_notebook_asks_no_other_host():
    """Nothing is fetched from elsewhere, with all the formulas there; links to follow may stay."""
    formulas = 0
    for path in NOTEBOOKS.glob("0[0-5]*.ipynb"):
        page = pages.of_notebook(nbformat.read(path, 4))
        formulas += page.count("<math")
        assert "<script" not in page
        assert "@import" not in page
        assert not re.findall(r"""(?:src|data|xlink:href)\s*=\s*["']?(?:https?:)?//""", page)
        assert not re.findall(r"""url\(\s*["']?(?:https?:)?//""", page)
        assert not re.findall(r"<link[^>]*href", page)
    assert formulas > 40
    odd = nbformat.v4.new_markdown_cell(r"$\nonsense{x}$ and $x^2$")
    page = pages.of_notebook(nbformat.v4.new_notebook(cells=[odd]))
    assert r"<code>\nonsense{x}</code>" in page
    assert page.count("<math") == 1


def test_actions_are_pinned_by_commit():
    """What a tag names can be changed by others; a commit can not."""
    lines = (NOTEBOOKS.parent / ".github/workflows/ci.yml").read_text(encoding="utf-8").splitlines()
    uses = [k for k, line in enumerate(lines) if "uses:" in line]
    assert len(uses) >= 7
    for k in uses:
        assert re.search(r"uses: [\w/-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+$", lines[k]), lines[k]
        assert "checkout@" not in lines[k] or "persist-credentials: false" in lines[k + 1]
