"""Factors against per-sample autograd, for every layer kind and every kind of Fisher."""

import curvlinops
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.passes import collect
from lightning_curvature.recording import fisher
from lightning_curvature.recording.options import CollectorOptions
from tests import reference
from tests.support import models


class Tokens(nn.Module):
    """A sequence model: linear layers over positions, mixed by attention; one loss position per token."""

    def __init__(self, layer=nn.Linear):
        super().__init__()
        self.fc1 = Conv1D(6, 5) if layer is Conv1D else nn.Linear(5, 6)
        self.fc2 = Conv1D(4, 6) if layer is Conv1D else nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.fc1(x)
        x = x + F.scaled_dot_product_attention(x, x, x)
        return self.head(torch.tanh(self.fc2(x)))


def small_cnn():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 2, 2, dilation=2),
        nn.Flatten(),
        nn.Linear(8, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    )


CASES = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)),
        (5,),
        "2",
    ),
    "conv2d": (small_cnn, (1, 8, 8), "0"),
    "dilated conv2d": (small_cnn, (1, 8, 8), "2"),
    "linear in a cnn": (small_cnn, (1, 8, 8), "4"),
    "linear over tokens": (Tokens, (4, 5), "fc1"),
    "Conv1D over tokens": (lambda: Tokens(Conv1D), (4, 5), "fc1"),
}


def build(case, n=6):
    torch.manual_seed(0)
    make, shape, layer = CASES[case]
    model = make().double()
    x = torch.randn(n, *shape, dtype=torch.float64)
    logits = model(x)
    return model, x, torch.randint(3, logits.shape[:-1]), layer


def run(model, x, y, layer, **options):
    def step(batch):
        logits = model(batch[0])
        return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())

    options = {"layers": [layer], "positions": "all"} | options
    return collect(model, list(zip(x.split(4), y.split(4), strict=True)), step, **options)[layer]


