"""Claims: what is asserted, by whom, the number that decides it, and what became of it.

A notebook ends in claims. Each names its bound once, as a number; the words of the criterion and
the outcome are made from it:

* the value meets the bound: a published claim is *reproduced*, one of ours *holds*, also where the
  interval reaches beyond the bound;
* the value misses the bound, but a part of its 95 % interval meets it, or, where there is no
  interval, the value comes within a tenth of it: *partly*;
* else a published claim is *not reproduced*, ours *does not hold*.

A claim without a value is *not run*. One that a profile can not put to the test, such as a planted
cause in photographs, is *not applicable*.
"""

import json
import operator
import platform
import subprocess
import warnings
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock

from support import stored
from support.stored import ROOT, folder

BOUNDS = {
    "at_least": ("at least {}", operator.ge),
    "at_most": ("at most {}", operator.le),
    "above": ("above {}", operator.gt),
    "below": ("below {}", operator.lt),
    "within": ("from {} to {}", lambda value, ends: ends[0] <= value <= ends[1]),
    "equal": ("exactly {}", operator.eq),
    "interval_above": ("95 % interval above {}", lambda ends, limit: ends[0] > limit),
    "interval_holds": ("95 % interval holds {}", lambda ends, limit: ends[0] <= limit <= ends[1]),
}
CODE = ("helpers", "notebooks", "params")  # what decides a result
SOURCES = ("paper", "thesis", "here")
DEFAULT = "vehicles"  # the data set whose ids are bare, in notebooks that run on several
PUBLISHED, OWN = ("reproduced", "not reproduced"), ("holds", "does not hold")
WORDS = (PUBLISHED[0], OWN[0], "partly", PUBLISHED[1], OWN[1], "not run", "not applicable")


def claim(id, text, value, *, of="here", published=None, interval=None, applies=True, **bound):
    """Return a claim as a dict, with its outcome.

    value : the number that decides; None where it was not computed; or what has a `mean` and an
    `interval`, as `evaluation.mean_of` returns. interval : (low, high) at 95 %.
    bound : one of at_least=, at_most=, above=, below=, within=(low, high), equal=, and
    of the interval, interval_above= (its lower end) and interval_holds= (a published number).
    of : whose claim it is, "paper", "thesis", or "here" (ours); published : their number.
    applies : False where this profile can not put it to the test; one repetition has no interval
    to ask it of.
    """
    ((kind, limit),) = bound.items()
    if kind not in BOUNDS or of not in SOURCES:
        raise ValueError(f"claim {id}: bounds are {', '.join(BOUNDS)}; of is one of {SOURCES}")
    if of == "here" and published is not None:
        raise ValueError(f"claim {id}: a published number is the paper's or the thesis's")
    if hasattr(value, "interval"):
        value, interval = value.mean, value.interval
    if interval is not None and not np.isfinite(np.asarray(interval, float)).all():
        interval, applies = None, applies and not kind.startswith("interval")
    elif kind.startswith("interval") and value is not None and interval is None:
        raise ValueError(f"claim {id}: {kind} asks it of an interval, and there is none")
    stated = {"id": id, "claim": text, "of": of, "published": published, kind: limit}
    known = {"value": value if applies else None, "interval": interval if applies else None}
    known = plain({name: v for name, v in (stated | known).items() if v is not None})
    word = outcome(known) if applies else "not applicable"
    return {**known, "value": known.get("value"), "verdict": word}


def bound_of(claim):
    """Return the kind of a claim's bound and its number, or its two."""
    return next((kind, claim[kind]) for kind in BOUNDS if kind in claim)


def criterion(claim):
    """Return the words of a claim's criterion."""
    kind, limit = bound_of(claim)
    return BOUNDS[kind][0].format(*(f"{end:.6g}" for end in np.atleast_1d(limit)))


def outcome(claim):
    """Return what became of a claim, one of WORDS, by the rule that stands at the top."""
    value, interval, (kind, limit) = claim.get("value"), claim.get("interval"), bound_of(claim)
    if value is None:
        return "not run"
    met, ends = BOUNDS[kind][1], np.atleast_1d(limit)
    yes, no = OWN if claim["of"] == "here" else PUBLISHED
    if kind.startswith("interval"):
        holds, near = met(interval, limit), interval[0] <= limit < interval[1]
    elif interval is not None:
        some = (*interval, *np.clip(ends, *interval))  # one of them meets it, if any part does
        holds, near = met(value, limit), any(met(v, limit) for v in some)
    else:
        holds, near = met(value, limit), any(abs(value - end) < 0.1 * abs(end) for end in ends)
    return yes if holds else "partly" if near else no


def show_number(value):
    """Return a number as text with three digits; rounding noise (below 1e-9) is said to be that."""
    if value is None or np.isnan(value):
        return "-"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:,.0f}"
    if value != 0 and abs(value) < 1e-9:
        return "below 1e-9"
    return f"{value:.3g}"


def show_value(claim):
    """Return a claim's value as text, with its interval where it has one."""
    value = show_number(claim["value"])
    ends = claim.get("interval")
    return f"{value} ({' to '.join(map(show_number, ends))})" if ends else value


