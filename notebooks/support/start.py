"""The first call of every notebook: quiet logs, seeds and float64, before TensorFlow starts."""

import os
import sys
import warnings
from functools import partialmethod

import numpy as np
import tqdm.auto

from support.stored import named_folder

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
            "and call support.start.start first, before anything else of this project is imported."
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
    if profile == "demo":
        tf.config.experimental.enable_op_determinism()
    from support import figures

    warnings.filterwarnings("ignore", message=".*IProgress.*")
    if os.environ.get("TQDM_DISABLE"):  # which tqdm's bars for notebooks do not heed
        tqdm.auto.tqdm.__init__ = partialmethod(tqdm.auto.tqdm.__init__, disable=True)
    figures.style()
    np.set_printoptions(precision=3, suppress=True)


def require(holds, words):
    """Raise ValueError with the words, which say what a parameter must be, where it is not so."""
    if not holds:
        raise ValueError(words)
