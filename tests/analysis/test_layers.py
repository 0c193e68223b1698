"""Which layers to edit: shares of flat energy against a slow reference, and the order."""

import pytest
import torch
from torch import nn

from lightning_curvature import KroneckerFactors, LayerFactors
from lightning_curvature.analysis.layers import flat_shares_by_layer, rank_layers
from tests.support import models


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3), nn.Dropout(0.5)).double()


def factors_of(module, rows):
    layers = {}
    for name, inputs in (("0", rows), ("2", module[1](module[0](rows)).detach())):
        G = torch.eye(module[int(name)].out_features).double()
        flat = inputs.flatten(0, -2)
        layers[name] = LayerFactors(A=flat.T @ flat / len(flat), G=G, num_inputs=len(flat), num_gradients=len(flat))
    return KroneckerFactors(layers)


def test_shares_example_by_example():
    module = network().train()
    rows = torch.randn(7, 5, 6, dtype=torch.float64)
    factors = factors_of(module, rows)
    shares = flat_shares_by_layer(module, factors, [rows[:3], rows[3:]], module)
    assert module.training
    for name, inputs in (("0", rows), ("2", module[1](module[0](rows)).detach())):
        values, vectors = torch.linalg.eigh(factors[name].A)  # weakest first
        half = len(values) // 2
        for example in range(7):
            flat = sum(float(vectors[:, j] @ a) ** 2 for a in inputs[example] for j in range(half))
            total = sum(float(a @ a) for a in inputs[example])
            assert float(shares[name][example]) == pytest.approx(flat / total)
    first = flat_shares_by_layer(module, factors, [rows], module, positions="first")
    alone = flat_shares_by_layer(module, factors, [rows[:, :1]], module)
    assert all(torch.allclose(first[name], alone[name]) for name in factors)
    with pytest.raises(ValueError, match="positions must be one of"):
        flat_shares_by_layer(module, factors, [rows], module, positions="last")
    assert flat_shares_by_layer(module, factors, [rows], module, flat=0.2)["0"].max() < shares["0"].max()


def test_the_layer_where_examples_differ_comes_first():
    """What is recited is shifted along a direction that the first layer has flat, and the second does not see."""
    module = network().eval()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 6, dtype=torch.float64, generator=generator) * torch.tensor([3.0, 2, 2, 1, 0.1, 0.1])
    with torch.no_grad():
        module[0].weight[:, 4:] = 0
    factors = factors_of(module, rows)
    recited = rows[:20] + torch.tensor([0, 0, 0, 0, 5.0, 0])
    areas = rank_layers(module, factors, [recited], [rows[20:30], rows[30:]], module)
    assert list(areas) == ["0", "2"]
    assert areas["0"] > 0.9
    swapped = rank_layers(module, factors, [rows[20:30], rows[30:]], [recited], module)
    assert list(swapped) == ["0", "2"]
    assert swapped["0"] == pytest.approx(1 - areas["0"])
    assert 0.2 < areas["2"] < 0.8


def test_convolutions_and_errors():
    net, module, rows = models.cnn().eval(), network(), torch.randn(7, 6, dtype=torch.float64)
    images = models.images(6).tensors[0]
    A, G = torch.eye(72), torch.eye(8)
    layer = next(name for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == 8)
    factors = KroneckerFactors({layer: LayerFactors(A=A, G=G, num_inputs=9, num_gradients=9)})
    assert flat_shares_by_layer(net, factors, [images], net)[layer].shape == (6,)
    with pytest.raises(ValueError, match="no batch was given"):
        flat_shares_by_layer(net, factors, [], net)
    with pytest.raises(ValueError, match="flat must lie between 0 and 1"):
        flat_shares_by_layer(net, factors, [images], net, flat=1.0)
    with pytest.raises(RuntimeError, match="ran 2 times in one forward pass"):
        flat_shares_by_layer(net, factors, [images], lambda batch: (net(batch), net(batch)))
    with pytest.raises(RuntimeError, match="its input was changed in place after the layer read it"):
        flat_shares_by_layer(module, factors_of(module, rows), [rows], lambda batch: (module(batch), batch.add_(1)))
    wrong = KroneckerFactors({layer: LayerFactors(A=torch.eye(9), G=G, num_inputs=9, num_gradients=9)})
    with pytest.raises(ValueError, match="factors are for 9 inputs, the layer reads 72"):
        flat_shares_by_layer(net, wrong, [images], net)
    areas = rank_layers(net, factors, [torch.zeros_like(images), images], [images], net)
    assert areas[layer] == pytest.approx(rank_layers(net, factors, [images], [images], net)[layer], abs=0.35)
    assert not any(m._forward_pre_hooks for m in net.modules())
