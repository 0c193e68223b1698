"""Whether a network holds trained weights."""

import pytest
import torch
import torchvision
import transformers
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_curvature.layers.trained import EDGE, _edge_ratio, has_trained_weights
from tests.support import models

INITIALIZATIONS = [
    nn.init.normal_,
    nn.init.uniform_,
    nn.init.ones_,
    nn.init.trunc_normal_,
    nn.init.xavier_uniform_,
    nn.init.kaiming_normal_,
    nn.init.orthogonal_,
    nn.init.eye_,
    lambda weight: nn.init.sparse_(weight, 0.5),
]


def stand_out(module):
    """Give the matrices of a module a direction that stands out, as training does."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and not is_lazy(layer.weight):
            weight = layer.weight.detach().flatten(1)
            direction = torch.outer(torch.randn(len(weight)), torch.randn(weight.shape[1]))
            layer.weight.data += (weight.norm() * direction / direction.norm()).view_as(layer.weight)
    return module


@pytest.mark.parametrize("initialize", INITIALIZATIONS)
@pytest.mark.parametrize("shape", [(16, 16), (16, 300), (200, 100)])
def test_initializations_stay_within_the_edge(initialize, shape):
    torch.manual_seed(0)
    assert (_edge_ratio(initialize(torch.empty(shape))) or 0.0) < EDGE


@pytest.mark.parametrize(
    "build",
    [
        lambda: torchvision.models.resnet18(num_classes=4),
        torchvision.models.swin_t,
        lambda: models.Classifier("vit"),
        lambda: transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, vocab_size=64)),
        lambda: nn.Sequential(nn.Embedding(10, 64), nn.LazyLinear(8)),
        nn.Identity,
    ],
)
def test_models_as_their_makers_initialize_them(build):
    torch.manual_seed(0)
    assert not has_trained_weights(build())


def test_directions_that_stand_out_are_training():
    torch.manual_seed(0)
    model = stand_out(torchvision.models.resnet18(num_classes=4))
    assert has_trained_weights(model)
    assert has_trained_weights(model.bfloat16())
    assert has_trained_weights(nn.Sequential(stand_out(nn.Linear(300, 300)), nn.Linear(64, 8)))  # a fresh head
    assert not has_trained_weights(nn.Sequential(stand_out(nn.Linear(64, 64)), nn.Linear(300, 300)))


def test_training_makes_them_stand_out():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    rows, targets = torch.randn(64, 32), torch.randn(64, 4) @ torch.randn(4, 32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    assert _edge_ratio(net[2].weight.detach()) < EDGE
    for _ in range(200):
        optimizer.zero_grad()
        (net(rows) - targets).square().mean().backward()
        optimizer.step()
    assert _edge_ratio(net[2].weight.detach()) > EDGE


def test_matrices_without_a_spectrum_say_nothing():
    for value in (0.0, float("nan")):
        layer = nn.Linear(32, 32)
        nn.init.constant_(layer.weight, value)
        assert not has_trained_weights(layer)
