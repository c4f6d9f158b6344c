"""`make benchmark`: cost and error of all-pairs influence, ours beside NumPy and other libraries.

Every run is a process of its own, methods take turns (interleaved), and the median over the rounds
is reported: the first call, tracing and compiling included, and the repeated one. Writes
figures/benchmark/benchmark.{json,md,png}. `--peers PYTHON` adds the PyTorch libraries of the
environment that `make peers` makes; `--quick` is one round on T3, for a look.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from helpers import CG, Cholesky, fit_head, predicted_loss_change, s_test, solve

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks"), str(HERE)]
OURS = {
    "t1": ["ours cholesky float64", "NumPy closed float64", "ours cg float64", "naive compiled"],
    "t3": ["ours cg", "naive compiled", "naive eager"],
    "t4": ["ours cg", "naive compiled"],
}
PEERS = {
    "t1": ["dattri explicit", "dattri cg", "pyDVL direct", "kronfluence ekfac", "captum arnoldi"],
    "t3": ["dattri cg", "pyDVL cg", "kronfluence ekfac", "captum arnoldi", "pyDVL direct"],
    "t4": ["dattri cg", "pyDVL cg", "kronfluence ekfac"],
}


def measure(python, method, task, path, limit=900):
    """Return the JSON of one worker process, or why it gave none."""
    command = [python, str(HERE / "worker.py"), method, task, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"method": method, "failed": f"no result in {limit} s"}
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"])[-1]
        return {"method": method, "failed": why}
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(task, path, methods, rounds):
    """Return one row a method: medians over interleaved rounds. What takes minutes runs once."""
    results = {method: [] for method in methods}
    for turn in range(rounds):
        for method, python in methods.items():
            if turn and (results[method][0].get("first", 1e9) > 60):
                continue
            found = measure(python, method, task, path)
            results[method].append(found)
            print(task, turn, found, flush=True)
    rows = []
    for method, runs in results.items():
        good = [r for r in runs if "failed" not in r]
        if not good:
            rows.append({"task": task, "method": method, "failed": runs[0]["failed"]})
            continue
        warm = [t for r in good for t in r["warm"]]
        row = {"task": task, "method": method, "settings": good[0]["settings"]}
        row |= {"first s": np.median([r["first"] for r in good])}
        row |= {"repeated s": np.median(warm) if warm else np.nan, "runs": len(good)}
        row |= {"relative error": max(r["error"] for r in good)}
        row |= {
            "memory MB": max(r["memory"] for r in good),
            "peak MB": max(r["peak"] for r in good),
        }
        rows.append(row | {"extrapolated": good[0]["extrapolated"]})
    return rows


def scaling():
    """Return seconds of ours and of NumPy over n, d = p and m, the others fixed, and the naive way.

    The naive way (one compiled solve a test point, one gradient a training point) is timed on one
    test point and scaled by m.
    """
    import ours as methods
    import tasks

    base, rows = {"n": 2000, "d": 1024, "m": 100}, []
    sweeps = {"n": (500, 1000, 2000, 4000, 8000), "d": (128, 256, 512, 1024, 2048)}
    sweeps["m"] = (1, 10, 100, 1000, 4000)
    rng = np.random.default_rng(0)
    keras = tasks.keras
    keras.config.set_dtype_policy("float64")
    for axis, values in sweeps.items():
        for value in values:
            size = base | {axis: value}
            x, xt = rng.normal(size=(size["n"], size["d"])), rng.normal(size=(size["m"], size["d"]))
            truth = rng.normal(size=size["d"]) / np.sqrt(size["d"])
            y, yt = ((a @ truth + rng.normal(size=len(a)) > 0).astype(float) for a in (x, xt))
            data = {"x_train": x, "y_train": y, "x_test": xt, "y_test": yt, "weight_decay": 0.01}
            data |= {"theta": 0.1 * truth, "damping": 0.0, "cg_steps": 30}

            def bound(data=data, d=size["d"]):
                model = tasks.models.linear_head(d)
                model.layers[-1].kernel.assign(data["theta"][:, None])
                loss = tasks.LOSSES["t1"]
                return tasks.Objective(
                    model, loss, data["x_train"], data["y_train"], weight_decay=0.01
                )

            def ours(objective, data=data):
                s = s_test(objective, data["x_test"], data["y_test"], Cholesky())
                return predicted_loss_change(objective, s)

            kept = bound()
            naive, _ = methods.naive(bound(), xt, yt, data, "compiled", few=1)
            for name, function, factor, repeats in (
                ("ours, first call", lambda b=bound, o=ours: o(b()), 1, 2),
                ("ours", lambda o=ours, k=kept: o(k), 1, 4),
                ("NumPy closed form", lambda d=data: methods.closed_form(d, "float64"), 1, 4),
                ("naive (scaled by m)", naive, size["m"], 2),
            ):
                times = []
                for _ in range(repeats):
                    started = time.perf_counter()
                    function()
                    times.append(time.perf_counter() - started)
                seconds = float(np.median(times[1:])) * factor
                rows.append({"axis": axis, "value": value, "method": name, "seconds": seconds})
    return rows


def together():
    """Return the time ratios of many right-hand sides on the softmax head of the digits, p 640.

    Block CG with 64 columns against 64 single solves, and a factorisation with 64 columns against
    one column: medians of interleaved runs.
    """
    import tasks

    from support import evaluation

    tasks.keras.config.set_dtype_policy("float64")
    data = tasks._digits()
    x, y = data["x_train"].astype(float), data["y_train"]
    model = tasks.models.linear_head(64, 10)
    objective = tasks.Objective(model, tasks.LOSSES["t3"], x, y, weight_decay=0.01)
    fit_head(objective)
    b = np.random.default_rng(0).normal(size=(objective.p, 64))

    def solved(columns, solver):
        return solve(objective, columns, solver(rtol=1e-6))

    def one_by_one():
        return [solved(b[:, j : j + 1], CG) for j in range(64)]

    return {
        "64 single CG solves / block CG": 1
        / evaluation.time_ratio(lambda: solved(b, CG), one_by_one),
        "Cholesky of 64 columns / of one": evaluation.time_ratio(
            lambda: solved(b, Cholesky), lambda: solved(b[:, :1], Cholesky)
        ),
    }


def refits(k=64, few=2):
    """Return how many times faster k refits of T1 to other labels are than scikit-learn's.

    A tenth of the labels is flipped, as in notebook 10; both reach a gradient norm of 1e-8, and
    scikit-learn's fits run one by one with each solver that gets there. The smallest ratio counts.
    """
    import tasks
    from sklearn.linear_model import LogisticRegression

    from studies import many_fits
    from support import evaluation

    tasks.keras.config.set_dtype_policy("float64")
    data = tasks.load("t1")
    objective = tasks.bind("t1", data, "float64")
    x, wd, n = objective.head.phi, float(data["weight_decay"]), objective.n
    labels = np.repeat(np.asarray(data["y_train"], float)[:, None], k, 1)
    rng = np.random.default_rng(0)
    for j in range(k):
        labels[rng.choice(n, n // 10, replace=False), j] -= 1
    labels = np.abs(labels)

    def fit(solver, tol, y):
        options = {"fit_intercept": False, "max_iter": 10_000, "tol": tol, "solver": solver}
        return LogisticRegression(C=1 / (n * wd), **options).fit(x, y).coef_[0]

    def norm(theta, y):
        p = 1 / (1 + np.exp(-x @ theta))
        return np.linalg.norm(x.T @ (p - y) / n + wd * theta)

    ours = many_fits.fit_many(objective, labels).gradient_norm.max()
    found = {}
    for solver in ("newton-cg", "newton-cholesky", "lbfgs"):
        reached = {t: norm(fit(solver, t, labels[:, 0]), labels[:, 0]) for t in (1e-8, 1e-9, 1e-10)}
        tol = next((t for t, g in reached.items() if g <= 1e-8), None)
        if tol is not None:

            def one_by_one(solver=solver, tol=tol):
                return [fit(solver, tol, labels[:, j]) for j in range(few)]

            ratio = evaluation.time_ratio(
                lambda: many_fits.fit_many(objective, labels), one_by_one, repeats=2
            )
            name = f"scikit-learn {solver} to {reached[tol]:.0e} / one of {k} fits to {ours:.0e}"
            found[name] = k / few / ratio
    return found


def draw(rows, path):
    """Write the log-log picture of cost against n, d and m."""
    table = pd.DataFrame(rows)
    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.85)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True, layout="constrained")
    labels = {"n": "n training points", "d": "p = d features", "m": "m test points"}
    for panel, (axis, label) in zip(axes, labels.items(), strict=True):
        for name, part in table[table["axis"] == axis].groupby("method", sort=False):
            panel.plot(part["value"], part["seconds"], "o-", label=name)
        panel.set(xscale="log", yscale="log", xlabel=label)
        values = sorted(set(table[table["axis"] == axis]["value"]))
        panel.set_xticks(values, [f"{value:,}" for value in values], minor=False)
        panel.set_xticks([], minor=True)
    axes[0].set_ylabel("seconds for all m x n influences")
    axes[0].legend()
    figure.suptitle("One factorisation for all pairs, on a logistic head (n 2,000, p 1,024, m 100)")
    figure.savefig(path, dpi=100)


def processor():
    """Return the processor's name and the number of its cores that are ours."""
    lines = (
        [Path("/proc/cpuinfo").read_text(encoding="utf-8")]
        if Path("/proc/cpuinfo").exists()
        else [""]
    )
    names = [w.split(":")[1].strip() for w in lines[0].splitlines() if w.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor()}, {cores} cores, no GPU used"


