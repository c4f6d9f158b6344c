"""One method on one task in a process of its own: `python worker.py METHOD TASK OUTPUT.npz`.

METHOD may end in what it is asked for: "ours cg@1e-3" a relative residual, "pyDVL cg@11" steps.
Prints a JSON line: seconds of the first and of the repeated runs (imports and loading excluded),
the time of day of the first answer, the relative error against the reference, and how far the peak
of resident memory rose above the state after loading. The last line counts; peers print too.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / part) for part in (".", "notebooks")]
sys.path.insert(0, str(Path(__file__).resolve().parent))


def resident():
    """Return the resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 1e6


def main(method, task, path, budget=30.0):
    with np.load(path) as stored:
        data = dict(stored)
    library, (name, _, asked) = method.split()[0], method.partition("@")
    if library in ("ours", "NumPy", "naive"):
        import ours as methods
    else:
        import peers as methods
    run, settings = methods.prepare(name, task, data, *[asked] * bool(asked))
    loaded, times, answered = resident(), [], None
    while len(times) < 4 and sum(times) + (times[-1] if times else 0) < budget:
        started = time.perf_counter()
        change = run()
        times.append(time.perf_counter() - started)
        answered = answered or time.time()
    rows = slice(0, len(change))
    own = "change" if library in ("ours", "NumPy", "naive") else "change_without_share"
    expected = data[own][rows]
    scale = len(data[own]) / len(change)  # a method run on some test points only
    print(
        json.dumps(
            {
                "method": method,
                "settings": settings,
                "first": times[0] * scale,
                "answered": answered,
                "warm": [t * scale for t in times[1:]],
                "extrapolated": scale > 1,
                "error": float(np.linalg.norm(change - expected) / np.linalg.norm(expected)),
                "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - loaded,
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:4])
