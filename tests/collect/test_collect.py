"""The collector: positions, invariances, losses it must find or refuse, faults, and hooks that must not survive."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import ViTForImageClassification

from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.passes import collect
from tests.support import models


def images(n=12, seed=0):
    return models.images(n, seed).tensors


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double()


def data(n=12):
    torch.manual_seed(1)
    return torch.randn(n, 5, dtype=torch.float64), torch.randint(3, (n,))


def gather(model, step, batches=(None,), **options):
    return collect(model, batches, step, **({"layers": ["2"], "fisher": "empirical"} | options))


def same(one, two, **tolerance):
    assert list(one) == list(two)
    for name in one:
        assert one[name].num_inputs == two[name].num_inputs
        torch.testing.assert_close(one[name].A, two[name].A, **tolerance)
        torch.testing.assert_close(one[name].G, two[name].G, **tolerance)


def num_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


# Positions ----------------------------------------------------------------------------------------------------------


def test_only_the_class_token_counts_in_the_last_block_of_a_vit():
    torch.manual_seed(0)
    model, (x, y) = models.vit(), images()
    step = lambda _: F.cross_entropy(model(x), y)  # noqa: E731
    found = gather(model, step, layers=["blocks.*"], fisher="sketched")
    cls = gather(model, step, layers=["blocks.*"], fisher="sketched", positions="first")
    for name in ("blocks.1.fc1", "blocks.1.fc2", "blocks.1.attention.proj"):
        assert (found[name].num_inputs, found[name].num_seen) == (12, 60)
        torch.testing.assert_close(found[name].A, cls[name].A)
        torch.testing.assert_close(found[name].G, cls[name].G)
    for name in ("blocks.0.fc2", "blocks.1.attention.qkv"):
        assert found[name].num_inputs == 60


def test_transformers_vit_finds_the_same_rule():
    torch.manual_seed(0)
    model, (x, y) = ViTForImageClassification(models.hf_vit_config()), images()
    found = gather(model, lambda _: model(pixel_values=x[:, None], labels=y).loss, layers=["*.1.mlp.*"])
    assert found["vit.layers.1.mlp.fc2"].num_inputs == 12


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.fc(x)))


def test_ignored_positions_do_not_count_as_an_explicit_mask_says():
    torch.manual_seed(0)
    model, x, y = Padded(), torch.randn(5, 7, 4), torch.randint(3, (5, 7))
    mask = torch.arange(7) < torch.tensor([7, 5, 3, 1, 6])[:, None]
    y[~mask] = -100
    x[~mask] = 1e3  # whatever stands at padding
    batch = {"attention_mask": mask}
    step = lambda _: F.cross_entropy(model(x).flatten(0, 1), y.flatten())  # noqa: E731
    for kind in ("sketched", "empirical", "exact", "sampled"):
        rule = gather(model, step, [batch], layers=["fc"], fisher=kind)
        explicit = gather(model, step, [batch], layers=["fc"], fisher=kind, positions="mask:attention_mask")
        same(rule, explicit)
        assert rule["fc"].num_inputs == 22
    assert gather(model, step, layers=["fc"], positions="all")["fc"].num_inputs == 35


def test_classes_in_dimension_one_and_class_probabilities():
    torch.manual_seed(0)
    model, x, y = Padded().double(), torch.randn(5, 7, 4).double(), torch.randint(3, (5, 7))
    y[0, 3:] = -100
    flat = lambda _: F.cross_entropy(model(x).flatten(0, 1), y.flatten())  # noqa: E731
    channels = lambda _: F.cross_entropy(model(x).movedim(-1, 1), y)  # noqa: E731
    for kind in ("exact", "empirical"):
        same(gather(model, flat, layers=["fc"], fisher=kind), gather(model, channels, layers=["fc"], fisher=kind))
    full = torch.randint(3, (5, 7))
    soft = lambda _: F.cross_entropy(model(x).flatten(0, 1), F.one_hot(full.flatten(), 3).double())  # noqa: E731
    hard = lambda _: F.cross_entropy(model(x).flatten(0, 1), full.flatten())  # noqa: E731
    same(gather(model, soft, layers=["fc"]), gather(model, hard, layers=["fc"]))


def test_bad_positions():
    with pytest.raises(ValueError, match="positions must be one of"):
        Collector(models.mlp(), "mlp", positions="last")
    model, x, y = Padded(), torch.randn(5, 7, 4), torch.randint(3, (5, 7))
    step = lambda _: F.cross_entropy(model(x).flatten(0, 1), y.flatten())  # noqa: E731
    with pytest.raises(RuntimeError, match=r"the batch has no 'mask', found \['ids'\]"):
        gather(model, step, [{"ids": x}], layers=["fc"], positions="mask:mask")
    with pytest.raises(RuntimeError, match=r"positions \[5, 7\], the mask is \[2, 2\]"):
        gather(model, step, [{"mask": torch.ones(2, 2)}], layers=["fc"], positions="mask:mask")
    deep = lambda _: F.cross_entropy(model(x[None])[0].flatten(0, 1), y.flatten())  # noqa: E731
    with pytest.raises(RuntimeError, match=r"positions='first': layer 'fc' has outputs \[1, 5, 7, 6\]"):
        gather(model, deep, layers=["fc"], positions="first")
    single = network()
    x, y = data()
    plain = lambda _: F.cross_entropy(single(x), y)  # noqa: E731
    same(gather(single, plain, positions="first"), gather(single, plain))


# Invariances --------------------------------------------------------------------------------------------------------


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
    one, two = (
        gather(m, lambda _, m=m: F.cross_entropy(m(x), y), layers=["0", "2"], fisher=kind) for m in (plain, inplace)
    )
    same(one, two)


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


def test_a_layer_called_twice_is_paired_call_by_call():
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
    for kind in ("empirical", "exact"):
        one = gather(shared, lambda _: F.cross_entropy(shared(x), y), layers=["fc"], fisher=kind)["fc"]
        two = gather(unrolled, lambda _: F.cross_entropy(unrolled(x), y), layers=["a", "b"], fisher=kind)
        assert one.num_inputs == 24
        torch.testing.assert_close(one.A, (two["a"].A + two["b"].A) / 2)
        torch.testing.assert_close(one.G, (two["a"].G + two["b"].G) / 2)


def test_non_reentrant_checkpointing_does_not_count_twice():
    model, (x, y) = network(), data()
    plain = gather(model, lambda _: F.cross_entropy(model(x), y), fisher="exact")
    inner = lambda h: model[:4](h)  # noqa: E731
    checkpointed = gather(
        model, lambda _: F.cross_entropy(model[4](checkpoint(inner, x, use_reentrant=False)), y), fisher="exact"
    )
    same(plain, checkpointed)


# Which loss ---------------------------------------------------------------------------------------------------------


def test_all_ways_to_write_the_loss():
    model, (x, y) = network(), data()
    expected = gather(model, lambda _: F.cross_entropy(model(x), y), fisher="exact")
    ways = [
        lambda _: nn.CrossEntropyLoss()(model(x), y),
        lambda _: nn.CrossEntropyLoss()(input=model(x), target=y),
        lambda _: F.nll_loss(model(x).log_softmax(-1), y),
        lambda _: nn.NLLLoss()(nn.LogSoftmax(-1)(model(x)), y),
        lambda _: F.cross_entropy(model(x), y, weight=torch.ones(3).double(), label_smoothing=0.2),
    ]
    for way in ways:
        same(gather(model, way, fisher="exact"), expected)


def test_a_metric_is_not_the_loss():
    model, (x, y) = network(), data()

    def step(_):
        logits = model(x)
        with torch.no_grad():
            F.cross_entropy(logits, y)
        F.cross_entropy(logits.detach(), y)
        F.cross_entropy(logits, y, label_smoothing=0.5)  # has a graph, but does not reach the training loss
        return F.cross_entropy(logits, y)

    same(gather(model, step), gather(model, lambda _: F.cross_entropy(model(x), y)))


def test_named_logits_of_a_submodule_and_of_a_method():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def logits(self, x):
            return self.net(x)

        def loss(self, x, y):
            return -(self.logits(x).softmax(-1).gather(1, y[:, None])).log().mean()

    model, (x, y) = Hidden(), data()
    expected = gather(model, lambda _: F.cross_entropy(model.net(x), y), layers=["net.2"], fisher="exact")
    for name in ("net.4", "net", "logits"):
        found = gather(model, lambda _: model.loss(x, y), layers=["net.2"], fisher="exact", logits=name)
        same(found, expected)
    model.logits = model.logits  # an own attribute comes back too
    gather(model, lambda _: model.loss(x, y), layers=["net.2"], fisher="exact", logits="logits")
    assert model.logits.__name__ == "logits"
    with pytest.raises(ValueError, match=r"logits='logit' is neither a submodule nor a method of Hidden. Did you mean"):
        gather(model, lambda _: model.loss(x, y), layers=["net.2"], logits="logit")
    model.loss_pair = lambda: (1, 2)
    with pytest.raises(TypeError, match="logits='loss_pair' returned tuple"):
        gather(model, lambda _: model.loss_pair(), layers=["net.2"], logits="loss_pair")


def test_losses_that_are_refused():
    model, (x, y) = network(), data()
    hot = F.one_hot(y, 3).double()
    refused = {
        "binary_cross_entropy_with_logits": lambda _: F.binary_cross_entropy_with_logits(model(x), hot),
        "mse_loss": lambda _: F.mse_loss(model(x), hot),
    }
    for name, step in refused.items():
        with pytest.raises(
            RuntimeError, match=f"No softmax cross-entropy reaches the training loss. It computes '{name}'"
        ):
            gather(model, step)
    with pytest.raises(RuntimeError, match=r"2 softmax losses reach .* logits='...'"):
        gather(model, lambda _: F.cross_entropy(model(x), y) + F.cross_entropy(2 * model(x), y))
    with pytest.raises(RuntimeError, match="values that are not log-probabilities"):
        gather(model, lambda _: F.nll_loss(model(x), y))


# Heads, faults, hooks -----------------------------------------------------------------------------------------------


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
        found = gather(model, step, batches, fisher=kind)
    assert len(warnings) == 1
    assert found.provenance["batches_skipped"] == 2
    assert found["2"].num_inputs == 24
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
    collector = Collector(model, ["2"], fisher="empirical")
    collector.open()
    collector.before_backward(F.cross_entropy(model(x), y))
    with pytest.raises(RuntimeError, match="sent no gradient to the chosen layers"):
        collector.close()
    collector.open()
    collector.close()  # a step without a backward pass is not collected, and is no error
    assert collector.accumulator.num_batches == 0


def test_a_second_backward_through_the_same_graph_is_refused():
    model, (x, y) = network(), data()
    collector = Collector(model, ["2"], fisher="empirical")
    collector.open()
    logits = model(x)
    F.cross_entropy(logits, y).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass through the same forward pass"):
        logits.square().mean().backward()
    collector.abort()


def test_every_raw_backward_of_a_step_is_seen():
    """Manual loops call loss.backward() themselves."""
    model, (x, y) = network(), data()
    step = lambda scale: F.cross_entropy(model(scale * x), y)  # noqa: E731
    expected = gather(model, step, [1.0, 2.0])
    collector = Collector(model, ["2"], fisher="empirical")
    collector.open()
    step(1.0).backward()
    step(2.0).backward()
    collector.close()
    same(collector.factors(), expected)
