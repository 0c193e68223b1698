"""A gated MLP whose projections read one tensor, and collections of it."""

import torch
import torch.nn.functional as F
from torch import nn

from lightning_curvature.collect.passes import collect

PROJECTIONS = ["gate", "up", "down"]


class Gated(nn.Module):
    """A gated MLP whose projections may be told to read another tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 5)
        self.head = nn.Linear(5, 3)
        self.apart = False

    def forward(self, x):
        return self.head(self.down(F.silu(self.gate(x)) * self.up(x + 0.5 if self.apart else x)))


def batches(count=4, seed=1):
    torch.manual_seed(seed)
    return [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(count)]


def add(collector, batch):
    recording = collector.step()
    recording.open()
    recording.backward(F.cross_entropy(collector.network.module(batch[0]), batch[1]))
    recording.close()


def gathered(model, data, **options):
    return collect(model, data, lambda b: F.cross_entropy(model(b[0]), b[1]), **({"layers": PROJECTIONS} | options))


def same(factors, expected):
    assert list(factors) == list(expected)
    for name, layer in factors.items():
        assert layer.numbers == expected[name].numbers
        torch.testing.assert_close(layer.A, expected[name].A)
        torch.testing.assert_close(layer.G, expected[name].G)


def separately(model, data, names=PROJECTIONS, **options):
    """Collected one layer at a time, so that nothing can be shared."""
    factors = {}
    for name in names:
        factors |= gathered(model, data, layers=[name], **options)
    return factors
