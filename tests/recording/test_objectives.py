"""Which losses of a step count, against the definition: the Fisher of independent softmax outputs is their sum."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.passes import collect
from lightning_curvature.recording.objectives import NothingToCollectError


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


# One head in parts ---------------------------------------------------------------------------------------------------


def in_chunks(model, x, y, reduction="mean"):
    h = torch.tanh(model.fc(x))
    losses = [
        F.cross_entropy(model.head(hc).flatten(0, 1), yc.flatten(), reduction=reduction)
        for hc, yc in zip(h.split(2, 1), y.split(2, 1), strict=True)
    ]
    return sum(losses) / len(losses)


def over_time(model, x, y):
    """A loop over positions that calls the whole network at each."""
    return sum(F.cross_entropy(model(x[:, t]), y[:, t]) for t in range(x.shape[1]))


def in_two_forward_passes(model, x, y):
    """Labelled and unlabelled examples, the latter with labels of the model's own."""
    guess = model(x[1:]).detach().argmax(-1)
    sure = F.cross_entropy(model(x[1:]).flatten(0, 1), guess.flatten(), reduction="none").mean()
    return F.cross_entropy(model(x[:1]).flatten(0, 1), y[:1].flatten()) + 0.5 * sure


@pytest.mark.parametrize("loss", [in_chunks, over_time, in_two_forward_passes])
@pytest.mark.parametrize("named", [None, "head"])
@pytest.mark.parametrize("kind", ["exact", "sketched"])
def test_losses_of_one_head_on_disjoint_positions_are_one_loss(loss, named, kind):
    model, (x, y) = Net().double(), tokens()
    found = factors(model, lambda: loss(model, x, y), logits=named, fisher=kind, draws=1 if kind == "exact" else 500)
    expected = exact_gradient_factor(model, x, [head(model)])
    assert found.num_inputs == found.num_gradients == 12
    a = x.reshape(-1, 5)
    torch.testing.assert_close(found.A, a.T @ a / 12)
    assert (found.G - expected).norm() < (1e-9 if kind == "exact" else 0.25) * expected.norm()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_empirical_in_chunks_is_empirical_as_a_whole(reduction):
    model, (x, y) = Net().double(), tokens()
    found = factors(model, lambda: in_chunks(model, x, y, reduction), fisher="empirical")
    whole = factors(model, lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten()), fisher="empirical")
    torch.testing.assert_close(found.G, whole.G)


def test_empirical_refuses_chunks_of_different_weight():
    model, (x, y) = Net().double(), tokens()

    def step():
        h = torch.tanh(model.fc(x))
        parts = (h[:, :1], y[:, :1]), (h[:, 1:], y[:, 1:])  # each a mean, over one and over three positions
        return sum(F.cross_entropy(model.head(hc).flatten(0, 1), yc.flatten()) for hc, yc in parts)

    with pytest.raises(RuntimeError, match="weighs its loss positions differently"):
        factors(model, step, fisher="empirical")


@pytest.mark.parametrize("cast", [torch.Tensor.double, lambda z: z])
def test_mixed_labels_are_one_softmax(cast):
    model, (x, y) = Net(), tokens()
    labels = y.flatten()

    def step(weights):
        z = model(x.float()).flatten(0, 1)
        return sum(w * F.cross_entropy(cast(z), labels.roll(i)) for i, w in enumerate(weights))

    for kind in ("exact", "sketched"):
        mixed, plain = (factors(model, lambda w=w: step(w), fisher=kind) for w in ((0.3, 0.7), (1.0,)))
        torch.testing.assert_close(mixed.G, plain.G)
        assert mixed.num_inputs == plain.num_inputs
    soft = factors(model, lambda: step((0.5, 0.5)), fisher="empirical")
    hot = (F.one_hot(labels, 4) + F.one_hot(labels.roll(1), 4)) / 2
    hard = factors(model, lambda: F.cross_entropy(model(x.float()).flatten(0, 1), hot.float()), fisher="empirical")
    torch.testing.assert_close(soft.G, hard.G)


def test_two_softmaxes_of_the_same_outputs_are_refused():
    model, (x, y) = Net().double(), tokens()
    labels = y.flatten()
    for other in (lambda z: z[:, :2], lambda z: z[:9], torch.t):
        with pytest.raises(RuntimeError, match="2 softmax losses read the same outputs in different ways"):
            factors(
                model,
                lambda other=other: (
                    F.cross_entropy(z := model(x).flatten(0, 1), labels)
                    + F.cross_entropy(other(z), labels[: len(other(z))] % 2)
                ),
            )
    warm = lambda z: F.cross_entropy(z / 2, labels) + F.cross_entropy(z / 4, labels)  # noqa: E731
    with pytest.raises(RuntimeError, match="2 softmax losses"):
        factors(model, lambda: warm(model(x).flatten(0, 1)))


