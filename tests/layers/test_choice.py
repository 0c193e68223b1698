"""Layers that do not run, or not with gradients: which are left out, and which may still come."""

import copy

import peft
import pytest
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_curvature.layers.selection import choose_layers
from tests.support.blocks import both, experts, lin, mlp_in_out, named, resolve_all, stack


@pytest.fixture
def messages(monkeypatch):
    told = []
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_info", told.append)
    return told


def test_weights_that_are_read_without_a_call_are_left_out_and_named(messages):
    net = both(mlp=mlp_in_out)
    linear = {f"0.{i}.mlp.{name}" for i in (0, 1) for name in ("in_proj", "mid", "out_proj")}
    out_proj = ["0.0.attn.out_proj", "0.1.attn.out_proj"]
    assert set(resolve_all(net, "linear", {"1"}, silent=out_proj)) == linear
    assert messages == [
        "layers='linear' leaves out '0.0.attn.out_proj', '0.1.attn.out_proj': the modules that hold them ran and did "
        "not call them."
    ]
    for layers in ("attention", ["mlp", "*.0.attn.out_proj"], "0.*"):
        with pytest.raises(RuntimeError, match=r"attn.out_proj'.* never ran"):
            resolve_all(net, layers, {"1"}, silent=out_proj)


def test_layers_that_run_in_no_block_are_left_out_and_those_of_blocks_that_did_not_run_wait(messages):
    net = stack(*(named("B", attn=named("Attn", qkv=lin(), proj=lin()), mlp=mlp_in_out()) for _ in "ab"))
    attention = [f"0.{i}.attn.{name}" for i in (0, 1) for name in ("qkv", "proj")]
    assert len(resolve_all(net, "linear", {"1"}, silent=attention)) == 6
    assert "0.1.attn.proj" in messages[0]
    # One block of two ran it, or one of two blocks did not run at all: others may come.
    assert len(resolve_all(net, "linear", {"1"}, silent=attention[:1])) == 10
    second = [name for name in choose_layers(net, "linear").modules if name.startswith("0.1.")]
    assert len(resolve_all(net, "linear", {"1"}, silent=second)) == 10
    with pytest.raises(RuntimeError, match="never ran"):
        resolve_all(net, "attention", {"1"}, silent=attention)
    assert len(messages) == 1


def test_a_weight_that_some_function_was_seen_to_read_is_not_waited_for(messages):
    net = nn.Sequential(lin(), lin(), lin(8, 3))
    assert resolve_all(net, "mlp", {"2"}, silent=["0"]) == ["1", "0"]
    assert resolve_all(net, "mlp", {"2"}, silent=["0"], read=["0", "1", "2"]) == ["1"]
    assert "leaves out '0'" in messages[0]
    with pytest.raises(RuntimeError, match="Chosen layers '0' never ran"):
        resolve_all(net, ["0", "1"], {"2"}, silent=["0"], read=["0", "1"])


def test_experts_that_did_not_run_wait(messages):
    net = both(moe=experts)
    silent = ["0.0.moe.experts.1.w1", "0.0.moe.experts.1.w2", "0.0.attn.out_proj", "0.1.attn.out_proj"]
    assert set(silent[:2]) < set(resolve_all(net, "mlp", {"1"}, silent=silent))
    assert not messages


def with_copy(wrap=lambda net: net, **changes):
    net = nn.Sequential(lin(), nn.ReLU(), lin(), nn.ReLU(), lin(8, 3))
    return named("Lit", net=net, **{"copy": wrap(copy.deepcopy(net)), **changes})


def frozen(net):
    return net.requires_grad_(False)


def changed(net):
    for parameter in net.parameters():
        parameter.data.add_(1)
    return net


def ema_of(net):
    return AveragedModel(net)


NET, COPY = ["net.0", "net.2"], ["copy.0", "copy.2", "copy.4"]