def _seconds(value):
    return "once" if np.isnan(value) else f"{value:.3g}"


def markdown(rows, ratios, fits, machine):
    """Return the table as Markdown."""
    lines = [f"Medians of interleaved runs on {machine}. Where a row says so it is scaled up.", ""]
    lines += [
        "| task | method | first call s | repeated s | relative error | memory MB | settings |"
    ]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['task']} | {row['method']} | - | - | - | - | {row['failed']} |")
            continue
        scaled = " (scaled)" if row["extrapolated"] else ""
        lines.append(
            f"| {row['task'].upper()} | {row['method']}{scaled} | {row['first s']:.3g} | "
            f"{_seconds(row['repeated s'])} | {row['relative error']:.1e} | "
            f"{row['memory MB']:.0f} | {row['settings']} |"
        )
    lines += ["", "Many right-hand sides on the softmax head of the digits (p 640):", ""]
    lines += [f"- {name}: {value:.3g}" for name, value in ratios.items()]
    lines += ["", "Refits of the T1 head to other labels, times a fit:", ""]
    lines += [f"- {name}: {value:.3g}" for name, value in fits.items()]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", help="Python of the environment with the PyTorch libraries")
    parser.add_argument("--tasks", nargs="*", default=["t1", "t3", "t4"], choices=list(OURS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round on T3")
    options = parser.parse_args()
    if options.quick:
        options.tasks, options.rounds = ["t3"], 1
    import tasks

    folder = ROOT / "figures" / "benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    rows, machine = [], processor()
    for task in options.tasks:
        tasks.load(task)
        methods = dict.fromkeys(OURS[task], sys.executable)
        if options.peers:
            methods |= dict.fromkeys(PEERS[task], options.peers)
        rows += compare(task, tasks.FOLDER / f"{task}.npz", methods, options.rounds)
    ratios, fits = together(), refits()
    print("\n" + markdown(rows, ratios, fits, machine))
    if options.quick:
        return
    swept = scaling()
    draw(swept, folder / "benchmark.png")
    (folder / "benchmark.md").write_text(markdown(rows, ratios, fits, machine), encoding="utf-8")
    record = {
        "machine": machine,
        "rows": rows,
        "together": ratios,
        "refits": fits,
        "scaling": swept,
    }
    (folder / "benchmark.json").write_text(
        json.dumps(record, indent=1, default=float) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
