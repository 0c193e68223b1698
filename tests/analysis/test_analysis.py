"""Each analysis on a case whose answer is known."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.analysis import (
    Detection,
    Products,
    SkillRetention,
    activation_norms,
    auroc,
    band_strengths,
    compare_bands,
    curvature_order,
    detect,
    direction_use,
    flat_shares,
    gather,
    interplay,
    layer_activations,
    rank_correlation,
    skill_retention,
    top_curvature,
)
from lightning_curvature.analysis.bands import all_rising, draw_bands
from lightning_curvature.analysis.curvature import inner
from lightning_curvature.analysis.detection import random_shares
from lightning_curvature.analysis.directions import draw_precision
from lightning_curvature.analysis.labels import rank_labelled
from lightning_curvature.collect.eigenvalues import correct_eigenvalues


def diagonal(mu, lam=(1.0,)):
    """Factors whose eigenvectors are the axes, in this order."""
    A, G = (torch.diag(torch.tensor(values, dtype=torch.float64)) for values in (mu, lam))
    return LayerFactors(A=A, G=G, num_inputs=10, num_gradients=10)


def axis(*places, dim=20, times=1.0):
    """Examples of one position, each along an axis."""
    return times * F.one_hot(torch.tensor(places), dim).double()[:, None]


# What layers read --------------------------------------------------------------------------------------------------


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
    found = layer_activations(model, x.split(2), model, ["once"])
    assert model.training  # as it was; without dropout while it ran
    assert torch.equal(found["once"], x)
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


# Bands -------------------------------------------------------------------------------------------------------------


def test_strength_of_each_band():
    factors = diagonal(range(20, 0, -1))
    weight = torch.arange(1.0, 21.0)[None]
    inputs = torch.cat([axis(0, 1, 2, 4, 9, 10), axis(19, times=3.0)])
    expected = torch.tensor(
        [[1, 0, 0, 0], [2, 0, 0, 0], [0, 3, 0, 0], [0, 5, 0, 0], [0, 0, 10, 0], [0, 0, 0, 11], [0, 0, 0, 60]]
    ).double()
    torch.testing.assert_close(band_strengths(weight, factors, inputs), expected)
    expected[-1] /= 3
    torch.testing.assert_close(band_strengths(weight, factors, inputs, normalize=True), expected)


def test_bands_are_ordered_by_the_product_of_both_spectra():
    factors = diagonal([8.0, 1.0], [4.0, 1.0, 1.0, 0.4, 0.1])
    # Ten pairs: 32, 8, 8, 4, 3.2, 1, 1, 0.8, 0.4, 0.1. The top band holds (0, 0), the second the next one or two.
    weight = torch.zeros(5, 2)
    weight[0, 0], weight[3, 0] = 2.0, 7.0
    strengths = band_strengths(weight, factors, axis(0, dim=2))
    torch.testing.assert_close(strengths, torch.tensor([[2.0, 0.0, 7.0, 0.0]]).double())


def test_bands_of_singular_values():
    weight = torch.diag(torch.arange(20.0, 0.0, -1.0))
    strengths = band_strengths(weight, diagonal([1.0] * 20, [1.0] * 20), axis(0, 3, 8, 15), basis="svd")
    torch.testing.assert_close(strengths, torch.diag(torch.tensor([20.0, 17.0, 12.0, 5.0])).double())


def test_strengths_are_averaged_over_positions():
    factors = diagonal(range(20, 0, -1))
    inputs = torch.cat([axis(0), axis(1)], 1)
    assert band_strengths(torch.ones(1, 20), factors, inputs)[0, 0] == 1.0
    assert band_strengths(torch.ones(1, 20), factors, torch.cat([axis(0), axis(19)], 1))[0].tolist() == [0.5, 0, 0, 0.5]


def mixture(weights, count=40, seed=0):
    """Examples with the given strength in each band, times a random size of their own."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 1 + 0.2 * torch.rand(count, 1, 1, generator=generator, dtype=torch.float64)
    return sizes * sum(w * axis(place) for w, place in zip(weights, (0, 3, 8, 15), strict=True))


