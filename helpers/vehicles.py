"""Airplanes against cars as every study meets them: frozen features, labels, the fitted head."""

from typing import NamedTuple

import keras
import numpy as np
import pandas as pd

from helpers import retraining, runtime
from helpers.models import linear_head
from helpers.objective import Objective


class Vehicles(NamedTuple):
    """What notebooks 00 and 01 made: manifest rows, features (n, d) and (m, d), labels 0. or 1.

    An airplane is 1, a car 0; rows of `train` and `test` are in the order of the features.
    """

    train: pd.DataFrame
    test: pd.DataFrame
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    def __str__(self):
        (n, d), m = self.x_train.shape, len(self.x_test)
        return f"n = {n:,} training pictures, m = {m:,} test pictures, d = {d:,} features"


def load(profile):
    """Return the Vehicles of a profile; an error names the notebook to run first."""
    derived = runtime.folder("data", "derived", profile)
    manifest = runtime.need(derived / "00_manifest.csv", made_by="00_data_curation")
    features = runtime.need(derived / "01_features.npy", made_by="01_feature_extraction")
    manifest = pd.read_csv(manifest, keep_default_na=False)
    phi = np.load(features).astype(float)
    if len(phi) != len(manifest):
        raise ValueError(
            f"{features.name} holds {len(phi)} rows, the manifest {len(manifest)}: the pictures "
            "changed since they were measured. Run notebook 01_feature_extraction again."
        )
    airplane = (manifest["label"] == "airplane").to_numpy().astype(float)
    train = (manifest["split"] == "train").to_numpy()
    tables = (manifest[part].reset_index(drop=True) for part in (train, ~train))
    return Vehicles(*tables, phi[train], airplane[train], phi[~train], airplane[~train])


def fitted_head(data, weight_decay):
    """Return the Objective of the logistic head on Vehicles, at its minimum (Newton, 1e-10)."""
    logistic = keras.losses.BinaryCrossentropy(from_logits=True)
    model = linear_head(data.x_train.shape[1])
    objective = Objective(model, logistic, data.x_train, data.y_train, weight_decay=weight_decay)
    fit = retraining.fit_head(objective)
    if not fit.converged:
        raise ValueError(f"The head did not converge ({fit}): raise the weight decay.")
    return objective
