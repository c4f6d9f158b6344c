"""How far a fresh run may lie from the committed one: the one table, and who compares by it.

Another processor, another number of threads or another build of the kernels adds sums in another
order. Mathematics in float64 then agrees to many digits; where float32 or the training of a
network comes in between, fewer do. Words must always be the same.
"""

import re
from typing import NamedTuple

import numpy as np


class Tolerance(NamedTuple):
    """Numbers whose name matches `where` may differ by absolute + relative x size."""

    kind: str
    where: str
    relative: float
    absolute: float
    why: str


TABLE = [Tolerance("default", r".*", 1e-3, 1e-6, ".")]
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def tolerance(name):
    """Return the first tolerance of the table that fits a name such as 14/mlp_best_lds."""
    return next(t for t in TABLE if re.match(t.where, name))


def allowed(name, value):
    """Return how far a fresh number may be from a committed one of this name."""
    t = tolerance(name)
    return t.absolute + t.relative * np.abs(value)


def text_difference(name, committed, fresh):
    """Return what differs between two outputs of a notebook, or None.

    Words must be equal, in their order; a number may differ as the table says and by one unit of
    its last printed digit, to which it was rounded.
    """
    words = [NUMBER.sub("#", text).split() for text in (committed, fresh)]
    words = [[re.sub(r"^[-─]+$", "-", word) for word in some] for some in words]
    if words[0] != words[1]:
        return f"the words differ:\n{committed}\n--- fresh:\n{fresh}"
    for old, new in zip(NUMBER.findall(committed), NUMBER.findall(fresh), strict=True):
        a, b = (float(text.replace(",", "")) for text in (old, new))
        if abs(a - b) > allowed(name, a) + max(_unit(old), _unit(new)) * 1.001:
            return f"{new} for {old} in:\n{committed}\n--- fresh:\n{fresh}"
    return None


def _unit(text):
    """Return one unit of the last digit of a printed number; of a whole number, none."""
    digits, _, exponent = text.lower().partition("e")
    decimals = len(digits.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - decimals) if decimals or exponent else 0.0


def verdict_differences(committed, fresh):
    """Return what differs between two records of verdicts, by id: a line a difference."""
    found = []
    old, new = ({v["id"]: v for v in record["verdicts"]} for record in (committed, fresh))
    if list(old) != list(new):
        found.append(f"the ids differ: {sorted(set(old) ^ set(new)) or 'their order'}")
    for id in old.keys() & new.keys():
        name = f"{committed['notebook'][:2]}/{id}"
        for part in ("claim", "criterion", "verdict"):
            if old[id][part] != new[id][part]:
                found.append(f"{name}: {part} {new[id][part]!r} for {old[id][part]!r}")
        a, b = ([v["value"], *(v.get("interval") or [])] for v in (old[id], new[id]))
        if len(a) != len(b) or any(
            (u is None) != (v is None) or (u is not None and abs(u - v) > allowed(name, u))
            for u, v in zip(a, b, strict=True)
        ):
            found.append(f"{name}: {b} for {a}, allowed is {allowed(name, a[0] or 0):.2g}")
    return found
