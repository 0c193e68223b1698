"""Logits that the user names."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curvature.collect.collector import Collector
from lightning_curvature.recording.options import CollectorOptions
from tests.support.trunk import Net, exact_gradient_factor, factors, head, tokens


class Segmenter(nn.Module):
    """Logits ``[batch, classes, height, width]``."""

    def __init__(self, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head = nn.Conv2d(2, 6, 1), nn.Conv2d(6, classes, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.fc(x)))


def focal(z, y, dim):
    logp = z.log_softmax(dim).gather(dim, y.unsqueeze(dim))
    return (-((1 - logp.exp()) ** 2) * logp).mean()


def by_hand(z, y, dim):
    """Cross-entropy with the normaliser written out."""
    return (z.logsumexp(dim) - z.gather(dim, y.unsqueeze(dim)).squeeze(dim)).mean()


def softmax_then_log(z, y, dim):
    return -z.softmax(dim).gather(dim, y.unsqueeze(dim)).log().mean()


@pytest.mark.parametrize("loss", [focal, by_hand, softmax_then_log])
def test_the_softmax_tells_the_class_dimension_of_named_logits(loss):
    model, x, y = Segmenter().double(), torch.randn(2, 2, 5, 4).double(), torch.randint(0, 3, (2, 5, 4))
    expected = exact_gradient_factor(model, x, [lambda pre: model.head(torch.tanh(pre)).movedim(1, -1).reshape(-1, 3)])
    for options in ({}, {"class_dim": 1}, {"class_dim": -3}):
        torch.testing.assert_close(factors(model, lambda: loss(model(x), y, 1), logits="head", **options).G, expected)
    flat = lambda z: z.movedim(1, -1).flatten(0, 2)  # noqa: E731
    torch.testing.assert_close(factors(model, lambda: loss(flat(model(x)), y.flatten(), 1), logits="head").G, expected)


@pytest.mark.parametrize("loss", [focal, by_hand, softmax_then_log])
@pytest.mark.parametrize("length", [4, 7])
def test_named_logits_of_a_sequence_have_their_classes_last(loss, length):
    model, (x, _) = Net().double(), tokens(length=length)  # as many positions as classes, or more
    y = torch.randint(0, 4, (3, length))
    expected = exact_gradient_factor(model, x, [head(model)])
    torch.testing.assert_close(factors(model, lambda: loss(model(x), y, -1), logits="head").G, expected)
    flat = factors(model, lambda: loss(model(x).flatten(0, 1), y.flatten(), -1), logits="head")
    torch.testing.assert_close(flat.G, expected)
    shifted = factors(model, lambda: loss(model(x)[:, :-1], y[:, 1:], -1), logits="head", positions="all")
    assert shifted.num_inputs == 3 * length


class Hidden(torch.autograd.Function):
    """A loss that torch does not see into."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.logsumexp(-1).mean()

    @staticmethod
    def backward(ctx, gradient):
        (z,) = ctx.saved_tensors
        return gradient * z.softmax(-1) / (z.numel() // z.shape[-1])


def test_a_class_dimension_that_cannot_be_told_is_asked_for():
    model, (x, _) = Net().double(), tokens()
    with pytest.raises(RuntimeError, match=r"returned \[3, 4, 4\], and which dimension holds the classes .*class_dim="):
        factors(model, lambda: Hidden.apply(model(x)), logits="head")
    expected = exact_gradient_factor(model, x, [head(model)])
    torch.testing.assert_close(factors(model, lambda: Hidden.apply(model(x)), logits="head", class_dim=-1).G, expected)
    flat = factors(model, lambda: Hidden.apply(model(x).flatten(0, 1)), logits="forward", class_dim=2)
    torch.testing.assert_close(flat.G, expected)
    with pytest.raises(RuntimeError, match=r"class_dim=3: logits='head' returned \[3, 4, 4\], without that dimension"):
        factors(model, lambda: Hidden.apply(model(x)), logits="head", class_dim=3)


@pytest.mark.parametrize("kind", ["exact", "sketched", "sampled"])
@pytest.mark.parametrize(
    ("out", "loss", "message"),
    [
        (4, lambda z: F.l1_loss(z, torch.zeros_like(z)), "goes into 'l1_loss'"),
        (4, lambda z: F.binary_cross_entropy(z.sigmoid(), torch.ones_like(z)), "goes into 'binary_cross_entropy'"),
        (4, lambda z: (z - 1).square().mean(), "goes into no softmax on its way"),
        (4, lambda z: -F.logsigmoid(z).mean(), "goes into no softmax on its way"),
        (4, lambda z: F.multi_margin_loss(z.flatten(0, 1), torch.zeros(12).long()), "goes into 'multi_margin_loss'"),
        (1, lambda z: z.log_softmax(-1).mean(), "one class only, whose softmax is always 1"),
    ],
)
def test_named_logits_of_losses_of_unknown_curvature_are_refused(kind, out, loss, message):
    model, (x, _) = Net(out=out).double(), tokens()
    with pytest.raises(RuntimeError, match=message):
        factors(model, lambda: loss(model(x)), logits="head", class_dim=-1, fisher=kind)


def test_named_logits_select_the_loss_that_is_seen():
    """What is known of the loss (its shift, ignored labels, a cast) counts also where the user named the logits."""
    model, (x, y) = Net(), tokens()
    labels = y.masked_fill(torch.arange(4) == 2, -100)

    def step():
        return F.cross_entropy(model(x.float())[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten())

    plain, named = factors(model, step), factors(model, step, logits="head")
    assert named.num_inputs == plain.num_inputs == 6
    torch.testing.assert_close(named.A, plain.A)
    torch.testing.assert_close(named.G, plain.G)


@pytest.mark.parametrize("loss", [F.cross_entropy, lambda z, y: by_hand(z, y, -1)])
def test_what_goes_through_more_than_views_is_no_logits(loss):
    """A temperature after the head: its output is not what goes into the softmax."""
    model, (x, y) = Net().double(), tokens()
    model.cool = nn.Identity()
    step = lambda: loss(model.cool(model(x) / 3).flatten(0, 1), y.flatten())  # noqa: E731
    expected = exact_gradient_factor(model, x, [lambda pre: model.head(torch.tanh(pre)).flatten(0, 1) / 3])
    torch.testing.assert_close(factors(model, step, logits="cool").G, expected)
    if loss is F.cross_entropy:  # which says itself what its logits are
        torch.testing.assert_close(factors(model, step, logits="head").G, expected)
    else:
        with pytest.raises(RuntimeError, match=r"more than views \(.*[Dd]iv.*\), so it returns no logits"):
            factors(model, step, logits="head")


def test_a_class_dimension_that_the_softmax_contradicts():
    model, x, y = Segmenter().double(), torch.randn(2, 2, 5, 4).double(), torch.randint(0, 3, (2, 5, 4))
    with pytest.raises(RuntimeError, match=r"class_dim=-1: .* the softmax of the loss has \[3\] classes, in another"):
        factors(model, lambda: focal(model(x), y, 1), logits="head", class_dim=-1)


def test_logits_that_are_changed_in_place_after_the_loss():
    model, (x, y) = Net().double(), tokens()

    def step(copy):
        z = model(x).flatten(0, 1)
        loss = F.cross_entropy(z, y.flatten())
        (z.detach().clone() if copy else z.detach()).mul_(2)
        return loss

    factors(model, lambda: step(True))
    with pytest.raises(RuntimeError, match="changed in place after the loss read them"):
        factors(model, lambda: step(False))


def test_every_way_of_taking_positions_hands_logits_on():
    model, (x, y) = Net().double(), tokens()
    expected = exact_gradient_factor(model, x, [head(model)])
    ways = {
        "slice": lambda z: (z[:, :1], z[:, 1:]),
        "split": lambda z: z.split([1, 3], 1),
        "chunk": lambda z: z.chunk(2, 1),
        "unsafe_split": lambda z: z.unsafe_split(2, 1),
        "tensor_split": lambda z: z.tensor_split(3, 1),
        "narrow": lambda z: (z.narrow(1, 0, 1), z.narrow(1, 1, 3)),
        "unbind": lambda z: z.unbind(1),
        "select": lambda z: [z.select(1, t) for t in range(4)],
        "index": lambda z: (z[:, torch.tensor([0, 2])], z[:, torch.tensor([1, 3])]),
        "index_select": lambda z: [z.index_select(1, torch.tensor(t)) for t in ([0, 2], [1, 3])],
        "mask": lambda z: (z[y > 1], z[y <= 1]),
        "transpose": lambda z: z.transpose(0, 1).contiguous().unflatten(0, (2, 2)).squeeze(0),
        "swapaxes": lambda z: z.swapaxes(0, 1).split(2),
        "reshape": lambda z: z.flatten(0, 1).unsqueeze(1).reshape(2, 6, 4),
        "double": lambda z: (z[:1].float(), z[1:].clone()),
    }
    for name, way in ways.items():
        parts = lambda way=way: [part.reshape(-1, 4) for part in way(model(x))]  # noqa: E731
        step = lambda parts=parts: sum(F.cross_entropy(z, torch.zeros(len(z)).long()) for z in parts())  # noqa: E731
        layer = factors(model, step)
        assert layer.num_inputs == 12, name
        torch.testing.assert_close(layer.G, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_views_that_overlap_are_refused():
    model, (x, y) = Net().double(), tokens()

    def step(first, second):
        z = model(x)
        return sum(F.cross_entropy(z[:, part].flatten(0, 1), y[:, part].flatten()) for part in (first, second))

    apart = factors(model, lambda: step(slice(0, 1), slice(1, 4)))
    torch.testing.assert_close(apart.G, exact_gradient_factor(model, x, [head(model)]))
    for first, second in ((slice(0, 2), slice(1, 3)), (torch.tensor([0, 1]), torch.tensor([1, 2]))):
        with pytest.raises(RuntimeError, match="read the same outputs in different ways"):
            factors(model, lambda first=first, second=second: step(first, second))
    once, twice = (factors(model, lambda n=n: step(torch.tensor([0, 1]), torch.tensor(n))) for n in ([2], [0, 1]))
    assert (once.num_inputs, twice.num_inputs) == (9, 6)  # the latter are mixed labels, of copies


def test_named_logits_that_do_not_reach_the_loss():
    model, (x, y) = Net().double(), tokens()
    model.other = nn.Linear(5, 4).double()
    with pytest.raises(RuntimeError, match="logits='other': nothing that it returned reaches the training loss"):
        factors(
            model,
            lambda: F.cross_entropy((model(x) + 0 * model.other(x).detach()).flatten(0, 1), y.flatten()),
            logits="other",
        )


def test_class_dim_needs_named_logits():
    with pytest.raises(ValueError, match=r"class_dim says which dimension of named logits .* logits='...'"):
        Collector(Net(), CollectorOptions(layers=["fc"], class_dim=1))
    with pytest.raises(TypeError, match="class_dim must be an integer or None, found 'last'"):
        Collector(Net(), CollectorOptions(layers=["fc"], logits="head", class_dim="last"))
    with pytest.raises(ValueError, match="logits='heads' is neither a submodule nor a method"):
        Collector(Net(), CollectorOptions(layers=["fc"], logits="heads"))
