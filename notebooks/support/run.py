"""A strict front end to papermill: `python -m support.run --profile demo`.

How this differs from plain papermill:
1. an unknown parameter, or a value of another type than the default's, is an error;
2. the parameters cell holds literals only, so an override can not leave a derived value behind;
3. the output file appears when the run has succeeded; until then it is partial_NN_name.ipynb;
4. stderr, widgets, timings and papermill's metadata are dropped;
5. notebooks that do not read one another run side by side, one of several data sets once for each.

A run writes into runs/<profile>/ and nowhere else; `--promote` copies it to what is committed.
"""

import argparse
import ast
import json
import os
import shutil
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import joblib
import nbformat
import papermill
import yaml
from filelock import FileLock
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from tqdm import tqdm

from support import datasets, fetch, pages, stored
from support.claims import CODE, DEFAULT, forget, git, read_record, written
from support.start import PROFILES
from support.stored import ROOT, data_root, folder, named_folder, write

ALONE = {"00", "01", "02", "16"}  # the others read what 00-02 write, and 16 what all of them wrote
MISSING = "not applicable"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
NOT_RUN = 2  # exit status where nothing was run because of what was asked for


def declared_parameters(notebook):
    """Return {name: default} of the notebook's parameters cell, which may hold literals only."""
    cells = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"a notebook needs one cell tagged 'parameters', found {len(cells)}")
    try:
        body = ast.parse(cells[0].source).body
        return {name.id: ast.literal_eval(line.value) for line in body for name in line.targets}
    except (AttributeError, ValueError) as error:
        raise ValueError(f"parameters cell: only `name = literal` ({error})") from error


def plain(value):
    """Return a parameter as JSON has it: lists for tuples and arrays, numbers for NumPy's."""

    def other(value):
        if hasattr(value, "tolist"):
            return value.tolist()
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        raise ValueError(f"a parameter is a number, text, a list or a dict, not {value!r}")

    return json.loads(json.dumps(value, default=other))


def checked(given, declared):
    """Return the given parameters, each known and of its default's type (an int may be a float)."""
    given = plain(given)
    for name, value in given.items():
        if name not in declared:
            raise ValueError(f"unknown parameter '{name}'; there are {', '.join(sorted(declared))}")
        kind, its = type(plain(declared[name])), type(value)
        if kind not in (type(None), its) and (kind, its) != (float, int):
            hint = " (YAML floats need a dot: 1.0e-3)" if its is str else ""
            raise ValueError(
                f"parameter '{name}' is a {kind.__name__} like {declared[name]!r}; "
                f"{value!r} is a {its.__name__}{hint}"
            )
    return given


def tidy(notebook, *, injected=True):
    """Drop what changes from run to run; `injected=False` also drops the injected parameters."""
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    if not injected:
        notebook.cells = [
            c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])
        ]
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not _passing(o)]
    return CoalesceStreamsPreprocessor().preprocess(notebook, {})[0]


def _passing(output):
    """Return whether an output is stderr or a widget, dead once its kernel has ended."""
    widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return widget or output.get("name") == "stderr"


def run(source, target, parameters=None):
    """Execute a notebook with parameters into `target` and .html; return the seconds it took."""
    source, target = Path(source), Path(target)
    parameters = checked(parameters or {}, declared_parameters(nbformat.read(source, 4)))
    partial = target.with_name(f"partial_{target.name}")
    started = time.perf_counter()
    with _stderr_to(target.with_suffix(".log")):
        papermill.execute_notebook(
            *(str(path).replace("{", "{{").replace("}", "}}") for path in (source, partial)),
            parameters,
            cwd=source.parent,
            kernel_name="python3",
            language="python",
            progress_bar=False,
        )
    executed = tidy(nbformat.read(partial, 4))
    nbformat.write(executed, partial)
    write(target.with_suffix(".html"), pages.of_notebook(executed))
    partial.replace(target)
    return time.perf_counter() - started


