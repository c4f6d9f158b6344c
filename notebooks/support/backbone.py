"""The feature extractor of the offline profile `demo`, trained on vehicles that are not targets.

`python -m support.backbone` draws the pretext classes of `support.drawings`, trains a small
classifier on them and saves what lies before its last layer. Neither airplanes nor cars are seen,
as a head on frozen features must not owe its features to the pictures that are removed later.
"""

import os
from pathlib import Path

import numpy as np

from support import drawings
from support.stored import ROOT

OUT = ROOT / "data" / "embedded" / "demo_backbone.keras"
WIDTHS = (24, 96, 192, 256)
FEATURES = 2 * sum(WIDTHS[1:])  # mean and maximum of the last three levels
SCALE = 1.2  # for a mean squared norm of some 600: MobileNetV2 on photographs gives a few hundred


def demo_backbone(size=96):
    """Return the untrained feature model: pictures in [0, 255] to pooled features."""
    import keras  # late, so that the settings of `main` come before TensorFlow starts

    x = inputs = keras.Input((size, size, 3))
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(x)
    pooled = []
    for level, width in enumerate(WIDTHS):
        kind = keras.layers.Conv2D if level < 2 else keras.layers.SeparableConv2D
        x = kind(width, 3, strides=2, padding="same", use_bias=False)(x)
        x = keras.layers.BatchNormalization(momentum=0.9)(x)
        x = keras.layers.ReLU()(x)
        if level:
            most = keras.layers.GlobalMaxPooling2D()(x)
            pooled += [keras.layers.GlobalAveragePooling2D()(x), keras.layers.Rescaling(0.3)(most)]
    outputs = keras.layers.Rescaling(SCALE)(keras.layers.Concatenate()(pooled))
    return keras.Model(inputs, outputs, name="demo_backbone")


def pretext_pictures(seed, per_class, size=96):
    """Return (pictures, class numbers) of the pretext classes, shuffled."""
    rows = drawings.pretext_rows(seed, per_class)
    pictures = np.stack([drawings.draw(row, seed=seed, size=size) for _, row in rows.iterrows()])
    order = np.random.default_rng([seed, 3]).permutation(len(rows))
    return pictures[order], rows["label"].map(drawings.PRETEXT.index).to_numpy()[order]


def train(out=OUT, *, epochs=10, per_class=600, seed=7, size=96):
    """Return the validation accuracy on the pretext classes, after saving the feature model."""
    import keras

    keras.utils.set_random_seed(seed)
    pictures, classes = pretext_pictures(seed, per_class, size)
    features = demo_backbone(size)
    head = [keras.layers.Dropout(0.2), keras.layers.Dense(int(classes.max()) + 1)]
    model = keras.Sequential([keras.layers.RandomFlip("horizontal"), features, *head])
    steps = epochs * -(-int(0.9 * len(pictures)) // 64)
    rate = keras.optimizers.schedules.CosineDecay(2e-3, steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    how = {"batch_size": 64, "epochs": epochs, "validation_split": 0.1, "verbose": 2}
    past = model.fit(pictures, classes, **how)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    features.save(out)
    return past.history["val_accuracy"][-1]


if __name__ == "__main__":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
    print(f"{OUT.name}: {train():.3f} of the held-out pretext pictures are named rightly")