@pytest.mark.parametrize("layers", ["mlp", "last-mlp", "linear"])
def test_copies_that_are_not_trained_are_left_out_and_named(layers, messages):
    chosen = NET[-1:] if layers == "last-mlp" else NET
    averaged = ["copy.module.0", "copy.module.2", "copy.module.4"]
    for net, names, dead, silent in [
        (with_copy(), COPY, [], COPY),  # a running average that has not begun, and never runs in training
        (with_copy(frozen), COPY, [], COPY),
        (with_copy(lambda net: frozen(changed(net))), COPY, [], COPY),
        (with_copy(lambda net: frozen(changed(net))), COPY, COPY, []),  # a teacher
        (with_copy(changed), COPY, COPY, COPY),  # a momentum encoder that runs under no_grad
        (with_copy(ema_of), averaged, [], averaged),
        (with_copy(lambda net: AveragedModel(frozen(net))), averaged, averaged, averaged),
    ]:
        assert resolve_all(net, layers, {"net.4"}, dead, silent) == chosen
        assert all(name in messages[-1] for name in names)
        assert "not trained" in messages[-1]


def test_a_copy_of_the_whole_module_is_left_out(messages):
    net = named("Lit", fc1=lin(), fc2=lin(), head=lin(8, 3))
    net.shadow = copy.deepcopy(net)
    shadow = ["shadow.fc1", "shadow.fc2", "shadow.head"]
    assert resolve_all(net, "mlp", {"head"}, silent=shadow) == ["fc1", "fc2"]
    assert messages


@pytest.mark.parametrize("name", ["teacher", "ema_net", "target_encoder", "reference", "lpips", "frozen_features"])
def test_a_frozen_teacher_of_another_size_is_left_out(name, messages):
    net = named("Lit", net=nn.Sequential(lin(), lin(), lin(8, 3)), **{name: frozen(nn.Sequential(lin(), lin(8, 32)))})
    names = [f"{name}.0", f"{name}.1"]
    for dead, silent in ((names, []), (names, names), ([], names)):
        assert resolve_all(net, "mlp", {"net.2"}, dead, silent) == ["net.0", "net.1"]
        assert resolve_all(net, "last-mlp", {"net.2"}, dead, silent) == ["net.1"]
    assert "teacher" in messages[0]


def test_what_may_be_trained_later_is_not_left_out(messages):
    """A frozen backbone, one of two towers, an expert: no copy that something else is trained in place of."""
    net = named("Lit", backbone=frozen(nn.Sequential(lin(), nn.Tanh(), lin(), nn.Tanh())), head=lin(8, 3))
    backbone = ["backbone.0", "backbone.2"]
    assert resolve_all(net, "mlp", {"head"}, backbone) == backbone
    assert resolve_all(net, "last-mlp", {"head"}, backbone) == ["backbone.2"]
    net = named("Lit", backbone=frozen(nn.Sequential(lin(), lin())), head=nn.Sequential(lin(), lin(8, 3)))
    assert resolve_all(net, "mlp", {"head.1"}, ["backbone.0", "backbone.1"]) == ["backbone.0", "backbone.1", "head.0"]
    towers = named("Lit", english=nn.Sequential(lin(), lin()), german=nn.Sequential(lin(), lin()), head=lin(8, 3))
    german = ["german.0", "german.1"]
    assert resolve_all(towers, "mlp", {"head"}, silent=german) == ["english.0", "english.1", *german]
    assert not messages


def test_what_an_adapter_replaces_is_left_out():
    net = nn.Sequential(lin(), nn.Tanh(), lin(), nn.Tanh(), lin(8, 3))
    config = peft.LoraConfig(target_modules=["0"], modules_to_save=["2"], r=2)
    wrapped = peft.get_peft_model(net, config)
    inside = "base_model.model."
    assert set(choose_layers(wrapped, "mlp").modules) == {
        f"{inside}0.base_layer",
        f"{inside}2.modules_to_save.default",
        f"{inside}4",
    }


def test_a_pattern_takes_copies():
    net = with_copy(frozen)
    assert resolve_all(net, ["copy.*"], {"net.4"}, dead=COPY) == COPY