@contextmanager
def _stderr_to(path):
    """Send what the kernel logs to a file, which stays only if the run fails."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with open(path, "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
    path.unlink()


def choose(names):
    """Return the notebooks of these numbers or names, in order; all of them where none is named."""
    every = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    known = {key: path for path in every for key in (path.stem, path.stem[:2])}
    unknown = [name for name in names if name not in known]
    if unknown:
        numbers = " ".join(path.stem[:2] for path in every)
        raise ValueError(f"there is no notebook {' and no '.join(unknown)}; there are {numbers}")
    return sorted({known[name] for name in names}) if names else every


class Job(NamedTuple):
    """A run of a notebook: its path, the name of what it writes, its parameters."""

    path: Path
    name: str
    dataset: str | None
    parameters: dict

    @property
    def number(self):
        return self.path.stem[:2]


def jobs_of(profile, chosen):
    """Return the Jobs of some notebooks, with the checked parameters of params/<profile>.yaml.

    The file gives a notebook its parameters, or a list of them, one for each data set it runs on.
    What a notebook on another data set than its default writes is called NN_name_<dataset>.
    """
    file = ROOT / "params" / f"{profile}.yaml"
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file.relative_to(ROOT)} can not be read: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{file.relative_to(ROOT)} gives no parameters, NN_name: {{name: value}}")
    jobs, unknown = [], given.keys() - {path.stem for path in choose([])}
    if unknown:
        raise ValueError(
            f"{file.relative_to(ROOT)} names no notebook: {', '.join(map(str, unknown))}"
        )
    for path in chosen:
        declared = declared_parameters(nbformat.read(path, 4))
        entry = given.get(path.stem, {})
        for parameters in entry if entry and isinstance(entry, list) else [entry]:
            if not isinstance(parameters, dict):
                raise ValueError(
                    f"{file.relative_to(ROOT)} gives {path.stem} no parameters, {{name: value}}, "
                    f"but {parameters}"
                )
            if parameters.get("profile", "demo") != profile:
                raise ValueError(
                    f"{file.relative_to(ROOT)} needs a line for {path.stem} that says "
                    f"`profile: {profile}`; it says {parameters.get('profile', 'nothing')}"
                )
            if parameters.get("mnist_source") == "best":
                parameters = {**parameters, "mnist_source": datasets.best_digits()}
            dataset = parameters.get("dataset", declared.get("dataset"))
            name = path.stem if dataset in (None, DEFAULT) else f"{path.stem}_{dataset}"
            if name in {job.name for job in jobs}:
                raise ValueError(
                    f"{file.relative_to(ROOT)} gives {name} two sets of parameters, and the second "
                    "run would overwrite the first: one for each data set"
                )
            jobs.append(Job(path, name, dataset, checked(parameters, declared)))
    return jobs


def run_jobs(profile, left, at_once=1):
    """Run Jobs into runs/<profile>/, `at_once` side by side; return those that failed.

    Where data of one's own are needed, a Job that misses some is not applicable, and the others go
    on; if none ran, all have failed.
    """
    target, left, running, failed, missed = folder("runs", profile), list(left), {}, [], []
    every = len(left)
    with (
        ProcessPoolExecutor(at_once, get_context("spawn")) as pool,
        tqdm(total=len(left), unit="notebook", disable=None, leave=False) as bar,
    ):
        while running or (left and not failed):
            while left and not failed and _may_start(left[0], running.values(), at_once):
                job = left.pop(0)
                running[pool.submit(_attempt, job, target)] = job
            bar.set_description(" ".join(job.number for job in running.values()))
            for task in wait(running, return_when=FIRST_COMPLETED).done:
                job, (done, outcome) = running.pop(task), task.result()
                without_data = profile != "demo" and outcome.startswith(MISSING)
                failed += [] if done or without_data else [job]
                missed += [job] if without_data else []
                bar.write(f"{job.name:28s} {outcome}")
                bar.update()
    failed = failed or (missed if len(missed) == every else [])
    if failed:
        print(f"\nFAILED: {' '.join(job.name for job in failed)}")
        for partial in (target / f"partial_{job.name}.ipynb" for job in failed):
            if partial.exists():
                print(f"The cells that ran are in {partial}")
        if left:
            print(f"Not run: {' '.join(job.name for job in left)}")
    return failed


def _may_start(job, running, at_once):
    """Return whether a Job may run beside those that are running."""
    numbers = {other.number for other in running}
    return not numbers or (len(running) < at_once and not (numbers | {job.number}) & ALONE)


def _set_aside(target, job):
    """Move what an earlier run of a Job left to runs/<profile>/earlier/."""
    earlier = target / "earlier"
    figures = f"{job.number}_{job.dataset}_*" if job.dataset else f"{job.number}_*"
    old = [*target.glob(f"{job.name}.*"), *target.glob(f"partial_{job.name}.*")]
    for path in [*old, *(target / "figures").glob(figures)]:
        earlier.mkdir(exist_ok=True)
        path.replace(earlier / path.name)
    if job.dataset:
        forget(target / "figures" / f"{job.number}_verdicts.json", job.dataset)


def alone(target):
    """Return the lock of an executed notebook: of two processes that run it one waits."""
    return FileLock(target.with_name(f".{target.name}.lock"))


def _attempt(job, folder):
    """Run a Job; return whether it succeeded, and the seconds it took or why it failed."""
    output = folder / f"{job.name}.ipynb"
    try:
        with alone(output):
            _set_aside(folder, job)
            return True, f"{run(job.path, output, job.parameters):5.0f} s"
    except Exception as error:  # whatever stopped it, the reader wants the reason first
        name = getattr(error, "ename", type(error).__name__)  # of an exception in the notebook
        start = MISSING if name == stored.DataMissing.__name__ else f"FAILED\n\n{name}"
        return False, f"{start}: {getattr(error, 'evalue', error)}\n"


def share_cores(at_once):
    """Give each of so many processes its share of the cores, where nobody has said more."""
    if at_once > 1:
        share = str(max(1, joblib.cpu_count() // at_once))
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
            os.environ.setdefault(name, share)
        os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")


def print_verdicts(profile, chosen):
    """Print the verdicts of the notebooks that were run, and where their files are."""
    print()
    for row in written(folder("runs", profile, "figures"), chosen).itertuples():
        print(f"{row.notebook[:2]}  {row.verdict:14s}  {row.id:32s} {row.shown:>24s}", end="")
        print(f"   {row.criterion}")
    where = folder("runs", profile)
    print(f"\nExecuted notebooks: {where}/*.html   figures: {where}/figures/")


def _start_from_what_is_committed(profile):
    """Let a run write to runs/refresh/, where the summary finds the other notebooks' results."""
    os.environ["THESIS_RUNS"] = "runs/refresh"
    figures = folder("runs", profile, "figures")
    shutil.rmtree(figures)
    shutil.copytree(folder("figures", profile), figures)


