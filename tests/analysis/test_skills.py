"""What edits leave of skills."""

import pytest
import torch
from torch import nn

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.analysis import SkillRetention, skill_retention
from tests.support.axes import diagonal


def test_what_edits_leave_of_skills():
    layer = nn.Sequential(nn.Linear(4, 1, bias=False))
    nn.init.ones_(layer[0].weight)
    factors = KroneckerFactors({"0": diagonal((8.0, 4.0, 2.0, 1.0))})
    chance = {"sharp": 0.5, "flat": 0.0}

    def measure():
        kept = layer[0].weight[0].detach().round()
        return {
            "sharp": 0.5 + 0.5 * float(kept[0]),
            "flat": 0.8 * float(kept[3]),
            "perplexity": 9.0 - float(kept.sum()),
        }

    before = layer[0].weight.clone()
    retention = skill_retention(layer, factors, CurvatureEditor(), [0.5, 1.0, 0.9, 0.8], measure, chance)
    assert torch.equal(layer[0].weight, before)
    assert retention.energies == (1.0, 0.9, 0.8, 0.5)
    assert retention.perplexity == pytest.approx((1.0, 1.2, 1.4, 1.6))
    assert retention.accuracy["sharp"] == pytest.approx((1.0, 1.0, 1.0, 1.0))
    assert retention.retained("sharp") == pytest.approx((1.0, 1.0, 1.0, 1.0))
    assert retention.retained("flat") == pytest.approx((1.0, 0.0, 0.0, 0.0))


def curves(perplexity, accuracy, chance=0.5):
    return SkillRetention(
        tuple(1 - 0.1 * i for i in range(len(perplexity))), perplexity, {"a": accuracy}, {"a": chance}
    )


def test_retained_share_between_two_edits():
    retention = curves((1.0, 1.21, 1.0, 1.5), (0.9, 0.7, 0.9, 0.5))
    assert retention.retained("a") == pytest.approx((1.0, 0.5, 1.0, 0.0))
    assert retention.at_perplexity(1.1)["a"] == pytest.approx(0.75)  # half way, in logarithms
    assert retention.at_perplexity(1.21)["a"] == pytest.approx(0.5)  # the first edit that costs as much
    assert retention.at_perplexity(1.5)["a"] == pytest.approx(0.0)
    for multiple in (1.51, 1.0, 0.9):
        with pytest.raises(ValueError, match=f"x 1 to x 1.500, not x {multiple}"):
            retention.at_perplexity(multiple)


@pytest.mark.parametrize(
    ("measured", "chance", "says"),
    [
        ({"logic": 0.9, "perplexity": 9.0}, {"lojic": 0.5}, "odd: .'logic', 'lojic'.. Did you mean"),
        ({"logic": 0.9}, {"logic": 0.5}, "odd: .'perplexity'."),
        ({"logic": 0.5, "perplexity": 9.0}, {"logic": 0.5}, "'logic', where a guess has 0.500: it never"),
    ],
)
def test_skills_that_cannot_be_compared(measured, chance, says):
    layer = nn.Sequential(nn.Linear(2, 1))
    factors = KroneckerFactors({"0": diagonal((2.0, 1.0))})
    with pytest.raises(ValueError, match=says):
        skill_retention(layer, factors, CurvatureEditor(), [0.5], lambda: measured, chance)
