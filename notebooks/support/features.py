"""Frozen features of pictures: any Keras backbone, cached under what they depend on."""

import hashlib
import json
import shutil
import types
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from support import datasets
from support.stored import ROOT, folder, named_folder


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
    weights : for `keras.applications`: "imagenet" (Keras' own cache, `KERAS_HOME`), a file, the
        name of one in the folder "models" of KERAS_HOME, or None for random weights.
    """
    if name == "demo":
        return _in_float64(_from_file(ROOT / "data" / "embedded" / "demo_backbone.keras"))
    if str(name).endswith(".keras"):
        return _from_file(Path(name))
    build = getattr(keras.applications, name, None)
    if not callable(build):
        known = sorted(n for n in dir(keras.applications) if n[0].isupper())
        raise ValueError(f"No keras.applications model is called '{name}'. {', '.join(known)}")
    modules = [m for m in vars(keras.applications).values() if isinstance(m, types.ModuleType)]
    module = next(m for m in modules if hasattr(m, name))
    if weights not in ("imagenet", None) and not Path(weights).exists():
        home = named_folder("KERAS_HOME") or Path("~/.keras").expanduser()
        weights = home / "models" / weights
    size = size or (299 if name in ("InceptionV3", "InceptionResNetV2", "Xception") else 224)
    try:
        with _float32():
            model = build(
                include_top=False, pooling="avg", weights=weights, input_shape=(size, size, 3)
            )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Could not load {name} with weights='{weights}': {error}. For 'imagenet' connect to "
            "the internet once, or put the no-top file into the folder 'models' of KERAS_HOME "
            "(~/.keras by default)."
        ) from error
    model.trainable = False
    return Backbone(name, model, module.preprocess_input, size)


def _from_file(path):
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; `python -m support.backbone` makes the demo's."
        )
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

    The cache (data/derived/features) is keyed by the weights, the preprocessing, the size and the
    bytes of every picture, so another model or a changed picture never meets an old file. An
    interrupted run goes on where it stopped; a damaged file is noticed by its checksum and redone.
    Of two runs at once one waits for the other. OSError where the disk is too full for the result.
    """
    cache = Path(cache) if cache else folder("data", "derived", "features")
    key = _key(manifest, backbone)
    with FileLock(cache / f"{key}.lock"):
        return _extract(manifest, backbone, batch_size, cache, key)


def _extract(manifest, backbone, batch_size, cache, key):
    done, partial = cache / f"{key}.npy", cache / f"{key}.partial.npy"
    record = cache / f"{key}.json"
    if done.exists() and record.exists():
        if json.loads(record.read_text(encoding="utf-8"))["sha256"] == _sha256(done):
            return np.load(done)
        print(f"{done.name} is damaged (checksum differs): extracting again.")
    _fill(manifest, backbone, batch_size, partial)
    note = {"sha256": _sha256(partial), "backbone": backbone.name, "pictures": len(manifest)}
    record.write_text(json.dumps(note, indent=1), encoding="utf-8")
    partial.replace(done)
    partial.with_suffix(".progress").unlink()
    return np.load(done)


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


def _fill(manifest, backbone, batch_size, partial):
    """Write features batch by batch; `.progress` counts the rows that are safely on disk."""
    n, d = len(manifest), int(backbone.model.output_shape[-1])
    progress = partial.with_suffix(".progress")
    done = progress.read_text(encoding="utf-8") if partial.exists() and progress.exists() else ""
    start = int(done) if done.isdigit() else 0
    needed, free = 0 if start else 4 * n * d, shutil.disk_usage(partial.parent).free
    if free < needed + 2**16:
        raise OSError(
            f"{partial.parent} has {free / 1e6:.1f} MB free, the features need "
            f"{needed / 1e6:.1f}: make room there and run again."
        )
    mode = "r+" if start else "w+"
    array = np.lib.format.open_memmap(partial, mode, dtype=np.float32, shape=(n, d))
    bar = tqdm(total=n, initial=start, desc=f"{backbone.name} features", unit="picture")
    for first in range(start, n, batch_size):
        rows = slice(first, first + batch_size)
        batch = datasets.pictures(manifest[rows], backbone.size)
        array[rows] = measure(batch, backbone, batch_size=batch_size)
        array.flush()
        progress.write_text(str(min(first + batch_size, n)), encoding="utf-8")
        bar.update(len(batch))
    bar.close()


def _key(manifest, backbone):
    about = f"{backbone.name} {backbone.size} {backbone.model.compute_dtype}"
    digest = hashlib.sha256(about.encode())
    digest.update(getattr(backbone.preprocess, "__module__", "").encode())
    for weight in backbone.model.get_weights():
        digest.update(np.ascontiguousarray(weight).tobytes())
    digest.update(datasets.fingerprint(manifest).encode())
    return digest.hexdigest()[:24]


def _sha256(path):
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
