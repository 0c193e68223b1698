"""A trunk with a head of its own, and the factors of one step of it, fast and by the definition."""

import torch
from torch import nn

from lightning_curvature.collect.passes import collect


class Net(nn.Module):
    """A trunk with one hidden layer, and a head of its own."""

    def __init__(self, d_in=5, hidden=6, out=4):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head = nn.Linear(d_in, hidden), nn.Linear(hidden, out)

    def forward(self, x):
        return self.head(torch.tanh(self.fc(x)))


def exact_gradient_factor(model, x, uses):
    """Return G of ``fc`` by the definition: of each softmax over each of ``uses``, one position and class at a time.

    Args:
        model: Has a layer ``fc``.
        x: Inputs.
        uses: From the output of ``fc`` to logits ``[positions, classes]``, one function for each softmax.
    """
    pre = model.fc(x).detach().requires_grad_(True)
    total = 0.0
    for use in uses:
        z = use(pre)
        p = z.detach().softmax(-1)
        for n in range(len(p)):
            for c in range(p.shape[1]):
                v = torch.zeros_like(p)
                v[n] = p[n]
                v[n, c] -= 1
                (g,) = torch.autograd.grad(z, pre, v * p[n, c].sqrt(), retain_graph=True)
                rows = g.movedim(1, -1) if isinstance(model.fc, nn.Conv2d) else g
                rows = rows.reshape(-1, rows.shape[-1])
                total = total + rows.T @ rows
    return total / (pre.numel() // (pre.shape[1] if isinstance(model.fc, nn.Conv2d) else pre.shape[-1]))


def factors(model, step, **options):
    return collect(model, [None], lambda _: step(), **({"layers": ["fc"], "fisher": "exact"} | options))["fc"]


def tokens(n=3, length=4, seed=1):
    torch.manual_seed(seed)
    return torch.randn(n, length, 5).double(), torch.randint(0, 4, (n, length))


def head(model):
    return lambda pre: model.head(torch.tanh(pre)).flatten(0, -2)
