"""Frozen features of pictures from any Keras backbone, kept under what they depend on."""

import inspect
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import keras
import numpy as np
from keras.src.utils import file_utils
from tqdm.auto import tqdm

from support import datasets, stored

DEMO = stored.ROOT / "data" / "embedded" / "demo_backbone.keras"


class Backbone(NamedTuple):
    """A frozen feature extractor: pictures (b, size, size, 3) in 0..255 -> features (b, d)."""

    name: str
    model: keras.Model
    preprocess: callable
    size: int


def load_backbone(name, *, weights="imagenet", size=None):
    """Return a Backbone.

    name : "demo" (this project's small network, never trained on airplanes or cars), the name of a
        `keras.applications` model such as "MobileNetV2" or "InceptionV3", or the path of a
        `.keras` file that maps pictures in 0..255 to features.
    weights : for `keras.applications`: "imagenet" (a file in Keras's own cache, `KERAS_HOME`; where
        it is missing, the error says where to get it), a file, the name of one in the folder
        "models" of KERAS_HOME, or None for random weights.
    """
    if name == "demo" or str(name).endswith(".keras"):
        known = _in_float64(_from_file(DEMO)) if name == "demo" else _from_file(Path(name))
        if size not in (None, known.size):
            raise ValueError(f"{name} takes pictures of {known.size} pixels a side, not of {size}.")
        return known
    build = getattr(keras.applications, name, None)
    if not callable(build):
        known = sorted(n for n in dir(keras.applications) if n[0].isupper())
        raise ValueError(f"No keras.applications model is called '{name}'. {', '.join(known)}")
    if weights not in ("imagenet", None) and not Path(weights).exists():
        weights = stored.keras_home() / "models" / weights
    size = size or (299 if name in ("InceptionV3", "InceptionResNetV2", "Xception") else 224)
    try:
        with _float32(), patch.object(file_utils, "get_file", _on_disk):
            model = build(
                include_top=False, pooling="avg", weights=weights, input_shape=(size, size, 3)
            )
    except stored.DataMissing:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"Could not load {name} with weights={weights!r}: {error}.") from error
    model.trainable = False
    return Backbone(name, model, inspect.getmodule(build).preprocess_input, size)


def _on_disk(name, origin, *, cache_subdir="models", file_hash=None, **_):
    """Return the path of a file of Keras's cache; Keras's own `get_file` would download it."""
    path = stored.keras_home() / cache_subdir / name
    if not path.exists():
        raise stored.DataMissing(
            f"{path} is missing, and nothing is downloaded behind your back. `make data "
            f"ONLY=weights` brings MobileNetV2 and InceptionV3. Get it from {origin}, "
            "put it there (KERAS_HOME names another folder than ~/.keras), and run again."
        )
    if file_hash and not file_utils.validate_file(str(path), file_hash):
        raise ValueError(f"{path} is damaged (its checksum is not {file_hash}): get {origin} again")
    return str(path)


def _from_file(path):
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; `make backbone` makes the demo's.")
    with _float32():
        model = keras.saving.load_model(path, compile=False)
    model.trainable = False
    return Backbone(path.stem, model, lambda x: x, int(model.input_shape[1]))


def _in_float64(backbone):
    """Return the same network computing in float64: the demo's features agree on every CPU."""

    def wide(layer):
        return type(layer).from_config({**layer.get_config(), "dtype": "float64"})

    model = keras.models.clone_model(backbone.model, clone_function=wide)
    model.set_weights(backbone.model.get_weights())
    model.trainable = False
    return backbone._replace(model=model)


@contextmanager
def _float32():
    """Backbones run in float32 and mathematics in float64: no digit of a photograph is lost."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    try:
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


def extract(manifest, backbone, *, batch_size=64, cache=None):
    """Return the features of a manifest's pictures, (n, d) float32, from the cache where possible.

    Every batch is a result of its own (`stored.checkpoint`, in data/derived/features), named by
    the bytes of its pictures and by all of the backbone: an interrupted run goes on where it
    stopped, and another model or a changed picture never meets an old file.
    """
    keep = stored.checkpoint(cache or stored.folder("data", "derived", "features"))
    model = stored.key(backbone)

    def part(rows):
        images = partial(datasets.pictures, rows, backbone.size)
        decides = [model, datasets.fingerprint(rows)]
        return keep(decides, lambda: measure(images(), backbone, batch_size=batch_size))

    starts = range(0, len(manifest), batch_size)
    bar = tqdm(starts, f"{backbone.name} features", unit="batch", leave=False)
    return np.concatenate([part(manifest[i : i + batch_size]) for i in bar])


def measure(pictures, backbone, *, batch_size=64):
    """Return the features (n, d) float32 of pictures in memory, uint8 or not rounded, in 0..255.

    The replicas of a backbone loaded under a `tf.distribute` strategy share each batch.
    """
    shared = backbone.model.distribute_strategy.num_replicas_in_sync > 1
    predict = partial(backbone.model.predict, batch_size=batch_size, verbose=0)
    predict = predict if shared else backbone.model.predict_on_batch
    starts, parts = range(0, len(pictures), batch_size), []
    bar = tqdm(starts, f"{backbone.name} features", leave=False) if len(starts) > 1 else starts
    for i in bar:
        batch = np.array(pictures[i : i + batch_size], backbone.model.compute_dtype)
        parts.append(predict(backbone.preprocess(batch)))
    return np.concatenate(parts).astype(np.float32)
