"""`make rehearsal`: every notebook of `thesis`, on six tars, and of `real`, on two folders.

It asks whether they run on pictures of these forms, drawn ones, with random weights, few pictures
and few repetitions. Not part of `make test`, as it takes an hour.
"""

import io
import re
import tarfile

import cv2
import h5py
import keras
import nbformat
import numpy as np
import pytest
import yaml
from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group

from support import claims, datasets, drawings, features, run, stored

SIDE = 96
MOBILENET = "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5"
MANY = 360  # pictures of a class: 11 takes 60 for training and, always, 300 for testing
FEW = """
00_data_curation: {n_train: 60, n_test: 20}
01_feature_extraction: {batch_size: 32}
03_curvature: {n_digits: 100, width: 2, epochs: 2}
05_loo_validation: {side: 7, lissa_samples: 1, n_top: 20, n_random: 5}
06_nonconvex_validation: {
  n_paper: 100, batch: 25, c_train: [500], c_retrain: 1000, c_second: 1000, seeds: [0],
  later_looks: [40000], paper_digit: null,
  n_right: 1, n_wrong: 0, n_removed: 4, lissa_depth: 20, n_digits: 60, side: 22, width: 2,
  n_few: 2, n_top: 1, n_random: 1, other_networks: [[60, 1]], n_other: 2}
07_smooth_hinge: {n_test: 2, n_remove: 10, paper_digit: null}
09_influential_subset: {n_seeds: 2, n_random: 10, n_subset: 20, n_splits: 3}
10_mislabel_study: {seeds: 2, few_seeds: 2, table_seeds: 1, n_digits: 200}
11_attack_study: {
  n_train: 60, sizes: [96], n_targets: [[2, 1, 1]], steps: 3, shortlist: 5, n_recall: 1, pool: 20,
  n_many: 4, many_steps: 3, n_saved: 2, batch: 8, changes: [{size: 128}], n_changed: 1,
  mislabelled: []}
12_shifted_tests: {
  n_pictures: 20, n_attacked: 8, n_graded: 6, n_special: 4, rounds: 2, surrogate_epochs: 1}
14_method_comparison: {
  n_softmax: 100, n_digits: 60, n_subsets: 8, n_other: 8, n_cnn: 40, train_seeds: 2, n_models: 2,
  n_top: 1, flip_draws: 1, steps: 20}
15_your_own_model: {n_digits: 200, epochs: 2, n_sentences: 60, n_readers: 1}
"""


def drawn(number, subtype, label):
    """Return the JPEG file of a drawn picture of a subtype, another for every number."""
    row = {"scene": number, "index": number, "flag": "", "background": drawings.USUAL[label][0]}
    picture = drawings.draw({**row, "subtype": subtype}, size=SIDE)
    return cv2.imencode(".jpg", picture[..., ::-1])[1].tobytes()


@pytest.fixture
def tars(tmp_path):
    """Six synset tars as they are downloaded, and dogs and fish."""
    for at, (subtype, (synset, label)) in enumerate(datasets.SYNSETS.items()):
        path = tmp_path / "data" / "ilsvrc2012" / f"{synset}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        many = MANY if label == "airplane" else MANY // 5
        with tarfile.open(path, "w") as tar:
            for k in range(many + 2):
                data = drawn(1000 * at + k, subtype, label)
                member = tarfile.TarInfo(f"{synset}_{k}.JPEG")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    folders(tmp_path / "data" / "dog_fish", "dog", "fish", many=1200)


def folders(root, *names, many):
    """Two folders of pictures; other drawn things stand for what their names say."""
    for at, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for k in range(many):
            file = root / name / f"{k}.jpg"
            file.write_bytes(drawn(10_000 * (at + 1) + k, drawings.PRETEXT[at], "car"))


