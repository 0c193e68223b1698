"""The order of directions by curvature, where it is exact; rank correlation."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curvature import KroneckerFactors, LayerFactors
from lightning_curvature.analysis import Products, curvature_order, rank_correlation
from lightning_curvature.collect.eigenvalues import correct_eigenvalues
from tests.support.axes import diagonal


def test_order_of_directions_where_it_is_exact():
    """Without weights, all classes are equally likely whatever the input: the factors are independent."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 5, bias=False)).double()
    nn.init.zeros_(model[0].weight)
    x, y = torch.randn(64, 8, dtype=torch.float64) * torch.arange(1, 9), torch.randint(5, (64,))
    p = torch.full((5,), 0.2, dtype=torch.float64)
    factors = LayerFactors(A=x.T @ x / 64, G=torch.diag(p) - torch.outer(p, p), num_inputs=64, num_gradients=64)
    factors = correct_eigenvalues(
        model,
        KroneckerFactors({"0": factors}),
        [(x, y)],
        lambda batch: F.cross_entropy(model(batch[0]), batch[1]),
        fisher="exact",
        positions="all",
    )["0"]
    products = Products(model, ["0"], lambda: model(x), y)
    order = curvature_order(products, "0", factors, scores=("kfac", "ekfac"), count=20)
    for values in (order.ggn, order.hessian, order.predicted["ekfac"]):
        torch.testing.assert_close(torch.tensor(values), torch.tensor(order.predicted["kfac"]), atol=1e-12, rtol=1e-6)
    assert list(order.place) == sorted(order.place)
    panels = order.plot().axes
    assert [axes.get_xlabel() for axes in panels] == ["predicted: kfac", "predicted: ekfac"]
    assert tuple(panels[0].lines[0].get_ydata()) == tuple(map(abs, order.ggn))
    assert order.correlation("kfac") > 0.95  # pairs of equal curvature are ordered by rounding
    assert order.correlation("kfac", "hessian", 0.0, 0.5) == pytest.approx(1.0, abs=0.02)
    assert list(order.by_band("kfac")) == ["all", "0% to 10%", "10% to 25%", "25% to 50%", "50% to 100%"]
    with pytest.raises(ValueError, match=r"Layer '0': factors for \[1, 20\], the weight is \[5, 8\]"):
        curvature_order(products, "0", diagonal(range(20, 0, -1)))
    with pytest.raises(ValueError, match=r"Layer '0' stores its weight as \[d_in, d_out\]"):
        curvature_order(products, "0", dataclasses.replace(factors, transposed=True))


def test_rank_correlation_without_what_controls_explain():
    generator = torch.Generator().manual_seed(0)
    size, first, second = torch.randn(3, 4000, generator=generator, dtype=torch.float64)
    both = size + 0.3 * first, (size + 0.3 * second).exp()  # a common cause, and no more
    assert rank_correlation(*both) > 0.85
    assert abs(rank_correlation(*both, [size])) < 0.06
    assert rank_correlation(first, -(first**3), [size, second]) == pytest.approx(-1.0, abs=1e-3)
    ties = [1, 1, 2, 3, 3, 3], [5, 4, 4, 9, 7, 7]
    assert rank_correlation(*ties) == pytest.approx(0.8104, abs=1e-4)  # scipy.stats.spearmanr
    for values in (([1, 2, 3], [1, 2]), ([1, 2, 3], [3, 2, 1], [[1, 2, 3]])):
        with pytest.raises(ValueError, match="needs more than"):
            rank_correlation(*values)