def table(claims):
    """Return claims as a table to show."""
    pd.set_option("display.max_colwidth", 80, "display.width", 220)
    columns = ["id", "claim", "of", "published", "criterion", "value", "verdict"]
    rows = [{**c, "criterion": criterion(c), "value": show_value(c)} for c in claims]
    shown = pd.DataFrame(rows, columns=columns).set_index("id")
    shown["published"] = [show_number(c.get("published")) for c in claims]
    return shown


def write(notebook, profile, parameters, claims, *, dataset=None):
    """Write claims to runs/<profile>/figures/NN_verdicts.json and return the table to show.

    dataset : of a notebook that runs on several, which one. All runs share one file, in which each
    replaces its own claims; ids on another data set than DEFAULT get the prefix `<dataset>_`.
    """
    path = folder("runs", profile, "figures") / f"{notebook[:2]}_verdicts.json"
    if dataset not in (None, DEFAULT):
        claims = [{**c, "id": f"{dataset}_{c['id']}", "dataset": dataset} for c in claims]
    with FileLock(path.with_suffix(".lock")):
        record = _without(path, dataset)
        record["runs"][dataset or "all"] = {"parameters": parameters, **_made_with(profile)}
        record["verdicts"] += claims
        record["verdicts"].sort(key=lambda c: c.get("dataset", ""))
        runs = dict(sorted(record["runs"].items(), key=lambda run: (run[0] != DEFAULT, run[0])))
        record = {"notebook": notebook, "profile": profile, **record, "runs": runs}
        stored.write(path, json.dumps(plain(record), indent=1) + "\n")
    return table(claims)


def forget(path, dataset):
    """Take the claims of a data set out of a file that `write` wrote, where there is one."""
    if path.exists():
        with FileLock(path.with_suffix(".lock")):
            stored.write(path, json.dumps(_without(path, dataset), indent=1) + "\n")


def _without(path, dataset):
    """Return the record in a file, where it is whole, without what a data set's run put there."""
    nothing, own = {"runs": {}, "verdicts": []}, None if dataset == DEFAULT else dataset
    if not path.exists() or dataset is None:
        return nothing
    try:
        record = read_record(path)
    except ValueError as error:
        warnings.warn(f"{error} Claims on other data sets are lost.", stacklevel=3)
        return nothing
    record["runs"].pop(dataset, None)
    record["verdicts"] = [c for c in record["verdicts"] if c.get("dataset") != own]
    return record


def _made_with(profile):
    """Return what a run was made with; of `demo`, whose results are the same everywhere, less."""
    import keras
    import tensorflow as tf

    versions = {"tensorflow": tf.__version__, "keras": keras.__version__, "numpy": np.__version__}
    if profile == "demo":
        return {"versions": versions, "command": "make reproduce"}
    return {
        "versions": versions,
        "command": f"make {profile}",
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }


def _commit():
    """Return the commit that made a result, "-dirty" if its code had uncommitted changes."""
    try:
        commit = git("rev-parse", "--short", "HEAD").stdout.strip()
        changed = git("status", "--porcelain", "--", *CODE).stdout
    except OSError:  # there is no git
        return "unknown"
    return f"{commit or 'unknown'}{'-dirty' if changed else ''}"


def git(*words):
    """Return what git did in this project, as `subprocess.run` returns it."""
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)


def plain(value):
    """Return JSON types, floats with six significant digits (arrays become lists)."""
    if hasattr(value, "tolist"):  # NumPy's and pandas's
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value


# ---------------------------------------------------------------- what was written


def committed(profile):
    """Return the folder of a profile's committed verdicts and figures."""
    return ROOT / "figures" / profile


def results(profile):
    """Return the folder of a profile's last run; of the committed verdicts where none was made."""
    of_run = folder("runs", profile, "figures")
    others = [path for path in of_run.glob("[0-9][0-9]_verdicts.json") if path.name[:2] != "16"]
    return of_run if others else committed(profile)


def read_record(path):
    """Return what `write` wrote; ValueError where that is damaged."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(record["runs"], dict) or [c for c in record["verdicts"] if not c["id"]]:
            raise ValueError("it is no record of claims")
        return record
    except (ValueError, KeyError, TypeError) as error:
        name = Path(path).name
        raise ValueError(f"{path} is damaged ({error}): run notebook {name[:2]} again.") from error


def written(where, chosen=None):
    """Return the claims in a folder, of all or of some notebooks, as one table in their order.

    A damaged file is said, and left out.
    """
    rows = []
    for path in sorted(where.glob("[0-9][0-9]_verdicts.json")):
        try:
            record = read_record(path)
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
            continue
        for c in record["verdicts"]:
            told = {"shown": show_value(c), "criterion": criterion(c)}
            rows.append({"notebook": record["notebook"], **c, **told})
    columns = ["notebook", "id", "claim", "of", "published"]
    columns += ["criterion", "value", "shown", "verdict"]
    found = pd.DataFrame(rows, columns=columns)
    return found if chosen is None else found[found["notebook"].isin(p.stem for p in chosen)]
