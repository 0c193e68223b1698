"""A small classifier, and its rows and factors example by example."""

import torch
import torch.nn.functional as F
from torch import nn

from lightning_curvature.collect.eigenvalues import correct_eigenvalues
from lightning_curvature.collect.passes import collect
from tests import reference


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def data(n=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, dtype=torch.float64, generator=generator), torch.randint(4, (n,), generator=generator)


def rows(model, layer, inputs, labels):
    """Inputs [n, d_in] and gradients [n, d_out] of the empirical Fisher, example by example."""
    a, g = [], []
    for index, x in enumerate(inputs):
        logits, layer_input, y = reference.layer_io(model, layer, x[None])
        (vector,) = reference.label_vectors(labels)(logits, index)
        a.append(layer_input[0])
        g.append(torch.autograd.grad(logits, y, vector)[0][0])
    return torch.stack(a), torch.stack(g)


def collected(model, **options):
    inputs, labels = data()
    batches = [(inputs[:5], labels[:5]), (inputs[5:], labels[5:])]
    step = lambda batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    options = {"fisher": "empirical", "positions": "all"} | options
    factors = collect(model, batches, step, layers=["0"], coupled=True, **options)
    return correct_eigenvalues(model, factors, batches, step, **options), rows(model, model[0], inputs, labels)
