"""Airplanes against cars as every study meets them: frozen features, labels, the fitted head."""

import io
from typing import NamedTuple

import numpy as np
import pandas as pd

from helpers import fit_head
from support import datasets, stored
from support.models import bound_head


class Vehicles(NamedTuple):
    """Two classes of pictures: manifest rows, features (n, d) and (m, d), labels 0. or 1.

    Of two class folders the first in the alphabet is 1: an airplane is 1, a car 0. Rows of `train`
    and `test` are in the order of the features.
    """

    train: pd.DataFrame
    test: pd.DataFrame
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @property
    def names(self):
        """The names of the classes 0 and 1."""
        return [self.train["label"].to_numpy()[self.y_train == c][0] for c in (0, 1)]

    def __str__(self):
        (n, d), m = self.x_train.shape, len(self.x_test)
        return f"n = {n:,} training pictures, m = {m:,} test pictures, d = {d:,} features"


def manifest(profile):
    """Return the manifest that notebook 00 wrote; an error names the notebook to run first."""
    return _manifest(profile)[0]


def _manifest(profile):
    path = stored.folder("data", "derived", profile) / "00_manifest.csv"
    text, record = stored.get(path, made_by="notebook 00_data_curation")
    return pd.read_csv(io.StringIO(text), keep_default_na=False), record["sha256"]


def store_features(profile, phi):
    """Store the features (rows, d) of the manifest's pictures, for `load`."""
    table, made = _manifest(profile)
    path = stored.folder("data", "derived", profile) / "01_features.npz"
    stored.put(path, {"phi": phi}, manifest=made, pictures=datasets.fingerprint(table))


def load(profile):
    """Return the Vehicles of a profile; an error names the notebook to run first.

    Features are refused that were measured on another manifest, or on other pictures.
    """
    table, made = _manifest(profile)
    path = stored.folder("data", "derived", profile) / "01_features.npz"
    arrays, record = stored.get(path, made_by="notebook 01_feature_extraction")
    pictures = datasets.fingerprint(table)
    if (record["manifest"], record["pictures"]) != (made, pictures):
        raise ValueError(
            f"{path.name} was measured on other pictures than {len(table)} of today's manifest: "
            "run notebook 01_feature_extraction again."
        )
    return split(table, arrays["phi"].astype(float))


def split(manifest, phi, *, positive=None):
    """Return Vehicles of a manifest and its features (rows, d).

    Label `positive` becomes 1; where none is named, the first in the alphabet.
    """
    positive = positive or min(manifest["label"])
    label = (manifest["label"] == positive).to_numpy().astype(float)
    train = (manifest["split"] == "train").to_numpy()
    tables = (manifest[part].reset_index(drop=True) for part in (train, ~train))
    return Vehicles(*tables, phi[train], label[train], phi[~train], label[~train])


def pictures(manifest, size=96):
    """Return the train and test pictures of a manifest, uint8 (n, size, size, 3) and (m, ...).

    Read at 96 pixels a side and averaged down to `size`.
    """
    images = np.stack([datasets.resize(p, size) for p in datasets.pictures(manifest, 96)])
    train = (manifest["split"] == "train").to_numpy()
    return images[train], images[~train]


def fitted_head(data, weight_decay):
    """Return the Objective of the logistic head on Vehicles, at its minimum (Newton, 1e-10)."""
    objective = bound_head(data.x_train, data.y_train, weight_decay)
    fit = fit_head(objective)
    if not fit.converged:
        raise ValueError(f"The head did not converge ({fit}): raise the weight decay.")
    return objective