def test_memorized_over_clean():
    factors, weight = diagonal(range(20, 0, -1)), torch.ones(1, 20)
    memorized, clean = mixture([1, 2, 3, 4]), mixture([4, 4, 2, 1], seed=1)
    found = compare_bands("fc", weight, factors, memorized, clean)
    scale = (
        band_strengths(weight, factors, memorized)[:, 0].mean() / band_strengths(weight, factors, clean)[:, 3].mean()
    )
    torch.testing.assert_close(torch.tensor(found.ratio).double(), scale * torch.tensor([0.25, 0.5, 1.5, 4]).double())
    assert all(low < ratio < high for low, ratio, high in zip(found.low, found.ratio, found.high, strict=True))
    assert all(high - low < 0.1 * ratio for low, ratio, high in zip(found.low, found.ratio, found.high, strict=True))
    assert found.rising
    assert found == compare_bands("fc", weight, factors, memorized, clean)
    backwards = compare_bands("fc", weight, factors, clean, memorized)
    assert not backwards.rising
    assert all_rising([found])
    assert not all_rising([found, backwards])
    larger = compare_bands("fc", weight, factors, 9 * memorized, clean, normalize=True)
    smaller = compare_bands("fc", weight, factors, memorized, clean, normalize=True)
    torch.testing.assert_close(torch.tensor(larger.ratio), torch.tensor(smaller.ratio))  # norms do not explain it


def test_bands_of_other_shapes():
    factors = diagonal(range(20, 0, -1))
    with pytest.raises(ValueError, match=r"factors are for a weight \[1, 20\], found \[2, 20\]"):
        band_strengths(torch.ones(2, 20), factors, axis(0))
    with pytest.raises(ValueError, match=r"expected activations \[examples, positions, 20\].* found \[1, 20\]"):
        band_strengths(torch.ones(1, 20), factors, axis(0)[:, 0])
    with pytest.raises(ValueError, match=r"basis.*'curvature'.*'svd'"):
        band_strengths(torch.ones(1, 20), factors, axis(0), basis="fourier")


# Detection ---------------------------------------------------------------------------------------------------------


def test_share_in_the_flat_half():
    factors = diagonal(range(20, 0, -1))
    inputs = torch.cat([axis(0), axis(19), axis(3) + 3 * axis(12)])
    torch.testing.assert_close(flat_shares(factors, inputs), torch.tensor([0.0, 1.0, 0.9]).double())
    torch.testing.assert_close(flat_shares(factors.A, inputs), torch.tensor([0.0, 1.0, 0.9]).double())
    torch.testing.assert_close(flat_shares(factors, inputs, flat=0.3), torch.tensor([0.0, 1.0, 0.0]).double())
    two = torch.cat([axis(0, times=2.0), axis(19)], 1)  # energy, not the mean of shares
    torch.testing.assert_close(flat_shares(factors, two), torch.tensor([0.2]).double())
    assert flat_shares(factors, 0 * axis(0)).tolist() == [0.0]
    with pytest.raises(ValueError, match=r"flat=0.01 takes 0 of 20 directions"):
        flat_shares(factors, inputs, flat=0.01)


def test_controls():
    inputs = torch.randn(400, 2, 20, generator=torch.Generator().manual_seed(0))
    shares = random_shares(inputs)
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(shares, random_shares(inputs))
    assert not torch.equal(shares, random_shares(inputs, seed=1))
    torch.testing.assert_close(
        activation_norms(torch.cat([axis(0, times=2.0), axis(1)], 1)), torch.tensor([1.5]).double()
    )


