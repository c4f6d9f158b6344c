"""The models of the paper and the thesis."""

import pytest

from helpers import models


def test_parameter_counts():
    """C7 of the originals: 2,616, 7,840 and 2,048 parameters."""
    assert models.all_cnn().count_params() == 2616
    assert models.linear_head(784, 10).count_params() == 7840
    assert models.linear_head(2048).count_params() == 2048


@pytest.mark.parametrize(("classes", "outputs"), [(2, 1), (3, 3)])
def test_heads_output_logits(classes, outputs):
    assert models.linear_head(5, classes, use_bias=True).output_shape == (None, outputs)
