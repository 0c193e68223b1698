"""Products of the curvature, against dense matrices."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curvature.analysis import Products, gather, top_curvature
from lightning_curvature.analysis.curvature import inner
from tests.support.axes import axis


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.head = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(torch.tanh(self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])))


LAYERS = ["qkv", "out"]


@pytest.fixture(scope="module")
def dense():
    """A small network, its products, and its dense GGN and Hessian."""
    model = Attends()
    x, y = torch.randn(2, 3, 4, dtype=torch.float64), torch.randint(3, (6,))
    products = Products(model, LAYERS, lambda: model(x).flatten(0, 1), y)
    weights = {f"{name}.weight": model.get_submodule(name).weight.detach() for name in LAYERS}

    def logits(flat):
        parts = flat.split([w.numel() for w in weights.values()])
        named = {name: part.view(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.functional_call(model, named, (x,)).flatten(0, 1)

    flat = torch.cat([w.flatten() for w in weights.values()])
    J = torch.autograd.functional.jacobian(logits, flat)
    p = logits(flat).softmax(-1)
    ggn = torch.einsum("nki,nk,nkj->ij", J, p, J) - torch.einsum("nki,nk,nl,nlj->ij", J, p, p, J)
    H = torch.autograd.functional.hessian(lambda flat: F.cross_entropy(logits(flat), y), flat)
    return products, ggn.detach() / 6, H, weights


def split(flat, weights):
    parts = flat.split([w.numel() for w in weights.values()])
    return {
        name.removesuffix(".weight"): part.view(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)
    }


def joined(direction):
    return torch.cat([part.flatten() for part in direction.values()])


def test_products_against_dense_matrices(dense):
    products, ggn, H, weights = dense
    assert len(products) == 6
    v = torch.randn(len(ggn), dtype=torch.float64)
    direction = split(v, weights)
    torch.testing.assert_close(joined(products.ggn(direction)), ggn @ v)
    torch.testing.assert_close(joined(products.hessian(direction)), H @ v)
    torch.testing.assert_close(products.quadratics(direction).mean(), v @ ggn @ v)
    assert inner(direction, direction) == pytest.approx(float(v @ v))


def test_largest_curvature_and_trace(dense):
    products, ggn, _, _ = dense
    values, vectors = torch.linalg.eigh(ggn)
    value, vector = top_curvature(products, tolerance=1e-9, steps=1000)
    assert value == pytest.approx(float(values[-1]), rel=1e-6)
    assert abs(float(joined(vector) @ vectors[:, -1])) == pytest.approx(1.0, abs=1e-3)
    draws = torch.tensor([products.trace(draws=1, seed=seed) for seed in range(400)])
    assert abs(float(draws.mean()) - float(ggn.trace())) < 3 * float(draws.std()) / math.sqrt(len(draws))
    nothing = Attends()
    nn.init.zeros_(nothing.head.weight)
    x = torch.randn(1, 2, 4, dtype=torch.float64)
    assert top_curvature(Products(nothing, ["out"], lambda: nothing(x)[0]))[0] == 0.0


def test_products_leave_the_model_alone(dense):
    model = Attends()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    with torch.no_grad():  # also where the caller has switched gradients off
        Products(model, LAYERS, lambda: model(x).flatten(0, 1)).ggn(
            {name: torch.ones_like(model.get_submodule(name).weight) for name in LAYERS}
        )
    assert all(parameter.grad is None for parameter in model.parameters())


def test_products_that_cannot_be_taken(dense):
    model = Attends()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"There is no layer 'oout'. Did you mean 'out'"):
        Products(model, ["oout"], lambda: model(x))
    with pytest.raises(ValueError, match=r"Expected logits \[n, classes\], found \[2, 3, 3\]"):
        Products(model, ["out"], lambda: model(x))
    products = Products(model, ["out"], lambda: model(x).flatten(0, 1))
    with pytest.raises(RuntimeError, match="needs the labels: pass targets="):
        products.hessian({"out": model.out.weight})


def test_one_example_is_sharp_and_the_population_is_flat():
    """Memorized examples have an axis each, of one and a half times the length; clean ones share one."""
    model = nn.Sequential(nn.Linear(6, 2, bias=False)).double()
    nn.init.zeros_(model[0].weight)
    rows = torch.cat([axis(1, 2, 3, dim=6, times=1.5)[:, 0], axis(0, 0, 0, 0, dim=6)[:, 0]])

    def make(index):
        return Products(model, ["0"], lambda: model(rows[index : index + 1]))

    curves = gather(make, memorized=[0, 1], clean=[3, 4], population=[2, 3, 4, 5, 6, 0, 1], sizes=(1, 2, 4, 6))
    # With p = 1/2 the sharpest direction of an input a is (1, -1) a^T / |a| / sqrt 2, of curvature |a|^2 / 2.
    for curve in curves.memorized:
        torch.testing.assert_close(torch.tensor(curve), 1.125 / torch.tensor([1.0, 2.0, 4.0, 6.0]))
    # Of the others that come first, one is memorized; the last size of clean ones meets another one.
    for curve in curves.clean:
        torch.testing.assert_close(torch.tensor(curve), torch.tensor([0.5, 0.25, 3 / 8, 4 / 12]))
    assert curves.traces[0][0] == pytest.approx(2.25 * curves.traces[1][0])  # estimates, from the same random signs
    assert curves.medians()[0][0] == pytest.approx(1.125)
    assert curves.crossing == 4
    axes = curves.plot().axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "memorized, median of 2",
        "clean, median of 2",
        "crossing: 4",
    ]
    assert tuple(axes.lines[2].get_ydata()) == curves.medians()[0]
    assert gather(make, [0], [3], [4, 5, 6], sizes=(1, 2)).crossing is None  # not yet
    assert gather(make, [3], [0], [4, 5, 6], sizes=(1, 2)).crossing is None  # not sharper alone
    for sizes in ((2, 4), (1, 4, 2), (1, 50)):
        with pytest.raises(ValueError, match="Sizes must rise from 1"):
            gather(make, [0], [3], range(7), sizes=sizes)
