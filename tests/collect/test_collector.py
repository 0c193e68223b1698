"""The collector: invariances, faults, and hooks that must not survive."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_curvature.collect.collector import Collector
from lightning_curvature.recording.options import CollectorOptions
from tests.support.steps import data, gather, network, num_hooks, same


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_batch_split_and_order(kind):
    model, (x, y) = network(), data()
    step = lambda rows: F.cross_entropy(model(x[rows]), y[rows])  # noqa: E731
    whole = gather(model, step, [torch.arange(12)], fisher=kind)
    split = gather(model, step, torch.arange(12).flip(0).split(5), fisher=kind)
    same(whole, split)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scale", [1.0, 1 / 3, 2.0**16])
def test_reduction_and_scale_leave_no_trace(reduction, scale):
    model, (x, y) = network(), data()
    plain = gather(model, lambda _: F.cross_entropy(model(x), y, reduction="sum"))

    def step(_):
        loss = F.cross_entropy(model(x), y, reduction=reduction)
        return (loss.mean() if reduction == "none" else loss) * scale

    same(gather(model, step), plain)


def test_empirical_takes_class_weights_and_label_smoothing_out_of_the_denominator_only():
    model, (x, y) = network(), data()
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    mean = lambda _: F.cross_entropy(model(x), y, weight=weight, label_smoothing=0.1)  # noqa: E731
    total = lambda _: F.cross_entropy(model(x), y, weight=weight, label_smoothing=0.1, reduction="sum")  # noqa: E731
    same(gather(model, mean), gather(model, total))


def test_empirical_refuses_what_it_cannot_undo():
    model, (x, y) = network(), data()
    weights = torch.linspace(0.1, 1, 12)
    with pytest.raises(RuntimeError, match="weighs its loss positions differently"):
        gather(model, lambda _: (weights * F.cross_entropy(model(x), y, reduction="none")).sum())
    with pytest.raises(RuntimeError, match="reaches the layers on other paths"):
        gather(model, lambda _: F.cross_entropy(model(x), y) + 0.1 * model(x).square().mean())
    with pytest.raises(RuntimeError, match="cannot be used with logits="):
        gather(model, lambda _: F.cross_entropy(model(x), y), logits="4")


@pytest.mark.parametrize("kind", ["sketched", "empirical"])
def test_in_place_activation_after_a_layer(kind):
    (x, y), plain = data(), network()
    inplace = network()
    inplace[1].inplace = inplace[3].inplace = True
    expected, factors = (
        gather(m, lambda _, m=m: F.cross_entropy(m(x), y), layers=["0", "2"], fisher=kind) for m in (plain, inplace)
    )
    same(expected, factors)


def test_input_overwritten_after_the_layer_read_it():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.fc, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
            self.fc.weight.requires_grad_(False)  # otherwise autograd itself complains

        def forward(self, x):
            h = self.first(x)
            out = self.fc(h)
            h.mul_(0)
            return self.head(out)

    model = Overwriting().double()
    x, y = data()
    with pytest.raises(RuntimeError, match="Layer 'fc': its input was changed in place"):
        gather(model, lambda _: F.cross_entropy(model(x), y), layers=["fc"])


@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_a_layer_called_twice_is_paired_call_by_call(kind):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.fc(torch.tanh(self.fc(x)))))

    class Unrolled(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 5), nn.Linear(5, 5), shared.head
            self.a.load_state_dict(shared.fc.state_dict())
            self.b.load_state_dict(shared.fc.state_dict())

        def forward(self, x):
            return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))

    shared = Shared().double()
    unrolled = Unrolled(shared).double()
    x, y = data()
    layer = gather(shared, lambda _: F.cross_entropy(shared(x), y), layers=["fc"], fisher=kind)["fc"]
    calls = gather(unrolled, lambda _: F.cross_entropy(unrolled(x), y), layers=["a", "b"], fisher=kind)
    assert layer.num_inputs == 24
    torch.testing.assert_close(layer.A, (calls["a"].A + calls["b"].A) / 2)
    torch.testing.assert_close(layer.G, (calls["a"].G + calls["b"].G) / 2)


def test_non_reentrant_checkpointing_does_not_count_twice():
    model, (x, y) = network(), data()
    plain = gather(model, lambda _: F.cross_entropy(model(x), y), fisher="exact")
    inner = lambda h: model[:4](h)  # noqa: E731
    checkpointed = gather(
        model, lambda _: F.cross_entropy(model[4](checkpoint(inner, x, use_reentrant=False)), y), fisher="exact"
    )
    same(plain, checkpointed)


def test_the_head_is_told_by_the_graph():
    class HeadFirst(nn.Module):
        """The head is defined first, and is no wider than a hidden layer."""

        def __init__(self):
            super().__init__()
            self.out, self.hidden, self.deep = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x):
            return (self.out(torch.relu(self.deep(torch.relu(self.hidden(x))))) / 2).view(-1, 5).float()

    model, (x, y) = HeadFirst().double(), data()
    assert list(gather(model, lambda _: F.cross_entropy(model(x), y), layers="linear")) == ["hidden", "deep"]
    assert list(gather(model, lambda _: F.cross_entropy(model(x), y), layers=["out"])) == ["out"]


def test_a_frozen_stem_is_an_error_by_name():
    model, (x, y) = network(), data()
    for parameter in model[:3].parameters():
        parameter.requires_grad_(False)
    with pytest.raises(RuntimeError, match="Outputs of layers '0', '2' need no gradient"):
        gather(model, lambda _: F.cross_entropy(model(x), y), layers=["0", "2"], fisher="sketched")


@pytest.mark.parametrize("kind", ["sketched", "empirical"])
def test_a_batch_with_nan_is_left_out_with_one_warning(kind):
    model, (x, y) = network(), data()
    bad = x.clone()
    bad[3, 2] = float("nan")
    batches = [x, bad, bad, x]
    step = lambda batch: F.cross_entropy(model(batch), y)  # noqa: E731
    with pytest.warns(UserWarning, match="left out of the K-FAC factors") as warnings:
        factors = gather(model, step, batches, fisher=kind)
    assert len(warnings) == 1
    assert factors.provenance["batches_skipped"] == 2
    assert factors["2"].num_inputs == 24
    with pytest.warns(UserWarning, match="left out"), pytest.raises(RuntimeError, match="No batch was collected"):
        gather(model, step, [bad], fisher=kind)


@pytest.mark.parametrize("kind", ["sketched", "sampled", "exact", "empirical"])
def test_nothing_is_left_behind(kind):
    model, (x, y) = network(), data()
    seen = []

    def step(_):
        logits = model(x)
        seen.append(weakref.ref(logits))
        return F.cross_entropy(logits, y)

    state = torch.get_rng_state()
    gather(model, step, [0, 1], fisher=kind)
    assert torch.equal(state, torch.get_rng_state())
    assert all(reference() is None for reference in seen)
    assert num_hooks(model) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_hook_survives_an_exception():
    model, (x, _) = network(), data()

    def step(_):
        model(x)
        raise KeyError("from the user's step")

    with pytest.raises(KeyError):
        gather(model, step)
    assert num_hooks(model) == 0
    assert not torch.overrides._get_current_function_mode_stack()


def test_no_backward_no_gradient():
    model, (x, y) = network(), data()
    collector = Collector(model, CollectorOptions(layers=["2"], fisher="empirical"))
    recording = collector.step()
    recording.open()
    recording.before_backward(F.cross_entropy(model(x), y))
    with pytest.raises(RuntimeError, match="sent no gradient to the chosen layers"):
        recording.close()
    recording = collector.step()
    recording.open()
    recording.close()  # a step without a backward pass is not collected, and is no error
    assert collector.num_batches == 0


def test_a_second_backward_through_the_same_graph_is_refused():
    model, (x, y) = network(), data()
    collector = Collector(model, CollectorOptions(layers=["2"], fisher="empirical"))
    recording = collector.step()
    recording.open()
    logits = model(x)
    F.cross_entropy(logits, y).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass through the same forward pass"):
        logits.square().mean().backward()
    recording.abort()


def test_every_raw_backward_of_a_step_is_seen():
    """Manual loops call loss.backward() themselves."""
    model, (x, y) = network(), data()
    step = lambda scale: F.cross_entropy(model(scale * x), y)  # noqa: E731
    expected = gather(model, step, [1.0, 2.0])
    collector = Collector(model, CollectorOptions(layers=["2"], fisher="empirical"))
    recording = collector.step()
    recording.open()
    step(1.0).backward()
    step(2.0).backward()
    recording.close()
    same(collector.factors(), expected)
