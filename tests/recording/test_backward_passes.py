"""Steps with several backward passes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curvature.collect.collector import Collector
from lightning_curvature.recording.objectives import NothingToCollectError
from lightning_curvature.recording.options import CollectorOptions
from tests.support.trunk import Net, exact_gradient_factor, factors, head, tokens


def run(model, work, **options):
    """Collect from one step that runs its own backward passes."""
    collector = Collector(model, CollectorOptions(**{"layers": ["fc"], "fisher": "exact"} | options))
    recording = collector.step()
    recording.open()
    try:
        work()
        recording.close()
    finally:
        recording.abort()
    return collector


@pytest.mark.parametrize("kind", ["exact", "empirical", "sketched"])
def test_chunks_that_are_backpropagated_one_by_one(kind):
    model, (x, y) = Net().double(), tokens()

    def work():
        for xc, yc in zip(x.split(2, 1), y.split(2, 1), strict=True):
            F.cross_entropy(model(xc).flatten(0, 1), yc.flatten()).backward()

    options = {"fisher": kind, "draws": 500 if kind == "sketched" else 1}
    layer = run(model, work, **options).factors()["fc"]
    whole = factors(model, lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten()), **options)
    assert layer.num_inputs == 12
    torch.testing.assert_close(layer.A, whole.A)
    assert (layer.G - whole.G).norm() < (0.25 if kind == "sketched" else 1e-9) * whole.G.norm()


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
    collected = run(model, work, **options).factors()
    assert list(collected) == ["fc"]
    assert collected["fc"].num_inputs == 12
    expected = exact_gradient_factor(model, x, [head(model)])
    if kind == "empirical":
        plain = lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten())  # noqa: E731
        expected = factors(model, plain, fisher=kind).G
    assert (collected["fc"].G - expected).norm() < (0.25 if kind == "sketched" else 1e-9) * expected.norm()


def test_a_detached_trunk_that_gets_no_gradient_is_told():
    model, (x, y) = Net().double(), tokens()

    def work():
        copy = torch.tanh(model.fc(x)).detach().requires_grad_(True)
        F.cross_entropy(model.head(copy).flatten(0, 1), y.flatten()).backward()

    with pytest.raises(NothingToCollectError, match=r"through a detached activation alone, .*activation.backward"):
        run(model, work)


@pytest.mark.parametrize("layers", [["fc"], "last-mlp"], ids=["pattern", "preset"])
@pytest.mark.parametrize("order", ["first", "last"])
def test_backward_passes_of_other_losses_are_passed_over(layers, order):
    """An adversary with a binary loss, before or after a softmax: neither its layers nor its passes count."""
    model, (x, y) = Net().double(), tokens()
    model.critic = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1)).double()

    def classify():
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()

    def criticize():
        F.binary_cross_entropy_with_logits(
            model.critic(torch.tanh(model.fc(x))), torch.ones(3, 4, 1).double()
        ).backward()

    work = [criticize, classify] if order == "first" else [classify, criticize]
    collector = run(model, lambda: [each() for each in work], layers=layers)
    assert collector.chosen == ["fc"]
    torch.testing.assert_close(collector.factors()["fc"].G, exact_gradient_factor(model, x, [head(model)]))
    ((reason, count),) = collector.network.left_out.items()
    assert count == 1
    assert reason == "A binary or squared loss beside a softmax loss of the same step does not count."


def test_backward_passes_of_two_outputs_are_refused_in_either_order():
    model, (x, y) = Net().double(), tokens()
    model.second = nn.Linear(6, 4).double()

    def backward(output):
        F.cross_entropy(output(torch.tanh(model.fc(x))).flatten(0, 1), y.flatten()).backward()

    for order in ((model.head, model.second), (model.second, model.head)):
        with pytest.raises(RuntimeError, match="2 losses"):
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
