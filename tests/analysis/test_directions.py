"""Examples that use a direction."""

import pytest
import torch

from lightning_curvature.analysis import direction_use
from tests.support.axes import axis, diagonal


def test_examples_that_use_a_direction():
    factors = diagonal(range(6, 0, -1))
    inputs = torch.cat(
        [
            axis(5, dim=6) + 0.1 * axis(0, dim=6),
            5 * axis(5, dim=6) + 5 * axis(4, dim=6),
            axis(0, dim=6),
            axis(0, dim=6) + 0.5 * axis(5, dim=6),
        ]
    )
    labels = [True, True, False, False]
    flat = direction_use("fc", factors, inputs, labels, flat=True, count=2, examples=2)
    assert flat.directions == (4, 5)
    assert flat.top[1] == (0, 1)  # shares, not sizes
    assert flat.top[0][0] == 1
    assert flat.precision[1] == 1.0
    assert flat.chance == 0.5
    sharp = direction_use("fc", factors, inputs, labels, flat=False, count=1, examples=2)
    assert sharp.top == ((2, 3),)
    assert sharp.mean_precision == 0.0
    late = torch.cat([axis(0, 0, dim=6), torch.cat([axis(1, dim=6), axis(5, dim=6)])], 1)
    assert direction_use("fc", factors, late, [False, True], flat=True, count=1, examples=1).top == ((1,),)
    with pytest.raises(ValueError, match=r"20 of 4 examples were asked for"):
        direction_use("fc", factors, inputs, labels, flat=True)
