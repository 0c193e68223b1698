"""A small classifier of rows, and factors of one step of it."""

import torch
from torch import nn

from lightning_curvature.collect.passes import collect
from tests.support import models


def images(n=12, seed=0):
    return models.images(n, seed).tensors


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double()


def data(n=12):
    torch.manual_seed(1)
    return torch.randn(n, 5, dtype=torch.float64), torch.randint(3, (n,))


def gather(model, step, batches=(None,), **options):
    return collect(model, batches, step, **({"layers": ["2"], "fisher": "empirical"} | options))


def same(factors, expected, **tolerance):
    assert list(factors) == list(expected)
    for name in factors:
        assert factors[name].num_inputs == expected[name].num_inputs
        torch.testing.assert_close(factors[name].A, expected[name].A, **tolerance)
        torch.testing.assert_close(factors[name].G, expected[name].G, **tolerance)


def num_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
