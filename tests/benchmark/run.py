"""`make benchmark`: cost and error of all-pairs influence, ours beside NumPy and other libraries.

Every run is a process of its own, methods take turns (interleaved), and the median over the rounds
is reported: a script from its start to the first answer, the first call alone (tracing included),
and the repeated one. Iterative solvers run at several accuracies, so that they can be compared at
equal error. Writes figures/benchmark/{benchmark.json,benchmark.md,benchmark.png,error.png} and the
table in README. `--peers PYTHON` adds the PyTorch libraries of the environment that `make peers`
makes; `--quick` is one round on T3, for a look.
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
from matplotlib import ticker

from helpers import CG, Cholesky, Removals, fit_head, predicted_loss_change, s_test, solve

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks"), str(HERE)]
CURVE = [f"ours cg@{rtol}" for rtol in ("3e-1", "1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "3e-6")]
CURVE += ["ours cg float64@1e-7"]
PEER_CURVE = [f"pyDVL cg@{steps}" for steps in (4, 7, 11, 20, 37)]
OURS = {
    "t1": ["ours cholesky float64", "NumPy closed float64", "ours cg float64", "naive compiled"],
    "t3": [*CURVE, "naive compiled", "naive eager"],
    "t4": [*CURVE, "naive compiled"],
}
PEERS = {
    "t1": ["dattri explicit", "dattri cg", "pyDVL direct", "kronfluence ekfac", "captum arnoldi"],
    "t3": [*PEER_CURVE, "dattri cg", "kronfluence ekfac", "captum arnoldi", "pyDVL direct"],
    "t4": [*PEER_CURVE, "dattri cg", "kronfluence ekfac"],
}


def measure(python, method, task, path, limit=900):
    """Return the JSON of one worker process, or why it gave none."""
    command = [python, str(HERE / "worker.py"), method, task, str(path)]
    started = time.time()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"method": method, "failed": f"no result in {limit} s"}
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"])[-1]
        return {"method": method, "failed": why}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found | {"script": found["answered"] - started}


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
        row |= {"script s": np.median([r["script"] for r in good])}
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


def classes():
    """Return seconds of ours over C, the classes of a softmax head (n 2,000, d 64, m 10)."""
    import tasks

    tasks.keras.config.set_dtype_policy("float64")
    rng, rows = np.random.default_rng(0), []
    x = rng.normal(size=(2000, 64))
    for c in (3, 10, 100, 1000):
        y = rng.integers(0, c, 2000)
        model = tasks.models.linear_head(64, c)
        model.layers[-1].kernel.assign(0.1 * rng.normal(size=(64, c)))
        objective = tasks.Objective(model, tasks.LOSSES["t3"], x, y, weight_decay=0.01)
        times = []
        for _ in range(4):
            started = time.perf_counter()
            predicted_loss_change(objective, s_test(objective, x[:10], y[:10]))
            times.append(time.perf_counter() - started)
        found = {"ours, first call": times[0], "ours": float(np.median(times[1:]))}
        rows += [{"axis": "C", "value": c, "method": k, "seconds": s} for k, s in found.items()]
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


def leave_one_out(few=3):
    """Return seconds and errors of leaving each of 500, then of all 2,000, points of T1 out.

    The exact refits, the Newton step and the first order, on the m test losses; scikit-learn from
    the full fit on, by its fastest solver that gets to a gradient norm of 1e-8, is timed on `few`
    points and scaled.
    """
    import tasks
    from sklearn.linear_model import LogisticRegression

    tasks.keras.config.set_dtype_policy("float64")
    data = tasks.load("t1")
    objective = tasks.bind("t1", data, "float64")
    x, y, n = objective.head.phi, objective.head.y.ravel(), objective.n
    wd, tests = float(data["weight_decay"]), (data["x_test"].astype(float), data["y_test"])
    full = {"coef_": objective.theta[None], "intercept_": np.zeros(1), "classes_": [0, 1]}

    def timed(work):
        started = time.perf_counter()
        return work(), time.perf_counter() - started

    def scikit_learn(i, solver):
        rows, options = np.arange(n) != i, {"fit_intercept": False, "max_iter": 1000}
        c = 1 / ((n - 1) * wd)
        model = LogisticRegression(C=c, tol=1e-8, solver=solver, warm_start=True, **options)
        vars(model).update(full)
        theta = model.fit(x[rows], y[rows]).coef_[0]
        residual = 1 / (1 + np.exp(-x[rows] @ theta)) - y[rows]
        return np.linalg.norm(x[rows].T @ residual / (n - 1) + wd * theta)

    without, factorisation = timed(lambda: Removals(objective))
    tried = [
        timed(lambda s=s: [scikit_learn(i, s) for i in range(few)])
        for s in ("newton-cg", "newton-cholesky", "lbfgs")
    ]
    theirs = min(seconds for norms, seconds in tried if max(norms) <= 1e-8)
    found = [{"rows": "factorisation", "exact s": factorisation}]
    for rows in (np.arange(500), np.arange(n)):
        actual, exact = timed(lambda r=rows: without.loss_change(without.exact(r), *tests))
        step, newton = timed(lambda r=rows: without.newton_loss_change(*tests, r))
        first, linear = timed(
            lambda: predicted_loss_change(objective, s_test(objective, *tests, Cholesky()))
        )
        scale = np.linalg.norm(actual)
        row = {"rows": len(rows), "exact s": exact, "gradient norm": without.gradient_norms.max()}
        row |= {"Newton step s": newton, "its error": np.linalg.norm(step - actual) / scale}
        row |= {"first order s": linear}
        row |= {"error of it": np.linalg.norm(first[:, rows] - actual) / scale}
        found.append(row | {"scikit-learn s (scaled)": theirs / few * len(rows)})
    return found


def draw(rows, path):
    """Write the log-log picture of cost against n, d, m and C."""
    table = pd.DataFrame(rows)
    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.85)
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), sharey=True, layout="constrained")
    labels = {"n": "n training points", "d": "p = d features", "m": "m test points"}
    labels |= {"C": "C classes, p = 64 C (m 10)"}
    for panel, (axis, label) in zip(axes, labels.items(), strict=True):
        for name, part in table[table["axis"] == axis].groupby("method", sort=False):
            panel.plot(part["value"], part["seconds"], "o-", label=name)
        panel.set(xscale="log", yscale="log", xlabel=label)
        values = sorted(set(table[table["axis"] == axis]["value"]))
        panel.set_xticks(values, [f"{value:,}" for value in values], minor=False)
        panel.set_xticks([], minor=True)
    axes[0].set_ylabel("seconds for all m x n influences")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4)
    figure.suptitle("One factorisation for all pairs, on a logistic head (n 2,000, p 1,024, m 100)")
    figure.savefig(path, dpi=100)


def draw_errors(rows, path):
    """Write the picture of seconds against the error that is reached, ours beside pyDVL's."""
    table = pd.DataFrame(rows)
    table = table[table["method"].str.contains("@")].rename(columns=COLUMNS)
    table["library"] = table["method"].str.split().str[0]
    table["task"] = table["task"].map(lambda task: NAMES[task].split(",")[0])
    table = table.melt(
        ["task", "library", "relative error"], [*COLUMNS.values()], "time", "seconds"
    )
    sns.set_theme(context="paper", style="whitegrid")
    grid = sns.relplot(
        table, x="relative error", y="seconds", hue="library", style="library", col="time",
        row="task", kind="line", estimator=None, markers=True, dashes=False, height=2.2,
        aspect=1.05, facet_kws={"sharey": "row"},
    )  # fmt: skip
    grid.set(xscale="log", yscale="log").set_titles("{row_name}, {col_name}")
    grid.axes[0, 0].invert_xaxis()
    grid.set_xlabels("relative error (falling)")
    for axis in grid.axes.flat:
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    grid.savefig(path, dpi=150)


