"""`make rehearsal`: every notebook of the profile `thesis`, on six tars of drawn pictures.

It asks whether they run, with Inception-v3 (random weights, small pictures), few pictures and few
repetitions. Not part of `make test`, as it takes half an hour.
"""

import io
import tarfile

import cv2
import keras
import nbformat
import numpy as np
import pytest
import yaml

from support import claims, datasets, drawings, features, run, stored

SIDE = 96
MANY = 360  # pictures of a class: 11 takes 60 for training and, always, 300 for testing
NEEDS_DATA = {"10_mislabel_study_enron", "13_domain_mismatch"}  # e-mails and hospital stays
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
  n_many: 4, many_steps: 3, n_saved: 1, batch: 8}
12_shifted_tests: {
  n_pictures: 20, n_attacked: 8, n_graded: 6, n_special: 4, rounds: 2, surrogate_epochs: 1}
14_method_comparison: {
  n_softmax: 100, n_digits: 60, n_subsets: 8, n_other: 8, n_cnn: 40, train_seeds: 1, n_top: 1,
  n_random: 3, steps: 20}
15_your_own_model: {n_digits: 200, epochs: 2, n_sentences: 60, n_readers: 1}
"""


def drawn(number, subtype, label):
    """Return the JPEG file of a drawn picture of a subtype, another for every number."""
    row = {"scene": number, "index": number, "flag": "", "background": drawings.USUAL[label][0]}
    picture = drawings.draw({**row, "subtype": subtype}, size=SIDE)
    return cv2.imencode(".jpg", picture[..., ::-1])[1].tobytes()


@pytest.fixture
def data_root(tmp_path):
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
    for at, name in enumerate(("dog", "fish")):  # other drawn things stand for them
        (tmp_path / "data" / "dog_fish" / name).mkdir(parents=True)
        for k in range(1200):
            file = tmp_path / "data" / "dog_fish" / name / f"{k}.jpg"
            file.write_bytes(drawn(10_000 * (at + 1) + k, drawings.PRETEXT[at], "car"))
    return tmp_path / "data"


@pytest.fixture
def inception(tmp_path):
    """Inception-v3 with random weights, as Keras's file of weights and as a whole .keras file."""
    keras.utils.set_random_seed(0)
    backbone = features.load_backbone("InceptionV3", weights=None, size=SIDE)
    backbone.model.trainable = True
    for layer in backbone.model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # the statistics of one batch, else nothing is left at the end
    pictures = [drawn(k, kind, "car") for k in range(8) for kind in drawings.SUBTYPES["car"]]
    batch = np.array([datasets.decode(picture) for picture in pictures], "float32")
    backbone.model(backbone.preprocess(batch), training=True)
    (tmp_path / "keras" / "models").mkdir(parents=True)
    backbone.model.save_weights(tmp_path / "keras" / "models" / "random.weights.h5")
    inputs = keras.Input((SIDE, SIDE, 3), dtype="float32")
    scaled = keras.layers.Rescaling(1 / 127.5, offset=-1, dtype="float32")(inputs)
    path = tmp_path / "inception.keras"
    keras.Model(inputs, backbone.model(scaled)).save(path)
    return str(path)


@pytest.mark.rehearsal
def test_every_notebook_runs(data_root, inception, tmp_path, monkeypatch):
    for name, place in (("THESIS_DATA", "data"), ("KERAS_HOME", "keras")):
        monkeypatch.setenv(name, str(tmp_path / place))
    for name in ("THESIS_RUNS", "THESIS_DERIVED"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    jobs, few_of = [], yaml.safe_load(FEW)
    for job in run.jobs_of("thesis", run.choose([])):
        few = few_of.get(job.path.stem, {})
        if "backbone_name" in job.parameters:
            attack = job.number == "11"  # which takes pictures of any size
            other = {"weights": "random.weights.h5"} if attack else {"backbone_name": inception}
            few = few | other
        declared = run.declared_parameters(nbformat.read(job.path, 4))
        jobs.append(job._replace(parameters=run.checked(job.parameters | few, declared)))
    stopped = [job.name for job in jobs if run.run_jobs("thesis", [job])]  # all that do are told
    assert set(stopped) == NEEDS_DATA
    table = claims.written(stored.folder("runs", "thesis", "figures"), run.choose([]))
    assert {name[:2] for name in table["notebook"]} == {f"{k:02}" for k in range(17)} - {"13"}
