"""Where files live, and results on disk that know what they were made from.

A result is a file beside a record, `NAME.json`, with the sha256 of its bytes. Both are written
whole or not at all, and checked when they are read. `checkpoint` names results by what decides
them: the data, and the code that computes with them.
"""

import ast
import functools
import hashlib
import inspect
import io
import json
import os
import re
import sys
import threading
import types
import warnings
from pathlib import Path

import joblib
import numpy as np
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("helpers", "notebooks/support", "notebooks/studies")
SOURCES = {
    f"{path.parent.name}.{path.stem}": path.read_text(encoding="utf-8")
    for floor in FLOORS
    for path in (ROOT / floor).glob("*.py")
    if path != Path(__file__)  # how results are kept decides none of them
}


class DataMissing(FileNotFoundError):
    """Data are not there: the message says which file, where to get it, and what to run."""


def named_folder(variable):
    """Return the folder that an environment variable names; None where it is unset or empty.

    A relative path counts from the root of the project, in a terminal as in a notebook.
    """
    named = os.environ.get(variable)
    if not named:
        return None
    path = (ROOT / Path(named).expanduser()).resolve()
    if not path.is_dir():
        raise FileNotFoundError(f"{variable} names {path}, which is no folder.")
    return path


def data_root():
    """Return the folder that holds the data sets: `THESIS_DATA` if set, else data/raw."""
    return named_folder("THESIS_DATA") or ROOT / "data" / "raw"


def keras_home():
    """Return Keras's own folder of weights and data sets: `KERAS_HOME` if set, else ~/.keras."""
    return named_folder("KERAS_HOME") or Path("~/.keras").expanduser()


def folder(*parts):
    """Return ROOT/parts as a folder that exists and can be written to.

    `THESIS_RUNS` stands for ROOT/runs, so that two runs do not overwrite each other's;
    `THESIS_DERIVED` for ROOT/data/derived, so that tests find nothing that was stored before.
    """
    path = ROOT.joinpath(*parts)
    for variable, usual in (("THESIS_RUNS", "runs"), ("THESIS_DERIVED", "data/derived")):
        if path.is_relative_to(ROOT / usual) and os.environ.get(variable):
            path = ROOT / os.environ[variable] / path.relative_to(ROOT / usual)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        raise PermissionError(
            f"Cannot write to {path} ({error.strerror}). Results and caches go there: "
            "change its permissions, or work in a copy of the project that you own."
        ) from error
    return path


# -------------------------------------------------------------------- results

NAMED = (tuple, type, types.FunctionType, types.ModuleType)  # their contents and code are known


