"""A layer whose factors cannot be decomposed stops the edit, or is left as it is."""

import pytest
import torch
from torch import nn

from lightning_curvature import CurvatureEditor, KroneckerFactors
from tests.support.faults import failing_eigh, layer_factors

pytestmark = [
    pytest.mark.filterwarnings("ignore:The factors of layer .* rest on"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


def test_a_layer_whose_factor_cannot_be_decomposed_is_named(monkeypatch):
    failing_eigh(monkeypatch, 100)
    monkeypatch.setattr(torch.linalg, "svd", torch.linalg.eigh)
    net = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"Layer '0': Factor G could not be decomposed, neither on cpu"):
        CurvatureEditor(0.5).edit(net, KroneckerFactors({"0": layer_factors()}))


FAULTS = {
    "NaN in A": (lambda net: None, {"A": torch.full((3, 3), torch.nan)}, "Factor A holds NaN"),
    "zero G": (lambda net: None, {"G": torch.zeros(2, 2)}, "Factor G is zero"),
    "zero A": (lambda net: None, {"A": torch.zeros(3, 3)}, "Factor A is zero"),
    "infinite weight": (lambda net: net[0].weight.data.fill_(torch.inf), {}, "its weight holds NaN or infinite"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_layer_stops_the_edit_or_is_left_as_it_is(name):
    damage, changes, message = FAULTS[name]
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))
    damage(net)
    factors = KroneckerFactors({"0": layer_factors(**changes), "1": layer_factors()})
    before = [layer.weight.clone() for layer in net]
    with pytest.raises(ValueError, match=f"Layer '0': .*{message}"):
        CurvatureEditor(0.5).edit(net, factors)
    assert all(torch.equal(a, b.weight) for a, b in zip(before, net, strict=True))
    with pytest.warns(UserWarning, match=f"Not edited: Layer '0': .*{message}"):
        report = CurvatureEditor(0.5, skip_faulty=True).edit(net, factors)
    assert torch.equal(before[0], net[0].weight)
    assert not torch.equal(before[1], net[1].weight)
    assert list(report.layers) == ["1"]
    assert message in report.skipped["0"]
    assert f"Not edited: {report.skipped['0']}" in str(report)
    with pytest.raises(ValueError, match="No layer can be edited: Layer '0'"):
        CurvatureEditor(0.5, ["0"], skip_faulty=True).edit(net, factors)
