"""The feature cache: keyed by content, resumable, and suspicious of damage."""

from pathlib import Path

import cv2
import keras
import numpy as np
import pytest

from support import datasets, features, stored, vehicles


class Counting:
    """A tiny backbone that counts the pictures it has seen and can stop in the middle."""

    def __init__(self, seed=0, stop_after=None):
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((16, 16, 3))
        outputs = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(inputs))
        self.model, self.seen, self.stop_after = keras.Model(inputs, outputs), 0, stop_after
        self.predict, self.model.predict_on_batch = self.model.predict_on_batch, self.count

    def count(self, batch):
        if self.stop_after is not None and self.seen >= self.stop_after:
            raise KeyboardInterrupt
        self.seen += len(batch)
        return self.predict(batch)

    @property
    def backbone(self):
        return features.Backbone("tiny", self.model, lambda x: x / 255, 16)


@pytest.fixture(scope="module")
def manifest():
    return datasets.rendered().iloc[::110].reset_index(drop=True)


def test_second_call_reads_the_cache(manifest, tmp_path):
    counting = Counting()
    first = features.extract(manifest, counting.backbone, batch_size=7, cache=tmp_path)
    second = features.extract(manifest, counting.backbone, batch_size=7, cache=tmp_path)
    assert counting.seen == len(manifest)
    np.testing.assert_array_equal(first, second)


def test_an_interrupted_run_goes_on_where_it_stopped(manifest, tmp_path):
    whole = features.extract(manifest, Counting().backbone, batch_size=5, cache=tmp_path.parent)
    stopped = Counting(stop_after=10)
    with pytest.raises(KeyboardInterrupt):
        features.extract(manifest, stopped.backbone, batch_size=5, cache=tmp_path)
    again = Counting()
    phi = features.extract(manifest, again.backbone, batch_size=5, cache=tmp_path)
    assert again.seen == len(manifest) - 10
    np.testing.assert_array_equal(phi, whole)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".npz"}


def test_damage_is_noticed_and_repaired(manifest, tmp_path, capsys):
    good = features.extract(manifest, Counting().backbone, cache=tmp_path)
    path = next(tmp_path.glob("*.npz"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 0xFF
    path.write_bytes(data)
    counting = Counting()
    np.testing.assert_array_equal(
        features.extract(manifest, counting.backbone, cache=tmp_path), good
    )
    assert counting.seen == len(manifest)
    assert "damaged" in capsys.readouterr().out


def test_another_model_or_another_picture_has_another_cache(manifest, tmp_path):
    features.extract(manifest, Counting(seed=0).backbone, cache=tmp_path)
    other = Counting(seed=1)
    features.extract(manifest, other.backbone, cache=tmp_path)
    fewer = Counting(seed=0)
    features.extract(manifest.iloc[1:], fewer.backbone, cache=tmp_path)
    assert (other.seen, fewer.seen) == (len(manifest), len(manifest) - 1)


def smaller(pooling="Average", activation="relu", scale=1.0):
    """Return a backbone without random parts: its weights do not depend on what is changed."""
    layers = keras.layers
    pool = getattr(layers, f"Global{pooling}Pooling2D")()
    convolve = layers.Conv2D(4, 3, activation=activation, kernel_initializer="ones")
    body = [keras.Input((16, 16, 3)), layers.Rescaling(scale), convolve, pool]
    return keras.Sequential(body)


OTHERS = {
    "preprocessing": {"preprocess": lambda x: x / 127.5 - 1},
    "pooling": {"model": smaller(pooling="Max")},
    "activation": {"model": smaller(activation="tanh")},
    "Rescaling": {"model": smaller(scale=1 / 205)},
    "size": {"size": 17},
}


@pytest.mark.parametrize("what", OTHERS)
def test_all_of_a_backbone_decides(what):
    """Equal weights, but another function of the pictures: another name in the cache."""
    one = features.Backbone("same", smaller(), lambda x: x / 255, 16)
    other = one._replace(**OTHERS[what])
    for a, b in zip(one.model.get_weights(), other.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert stored.key(one) == stored.key(one._replace(model=smaller()))
    assert stored.key(one) != stored.key(other)


def test_a_keras_file_saved_again_with_the_same_weights_is_another_backbone(manifest, tmp_path):
    found = []
    for scale in (1.0, 1 / 205):
        smaller(scale=scale).save(tmp_path / "mine.keras")
        backbone = features.load_backbone(str(tmp_path / "mine.keras"))
        found.append(features.extract(manifest[:2], backbone, cache=tmp_path))
    np.testing.assert_allclose(found[0], 205 * found[1], rtol=1e-4)


def test_features_of_other_pictures_are_refused(tmp_path, monkeypatch):
    """A picture or a row of the manifest that changed after it was measured."""
    monkeypatch.setattr(stored, "ROOT", tmp_path)
    rows = datasets.rendered(n_train=60, n_test=30, size=16)
    path = stored.folder("data", "derived", "demo") / "00_manifest.csv"
    stored.put(path, rows.to_csv(index=False))
    vehicles.store_features("demo", np.zeros((len(rows), 3), np.float32))
    assert len(vehicles.load("demo").x_train) == 120
    first = tmp_path / rows["path"][0]
    whole, black = first.read_bytes(), cv2.imencode(".png", np.zeros((16, 16, 3), np.uint8))[1]
    first.write_bytes(black.tobytes())
    with pytest.raises(ValueError, match=r"other pictures .* run notebook 01_feature_extraction"):
        vehicles.load("demo")
    first.write_bytes(whole)
    assert len(vehicles.load("demo").x_train) == 120
    stored.put(path, rows[::-1].to_csv(index=False))
    with pytest.raises(ValueError, match=r"other pictures .* run notebook 01_feature_extraction"):
        vehicles.load("demo")


def test_drawn_pictures_that_were_damaged_are_drawn_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stored, "ROOT", tmp_path)
    sizes = {"n_train": 60, "n_test": 30, "size": 16}
    rows = datasets.rendered(**sizes)
    good, black = datasets.fingerprint(rows), cv2.imencode(".png", np.zeros((16, 16, 3)))[1]
    paths = [Path(p) for p in rows["path"][:26]]
    for path in paths[2:]:
        path.write_bytes(black.tobytes())
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:50])
    again = datasets.rendered(**sizes)
    assert "26 drawn pictures were missing or damaged" in capsys.readouterr().out
    assert datasets.fingerprint(again) == good


