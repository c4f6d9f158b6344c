"""The committed feature extractor of the demo profile, and the recipe that made it."""

import keras
import numpy as np
import pytest

from support import backbone, drawings


@pytest.fixture(scope="module")
def committed():
    return keras.saving.load_model(backbone.OUT, compile=False)


def test_the_committed_file_is_small_and_loads_as_it_is(committed):
    assert backbone.OUT.stat().st_size <= 2 * 2**20
    assert committed.input_shape == (None, 96, 96, 3)
    assert committed.output_shape == (None, backbone.FEATURES)
    assert backbone.FEATURES >= 1024
    assert {type(layer).__module__.split(".")[0] for layer in committed.layers} == {"keras"}


def test_features_are_finite_and_tell_pictures_apart(committed):
    rows = drawings.plan(n_train=4, n_test=2, n_duplicates=0, n_swapped=0, n_ambiguous=0)
    pictures = np.stack([drawings.draw(row) for row in rows.to_dict("records")])
    features = keras.ops.convert_to_numpy(committed(pictures.astype("float32")))
    assert np.isfinite(features).all()
    assert (features >= 0).all()
    assert np.linalg.matrix_rank(features) == len(rows)
    assert 200 < (features**2).sum(axis=1).mean() < 1200  # the regime of features of photographs


def test_no_target_is_among_the_pretext_classes():
    targets = {
        *drawings.SUBTYPES,
        *(name for group in drawings.SUBTYPES.values() for name in group),
    }
    assert not targets & set(drawings.PRETEXT)


def test_a_tiny_training_run_saves_a_feature_model(tmp_path):
    out = tmp_path / "tiny.keras"
    accuracy = backbone.train(out, epochs=1, per_class=4, seed=1, size=32)
    assert 0 <= accuracy <= 1
    model = keras.saving.load_model(out, compile=False)
    assert model.input_shape == (None, 32, 32, 3)
    assert model.output_shape == (None, backbone.FEATURES)
    assert not getattr(model, "optimizer", None)
