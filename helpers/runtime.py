"""The first call of every notebook: quiet logs, seeds, float64, and where files live."""

import hashlib
import os
import random
import sys
import warnings
import zipfile
import zlib
from functools import partialmethod
from pathlib import Path

import numpy as np
import tqdm.auto

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ("demo", "real", "thesis")


def start(profile="demo", seed=0, *, threads=None):
    """Prepare a notebook's kernel; call it before anything imports TensorFlow.

    Mathematics runs in float64. In `demo` oneDNN is off and operations are deterministic, so that
    results hardly differ from one CPU to the next; the other profiles keep oneDNN, which makes
    backbones two to three times faster. What the environment sets stands above both. `threads` = 1
    adds all sums in one order: where the training of a network ends can hang on their last digit.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile='{profile}' is not known; choose one of {', '.join(PROFILES)}.")
    settings = {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_ENABLE_ONEDNN_OPTS": "0" if profile == "demo" else "1",
    }
    late = [name for name in settings if name not in os.environ]
    if late and "tensorflow" in sys.modules:
        raise RuntimeError(
            f"TensorFlow is already imported, too late for {', '.join(late)}: restart the kernel "
            "and call runtime.start first, before any helper but `runtime` is imported."
        )
    os.environ.update({name: settings[name] for name in late})
    keras_home = named_folder("KERAS_HOME")
    os.environ.pop("KERAS_HOME", None)
    if keras_home:
        os.environ["KERAS_HOME"] = str(keras_home)
    import keras
    import tensorflow as tf

    if threads:
        import scipy.linalg  # noqa: F401  its BLAS is limited too, once it is loaded
        from threadpoolctl import threadpool_limits

        threadpool_limits(threads)
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    tf.get_logger().setLevel("ERROR")
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")  # Keras freezes its first policy; floatx is not enough
    keras.utils.set_random_seed(seed)
    random.seed(seed)
    if profile == "demo":
        tf.config.experimental.enable_op_determinism()
    import matplotlib.pyplot as plt
    import seaborn as sns

    warnings.filterwarnings("ignore", message=".*IProgress.*")
    if os.environ.get("TQDM_DISABLE"):  # which tqdm's bars for notebooks do not heed
        tqdm.auto.tqdm.__init__ = partialmethod(tqdm.auto.tqdm.__init__, disable=True)
    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.85)
    plt.rcParams.update(
        {"figure.dpi": 80, "savefig.dpi": 100, "figure.constrained_layout.use": True}
    )
    np.set_printoptions(precision=3, suppress=True)


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