def random_backbone(name):
    """Return a Backbone with random weights and the statistics of a few drawn pictures."""
    keras.utils.set_random_seed(0)
    backbone = features.load_backbone(name, weights=None, size=SIDE)
    backbone.model.trainable = True
    for layer in backbone.model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # the statistics of one batch, else nothing is left at the end
    pictures = [drawn(k, kind, "car") for k in range(8) for kind in drawings.SUBTYPES["car"]]
    batch = np.array([datasets.decode(picture) for picture in pictures], "float32")
    backbone.model(backbone.preprocess(batch), training=True)
    return backbone.model


@pytest.fixture
def inception(tmp_path):
    """Inception-v3, as Keras's file of weights and as a whole .keras file."""
    model = random_backbone("InceptionV3")
    (tmp_path / "keras" / "models").mkdir(parents=True)
    model.save_weights(tmp_path / "keras" / "models" / "random.weights.h5")
    inputs = keras.Input((SIDE, SIDE, 3), dtype="float32")
    scaled = keras.layers.Rescaling(1 / 127.5, offset=-1, dtype="float32")(inputs)
    path = tmp_path / "inception.keras"
    keras.Model(inputs, model(scaled)).save(path)
    return str(path)


@pytest.fixture
def mobilenet(tmp_path, inception):
    """MobileNetV2 where Keras looks for its weights, in the form that Keras distributes."""
    with h5py.File(tmp_path / "keras" / "models" / MOBILENET, "w") as file:
        save_weights_to_hdf5_group(file, random_backbone("MobileNetV2"))


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A function that runs all notebooks of a profile and returns the names of those that stop."""
    for name, place in (("THESIS_DATA", "data"), ("KERAS_HOME", "keras")):
        monkeypatch.setenv(name, str(tmp_path / place))
    for name in ("THESIS_RUNS", "THESIS_DERIVED"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))

    def run_all(profile, few_of, backbone_of):
        names, few_of = set(), yaml.safe_load(few_of)
        for job in run.jobs_of(profile, run.choose([])):
            few = few_of.get(job.path.stem, {}) | backbone_of(job)
            declared = run.declared_parameters(nbformat.read(job.path, 4))
            job = job._replace(parameters=run.checked(job.parameters | few, declared))
            names |= {job.name} if run.run_jobs(profile, [job]) else set()
        return names

    return run_all


@pytest.mark.rehearsal
def test_the_thesis_runs(tars, inception, stopped):
    def backbone_of(job):
        if "backbone_name" not in job.parameters:
            return {}
        attack = job.number == "11"  # which takes pictures of any size
        return {"weights": "random.weights.h5"} if attack else {"backbone_name": inception}

    assert stopped("thesis", FEW, backbone_of) == {"10_mislabel_study_enron", "13_domain_mismatch"}
    table = claims.written(stored.folder("runs", "thesis", "figures"), run.choose([]))
    assert {name[:2] for name in table["notebook"]} == {f"{k:02}" for k in range(17)} - {"13"}


@pytest.mark.rehearsal
def test_two_folders_of_ones_own_run_under_their_names(tmp_path, mobilenet, stopped):
    folders(tmp_path / "data" / "pictures", "cats", "dogs", many=2 * MANY)

    def backbone_of(job):
        if job.number != "11":
            return {}
        inception = job.parameters["backbone_name"] == "InceptionV3"
        return {"weights": "random.weights.h5" if inception else MOBILENET}

    without_data = {"08_model_comparison_dog_fish", "11_attack_study_dog_fish"}
    without_data |= {"10_mislabel_study_enron", "13_domain_mismatch"}
    assert stopped("real", FEW, backbone_of) == without_data
    runs = stored.folder("runs", "real")
    for path in sorted(runs.glob("[01][0-9]_*.ipynb")):
        if path.stem[:2] > "12":
            break
        for cell in nbformat.read(path, 4).cells:
            shown = [
                o.get("text") or o.get("data", {}).get("text/plain", "")
                for o in cell.get("outputs", [])
            ]
            assert not re.search(r"airplane|\bcars?\b", " ".join(shown)), path.stem
