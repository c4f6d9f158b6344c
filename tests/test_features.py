"""The feature cache: keyed by content, resumable, and suspicious of damage."""

import keras
import numpy as np
import pytest

from support import datasets, features


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
    assert sorted({p.suffix for p in tmp_path.iterdir()} - {".lock"}) == [".json", ".npy"]


def test_damage_is_noticed_and_repaired(manifest, tmp_path, capsys):
    good = features.extract(manifest, Counting().backbone, cache=tmp_path)
    path = next(tmp_path.glob("*.npy"))
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


def test_backbones_are_float32_and_leave_float64_alone():
    backbone = features.load_backbone("MobileNetV2", weights=None, size=32)
    assert backbone.model.compute_dtype == "float32"
    assert keras.config.floatx() == "float64"
    assert keras.layers.Dense(1).compute_dtype == "float64"


def test_unknown_backbones_and_absent_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="MobileNetV2"):
        features.load_backbone("MobileNetV9")
    with pytest.raises(FileNotFoundError, match=r"mine\.keras"):
        features.load_backbone(str(tmp_path / "mine.keras"))
    with pytest.raises(ValueError, match="KERAS_HOME"):
        features.load_backbone("MobileNetV2", weights=str(tmp_path / "none.weights.h5"))


def test_a_keras_file_is_a_backbone(manifest, tmp_path):
    Counting().model.save(tmp_path / "mine.keras")
    backbone = features.load_backbone(str(tmp_path / "mine.keras"))
    assert backbone.size == 16
    assert features.extract(manifest, backbone, cache=tmp_path).shape == (len(manifest), 4)