COLUMNS = {"script s": "whole script", "first s": "first call", "repeated s": "repeated call"}
NAMES = {
    "t1": "logistic head, n 2,000, p 2,048, m 600",
    "t3": "small CNN, n 1,500, p 1,338, m 10",
    "t4": "perceptron, n 1,500, p 112,810, m 10",
}


def readme_table(rows):
    """Return README's table: pyDVL at two accuracies, ours as exact as that, and the best others.

    Ours is the fastest that is no less exact; a method whose error exceeds a tenth is no answer.
    """
    lines = ["| task | method | whole script | first call | repeated | relative error |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for task, name in NAMES.items():
        good = [r for r in rows if r["task"] == task and r.get("relative error", 1) < 0.1]
        good = [r for r in good if not r["extrapolated"]]
        chosen = [r for r in good if "@" not in r["method"]]
        for peer in [r for r in good if r["method"] in ("pyDVL cg@11", "pyDVL cg@37")]:
            mine = [r for r in good if r["method"].startswith("ours cg")]
            mine = [r for r in mine if r["relative error"] <= peer["relative error"]]
            chosen += [min(mine, key=lambda r: r["repeated s"]), peer]
        for row in chosen:
            times = " | ".join(f"{_seconds(row[c])} s" for c in COLUMNS)
            times = times.replace("once s", "once")
            lines.append(f"| {name} | {row['method']} | {times} | {row['relative error']:.0e} |")
    return lines


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


def markdown(rows, ratios, fits, left_out, machine):
    """Return the table as Markdown."""
    lines = [f"Medians of interleaved runs on {machine}. Where a row says so it is scaled up.", ""]
    lines += [
        "| task | method | script s | first call s | repeated s | relative error | memory MB "
        "| settings |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(
                f"| {row['task']} | {row['method']} | - | - | - | - | - | {row['failed']} |"
            )
            continue
        scaled = " (scaled)" if row["extrapolated"] else ""
        lines.append(
            f"| {row['task'].upper()} | {row['method']}{scaled} | "
            f"{'-' if scaled else format(row['script s'], '.3g')} | {row['first s']:.3g} | "
            f"{_seconds(row['repeated s'])} | {row['relative error']:.1e} | "
            f"{row['memory MB']:.0f} | {row['settings']} |"
        )
    lines += ["", "Many right-hand sides on the softmax head of the digits (p 640):", ""]
    lines += [f"- {name}: {value:.3g}" for name, value in ratios.items()]
    lines += ["", "Refits of the T1 head to other labels, times a fit:", ""]
    lines += [f"- {name}: {value:.3g}" for name, value in fits.items()]
    lines += ["", "Leaving points of T1 out, each alone, and the change of 600 test losses:", ""]
    for row in left_out:
        cells = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        lines.append(f"- {', '.join(cells)}")
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
    ratios, fits, left_out = together(), refits(), leave_one_out()
    print("\n" + markdown(rows, ratios, fits, left_out, machine))
    if options.quick:
        return
    swept = scaling() + classes()
    draw(swept, folder / "benchmark.png")
    draw_errors(rows, folder / "error.png")
    page = ROOT / "README.md"
    lines = [f"Medians of {options.rounds} interleaved runs on {machine}.", "", *readme_table(rows)]
    head, rest = page.read_text(encoding="utf-8").split("<!-- speed -->")
    tail = rest.split("<!-- end speed -->")[1]
    text = "\n".join(["<!-- speed -->", "", *lines, "", "<!-- end speed -->"])
    page.write_text(head + text + tail, encoding="utf-8")
    (folder / "benchmark.md").write_text(
        markdown(rows, ratios, fits, left_out, machine), encoding="utf-8"
    )
    record = {
        "machine": machine,
        "rows": rows,
        "together": ratios,
        "refits": fits,
        "leave one out": left_out,
        "scaling": swept,
    }
    (folder / "benchmark.json").write_text(
        json.dumps(record, indent=1, default=float) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