def test_start_and_end_positions():
    """Extractive question answering: two softmaxes over the positions, of one head with two outputs."""
    model, (x, _) = Net(out=2).double(), tokens()
    start, end = torch.tensor([0, 1, 3]), torch.tensor([1, 2, 3])

    def step():
        z = model(x)
        first, last = (part.squeeze(-1) for part in z.split(1, dim=-1))
        return (F.cross_entropy(first, start) + F.cross_entropy(last, end)) / 2

    logits = lambda pre: model.head(torch.tanh(pre))  # noqa: E731
    expected = exact_gradient_factor(model, x, [lambda pre: logits(pre)[..., 0], lambda pre: logits(pre)[..., 1]])
    torch.testing.assert_close(factors(model, step).G, expected)
    torch.testing.assert_close(factors(model, step, logits="head").G, expected)


def test_losses_of_different_outputs_are_refused():
    model, (x, y) = Net().double(), tokens()
    second = nn.Linear(6, 4).double()

    def step(other):
        h = torch.tanh(model.fc(x))
        return F.cross_entropy(model.head(h).flatten(0, 1), y.flatten()) + F.cross_entropy(other(h), y.flatten())

    for other in (lambda h: second(h).flatten(0, 1), lambda h: 2 * model.head(h).flatten(0, 1)):
        with pytest.raises(RuntimeError, match=r"2 softmax losses reach the training loss .* logits='...'"):
            factors(model, lambda other=other: step(other))
    # The advice works: the named output counts.
    model.second = second
    expected = exact_gradient_factor(model, x, [head(model)])
    torch.testing.assert_close(
        factors(model, lambda: step(lambda h: second(h).flatten(0, 1)), logits="head").G, expected
    )


# Several backward passes ---------------------------------------------------------------------------------------------


def run(model, work, **options):
    """Collect from one step that runs its own backward passes."""
    collector = Collector(model, **({"layers": ["fc"], "fisher": "exact"} | options))
    collector.open()
    try:
        work()
        collector.close()
    finally:
        collector.abort()
    return collector


@pytest.mark.parametrize("kind", ["exact", "empirical", "sketched"])
def test_chunks_that_are_backpropagated_one_by_one(kind):
    model, (x, y) = Net().double(), tokens()

    def work():
        for xc, yc in zip(x.split(2, 1), y.split(2, 1), strict=True):
            F.cross_entropy(model(xc).flatten(0, 1), yc.flatten()).backward()

    options = {"fisher": kind, "draws": 500 if kind == "sketched" else 1}
    found = run(model, work, **options).factors()["fc"]
    whole = factors(model, lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten()), **options)
    assert found.num_inputs == 12
    torch.testing.assert_close(found.A, whole.A)
    assert (found.G - whole.G).norm() < (0.25 if kind == "sketched" else 1e-9) * whole.G.norm()


@pytest.mark.parametrize("kind", ["exact", "empirical", "sketched"])
@pytest.mark.parametrize("parts", ["whole", "chunks"])
@pytest.mark.parametrize("layers", [["fc"], "mlp"])
def test_a_detached_trunk_whose_gradient_is_handed_on(kind, parts, layers):
    """Each chunk of the head is backpropagated to a detached copy of the activation, and its gradient to the trunk."""
    model, (x, y) = Net().double(), tokens()

    def work():
        h = torch.tanh(model.fc(x))
        if parts == "whole":
            copies = [h.detach().requires_grad_(True)]
            chunks = list(zip(copies[0].split(2, 1), y.split(2, 1), strict=True))
        else:
            copies = [hc.detach().requires_grad_(True) for hc in h.split(2, 1)]
            chunks = list(zip(copies, y.split(2, 1), strict=True))
        for hc, yc in chunks:
            F.cross_entropy(model.head(hc).flatten(0, 1), yc.flatten(), reduction="sum").backward()
        h.backward(torch.cat([copy.grad for copy in copies], 1))

    options = {"fisher": kind, "draws": 500 if kind == "sketched" else 1, "layers": layers}
    found = run(model, work, **options).factors()
    assert list(found) == ["fc"]
    assert found["fc"].num_inputs == 12
    expected = exact_gradient_factor(model, x, [head(model)])
    if kind == "empirical":
        plain = lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten())  # noqa: E731
        expected = factors(model, plain, fisher=kind).G
    assert (found["fc"].G - expected).norm() < (0.25 if kind == "sketched" else 1e-9) * expected.norm()