def promote(profile, chosen):
    """Copy finished runs to what is committed: figures/<profile>/ and, of `demo`, notebooks/.

    Of the other profiles only numbers and plots are copied, no figure that shows a picture, and
    only from a run of the code that is committed.
    """
    runs, jobs = folder("runs", profile), jobs_of(profile, chosen)
    for job in jobs:
        record = runs / "figures" / f"{job.number}_verdicts.json"
        if not (runs / f"{job.name}.ipynb").exists() or not record.exists():
            raise ValueError(f"{runs} holds no finished run of {job.name}")
        if profile != "demo":
            for made in read_record(record)["runs"].values():
                _refuse_other_code(job.name, made["commit"])
    target = folder("figures", profile)
    for notebook in chosen:
        for pattern in (f"{notebook.stem[:2]}_*.{kind}" for kind in ("json", "png")):
            for old in target.glob(pattern):
                old.unlink()
            for new in (runs / "figures").glob(pattern):
                if new.suffix == ".png" and profile != "demo" and not pages.is_plot(new):
                    continue
                write(target / new.name, new.read_bytes())
        if profile == "demo":
            executed = tidy(nbformat.read(runs / notebook.name, 4), injected=False)
            write(notebook, nbformat.writes(executed) + "\n")
    pages.update_readme()


def _refuse_other_code(name, commit):
    """Raise where a run's code is not the committed one, or where the tree has changes."""
    if git("status", "--porcelain").stdout:
        raise ValueError("the tree has uncommitted changes: commit or remove them first")
    if commit.endswith("-dirty") or git("diff", "--quiet", commit, "HEAD", "--", *CODE).returncode:
        raise ValueError(f"{name} was run with other code ({commit}) than is committed")


def main(arguments=None):
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=PROFILES, default="demo")
    parser.add_argument("--jobs", type=int, help="notebooks at once; demo: one a core, else 1")
    parser.add_argument("--promote", action="store_true", help="copy a run to what is committed")
    parser.add_argument("notebooks", nargs="*", help="numbers or names; all by default")
    options = parser.parse_args(arguments)
    if options.jobs is not None and options.jobs < 1:
        parser.error("--jobs: at least 1")
    profile, only_copy = options.profile, options.promote and options.profile != "demo"
    at_once = options.jobs or (joblib.cpu_count() if profile == "demo" else 1)
    try:
        chosen = choose(options.notebooks)
        jobs = jobs_of(profile, chosen)
        named_folder("KERAS_HOME")
        root = data_root()
        folder("runs", profile)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return NOT_RUN
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    share_cores(at_once)
    if options.promote and not only_copy:
        _start_from_what_is_committed(profile)
    if not only_copy:
        if profile != "demo":
            print(f"data root: {root}")
        if profile == "real":
            fetch.print_states()
        if run_jobs(profile, jobs, at_once):
            return 1
    if options.promote:
        try:
            promote(profile, chosen)
        except ValueError as error:
            print(f"Nothing was copied: {error}.", file=sys.stderr)
            return NOT_RUN
    else:
        print_verdicts(profile, chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
