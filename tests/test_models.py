"""The models of the paper and the thesis."""

import numpy as np
import pytest
from scipy.special import expit

from helpers import Objective
from support import models


def test_parameter_counts():
    """C7 of the originals: 2,616, 7,840 and 2,048 parameters."""
    assert models.all_cnn().count_params() == 2616
    assert models.linear_head(784, 10).count_params() == 7840
    assert models.linear_head(2048).count_params() == 2048


@pytest.mark.parametrize(("classes", "outputs"), [(2, 1), (3, 3)])
def test_heads_output_logits(classes, outputs):
    assert models.linear_head(5, classes, use_bias=True).output_shape == (None, outputs)


@pytest.mark.parametrize("t", [0.5, 0.001])
def test_the_smooth_hinge_is_above_the_hinge_by_at_most_t_log_2(t):
    margin = np.linspace(-2, 3, 501)
    hinge, smooth = (np.asarray(models.smooth_hinge(k)(np.ones(501), margin)) for k in (0, t))
    assert np.array_equal(hinge, np.maximum(0, 1 - margin))
    assert (smooth - hinge).min() >= -1e-14
    assert (smooth - hinge).max() == pytest.approx(t * np.log(2))


def test_the_smooth_hinge_has_the_curvature_of_its_formula():
    """sigma(u)(1 - sigma(u))/t at u = (1 - s)/t, the same for both labels."""
    rng, t = np.random.default_rng(0), 0.1
    x, y = rng.normal(size=(40, 3)), rng.choice([-1.0, 1.0], 40)
    objective = Objective(models.linear_head(3), models.smooth_hinge(t), x, y, weight_decay=0.1)
    objective.theta = rng.normal(size=3)
    outputs = objective.head.outputs(x, objective.theta)
    u = (1 - y * outputs[:, 0]) / t
    curvature = objective.head.curvatures(y, outputs)[:, 0, 0]
    np.testing.assert_allclose(curvature, expit(u) * expit(-u) / t, rtol=1e-9, atol=1e-12)