def test_backbones_are_float32_and_leave_float64_alone():
    backbone = features.load_backbone("MobileNetV2", weights=None, size=32)
    assert backbone.model.compute_dtype == "float32"
    assert keras.config.floatx() == "float64"
    assert keras.layers.Dense(1).compute_dtype == "float64"


def test_a_backbone_of_one_size_refuses_another():
    assert features.load_backbone("demo", size=96).size == 96
    with pytest.raises(ValueError, match="pictures of 96 pixels a side, not of 64"):
        features.load_backbone("demo", size=64)


def test_unknown_backbones_and_absent_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="MobileNetV2"):
        features.load_backbone("MobileNetV9")
    with pytest.raises(FileNotFoundError, match=r"mine\.keras"):
        features.load_backbone(str(tmp_path / "mine.keras"))
    with pytest.raises(ValueError, match=r"none\.weights\.h5"):
        features.load_backbone("MobileNetV2", weights=str(tmp_path / "none.weights.h5"))


@pytest.mark.parametrize("name", ["InceptionV3", "MobileNetV2", "ResNet50", "EfficientNetB0"])
def test_missing_weights_are_named_and_not_downloaded(name, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(features.file_utils, "urlretrieve", lambda *_: pytest.fail("a download"))
    with pytest.raises(FileNotFoundError, match=r"models/.*\.h5 is missing.* Get it from https://"):
        features.load_backbone(name)


def test_damaged_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    name = "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5"
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / name).write_bytes(b"cut off")
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        features.load_backbone("InceptionV3")
    with pytest.raises(ValueError, match=r"Could not load MobileNetV2"):
        features.load_backbone("MobileNetV2", weights=str(tmp_path / "models" / name))


def test_a_keras_file_is_a_backbone(manifest, tmp_path):
    Counting().model.save(tmp_path / "mine.keras")
    backbone = features.load_backbone(str(tmp_path / "mine.keras"))
    assert backbone.size == 16
    assert features.extract(manifest, backbone, cache=tmp_path).shape == (len(manifest), 4)
