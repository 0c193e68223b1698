"""Losses that are sums over single outputs: binary cross-entropy and squared error, against autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from lightning_curvature.collect.passes import collect

OUTPUTS = 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, OUTPUTS)).double()


def data(n=6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, dtype=torch.float64, generator=generator)
    return x, torch.rand(n, OUTPUTS, generator=generator).round().double()


def gather(model, loss, **options):
    return collect(model, [None], lambda _: loss(), layers=["0"], positions="all", **options)["0"]


def gauss_newton(model, x, kind, counts=None):
    """Mean over examples of ``J^T H J`` with respect to what the first layer returns."""
    counts = torch.ones(len(x), OUTPUTS) if counts is None else counts
    total = torch.zeros(4, 4, dtype=torch.float64)
    for example, counted in zip(x, counts, strict=True):
        hidden = model[0](example).detach()
        jacobian = torch.autograd.functional.jacobian(model[1:], hidden)
        p = model(example).detach().sigmoid()
        h = p * (1 - p) if kind == "binary" else torch.ones(OUTPUTS).double()
        total += jacobian.T @ torch.diag(h * counted) @ jacobian
    return total / len(x)


LOSSES = {
    "binary": F.binary_cross_entropy_with_logits,
    "squared": F.mse_loss,
    "focal": lambda z, y: sigmoid_focal_loss(z, y, reduction="mean"),
    "module": lambda z, y: nn.BCEWithLogitsLoss(reduction="sum")(z, y),
    "prediction last": lambda z, y: F.mse_loss(y, z, reduction="sum"),
    "one by one": lambda z, y: F.mse_loss(z, y, reduction="none").sum(1).mean(),
}
SQUARED = ("squared", "prediction last", "one by one")


@pytest.mark.parametrize("name", LOSSES)
def test_the_exact_factor_is_the_gauss_newton_matrix(name):
    model, (x, y) = network(), data()
    factors = gather(model, lambda: LOSSES[name](model(x), y), fisher="exact")
    torch.testing.assert_close(factors.G, gauss_newton(model, x, "squared" if name in SQUARED else "binary"))
    assert (factors.num_gradients, factors.num_losses) == (6, 6)


@pytest.mark.parametrize("kind", ["sketched", "sampled"])
@pytest.mark.parametrize("name", ["binary", "squared"])
def test_random_kinds_have_its_second_moment(name, kind):
    model, (x, y) = network(), data()
    expected = gauss_newton(model, x, name)
    factors = gather(model, lambda: LOSSES[name](model(x), y), fisher=kind, draws=4000)
    assert (factors.G - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["binary", "squared", "module", "prediction last", "one by one"])
def test_the_empirical_factor_is_that_of_the_summed_likelihood(name):
    """Whatever the reduction and a factor of the training, it is that of the plain sum; of half the squares."""
    model, (x, y) = network(), data()
    hidden = model[0](x).detach().requires_grad_()
    z = model[1:](hidden)
    plain = (
        0.5 * F.mse_loss(z, y, reduction="sum")
        if name in SQUARED
        else F.binary_cross_entropy_with_logits(z, y, reduction="sum")
    )
    (g,) = torch.autograd.grad(plain, hidden)

    factors = gather(model, lambda: 0.25 * LOSSES[name](model(x), y), fisher="empirical")
    torch.testing.assert_close(factors.G, g.T @ g / len(x))


def test_outputs_of_weight_zero_do_not_count():
    """Whether the loss has the weights, or the training multiplies by a mask afterwards."""
    model, (x, y) = network(), data()
    mask = torch.ones(6, OUTPUTS).double()
    mask[0], mask[1, :2], mask[3, 1] = 0, 0, 0
    expected = gauss_newton(model, x, "binary", mask)
    bce = F.binary_cross_entropy_with_logits
    losses = [
        lambda: bce(model(x), y, weight=mask),
        lambda: (bce(model(x), y, reduction="none") * mask).sum() / mask.sum(),
    ]
    for loss in losses:
        factors = gather(model, loss, fisher="exact")
        torch.testing.assert_close(factors.G, expected)
        assert factors.num_losses == 5
    weighed = gather(model, lambda: bce(model(x), y, pos_weight=torch.tensor([0.0, 1, 1])), fisher="exact")
    torch.testing.assert_close(weighed.G, gauss_newton(model, x, "binary", 1 - y * torch.tensor([1.0, 0, 0])))


def test_one_output_for_each_example():
    """A vector of predictions: each is a position."""
    model, (x, y) = network(), data()
    flat = gather(model, lambda: F.mse_loss(model(x)[:, 0], y[:, 0]), fisher="exact")
    torch.testing.assert_close(flat.G, gauss_newton(model, x, "squared", torch.tensor([1.0, 0, 0]).repeat(6, 1)))
    assert flat.num_losses == 6


def test_outputs_of_an_image_belong_to_its_pixels():
    model, x = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Tanh(), nn.Conv2d(2, 3, 1)), torch.randn(4, 1, 5, 5)
    loss = lambda: F.binary_cross_entropy_with_logits(model(x), torch.ones(4, 3, 5, 5))  # noqa: E731
    factors = gather(model, loss, fisher="exact")
    assert (factors.num_gradients, factors.num_losses) == (100, 100)


def test_a_softmax_loss_beside_is_the_one_that_counts():
    """A squared error of features, or of logits to those of a teacher, is one more term of the training."""
    model, (x, y) = network(), data()
    cross_entropy = lambda: F.cross_entropy(model(x), y.argmax(1))  # noqa: E731
    both = gather(model, lambda: cross_entropy() + F.mse_loss(model(x), y), fisher="exact")
    torch.testing.assert_close(both.G, gather(model, cross_entropy, fisher="exact").G)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("other", [lambda model, x, y: model(x.flip(0)), lambda model, x, y: y[:, :1]])
def test_what_cannot_be_told_is_refused_by_name(other):
    model, (x, y) = network(), data()
    with pytest.raises(RuntimeError, match=r"No loss whose curvature is known reaches .* It computes 'mse_loss'"):
        gather(model, lambda: F.mse_loss(model(x), other(model, x, y)))


def test_named_logits_of_a_loss_that_is_seen():
    model, (x, y) = network(), data()
    expected = gauss_newton(model, x, "squared")
    named = gather(model, lambda: F.mse_loss(model(x), y), fisher="exact", logits="2")
    torch.testing.assert_close(named.G, expected)

    def by_hand():
        z = model(x)
        return -(z.log_softmax(1) * y).sum() + F.mse_loss(z, y)

    softmax = gather(model, by_hand, fisher="exact", logits="2")
    plain = gather(model, lambda: F.cross_entropy(model(x), y.argmax(1)), fisher="exact")
    torch.testing.assert_close(softmax.G, plain.G)
