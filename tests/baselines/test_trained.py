"""The bulk step and the trained baselines on a model that recites: they forget."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curvature import KroneckerFactors, LayerFactors
from lightning_curvature.baselines import BalancedSubnet, GradientAscent, NegativePreference
from lightning_curvature.editing.bulk import BulkStepEditor, add_margins
from lightning_curvature.text.sequences import PromptedSequence
from lightning_curvature.text.suffixes import suffix_batches, suffix_margins, suffix_nll
from tests.support import language


@pytest.fixture(scope="module")
def reciting():
    """A model that recites six rows, with factors of other text."""
    from lightning_curvature.collect.passes import collect

    torch.manual_seed(0)
    recited, ordinary = language.tokens(6, 14, seed=1), language.tokens(24, 14, seed=2)
    model = language.train(language.model("llama").train(), torch.cat([recited, ordinary[:8]]), 250).eval()
    factors = collect(model, [ordinary], lambda rows: model(input_ids=rows, labels=rows).loss, layers="mlp")
    sequences = [PromptedSequence(tuple(row[:6]), tuple(row[6:])) for row in recited.tolist()]
    return model, factors, sequences, ordinary


def strict(model, sequences):
    from lightning_curvature.text.evaluation import strict_rate

    return strict_rate(model, sequences)


def test_suffix_margins_and_losses_token_by_token(reciting):
    model, _, sequences, _ = reciting
    (batch,) = suffix_batches(model, sequences)
    with torch.no_grad():
        margins, nll = suffix_margins(model, batch), suffix_nll(model, batch)
    for row, sequence in enumerate(sequences):
        total = 0.0
        for place, token in enumerate(sequence.suffix_ids):
            logits = model(input_ids=torch.tensor([sequence.ids[: 6 + place]])).logits[0, -1].detach()
            runner_up = max(float(value) for index, value in enumerate(logits) if index != token)
            assert float(margins[row, place]) == pytest.approx(float(logits[token]) - runner_up, abs=1e-3)
            total -= float(logits.log_softmax(0)[token])
        assert float(nll[row]) == pytest.approx(total / len(sequence.suffix_ids), abs=1e-4)


def test_a_bulk_step_forgets(reciting):
    model, factors, sequences, _ = reciting
    assert strict(model, sequences) == 1.0
    with_margins = add_margins(model, factors, suffix_batches(model, sequences), lambda b: suffix_margins(model, b))
    with BulkStepEditor(0.5).applied(model, with_margins):
        assert strict(model, sequences) == 0.0
    assert strict(model, sequences) == 1.0


@pytest.mark.parametrize("kind", [BalancedSubnet, GradientAscent, NegativePreference])
def test_trained_baselines_forget_and_change_what_they_may(kind, reciting):
    model, factors, sequences, ordinary = reciting
    forget = list(suffix_batches(model, sequences))
    retain = list(suffix_batches(model, [PromptedSequence((r[0],), tuple(r[1:])) for r in ordinary.tolist()]))
    options = {
        BalancedSubnet: {"ratio": 0.1, "epochs": 60, "lr": 0.05},
        GradientAscent: {"epochs": 40, "lr": 0.01},
        NegativePreference: {"epochs": 60, "lr": 0.01},
    }[kind]
    editor = kind(forget, retain, suffix_nll, layers=["model.layers.1.*"], **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with editor.applied(model, factors) as report:
        assert strict(model, sequences) <= 0.05
        after = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert set(report.layers) == {name.removesuffix(".weight") for name in changed}
    if kind is BalancedSubnet:
        for name in changed:
            zero = after[name] == 0
            assert int(zero.sum()) == round(0.1 * zero.numel())
            assert torch.equal(after[name][~zero], before[name][~zero])


def test_npo_is_gradient_ascent_in_the_limit():
    losses = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    before = torch.tensor([1.0, 1.0], dtype=torch.float64)
    make = lambda kind, **options: kind([0], [0], None, **options)  # noqa: E731
    npo = make(NegativePreference, beta=1e-6).forget_loss(losses, before)
    ascent = make(GradientAscent).forget_loss(losses, before)
    npo_gradient, ascent_gradient = (torch.autograd.grad(loss, losses, retain_graph=True)[0] for loss in (npo, ascent))
    torch.testing.assert_close(npo_gradient, ascent_gradient, rtol=1e-5, atol=1e-8)
    expected = 2 / 0.5 * torch.log1p((torch.exp(-losses) / torch.exp(-before)) ** 0.5).mean()
    torch.testing.assert_close(make(NegativePreference, beta=0.5).forget_loss(losses, before), expected)


def test_the_subnet_holds_the_weights_of_highest_scores():
    """With one weight that alone makes the forget set, it is the one that goes."""
    module = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 5.0]]))
    loss = lambda net, batch: F.cross_entropy(net(batch[0]), batch[1], reduction="none")  # noqa: E731
    forget, retain = (torch.tensor([[1.0, 0.0]]), torch.tensor([0])), (torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
    factors = KroneckerFactors({"0": LayerFactors(A=torch.eye(2), G=torch.eye(2), num_inputs=9, num_gradients=9)})
    BalancedSubnet([forget], [retain], loss, ratio=0.25, epochs=50, lr=0.1).edit(module, factors)
    assert module[0].weight.tolist() == [[0.0, 0.0], [0.0, 5.0]]


def test_arguments_of_trained_baselines():
    for options, message in [
        ({"forget": []}, "needs batches to forget and batches to retain"),
        ({"weight": 1.0}, "weight must lie between 0 and 1"),
        ({"epochs": 0}, "epochs must be an integer"),
    ]:
        with pytest.raises(ValueError, match=message):
            GradientAscent(**{"forget": [0], "retain": [0], "loss": None} | options)
    with pytest.raises(ValueError, match="ratio must lie between 0 and 1"):
        BalancedSubnet([0], [0], None, ratio=0)
    with pytest.raises(ValueError, match="beta must be positive"):
        NegativePreference([0], [0], None, beta=0)
