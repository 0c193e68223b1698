"""What layers read."""

import pytest
import torch
from torch import nn

from lightning_curvature.analysis import layer_activations


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.once, self.often, self.never = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.often(self.often(self.once(self.drop(x))))


def test_activations():
    model = Twice()
    x = torch.randn(5, 4, 3)
    activations = layer_activations(model, x.split(2), model, ["once"])
    assert model.training  # as it was; without dropout while it ran
    assert torch.equal(activations["once"], x)
    assert torch.equal(layer_activations(model, [x], model, ["once"], slice(0, 1))["once"], x[:, :1])
    assert torch.equal(layer_activations(model, [x[:, 0]], model, ["once"])["once"], x[:, :1])
    images = layer_activations(model, [x[:, :, None]], model, ["once"])["once"]
    assert torch.equal(images, x)  # all dimensions between the first and the last are positions


def test_activations_that_cannot_be_read():
    model, x = Twice(), torch.randn(5, 4, 3)
    with pytest.raises(ValueError, match=r"There is no layer 'onc'. Did you mean .*'once'"):
        layer_activations(model, [x], model, ["onc"])
    with pytest.raises(ValueError, match=r"Layer 'drop' is a Dropout; only linear layers"):
        layer_activations(model, [x], model, ["drop"])
    with pytest.raises(RuntimeError, match=r"Layer 'often' ran 2 times in one forward pass"):
        layer_activations(model, [x], model, ["often"])
    with pytest.raises(RuntimeError, match=r"Layer 'never' ran 0 times"):
        layer_activations(model, [x], model, ["never"])
    with pytest.raises(ValueError, match=r"no examples to read the inputs of 'once' from"):
        layer_activations(model, [], model, ["once"])
