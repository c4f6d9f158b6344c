"""How far a fresh run may lie from the committed one: the one table, and who compares by it.

Another processor, another number of threads or another build of the kernels adds sums in another
order. Mathematics in float64 then agrees to many digits; where float32 or the training of a
network comes in between, fewer do. Words must always be the same.
"""

import re
from itertools import zip_longest
from typing import NamedTuple


class Tolerance(NamedTuple):
    """A number named like `where` may differ by absolute + relative x its size.

    Whole numbers in a text are counts and may differ by `whole` x their size: mostly not at all.
    """

    kind: str
    where: str
    relative: float
    absolute: float
    whole: float
    why: str


# A name is NN/id of a claim, and NN/first word of a line in the text that a notebook shows.
TABLE = [
    Tolerance(
        "error of a solve",
        r"03/cg_error",
        relative=0,
        absolute=1e-5,
        whole=0,
        why="CG stops once the residual is below 1e-5; how far below is rounding's doing",
    ),
    Tolerance(
        "steps of a solver",
        r"03/(CG|LiSSA|fewer|five|\w+_saves_steps)|14/CG$",
        relative=0.15,
        absolute=0,
        whole=0.15,
        why="rounding decides in which step a residual falls below its bound",
    ),
    Tolerance(
        "a fit that stops early",
        r"02/(early_stopping_costs|thesis_fit_suffices)",
        relative=0.5,
        absolute=0,
        whole=0,
        why="each step of L-BFGS multiplies the rounding of the last: after 34 steps the error is "
        "8 % on one processor, 9 % or 14 % on another",
    ),
    Tolerance(
        "a Newton step along flat directions",
        r"06/(Newton|cnn_loo_slope_newton)$",
        relative=0.15,
        absolute=0.15,
        whole=0,
        why="along eigenvalues near zero it goes far: on two processors r of the worst test digit "
        "was -0.08 and 0.06, the slope 1.00 and 0.90",
    ),
    Tolerance(
        "flat directions of a network",
        r"15/(polished|last_layer_suffices)",
        relative=0.15,
        absolute=0.03,
        whole=0,
        why="along eigenvalues near zero a polish goes far: single places in a top ten change",
    ),
    Tolerance(
        "trained networks",
        r"(06|15)/|14/(?!head_|softmax_)",
        relative=0.03,
        absolute=0.01,
        whole=0,
        why="hundreds of steps of training multiply the rounding of the first; AUC and rank "
        "correlations of a few hundred points then move by single pairs",
    ),
    Tolerance(
        "shifted pictures",
        r"12/(clean|bright|dark|gamma|rain|cover|JPEG|noise|adversarial|transfer|PGD|\d+)\b",
        relative=0.02,
        absolute=1e-3,
        whole=0.03,
        why="pictures pass a float32 network; whole numbers are two rounded digits",
    ),
    Tolerance(
        "default",
        r"",
        relative=2e-3,
        absolute=1e-8,
        whole=0,
        why="float64 mathematics on float32 features: they agree to 1e-6, and what a "
        "factorisation or a correlation makes of that to three digits",
    ),
]
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def tolerance(name):
    """Return the first tolerance of the table that fits a name such as 14/mlp_best_lds."""
    return next(t for t in TABLE if re.match(t.where, name))


def text_difference(number, committed, fresh):
    """Return what differs between two texts that notebook `number` shows, or None.

    Words must be equal, in their order. Printed numbers may differ as the table says, and by one
    unit of their last digit, to which they were rounded.
    """
    lines = [text.splitlines() for text in (committed, fresh)]
    if len(lines[0]) != len(lines[1]):
        return f"{len(lines[1])} lines for {len(lines[0])}:\n{fresh}"
    for old, new in zip(*lines, strict=True):
        words = [NUMBER.sub("#", re.sub(r"[-─]{3,}", "-", line)).split() for line in (old, new)]
        if words[0] != words[1]:
            return f"other words: {new!r} for {old!r}"
        t = tolerance(f"{number}/{(old.split() or [''])[0]}")
        for pair in zip(NUMBER.findall(old), NUMBER.findall(new), strict=True):
            a, b = (float(text.replace(",", "")) for text in pair)
            counts = all(text.lstrip("+-").replace(",", "").isdigit() for text in pair)
            rounding = max(map(_unit, pair))
            allowed = t.whole * abs(a) if counts else t.absolute + t.relative * abs(a) + rounding
            if abs(a - b) > allowed * (1 + 1e-9):
                return f"{pair[1]} for {pair[0]} in: {old!r}\nallowed is {allowed:.2g} ({t.kind})"
    return None


def _unit(text):
    """Return one unit of the last digit of a printed number that has decimals or an exponent."""
    digits, _, exponent = text.lower().partition("e")
    decimals = len(digits.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - decimals) if decimals or exponent else 0.0


def claim_differences(committed, fresh, dataset=None):
    """Return what differs between two records of claims on a data set, a line a difference."""
    found = []
    old, new = (
        {c["id"]: c for c in record["verdicts"] if c.get("dataset") == dataset}
        for record in (committed, fresh)
    )
    if list(old) != list(new):
        found.append(f"the ids differ: {sorted(set(old) ^ set(new)) or 'their order'}")
    for id in [id for id in old if id in new]:
        name = f"{committed['notebook'][:2]}/{id}"
        for part in (old[id].keys() | new[id].keys()) - {"value", "interval"}:
            if old[id].get(part) != new[id].get(part):
                found.append(f"{name}: {part} {new[id].get(part)!r} for {old[id].get(part)!r}")
        t = tolerance(name)
        pairs = zip_longest(*([v["value"], *v.get("interval", [])] for v in (old[id], new[id])))
        for a, b in pairs:
            if a != b and (None in (a, b) or abs(a - b) > t.absolute + t.relative * abs(a)):
                found.append(f"{name}: {b} for {a}, allowed is {t.relative:.0%} ({t.kind})")
    return found