@pytest.mark.parametrize("times", [1.0, 1e6, 1e-9])
def test_area_under_the_curve(times):
    """Against every pair, at any scale: torchmetrics would tie scores outside [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randint(9, (count,), generator=generator).double() for count in (30, 40))
    one = times * (one + 2)
    two = times * two
    pairs = one[:, None] - two
    expected = ((pairs > 0).double() + 0.5 * (pairs == 0)).mean()
    assert auroc(one, two) == pytest.approx(float(expected))
    assert auroc(two, one) == pytest.approx(1 - float(expected))
    assert auroc(torch.ones(3), torch.ones(2)) == 0.5


def test_detection_of_several_scores():
    found = detect(
        {"good": torch.tensor([3.0, 4.0]), "bad": torch.tensor([0.0, 0.0])},
        {"good": torch.tensor([1.0, 2.0]), "bad": torch.tensor([1.0, 1.0])},
    )
    assert found == Detection(
        auroc={"good": 1.0, "bad": 0.0},
        memorized={"good": (3.0, 4.0), "bad": (0.0, 0.0)},
        other={"good": (1.0, 2.0), "bad": (1.0, 1.0)},
    )
    with pytest.raises(ValueError, match=r"same scores are needed for both, found \['a'\] and \['b'\]"):
        detect({"a": torch.ones(1)}, {"b": torch.ones(1)})


# Directions --------------------------------------------------------------------------------------------------------


def test_examples_that_use_a_direction():
    factors = diagonal(range(6, 0, -1))
    inputs = torch.cat(
        [
            axis(5, dim=6) + 0.1 * axis(0, dim=6),
            5 * axis(5, dim=6) + 5 * axis(4, dim=6),
            axis(0, dim=6),
            axis(0, dim=6) + 0.5 * axis(5, dim=6),
        ]
    )
    labels = [True, True, False, False]
    flat = direction_use("fc", factors, inputs, labels, flat=True, count=2, examples=2)
    assert flat.directions == (4, 5)
    assert flat.top[1] == (0, 1)  # shares, not sizes
    assert flat.top[0][0] == 1
    assert flat.precision[1] == 1.0
    assert flat.chance == 0.5
    sharp = direction_use("fc", factors, inputs, labels, flat=False, count=1, examples=2)
    assert sharp.top == ((2, 3),)
    assert sharp.mean_precision == 0.0
    late = torch.cat([axis(0, 0, dim=6), torch.cat([axis(1, dim=6), axis(5, dim=6)])], 1)
    assert direction_use("fc", factors, late, [False, True], flat=True, count=1, examples=1).top == ((1,),)
    with pytest.raises(ValueError, match=r"20 of 4 examples were asked for"):
        direction_use("fc", factors, inputs, labels, flat=True)


# Interplay ---------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self, parallel):
        super().__init__()
        self.one, self.two = (nn.Linear(2, 2, bias=False) for _ in range(2))
        for layer in (self.one, self.two):
            nn.init.eye_(layer.weight)
        self.parallel = parallel

    def forward(self, x):
        return self.one(x) + self.two(x) if self.parallel else self.two(self.one(x))


@pytest.mark.parametrize(("parallel", "excess"), [(True, 0.0), (False, 1.0)])
def test_edits_together_and_alone(parallel, excess):
    """An edit drops the second axis. In parallel each takes its own half; in a row the first takes it all."""
    model = Two(parallel)
    factors = KroneckerFactors({name: diagonal([9.0, 1.0], [1.0, 1.0]) for name in ("one", "two")})
    x = torch.tensor([[1.0, 1.0]])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = interplay(
        model,
        factors,
        CurvatureEditor(0.9),
        {"a": ["one"], "b": ["two"]},
        lambda: {"sum": float(model(x).sum().detach())},
    )
    total = 4.0 if parallel else 2.0
    assert found.before == {"sum": total}
    assert found.alone == {"a": {"sum": total - 1}, "b": {"sum": total - 1}}
    assert found.excess("sum") == excess
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_groups_need_layers_of_their_own():
    model, factors = Two(True), KroneckerFactors({"one": diagonal([9.0, 1.0], [1.0, 1.0])})
    for groups in ({"a": ["one"], "b": ["two"]}, {"a": ["one"], "b": ["one"]}, {"a": ["one"], "b": []}):
        with pytest.raises(ValueError, match="Each group needs layers of its own, with factors"):
            interplay(model, factors, CurvatureEditor(), groups, dict)


# Products of the curvature -----------------------------------------------------------------------------------------


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

    found = gather(make, memorized=[0, 1], clean=[3, 4], population=[2, 3, 4, 5, 6, 0, 1], sizes=(1, 2, 4, 6))
    # With p = 1/2 the sharpest direction of an input a is (1, -1) a^T / |a| / sqrt 2, of curvature |a|^2 / 2.
    for curve in found.memorized:
        torch.testing.assert_close(torch.tensor(curve), 1.125 / torch.tensor([1.0, 2.0, 4.0, 6.0]))
    # Of the others that come first, one is memorized; the last size of clean ones meets another one.
    for curve in found.clean:
        torch.testing.assert_close(torch.tensor(curve), torch.tensor([0.5, 0.25, 3 / 8, 4 / 12]))
    assert found.traces[0][0] == pytest.approx(2.25 * found.traces[1][0])  # estimates, from the same random signs
    assert found.medians()[0][0] == pytest.approx(1.125)
    assert found.crossing == 4
    axes = found.plot().axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "memorized, median of 2",
        "clean, median of 2",
        "crossing: 4",
    ]
    assert tuple(axes.lines[2].get_ydata()) == found.medians()[0]
    assert gather(make, [0], [3], [4, 5, 6], sizes=(1, 2)).crossing is None  # not yet
    assert gather(make, [3], [0], [4, 5, 6], sizes=(1, 2)).crossing is None  # not sharper alone
    for sizes in ((2, 4), (1, 4, 2), (1, 50)):
        with pytest.raises(ValueError, match="Sizes must rise from 1"):
            gather(make, [0], [3], range(7), sizes=sizes)


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
    found = curvature_order(products, "0", factors, scores=("kfac", "ekfac"), count=20)
    for values in (found.ggn, found.hessian, found.predicted["ekfac"]):
        torch.testing.assert_close(torch.tensor(values), torch.tensor(found.predicted["kfac"]), atol=1e-12, rtol=1e-6)
    assert list(found.place) == sorted(found.place)
    panels = found.plot().axes
    assert [axes.get_xlabel() for axes in panels] == ["predicted: kfac", "predicted: ekfac"]
    assert tuple(panels[0].lines[0].get_ydata()) == tuple(map(abs, found.ggn))
    assert found.correlation("kfac") > 0.95  # pairs of equal curvature are ordered by rounding
    assert found.correlation("kfac", "hessian", 0.0, 0.5) == pytest.approx(1.0, abs=0.02)
    assert list(found.by_band("kfac")) == ["all", "0% to 10%", "10% to 25%", "25% to 50%", "50% to 100%"]
    with pytest.raises(ValueError, match=r"Layer '0': factors for \[1, 20\], the weight is \[5, 8\]"):
        curvature_order(products, "0", diagonal(range(20, 0, -1)))
    with pytest.raises(ValueError, match=r"Layer '0' stores its weight as \[d_in, d_out\]"):
        curvature_order(products, "0", dataclasses.replace(factors, transposed=True))


# Pictures ----------------------------------------------------------------------------------------------------------


def test_every_analysis_draws_itself():
    factors, weight = diagonal(range(20, 0, -1)), torch.ones(1, 20)
    comparison = compare_bands("fc", weight, factors, mixture([1, 2, 3, 4]), mixture([4, 3, 2, 1]))
    (axes,) = (axes for axes in draw_bands([comparison]).axes if axes.axison)
    assert axes.lines[0].get_label() == "curvature"
    torch.testing.assert_close(torch.tensor(axes.lines[0].get_ydata()).float(), torch.tensor(comparison.ratio))
    assert len(draw_bands([comparison] * 4).axes) == 1
    found = detect({"share": torch.tensor([3.0, 4.0])}, {"share": torch.tensor([1.0, 2.0])})
    assert found.plot().axes[0].patches[0].get_width() == 1.0
    use = direction_use("fc", factors, torch.cat([axis(0), axis(19)]), [False, True], True, count=2, examples=1)
    assert draw_precision([use]).axes[0].lines[0].get_ydata().tolist() == sorted(use.precision, reverse=True)
    assert use.plot().axes[0].get_title().endswith("fc")
    assert comparison.plot().axes
    together = interplay(
        Two(True),
        KroneckerFactors({"one": diagonal([9.0, 1.0], [1.0, 1.0])}),
        CurvatureEditor(0.9),
        {"a": ["one"]},
        lambda: {"loss": 1.0},
    )
    assert [bar.get_width() for bar in together.plot("loss").axes[0].patches] == [0.0, 0.0, 0.0]


# Labelled examples -------------------------------------------------------------------------------------------------


def test_only_labelled_examples_of_a_classifier_are_ranked():
    model, factors = nn.Linear(20, 3), diagonal(range(20, 0, -1))

    def rank(*tensors):
        return rank_labelled(nn.Sequential(model), DataLoader(TensorDataset(*tensors), 2, shuffle=True), "0", factors)

    rows = rank(torch.cat([axis(0), axis(19), axis(3)]).squeeze(1).float(), torch.tensor([0, 1, 2]))
    assert [row["index"] for row in rows] == [1, 0, 2]
    assert [row["label"] for row in rows] == [1, 0, 2]
    assert [row["score"] for row in rows] == [1.0, 0.0, 0.0]
    x, y = torch.ones(4, 20), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"Examples must be \(inputs, label\), found batches of type list"):
        rank(x)
    with pytest.raises(ValueError, match=r"Labels must be class indices \[n\], found torch.float32 \[4, 1\]"):
        rank(x, torch.ones(4, 1))
    with pytest.raises(
        ValueError, match=r"returned \[4, 2, 3\] for inputs \[4, 2, 20\], expected logits \[4, classes\]"
    ):
        rank(torch.ones(4, 2, 20), y)
    with pytest.raises(ValueError, match="A DataLoader of a dataset with numbered examples is needed, found list"):
        rank_labelled(model, [(x, y)], "0", factors)
    with pytest.raises(ValueError, match="found DataLoader of list, which has none"):
        rank_labelled(model, DataLoader([]), "0", factors)
    with pytest.raises(ValueError, match="Labels 0 to 3 are not among the 3 classes of Sequential"):
        rank(x, torch.tensor([0, 3, 1, 1]))
    pairs = DataLoader([*zip(x, y, strict=True)], 3)
    assert len(rank_labelled(nn.Sequential(model), pairs, "0", factors)) == 4


# Skills under edits ------------------------------------------------------------------------------------------------


def test_what_edits_leave_of_skills():
    layer = nn.Sequential(nn.Linear(4, 1, bias=False))
    nn.init.ones_(layer[0].weight)
    factors = KroneckerFactors({"0": diagonal((8.0, 4.0, 2.0, 1.0))})
    chance = {"sharp": 0.5, "flat": 0.0}

    def measure():
        kept = layer[0].weight[0].detach().round()
        return {
            "sharp": 0.5 + 0.5 * float(kept[0]),
            "flat": 0.8 * float(kept[3]),
            "perplexity": 9.0 - float(kept.sum()),
        }

    before = layer[0].weight.clone()
    found = skill_retention(layer, factors, CurvatureEditor(), [0.5, 1.0, 0.9, 0.8], measure, chance)
    assert torch.equal(layer[0].weight, before)
    assert found.energies == (1.0, 0.9, 0.8, 0.5)
    assert found.perplexity == pytest.approx((1.0, 1.2, 1.4, 1.6))
    assert found.accuracy["sharp"] == pytest.approx((1.0, 1.0, 1.0, 1.0))
    assert found.retained("sharp") == pytest.approx((1.0, 1.0, 1.0, 1.0))
    assert found.retained("flat") == pytest.approx((1.0, 0.0, 0.0, 0.0))


def curves(perplexity, accuracy, chance=0.5):
    return SkillRetention(
        tuple(1 - 0.1 * i for i in range(len(perplexity))), perplexity, {"a": accuracy}, {"a": chance}
    )


def test_retained_share_between_two_edits():
    found = curves((1.0, 1.21, 1.0, 1.5), (0.9, 0.7, 0.9, 0.5))
    assert found.retained("a") == pytest.approx((1.0, 0.5, 1.0, 0.0))
    assert found.at_perplexity(1.1)["a"] == pytest.approx(0.75)  # half way, in logarithms
    assert found.at_perplexity(1.21)["a"] == pytest.approx(0.5)  # the first edit that costs as much
    assert found.at_perplexity(1.5)["a"] == pytest.approx(0.0)
    for multiple in (1.51, 1.0, 0.9):
        with pytest.raises(ValueError, match=f"x 1 to x 1.500, not x {multiple}"):
            found.at_perplexity(multiple)


@pytest.mark.parametrize(
    ("measured", "chance", "says"),
    [
        ({"logic": 0.9, "perplexity": 9.0}, {"lojic": 0.5}, "odd: .'logic', 'lojic'.. Did you mean"),
        ({"logic": 0.9}, {"logic": 0.5}, "odd: .'perplexity'."),
        ({"logic": 0.5, "perplexity": 9.0}, {"logic": 0.5}, "'logic', where a guess has 0.500: it never"),
    ],
)
def test_skills_that_cannot_be_compared(measured, chance, says):
    layer = nn.Sequential(nn.Linear(2, 1))
    factors = KroneckerFactors({"0": diagonal((2.0, 1.0))})
    with pytest.raises(ValueError, match=says):
        skill_retention(layer, factors, CurvatureEditor(), [0.5], lambda: measured, chance)


def test_rank_correlation_without_what_controls_explain():
    generator = torch.Generator().manual_seed(0)
    size, one, two = torch.randn(3, 4000, generator=generator, dtype=torch.float64)
    both = size + 0.3 * one, (size + 0.3 * two).exp()  # a common cause, and no more
    assert rank_correlation(*both) > 0.85
    assert abs(rank_correlation(*both, [size])) < 0.06
    assert rank_correlation(one, -(one**3), [size, two]) == pytest.approx(-1.0, abs=1e-3)
    ties = [1, 1, 2, 3, 3, 3], [5, 4, 4, 9, 7, 7]
    assert rank_correlation(*ties) == pytest.approx(0.8104, abs=1e-4)  # scipy.stats.spearmanr
    for values in (([1, 2, 3], [1, 2]), ([1, 2, 3], [3, 2, 1], [[1, 2, 3]])):
        with pytest.raises(ValueError, match="needs more than"):
            rank_correlation(*values)
