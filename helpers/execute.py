"""A strict front end to papermill: `python -m helpers.execute --profile demo`.

How this differs from plain papermill:
1. an unknown parameter, or a value of another type than the default's, is an error;
2. the parameters cell holds literals only, so an override can not leave a derived value behind;
3. the output file appears when the run has succeeded; until then it is partial_NN_name.ipynb;
4. stderr, widgets, timings and papermill's metadata are dropped, so runs repeat to the byte;
5. notebooks run in the order of their numbers, because each reads what earlier ones wrote.
"""

import argparse
import ast
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import papermill
import yaml
from nbconvert import HTMLExporter

from helpers.reporting import all_verdicts, show_value, update_readme
from helpers.runtime import PROFILES, ROOT, data_root, folder


def declared_parameters(notebook):
    """Return {name: default} of the notebook's parameters cell, which may hold literals only."""
    cells = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"a notebook needs one cell tagged 'parameters', found {len(cells)}")
    declared = {}
    for statement in ast.parse(cells[0].source).body:
        if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1):
            raise ValueError(f"parameters cell, line {statement.lineno}: only `name = literal`")
        try:
            declared[statement.targets[0].id] = ast.literal_eval(statement.value)
        except ValueError as error:
            text = ast.unparse(statement)
            raise ValueError(f"parameters cell: `{text}` is no literal") from error
    return declared


def checked(given, declared):
    """Return the given parameters, each known and of its default's type (an int may be a float)."""
    for name, value in given.items():
        if name not in declared:
            raise ValueError(f"unknown parameter '{name}'; there are {', '.join(sorted(declared))}")
        default = declared[name]
        allowed = (int, float) if isinstance(default, float) else type(default)
        if default is not None and (
            isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, allowed)
        ):
            hint = " (YAML floats need a dot: 1.0e-3)" if isinstance(value, str) else ""
            raise ValueError(
                f"parameter '{name}' is a {type(default).__name__} like {default!r}; "
                f"{value!r} is a {type(value).__name__}{hint}"
            )
    return given


def tidy(notebook, *, in_place):
    """Drop what changes from run to run; `in_place` also drops the injected parameters cell."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    }
    notebook.metadata["language_info"] = {"name": "python"}
    if in_place:
        notebook.cells = [
            c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])
        ]
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.NotebookNode({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs = _joined([o for o in cell.outputs if not _passing(o)])
    return notebook


def _passing(output):
    """Return whether an output is stderr or a widget, dead once its kernel has ended."""
    widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return widget or output.get("name") == "stderr"


def _joined(outputs):
    """Return outputs with pieces of one stream joined: where they were cut is chance."""
    joined = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def run(source, target, parameters=None, *, html=True):
    """Execute a notebook with parameters into `target` (and .html); return the seconds it took."""
    source, target = Path(source), Path(target)
    notebook = nbformat.read(source, 4)
    parameters = checked(parameters or {}, declared_parameters(notebook))
    in_place = source.resolve() == target.resolve()
    partial = target.with_name(f"partial_{target.name}")
    started = time.perf_counter()
    with _stderr_to(target.with_suffix(".log")):
        papermill.execute_notebook(
            source,
            partial,
            parameters,
            cwd=source.parent,
            kernel_name="python3",
            language="python",
            progress_bar=False,
        )
    executed = tidy(nbformat.read(partial, 4), in_place=in_place)
    nbformat.write(executed, partial)
    partial.replace(target)
    if html and not in_place:
        body, _ = HTMLExporter().from_notebook_node(executed)
        target.with_suffix(".html").write_text(body)
    return time.perf_counter() - started


@contextmanager
def _stderr_to(path):
    """Send what the kernel logs to a file, which stays only if the run fails."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with open(path, "w") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
    path.unlink()


def run_profile(profile, names, *, in_place=False):
    """Run notebooks in order; return 0, or 1 after the first that fails, with its error."""
    overrides = {}
    if profile != "demo":
        overrides = yaml.safe_load((ROOT / "params" / f"{profile}.yaml").read_text()) or {}
        print(f"data root: {data_root()}")
    every = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    chosen = [p for p in every if not names or any(p.stem.startswith(n) for n in names)]
    unknown = set(overrides) - {p.stem for p in every}
    if unknown or not chosen:
        raise ValueError(f"no notebook is called {sorted(unknown) or names}")
    target = folder("notebooks") if in_place else folder("runs", profile)
    for path in chosen:
        print(f"{path.stem:24s}", end=" ", flush=True)
        try:
            seconds = run(path, target / path.name, overrides.get(path.stem))
        except Exception as error:  # whatever stopped it, the reader wants the reason first
            print(f"FAILED\n\n{_reason(error)}\n")
            print(f"The cells that ran are in {target / f'partial_{path.name}'}")
            return 1
        print(f"{seconds:5.0f} s", flush=True)
    return 0


def _reason(error):
    if hasattr(error, "evalue"):  # an exception inside the notebook
        return f"{error.ename}: {error.evalue}"
    return f"{type(error).__name__}: {error}"


def print_verdicts(profile):
    """Print the verdict table of a profile and where its files are."""
    print()
    for row in all_verdicts(profile).itertuples():
        print(
            f"{row.notebook[:2]}  {row.verdict:14s}  {row.id:28s} {show_value(row):>24s}"
            f"   {row.criterion}"
        )
    print(f"\nExecuted notebooks: runs/{profile}/*.html   figures: figures/{profile}/")


def main(arguments=None):
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=PROFILES, default="demo")
    parser.add_argument("--in-place", action="store_true", help="re-execute notebooks/ (demo only)")
    parser.add_argument("notebooks", nargs="*", help="numbers or names; all by default")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    if options.in_place and options.profile != "demo":
        parser.error("--in-place is for the demo profile: its outputs are the committed ones")
    status = run_profile(options.profile, options.notebooks, in_place=options.in_place)
    if status == 0 and not options.in_place:
        print_verdicts(options.profile)
    elif status == 0:
        update_readme()
    return status


if __name__ == "__main__":
    sys.exit(main())