def test_a_detached_trunk_that_gets_no_gradient_is_told():
    model, (x, y) = Net().double(), tokens()

    def work():
        copy = torch.tanh(model.fc(x)).detach().requires_grad_(True)
        F.cross_entropy(model.head(copy).flatten(0, 1), y.flatten()).backward()

    with pytest.raises(NothingToCollectError, match=r"through a detached activation alone, .*activation.backward"):
        run(model, work)


@pytest.mark.parametrize("order", ["first", "last"])
def test_backward_passes_of_other_losses_are_passed_over(order):
    """An adversary with a binary loss, before or after: neither its layers nor its passes count."""
    model, (x, y) = Net().double(), tokens()
    model.critic = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1)).double()

    def classify():
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()

    def criticize():
        F.binary_cross_entropy_with_logits(model.critic(x), torch.ones(3, 4, 1).double()).backward()

    for layers in (["fc"], "last-mlp"):
        work = [criticize, classify] if order == "first" else [classify, criticize]
        collector = run(model, lambda work=work: [each() for each in work], layers=layers)
        assert collector.chosen == ["fc"]
        torch.testing.assert_close(collector.factors()["fc"].G, exact_gradient_factor(model, x, [head(model)]))
        ((reason, count),) = collector.left_out.items()
        assert count == 1
        assert "'binary_cross_entropy_with_logits'" in reason


def test_backward_passes_of_two_outputs_are_refused_in_either_order():
    model, (x, y) = Net().double(), tokens()
    model.second = nn.Linear(6, 4).double()

    def backward(output):
        F.cross_entropy(output(torch.tanh(model.fc(x))).flatten(0, 1), y.flatten()).backward()

    for order in ((model.head, model.second), (model.second, model.head)):
        with pytest.raises(RuntimeError, match="2 softmax losses"):
            run(model, lambda order=order: [backward(output) for output in order])
        named = run(model, lambda order=order: [backward(output) for output in order], logits="head")
        torch.testing.assert_close(named.factors()["fc"].G, exact_gradient_factor(model, x, [head(model)]))


def test_checkpointed_layers_are_not_counted_again_in_a_backward_pass():
    model, (x, y) = Net().double(), tokens()

    def work():
        for xc, yc in zip(x.split(2, 1), y.split(2, 1), strict=True):
            h = torch.utils.checkpoint.checkpoint(lambda part: torch.tanh(model.fc(part)), xc, use_reentrant=False)
            F.cross_entropy(model.head(h).flatten(0, 1), yc.flatten()).backward()

    assert run(model, work).factors()["fc"].num_inputs == 12


# What the training leaves out ----------------------------------------------------------------------------------------


def masked(z, y, ignored):
    """The loss of each position, those to ignore times zero."""
    return (F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none") * ~ignored.flatten()).sum()


def indexed(z, y, ignored):
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none")[~ignored.flatten()].mean()


def class_weighted(z, y, ignored):
    """A class of weight zero stands for what is to be ignored."""
    weight = torch.ones(4).double()
    weight[3] = 0
    return F.cross_entropy(z.flatten(0, 1), y.masked_fill(ignored, 3).flatten(), weight)


def soft(z, y, ignored):
    """Class probabilities, all zero at what is to be ignored."""
    return F.cross_entropy(z.flatten(0, 1), (F.one_hot(y, 4) * ~ignored[..., None]).double().flatten(0, 1))


@pytest.mark.parametrize("loss", [masked, indexed, class_weighted, soft])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_positions_of_weight_zero_do_not_count(loss, kind):
    model, (x, y) = Net().double(), tokens()
    y = y % 3
    ignored = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    found = factors(model, lambda: loss(model(x), y, ignored), fisher=kind)
    labels = y.masked_fill(ignored, -100).flatten()
    plain = factors(model, lambda: F.cross_entropy(model(x).flatten(0, 1), labels), fisher=kind)
    assert found.num_inputs == plain.num_inputs == 9
    torch.testing.assert_close(found.A, plain.A)
    torch.testing.assert_close(found.G, plain.G)


# Named logits --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("out", "loss", "message"),
    [
        (4, lambda z: F.mse_loss(z, torch.zeros_like(z)), "goes into 'mse_loss'"),
        (4, lambda z: F.binary_cross_entropy_with_logits(z, torch.ones_like(z)), "binary_cross_entropy_with_logits"),
        (4, lambda z: F.binary_cross_entropy(z.sigmoid(), torch.ones_like(z)), "goes into 'binary_cross_entropy'"),
        (4, lambda z: (z - 1).square().mean(), "goes into no softmax on its way"),
        (4, lambda z: -F.logsigmoid(z).mean(), "goes into no softmax on its way"),
        (4, lambda z: F.multi_margin_loss(z.flatten(0, 1), torch.zeros(12).long()), "goes into 'multi_margin_loss'"),
        (1, lambda z: F.binary_cross_entropy_with_logits(z, torch.ones_like(z)), "goes into"),
        (1, lambda z: z.log_softmax(-1).mean(), "one class only, whose softmax is always 1"),
    ],
)
def test_named_logits_of_losses_that_have_no_softmax_are_refused(out, loss, message):
    model, (x, _) = Net(out=out).double(), tokens()
    for kind in ("exact", "sketched", "sampled"):
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
        found = factors(model, step)
        assert found.num_inputs == 12, name
        torch.testing.assert_close(found.G, expected, rtol=1e-5, atol=1e-6, msg=name)


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
        Collector(Net(), ["fc"], class_dim=1)
    with pytest.raises(TypeError, match="class_dim must be an integer or None, found 'last'"):
        Collector(Net(), ["fc"], logits="head", class_dim="last")
    with pytest.raises(ValueError, match="logits='heads' is neither a submodule nor a method"):
        Collector(Net(), ["fc"], logits="heads")


