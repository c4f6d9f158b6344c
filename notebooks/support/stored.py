"""Where files live, and results that are kept on disk: a run that was cut off goes on from them."""

import hashlib
import os
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


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


def folder(*parts):
    """Return ROOT/parts as a folder that exists and can be written to.

    `THESIS_RUNS` stands for ROOT/runs, so that two runs do not overwrite each other's.
    """
    path = ROOT.joinpath(*parts)
    if parts[0] == "runs":
        path = (ROOT / (os.environ.get("THESIS_RUNS") or "runs")).joinpath(*parts[1:])
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


def need(path, made_by):
    """Return a file that an earlier notebook wrote, or say which one to run."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist yet: run notebook {made_by} first.")
    return Path(path)


def keep_nothing(_, compute):
    """Return compute(): the checkpoint of a run that need not be resumed."""
    return compute()


def checkpoint(folder):
    """Return keep(numbers, compute): compute(), or what a run with the same numbers stored.

    Results are arrays, one file each in `folder`, written whole or not at all; `numbers` is a list
    of arrays and scalars that decide the result, so other data or settings mean other files. A
    file that was damaged (its checksum differs) is said so and computed again; on a full disk the
    run goes on without it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def keep(numbers, compute):
        digest = hashlib.sha256()
        for part in numbers:
            digest.update(np.ascontiguousarray(part))
        path = folder / f"{digest.hexdigest()[:20]}.npz"
        if path.exists():
            try:
                with np.load(path) as stored:
                    return stored["values"]
            except (zipfile.BadZipFile, ValueError, KeyError, OSError, EOFError, zlib.error):
                print(f"{path.name} is damaged: computing it again.")
        values = compute()
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                np.savez(file, values=values)
            os.replace(partial, path)
        except OSError as error:
            warnings.warn(f"{path} is not kept ({error.strerror}); going on.", stacklevel=2)
        finally:
            partial.unlink(missing_ok=True)
        return values

    return keep
