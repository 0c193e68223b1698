"""Scores of examples, and how well they tell memorized ones."""

import pytest
import torch

from lightning_curvature.analysis import Detection, activation_norms, auroc, detect, flat_shares
from lightning_curvature.analysis.detection import random_shares
from tests.support.axes import axis, diagonal


def test_share_in_the_flat_half():
    factors = diagonal(range(20, 0, -1))
    inputs = torch.cat([axis(0), axis(19), axis(3) + 3 * axis(12)])
    torch.testing.assert_close(flat_shares(factors, inputs), torch.tensor([0.0, 1.0, 0.9]).double())
    torch.testing.assert_close(flat_shares(factors.A, inputs), torch.tensor([0.0, 1.0, 0.9]).double())
    torch.testing.assert_close(flat_shares(factors, inputs, flat=0.3), torch.tensor([0.0, 1.0, 0.0]).double())
    positions = torch.cat([axis(0, times=2.0), axis(19)], 1)  # energy, not the mean of shares
    torch.testing.assert_close(flat_shares(factors, positions), torch.tensor([0.2]).double())
    assert flat_shares(factors, 0 * axis(0)).tolist() == [0.0]
    with pytest.raises(ValueError, match=r"flat=0.01 takes 0 of 20 directions"):
        flat_shares(factors, inputs, flat=0.01)


def test_controls():
    inputs = torch.randn(400, 2, 20, generator=torch.Generator().manual_seed(0))
    shares = random_shares(inputs)
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(shares, random_shares(inputs))
    assert not torch.equal(shares, random_shares(inputs, seed=1))
    torch.testing.assert_close(
        activation_norms(torch.cat([axis(0, times=2.0), axis(1)], 1)), torch.tensor([1.5]).double()
    )


@pytest.mark.parametrize("times", [1.0, 1e6, 1e-9])
def test_area_under_the_curve(times):
    """Against every pair, at any scale: torchmetrics would tie scores outside [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randint(9, (count,), generator=generator).double() for count in (30, 40))
    positive = times * (positive + 2)
    negative = times * negative
    pairs = positive[:, None] - negative
    expected = ((pairs > 0).double() + 0.5 * (pairs == 0)).mean()
    assert auroc(positive, negative) == pytest.approx(float(expected))
    assert auroc(negative, positive) == pytest.approx(1 - float(expected))
    assert auroc(torch.ones(3), torch.ones(2)) == 0.5


def test_detection_of_several_scores():
    detection = detect(
        {"good": torch.tensor([3.0, 4.0]), "bad": torch.tensor([0.0, 0.0])},
        {"good": torch.tensor([1.0, 2.0]), "bad": torch.tensor([1.0, 1.0])},
    )
    assert detection == Detection(
        auroc={"good": 1.0, "bad": 0.0},
        memorized={"good": (3.0, 4.0), "bad": (0.0, 0.0)},
        other={"good": (1.0, 2.0), "bad": (1.0, 1.0)},
    )
    with pytest.raises(ValueError, match=r"same scores are needed for both, found \['a'\] and \['b'\]"):
        detect({"a": torch.ones(1)}, {"b": torch.ones(1)})
