"""What a fresh run is held against: the comparison says no where it should."""

import pytest
import tolerances
from tolerances import Tolerance, claim_differences, text_difference

COMMITTED = tolerances.TABLE
TABLE = """            slope  steps
CG           0.62     37
first order  4.91      2
n = 2,000"""


@pytest.fixture(autouse=True)
def table(monkeypatch):
    rows = [
        Tolerance("steps", r"03/CG", 0, 0, 0.1, ""),
        Tolerance("networks", r"03/mlp", 0.1, 0, 0, ""),
        Tolerance("default", r"", 1e-3, 1e-8, 0, ""),
    ]
    monkeypatch.setattr(tolerances, "TABLE", rows)


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("4.91", "4.92", True),  # one unit of the last digit, to which it was rounded
        ("4.91", "4.93", False),
        ("  4.91", "14.91", False),
        ("first", "second", False),
        ("37", "40", True),  # steps of CG
        ("37", "41", False),
        ("     2\n", "     3\n", False),  # other counts are exact
        ("2,000", "1,999", False),
        ("2,000", "2000", True),
        ("2,000", "-2,000", False),
        ("   slope", "slope", True),  # only laid out otherwise
        ("\nn =", "\n\nn =", False),
    ],
)
def test_texts_are_compared_word_by_word_and_number_by_number(old, new, same):
    assert old in TABLE
    assert (text_difference("03", TABLE, TABLE.replace(old, new)) is None) == same


def test_exponents_and_long_rules_are_numbers_and_rules():
    assert text_difference("03", "a 1.6e+02\n---- b", "a 1.7e+02\n------ b") is None
    assert text_difference("03", "a 1.6e+02", "a 1.8e+02")
    assert text_difference("03", "a 5e-05", "a 7e-05")


def record(**changed):
    v = {"id": "mlp_r", "claim": "c", "at_least": 1, "value": 2.0, "verdict": "partly"}
    other = {"id": "rounding", "claim": "", "at_most": 1, "value": 1e-14, "verdict": "partly"}
    third = v | {"id": "digits_r", "dataset": "digits"}
    return {"notebook": "03_a", "verdicts": [v | changed, other, third]}


def test_claims_are_compared_by_id():
    assert claim_differences(record(), record()) == []
    assert claim_differences(record(), record(value=2.19)) == []
    assert claim_differences(record(interval=[1.0, 3.0]), record(interval=[1.05, 2.9])) == []
    for changed in (
        {"value": 2.3},
        {"value": None},
        {"verdict": "reproduced"},
        {"claim": "another"},
        {"id": "other_r"},
        {"at_least": 0.5},
        {"of": "paper"},
        {"interval": [1.0, 3.0]},
    ):
        assert claim_differences(record(), record(**changed))
        assert claim_differences(record(**changed), record())
    other = record()
    other["verdicts"][2]["value"] = 7
    assert claim_differences(record(), other) == []
    assert claim_differences(record(), other, "digits")
    far = record()
    far["verdicts"][1]["value"] = 1e-7
    assert claim_differences(record(), far)


def test_every_kind_says_why_and_the_last_takes_the_rest():
    assert all(t.kind and t.why for t in COMMITTED)
    assert COMMITTED[-1].where == ""
