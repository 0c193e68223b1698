"""Which losses of a step count, against the definition: the Fisher of independent softmax outputs is their sum."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.trunk import Net, exact_gradient_factor, factors, head, tokens

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
    layer = factors(model, lambda: loss(model, x, y), logits=named, fisher=kind, draws=1 if kind == "exact" else 500)
    expected = exact_gradient_factor(model, x, [head(model)])
    assert layer.num_inputs == layer.num_gradients == 12
    a = x.reshape(-1, 5)
    torch.testing.assert_close(layer.A, a.T @ a / 12)
    assert (layer.G - expected).norm() < (1e-9 if kind == "exact" else 0.25) * expected.norm()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_empirical_in_chunks_is_empirical_as_a_whole(reduction):
    model, (x, y) = Net().double(), tokens()
    chunked = factors(model, lambda: in_chunks(model, x, y, reduction), fisher="empirical")
    whole = factors(model, lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten()), fisher="empirical")
    torch.testing.assert_close(chunked.G, whole.G)


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
    for second_logits in (lambda z: z[:, :2], lambda z: z[:9], torch.t):
        with pytest.raises(RuntimeError, match="2 losses read the same outputs in different ways"):
            factors(
                model,
                lambda second_logits=second_logits: (
                    F.cross_entropy(z := model(x).flatten(0, 1), labels)
                    + F.cross_entropy(second_logits(z), labels[: len(second_logits(z))] % 2)
                ),
            )
    warm = lambda z: F.cross_entropy(z / 2, labels) + F.cross_entropy(z / 4, labels)  # noqa: E731
    with pytest.raises(RuntimeError, match="2 losses"):
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

    def step(second_head):
        h = torch.tanh(model.fc(x))
        return F.cross_entropy(model.head(h).flatten(0, 1), y.flatten()) + F.cross_entropy(second_head(h), y.flatten())

    for second_head in (lambda h: second(h).flatten(0, 1), lambda h: 2 * model.head(h).flatten(0, 1)):
        with pytest.raises(RuntimeError, match=r"2 losses reach the training loss .* logits='...'"):
            factors(model, lambda second_head=second_head: step(second_head))
    # The advice works: the named output counts.
    model.second = second
    expected = exact_gradient_factor(model, x, [head(model)])
    torch.testing.assert_close(
        factors(model, lambda: step(lambda h: second(h).flatten(0, 1)), logits="head").G, expected
    )


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
    layer = factors(model, lambda: loss(model(x), y, ignored), fisher=kind)
    labels = y.masked_fill(ignored, -100).flatten()
    plain = factors(model, lambda: F.cross_entropy(model(x).flatten(0, 1), labels), fisher=kind)
    assert layer.num_inputs == plain.num_inputs == 9
    torch.testing.assert_close(layer.A, plain.A)
    torch.testing.assert_close(layer.G, plain.G)
