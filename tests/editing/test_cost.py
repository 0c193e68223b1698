"""What an edit is predicted to cost."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.baselines.random_basis import RandomBasisEditor
from lightning_curvature.baselines.svd import SVDEditor
from lightning_curvature.collect.passes import collect
from lightning_curvature.editing.bulk import BulkStepEditor
from lightning_curvature.editing.cost import price
from lightning_curvature.editing.scores import SCORES

D_OUT, D_IN = 5, 7


def quadratic_layer(seed=0):
    """Factors of full rank, and a function: the loss of a position under a change, for a quadratic model with them."""
    generator = torch.Generator().manual_seed(seed)
    A, G = (
        rows.T @ rows / len(rows)
        for rows in (torch.randn(50, side, dtype=torch.float64, generator=generator) for side in (D_IN, D_OUT))
    )
    factors = LayerFactors(
        A=A,
        G=G,
        num_inputs=100,
        num_gradients=100,
        A_coupled=A,
        G_coupled=G,
        eigenvalues=torch.rand(D_OUT, D_IN, dtype=torch.float64, generator=generator),
        margins=torch.randn(D_OUT, D_IN, dtype=torch.float64, generator=generator),
    )

    def loss(change):
        curvature = torch.kron(G, A)  # of the weight, read row by row
        return 0.5 * float(change.flatten() @ curvature @ change.flatten())

    return factors, loss


EDITORS = [
    *(CurvatureEditor(0.8, score=score, soft=soft) for score, soft in itertools.product(SCORES, (False, True))),
    SVDEditor(0.8),
    RandomBasisEditor(0.8),
    BulkStepEditor(0.3),
    BulkStepEditor(0.3, energy=0.8),
]


@pytest.mark.parametrize("editor", EDITORS, ids=lambda editor: editor.method)
@pytest.mark.parametrize("exponent", [0, -300, 150])
def test_the_cost_is_exact_on_a_quadratic_model(editor, exponent):
    factors, loss = quadratic_layer()
    weight = torch.randn(D_OUT, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    new, edit = editor.edit_weight("a", weight * 2.0**exponent, factors, editor.energy, False)
    expected = loss(new * 2.0**-exponent - weight)
    assert expected > 0.01
    assert math.ldexp(edit.predicted_loss, -2 * exponent) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("read", [torch.sum, torch.mean], ids=["sum", "mean"])
@pytest.mark.parametrize("positions", [1, 4])
def test_equal_positions_of_one_loss_add_up(read, positions):
    """Where the loss reads the sum or the mean of equal positions, the cost is the second order of its rise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Linear(D_OUT, 3)).double()
    x = torch.randn(1, 1, D_IN).double().expand(1, positions, D_IN)
    logits = lambda: model[1](read(model[0](x), dim=1))  # noqa: E731
    factors = collect(
        model, [None], lambda _: F.cross_entropy(logits(), torch.tensor([1])), layers=["0"], fisher="exact"
    )
    change = 1e-5 * torch.randn(D_OUT, D_IN).double()
    with torch.no_grad():
        before = logits().log_softmax(-1)
        model[0].weight += change
        rise = float(
            (before.exp() * (before - logits().log_softmax(-1))).sum()
        )  # of the loss on the model's own labels
    for in_basis in (False, True):
        assert price(change, factors["0"], in_basis).nats == pytest.approx(rise, rel=1e-3, abs=0)


def test_an_edit_costs_more_where_positions_serve_one_loss():
    """By the square of their number; but no less than of single positions, where there are more losses than these."""
    factors, _ = quadratic_layer()
    weight = torch.randn(D_OUT, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def edited(num_losses):
        of_losses = dataclasses.replace(factors, num_losses=num_losses)
        return CurvatureEditor(0.8).edit_weight("a", weight, of_losses, 0.8, False)[1]

    one, four, less = edited(100), edited(25), edited(400)
    assert four.predicted_loss == pytest.approx(16 * one.predicted_loss)
    assert four.costliest.nats == pytest.approx(16 * one.costliest.nats)
    assert less.predicted_loss == one.predicted_loss


def test_the_pair_that_costs_most_is_named():
    """It is the one that a hard edit drops: large in the weight, and of little mass."""
    A, G = torch.diag(torch.tensor([100.0, 1.0, 1.0])), torch.diag(torch.tensor([100.0, 0.1]))
    factors = LayerFactors(A=A, G=G, num_inputs=100, num_gradients=100)
    module = nn.Sequential(nn.Linear(3, 2, bias=False))
    module[0].weight.data = torch.tensor([[1.0, 0.1, 0.1], [4.0, 1.0, 1.0]])
    report = CurvatureEditor(0.9).edit(module, KroneckerFactors({"0": factors}))
    edit = report.layers["0"]
    assert (edit.costliest.row, edit.costliest.column) == (1, 0)
    assert edit.costliest.nats == pytest.approx(0.5 * 10 * 4**2)
    assert report.predicted_loss == edit.predicted_loss > edit.costliest.nats
    assert "Most of it in layer '0': 81, of them 80 for the pair (1, 0) alone." in str(report)


def test_an_edit_that_keeps_everything_costs_nothing():
    factors, _ = quadratic_layer()
    module = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False, dtype=torch.float64))
    report = CurvatureEditor(1.0).edit(module, KroneckerFactors({"0": factors}))
    assert report.predicted_loss == 0.0
    assert "the loss rises by 0 nats per loss position, to second order, without data." in str(report)
    assert price(torch.zeros(D_OUT, D_IN), factors).pair is None


@pytest.mark.parametrize("in_basis", [False, True])
def test_a_cost_beyond_all_numbers_is_infinite(in_basis):
    factors, _ = quadratic_layer()
    assert (
        price(torch.full((D_OUT, D_IN), 1e300, dtype=torch.float64), factors, in_basis, exponent=-400).nats == math.inf
    )