def write(path, data):
    """Write bytes or text to a file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def put(path, content, **made):
    """Write a result, a text or a dict of arrays (.npz), and its record; return its sha256.

    made : what the result was made from, for the record. Objects are refused: nothing is pickled.
    """
    if isinstance(content, dict):
        np.savez(buffer := io.BytesIO(), allow_pickle=False, **content)
    data = buffer.getvalue() if isinstance(content, dict) else content.encode()
    record = {"sha256": hashlib.sha256(data).hexdigest(), **made}
    write(path, data)
    write(path.with_suffix(".json"), json.dumps(record, indent=1))
    return record["sha256"]


def get(path, made_by):
    """Return a result as `put` got it, and its record; `made_by` names what makes it.

    DataMissing where it is not there, ValueError where it is not what was written.
    """
    if not path.exists():
        raise DataMissing(f"{path} does not exist yet: run {made_by} first.")
    try:
        data = path.read_bytes()
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if record["sha256"] != hashlib.sha256(data).hexdigest():
            raise ValueError("its checksum differs")
        if path.suffix != ".npz":
            return data.decode(), record
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return dict(arrays), record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): run {made_by} again.") from error


def keep_nothing(_, compute):
    """Return compute(): the checkpoint of a run that need not be resumed."""
    return compute()


def checkpoint(place):
    """Return keep(decides, compute): the array compute(), or what the same work stored in a folder.

    decides : a list of what the result depends on: arrays, numbers, texts, tables, Keras models and
    losses, functions. The code of `compute` is added to it (`key`). Of two processes that want the
    same result one waits for the other. A damaged file is said and computed again; on a full disk
    work goes on without it.
    """
    place, used = Path(place), []
    place.mkdir(parents=True, exist_ok=True)

    def keep(decides, compute):
        if any(_home(value) in SOURCES and not isinstance(value, NAMED) for value in decides):
            raise TypeError(f"Say what in an object decides the result: one of {decides!r:.200}")
        path = place / f"{key(decides, _code(compute))}.npz"
        with FileLock(path.with_suffix(".lock")) as lock:
            try:
                values = get(path, "")[0]["values"]
                if not (used or os.environ.get("TQDM_DISABLE")):
                    print(f"Using results that are stored in {place}.", file=sys.stderr)
                used.append(path)
            except FileNotFoundError:
                values = None
            except ValueError:
                values = print(f"{path.name} is damaged: computing it again.")
            if values is None:
                values = compute()
                try:
                    put(path, {"values": values})
                except OSError as error:
                    warnings.warn(f"{path} is not kept ({error.strerror}).", stacklevel=2)
            Path(lock.lock_file).unlink(missing_ok=True)
        return values

    return keep


def key(*decides):
    """Return a text that stands for all of `decides`, contents and types: others, another text.

    A Keras object counts with its config and weights, a function with what it closes over and its
    code. The code of one of this project is the syntax trees of its module and of all that imports
    here, without comments and docstrings; that of another (a cell's, a test's) its instructions,
    and the constants, functions beside it and modules of this project that it names.
    """
    return joblib.hash(_plain(decides), hash_name="sha1")


def _plain(value):
    """Return a value as joblib can hash it."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, functools.partial):
        return _plain([value.func, value.args, value.keywords])
    if isinstance(value, types.FunctionType):
        within = inspect.getclosurevars(value).nonlocals
        return [_code(value), {name: _plain(v) for name, v in within.items() if v is not value}]
    if hasattr(value, "get_config") and not isinstance(value, type):
        from keras.saving import serialize_keras_object  # late: Keras starts TensorFlow

        text = json.dumps(serialize_keras_object(value), sort_keys=True, default=str)
        for k, name in enumerate(dict.fromkeys(re.findall(r'"name": "([^"]+)"', text))):
            text = text.replace(f'"{name}"', f'"#{k}"')  # Keras counts names up, model by model
        weights = value.get_weights() if hasattr(value, "get_weights") else []
        return [text, *weights, _plain(getattr(value, "fn", None))]
    if _home(value) in SOURCES:
        return _trees(_home(value))
    return _home(value) if inspect.ismodule(value) else value


def _home(value):
    """Return the name of a module, or of the one that a function or an object's class is from."""
    named = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
    return named or type(value).__module__


def _code(function):
    """Return what stands for a function's code, as `key` says."""
    function = getattr(function, "func", function)  # of a partial
    function = getattr(function, "__func__", function)  # of a method
    if function.__module__ in SOURCES:
        return _trees(function.__module__)
    functions, found = [function], []
    for one in functions:  # grows on the way
        found.append(_instructions(one.__code__))
        used = inspect.getclosurevars(one)
        for _, value in sorted((used.globals | used.nonlocals).items()):
            if _home(value) in SOURCES or isinstance(value, (bool, int, float, str, np.ndarray)):
                found.append(_plain(value))
            elif isinstance(value, types.FunctionType) and _home(value) == _home(function):
                functions += [value] if value not in functions else []
    return found


def _instructions(code):
    constants = [_instructions(c) if inspect.iscode(c) else c for c in code.co_consts]
    return [code.co_code, constants, code.co_names, code.co_varnames]


def _trees(module):
    """Return {module: its tree} of a module of this project and of all it imports here."""
    found, left = {}, {module}
    while left:
        name = left.pop()
        found[name], imports = _tree(SOURCES[name], name.partition(".")[0])
        imports |= {f"{package}.__init__" for package in imports}  # what `from helpers import` runs
        left |= (imports & SOURCES.keys()) - found.keys()
    return found


@functools.cache
def _tree(source, floor):
    """Return the checksum of a source's syntax tree without docstrings, and what it imports."""
    tree, imports = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (
            ast.get_docstring(node)
        ):
            node.body = node.body[1:]
        elif isinstance(node, ast.ImportFrom):
            home = ".".join(filter(None, [floor if node.level else "", node.module]))
            imports |= {home, *(f"{home}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            imports |= {name.name for name in node.names}
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imports
