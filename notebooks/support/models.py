"""The Keras models and losses of the paper: linear heads, the smooth hinge, a small network."""

import keras

from helpers import Objective


def linear_head(d, n_classes=2, *, use_bias=False):
    """Return the logistic head of the thesis: one `Dense` layer that outputs logits.

    Two classes give one logit (d parameters, Koh & Liang 2017, section 2), more give one
    logit a class (d x C parameters). The weights start at zero.
    """
    outputs = 1 if n_classes == 2 else n_classes
    dense = keras.layers.Dense(outputs, use_bias=use_bias, kernel_initializer="zeros")
    return keras.Sequential([keras.Input((d,)), dense], name="linear_head")


def bound_head(x, y, weight_decay):
    """Return the Objective of a linear head without a bias on classes y (n,): 0 and 1, or more."""
    losses, classes = keras.losses, max(2, int(y.max()) + 1)
    kind = losses.BinaryCrossentropy if classes == 2 else losses.SparseCategoricalCrossentropy
    y = y.astype(float) if classes == 2 else y
    head = linear_head(x.shape[1], classes)
    return Objective(head, kind(from_logits=True), x, y, weight_decay=weight_decay)


def smooth_hinge(t):
    """Return the loss of labels -1, +1 and logits that tends to the hinge as t -> 0.

    t log(1 + exp((1 - s)/t)) of the margin s, one value an example (Koh & Liang 2017, section 4.2);
    t = 0 is the hinge itself, which has no second derivative.
    """
    ops = keras.ops

    def loss(y, logits):
        gap = 1 - ops.cast(ops.reshape(y, (-1,)), logits.dtype) * ops.reshape(logits, (-1,))
        return ops.relu(gap) if t == 0 else t * ops.softplus(gap / t)

    return loss


def all_cnn(side=28, *, width=8):
    """Return Koh & Liang's all-convolutional network: tanh, no pooling, 2,616 parameters.

    Six convolutions (the second and fourth with stride two, the last 1 x 1 to ten channels), the
    mean over positions, and one Dense layer of logits. `width` 8 and side 28 are the paper's.
    """
    layers = keras.layers
    model = keras.Sequential([keras.Input((side, side, 1))], name="all_cnn")
    for stride in (1, 2, 1, 2, 1):
        model.add(layers.Conv2D(width, 3, stride, activation="tanh"))
    model.add(layers.Conv2D(10, 1, activation="tanh"))
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(10))
    return model