# Steps that cannot be recorded ---------------------------------------------------------------------------------------


def test_what_a_step_may_return():
    model, (x, y) = Net().double(), tokens()
    loss = lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten())  # noqa: E731
    plain = factors(model, loss)

    class Output:
        def __init__(self):
            self.loss = loss()

    for answer in (lambda: {"loss": loss(), "log": 1}, Output):
        torch.testing.assert_close(factors(model, answer).G, plain.G)
    for answer, kind in (
        (lambda: {"log": 1}, "dict"),
        (lambda: 1.0, "float"),
        (lambda: loss().expand(2), r"tensor \[2\]"),
    ):
        with pytest.raises(TypeError, match=f"must return the loss, one number, .* found a? ?{kind}"):
            factors(model, answer)


def test_a_layer_that_returns_a_tuple():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    class Paired(Net):
        def __init__(self):
            super().__init__()
            self.fc = Pair(5, 6)

        def forward(self, x):
            return self.head(torch.tanh(self.fc(x)[0]))

    model, (x, y) = Paired().double(), tokens()
    with pytest.raises(RuntimeError, match="Layer 'fc' returns a tuple, expected a tensor"):
        factors(model, lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten()))


def test_transforms_of_torch_func():
    model, (x, y) = Net().double(), tokens()
    parameters = dict(model.named_parameters())
    call = lambda p, x: torch.func.functional_call(model, p, (x,))  # noqa: E731
    plain = factors(model, lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten()))
    functional = factors(model, lambda: F.cross_entropy(call(parameters, x).flatten(0, 1), y.flatten()))
    torch.testing.assert_close(functional.G, plain.G)
    with pytest.raises(RuntimeError, match=r"Layers 'fc' run inside a torch.func transform \(vmap"):
        factors(model, lambda: F.cross_entropy(torch.vmap(model)(x).flatten(0, 1), y.flatten()))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["exact", "sketched", "empirical"])
def test_rows_of_several_lengths(kind):
    model, y = Net().double(), torch.randint(0, 4, (10,))
    rows = [torch.randn(n, 5).double() for n in (3, 5, 2)]
    nested = lambda: torch.nested.nested_tensor(rows, layout=torch.jagged)  # noqa: E731
    together = lambda z: torch.cat(z.unbind())  # noqa: E731
    found = factors(model, lambda: F.cross_entropy(together(model(nested())), y), fisher=kind)
    plain = factors(model, lambda: F.cross_entropy(model(torch.cat(rows)), y), fisher=kind)
    assert found.num_inputs == 10
    torch.testing.assert_close(found.A, plain.A)
    torch.testing.assert_close(found.G, plain.G)
    with pytest.raises(RuntimeError, match="reads rows of several lengths"):
        factors(model, lambda: F.cross_entropy(together(model(nested())), y), positions="first")


def test_an_empty_batch():
    model = Net().double()
    for kind in ("exact", "sketched", "sampled"):
        x, y = torch.zeros(0, 5).double(), torch.zeros(0, dtype=torch.long)
        found = collect(
            model,
            [x, torch.ones(2, 5).double()],
            lambda x: F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long), reduction="sum"),
            layers=["fc"],
            fisher=kind,
        )["fc"]
        assert found.num_inputs == 2
        assert len(y) == 0
