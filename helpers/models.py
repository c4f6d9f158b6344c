"""The Keras models of the thesis: linear heads on frozen features, and the backbone of `demo`."""

import keras


def linear_head(d, n_classes=2, *, use_bias=False):
    """Return the logistic head of the thesis: one `Dense` layer that outputs logits.

    Two classes give one logit (d parameters, Koh & Liang 2017, section 2), more give one
    logit a class (d x C parameters). The weights start at zero.
    """
    outputs = 1 if n_classes == 2 else n_classes
    return keras.Sequential(
        [
            keras.Input((d,)),
            keras.layers.Dense(outputs, use_bias=use_bias, kernel_initializer="zeros"),
        ],
        name="linear_head",
    )