def check(factors, model, x, layer, vectors, positions="all"):
    A, G, count = reference.factors(model, model.get_submodule(layer), x, vectors, positions)
    assert factors.num_inputs == factors.num_gradients == count
    torch.testing.assert_close(factors.A, A, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(factors.G, G, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_exact_factors(case):
    model, x, y, layer = build(case)
    check(run(model, x, y, layer, fisher="exact"), model, x, layer, reference.exact_vectors)


@pytest.mark.parametrize("case", CASES)
def test_empirical_factors(case):
    model, x, y, layer = build(case)
    check(run(model, x, y, layer, fisher="empirical"), model, x, layer, reference.label_vectors(y))


@pytest.mark.parametrize("kind", ["sketched", "sampled"])
@pytest.mark.parametrize("case", CASES)
def test_random_factors_with_given_draws(case, kind, monkeypatch):
    """The draws are recorded where they leave, and given to the reference."""
    model, x, y, layer = build(case)
    seeds, original = [], fisher.backpropagate

    def recorded(loss, v, calls):
        seeds.append(v)
        return original(loss, v, calls)

    monkeypatch.setattr(fisher, "backpropagate", recorded)
    factors = run(model, x, y, layer, fisher=kind, draws=3)
    monkeypatch.undo()
    positions = y[0].numel()
    draws = [torch.cat([seeds[batch * 3 + draw] for batch in range(2)]).view(len(x), positions, 3) for draw in range(3)]

    def vectors(logits, index):
        for draw in draws:
            yield draw[index].view_as(logits) / 3**0.5

    check(factors, model, x, layer, vectors)
    p = model(x).detach().softmax(-1).view(len(x), positions, 3)
    for draw in draws:
        torch.testing.assert_close(draw.sum(-1), torch.zeros(len(x), positions, dtype=torch.float64))
        if kind == "sampled":
            assert torch.equal((p - draw).round(decimals=9).sum(-1), torch.ones(len(x), positions).double())


@pytest.mark.parametrize("kind", ["sketched", "sampled"])
def test_random_kinds_have_the_exact_second_moment(kind):
    """Over many draws the mean of v v^T is diag(p) - p p^T, within five standard errors."""
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 0.0, -1.0], [9.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    loss = fisher.OutputLoss(logits, 1, torch.ones(2, dtype=torch.bool))
    p = logits.detach().softmax(-1)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(list(fisher.fisher_vectors(kind, loss, [], 20_000, generator)))
    products = torch.einsum("sni,snj->snij", draws, draws)
    exact = torch.diag_embed(p) - torch.einsum("ni,nj->nij", p, p)
    error = (products.mean(0) - exact).abs()
    assert (error <= 5 * products.std(0) / 20_000**0.5 + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signs_are_tossed_for_each_entry(dtype):
    """Over 2000 draws of 3 x 50 entries, which take five random numbers, no two entries have to do with each other."""
    s = torch.rand(50, 3, dtype=dtype, generator=torch.Generator().manual_seed(1)).T + 0.1
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([fisher.with_random_signs(s, generator) for _ in range(2000)])
    assert torch.equal(draws.abs(), s.expand(2000, -1, -1))
    signs = draws.sign().flatten(1).double()
    products = signs.T @ signs / 2000
    torch.testing.assert_close(products, torch.eye(150, dtype=torch.float64), rtol=0, atol=5.5 / 2000**0.5)
    assert signs.mean(0).abs().max() < 5 / 2000**0.5


@pytest.mark.parametrize("draw", [fisher.draw_by_race, fisher.draw_by_sums])
@pytest.mark.parametrize("strided", [False, True])
def test_labels_are_drawn_from_the_softmax(draw, strided):
    """On a GPU by a race, elsewhere by sums; a class of probability 0 is never drawn, and any where nothing counts."""
    p = torch.tensor([0.0, 0.5, 0.0, 0.375, 0.125, 0.0]).expand(4, 5000, -1).clone()
    p[:, 0] = 0.0
    p = p.movedim(-1, 1).contiguous().movedim(1, -1) if strided else p
    labels = draw(p, torch.Generator().manual_seed(0))
    assert labels.shape == (4, 5000, 1)
    shares = torch.bincount(labels[:, 1:].flatten(), minlength=6) / labels[:, 1:].numel()
    torch.testing.assert_close(shares, p[0, 1], rtol=0, atol=0.02)
    assert torch.equal(shares == 0, p[0, 1] == 0)
    assert ((labels >= 0) & (labels < 6)).all()


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_no_random_number_draws_a_class_of_probability_0(monkeypatch, number):
    monkeypatch.setattr(torch, "rand", lambda shape, dtype, **_: torch.full(shape, number, dtype=dtype))
    totals = torch.cat([torch.linspace(0.5, 2.0, 10_001), 1 + torch.arange(-8, 9) * 2**-24])
    p = torch.stack([0 * totals, totals, 0 * totals], -1)
    assert torch.equal(fisher.draw_by_sums(p, torch.Generator()), torch.ones(len(p), 1, dtype=torch.int64))


def test_sketch_is_the_better_estimator_on_a_saturated_model():
    """The reason for the default: at one backward pass, the error of G is a fraction of that of a sampled label."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5))
    x, y = torch.randn(300, 6), torch.randint(5, (300,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(1200):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    saturation = model(x).softmax(-1).max(-1).values.median()
    assert saturation > 0.99

    def gradient_factor(**options):
        step = lambda batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
        return collect(model, [(x, y)], step, layers=["2"], **options)["2"].G

    exact = gradient_factor(fisher="exact")
    errors = {
        kind: torch.stack(
            [(gradient_factor(fisher=kind, seed=s) - exact).norm() / exact.norm() for s in range(20)]
        ).mean()
        for kind in ("sketched", "sampled")
    }
    assert errors["sketched"] < 0.6 * errors["sampled"]


def test_empirical_agrees_with_curvlinops():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)
    ).double()
    x, y = torch.randn(16, 5, dtype=torch.float64), torch.randint(3, (16,))
    ours = {layer: run(model, x, y, layer, fisher="empirical") for layer in ("0", "2", "4")}
    theirs = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(reduction="sum"),
        list(model.parameters()),
        [(x, y)],
        fisher_type="empirical",
        kfac_approx="expand",
        check_deterministic=False,
    )
    dense = theirs @ torch.eye(theirs.shape[1], dtype=torch.float64)
    start = 0
    for name, layer in ours.items():
        size = layer.shape[0] * layer.shape[1]
        block = dense[start : start + size, start : start + size]
        torch.testing.assert_close(torch.kron(layer.G, layer.A) * len(x), block, rtol=1e-6, atol=1e-12)
        start += size
        assert name


@pytest.mark.parametrize("fisher_kind", ["sketched", "exact", "empirical"])
def test_flattened_tokens_are_not_taken_for_independent_examples(fisher_kind):
    """The layers see [batch * tokens, d] here, and tokens see each other."""

    class Flattened(Tokens):
        def forward(self, x):
            b, t, d = x.shape
            h = self.fc1(x.reshape(b * t, d)).view(b, t, -1)
            h = h + F.scaled_dot_product_attention(h, h, h)
            return self.head(torch.tanh(self.fc2(h.view(b * t, -1)))).view(b, t, -1)

    torch.manual_seed(0)
    model = Flattened().double()
    x, y = torch.randn(3, 4, 5, dtype=torch.float64), torch.randint(3, (3, 4))
    factors = run(model, x, y, "fc1", fisher=fisher_kind)
    if fisher_kind == "exact":
        check(factors, model, x, "fc1", reference.exact_vectors)
    if fisher_kind == "empirical":
        check(factors, model, x, "fc1", reference.label_vectors(y))
    assert factors.num_inputs == 12


def test_exact_is_refused_above_its_limit(monkeypatch):
    model, x, y, layer = build("linear over tokens")
    monkeypatch.setattr(fisher, "EXACT_LIMIT", 11)
    with pytest.raises(RuntimeError, match="needs 12 backward passes for this batch, the limit is 11"):
        run(model, x, y, layer, fisher="exact")


def test_half_precision_gradients_do_not_vanish():
    """Gradients below the smallest float16 are kept by the scaled pass, and the scale leaves no trace."""

    class Half(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False).to(dtype)
            self.head = nn.Linear(4, 3, bias=False).to(dtype)
            with torch.no_grad():
                self.head.weight.mul_(1e-6 if dtype == torch.float64 else 1.0)
            self.dtype = dtype

        def forward(self, x):
            h = self.fc(x.to(self.dtype))
            return self.head(h) if self.dtype == torch.float64 else self.head(h) * 1e-6

    torch.manual_seed(0)
    half, full = Half(torch.float16), Half(torch.float64)
    with torch.no_grad():
        full.fc.weight.copy_(half.fc.weight)
        full.head.weight.copy_(half.head.weight.double() * 1e-6)
    x, y = torch.randn(8, 4, dtype=torch.float64).half().double(), torch.randint(3, (8,))

    def factors(model):
        step = lambda batch: F.cross_entropy(model(batch[0]).float(), batch[1])  # noqa: E731
        return collect(model, [(x, y)], step, layers=["fc"], fisher="exact")["fc"]

    in_half, expected = factors(half), factors(full)
    assert in_half.num_inputs == 8
    torch.testing.assert_close(in_half.G.double(), expected.G.double(), rtol=0.05, atol=1e-16)


def test_wrong_kind_is_an_error():
    with pytest.raises(
        ValueError, match=r"fisher must be one of \['sketched'.*found 'sketch'.*Did you mean 'sketched'"
    ):
        Collector(models.mlp(), CollectorOptions(layers="mlp", fisher="sketch"))
