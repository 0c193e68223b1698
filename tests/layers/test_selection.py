import copy
import re

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from transformers import ViTForImageClassification

from lightning_curvature.layers.selection import choose_layers
from tests.support import models


def ran(module, x=None):
    """Names of leaf layers in the order in which they run."""
    order = []
    names = {layer: name for name, layer in module.named_modules()}
    handles = [layer.register_forward_hook(lambda m, *_: order.append(names[m])) for layer in names]
    module(torch.randn(2, 8, 8) if x is None else x)
    for handle in handles:
        handle.remove()
    return order


def resolve(module, layers, head, x=None):
    choice = choose_layers(module, layers)
    return choice.resolve([name for name in ran(module, x) if name in choice.modules], {head})


def test_presets_of_a_vision_transformer():
    net = models.vit()
    mlp = [f"blocks.{i}.fc{j}" for i in (0, 1) for j in (1, 2)]
    attention = [f"blocks.{i}.attention.{leaf}" for i in (0, 1) for leaf in ("qkv", "proj")]
    assert resolve(net, "mlp", "head") == mlp
    assert resolve(net, "last-mlp", "head") == ["blocks.1.fc2"]
    assert resolve(net, "attention", "head") == attention
    assert set(resolve(net, "linear", "head")) == {*mlp, *attention, "embed"}


def test_presets_of_torchvision_and_transformers():
    assert resolve(models.torchvision_vit(), "last-mlp", "1.heads.head") == ["1.encoder.layers.encoder_layer_1.mlp.3"]
    net = ViTForImageClassification(models.hf_vit_config())
    images = torch.randn(2, 1, 8, 8)
    assert resolve(net, "last-mlp", "classifier", images) == ["vit.layers.1.mlp.fc2"]
    assert len(resolve(net, "attention", "classifier", images)) == 8
    assert len(resolve(net, "mlp", "classifier", images)) == 4


def test_presets_of_a_plain_mlp_and_a_cnn():
    assert resolve(models.mlp(), "mlp", "5") == ["1", "3"]
    assert resolve(models.mlp(), "last-mlp", "5") == ["3"]
    assert resolve(models.cnn(), "mlp", "11") == ["8"]
    convolutional = nn.Sequential(
        models.Channels(1), nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(32, 4)
    )
    assert resolve(convolutional, "mlp", "4") == ["1", "2"]  # its only linear layer is the head
    assert resolve(convolutional, "last-mlp", "4") == ["2"]


def test_patterns_take_what_presets_leave_out():
    net = models.mlp()
    assert resolve(net, ["5"], "5") == ["5"]
    assert resolve(net, ["last-mlp", "1"], "5") == ["1", "3"]
    tied = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4))
    tied[2].weight = tied[1].weight
    assert resolve(tied, "mlp", "4") == ["3"]
    assert resolve(tied, ["mlp", "1"], "4") == ["1", "3"]


def test_a_pattern_that_matches_nothing_lists_near_names():
    with pytest.raises(ValueError, match=r"matches no editable layer. Did you mean 'blocks.0.fc1'"):
        choose_layers(models.vit(), "blocks.0.fc3")
    with pytest.raises(ValueError, match=r"'mpl' is no preset .*Did you mean 'mlp'"):
        choose_layers(models.vit(), "mpl")


def test_a_preset_without_layers_and_bad_types():
    with pytest.raises(ValueError, match="Preset 'attention' matches no layer"):
        choose_layers(models.mlp(), "attention")
    for layers in ([], [1]):
        with pytest.raises(TypeError, match="layers must be a preset"):
            choose_layers(models.mlp(), layers)


def test_layers_that_cannot_be_edited_are_refused_by_name():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"Layer '0' \(matched by '0'\) cannot be edited: .*groups=2"):
        choose_layers(net, "0")
    with pytest.raises(ValueError, match="remove_parametrizations"):
        choose_layers(net, "1*")


def test_a_layer_that_never_runs_is_an_error():
    net = models.torchvision_vit()
    choice = choose_layers(net, "attention")
    with pytest.raises(RuntimeError, match=r"out_proj' never ran .*nn.MultiheadAttention reads the weight"):
        choice.resolve([], set())


# What a layer is for ------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """Modules by attribute, which run one after the other."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        for part in self.children():
            x = part(x)
        return x


def named(title, **parts):
    """Make a module of a class of one's own."""
    return type(title, (Parts,), {})(**parts)


def lin(d_in=8, d_out=8):
    return nn.Linear(d_in, d_out)


def stack(*blocks):
    return nn.Sequential(nn.ModuleList(blocks), lin(8, 3))


def both(title="Block", **parts):
    """Two blocks with attention of torch's own and something beside it."""
    return stack(*(named(title, attn=nn.MultiheadAttention(8, 2), **{k: v() for k, v in parts.items()}) for _ in "ab"))


def mlp_in_out():
    return nn.ModuleDict({"in_proj": lin(8, 16), "mid": lin(16, 16), "out_proj": lin(16, 8)})


def qkv_flat():
    return named("Block", q=lin(), k=lin(), v=lin(), proj=lin(), fc1=lin(), fc2=lin(), norm=nn.LayerNorm(8))


class Attention(Parts):
    def __init__(self):
        super().__init__(to_q=lin(), to_kv=lin(8, 16), to_out=nn.Sequential(lin(), nn.Dropout(0.1)))


class PreNorm(Parts):
    def __init__(self, fn):
        super().__init__(norm=nn.LayerNorm(8), fn=fn)


def nested_lists(feed_forward):
    return nn.Sequential(nn.ModuleList(nn.ModuleList([PreNorm(Attention()), feed_forward()]) for _ in "ab"), lin(8, 3))


def experts():
    return named("MoE", gate=lin(8, 2), experts=nn.ModuleList(named("Expert", w1=lin(), w2=lin()) for _ in "ab"))


def mamba():
    mixer = named("MambaMixer", in_proj=lin(), x_proj=lin(), dt_proj=lin(), out_proj=lin())
    mixer.A_log = nn.Parameter(torch.zeros(3))
    return mixer


class Recurrence(Parts):
    """A module that holds one of torch's recurrent layers: its linear layers are not the recurrent ones."""


def hyena():
    return named("HyenaOperator", in_proj=lin(), out_proj=lin(), filter_fn=named("Filter", mlp=nn.Sequential(lin())))


def retention():
    return named("MultiScaleRetention", q_proj=lin(), k_proj=lin(), v_proj=lin(), g_proj=lin(), out_proj=lin())


def short_convolution():
    return named("Gated", in_proj=lin(), conv=nn.Conv1d(8, 8, 3, groups=8), out_proj=lin())


ROLES = {
    "an MLP with in_proj and out_proj": (lambda: both(mlp=mlp_in_out), "#.mlp.(in_proj|mid|out_proj)", ""),
    "of a feed-forward class": (
        lambda: both(net=lambda: named("FeedForward", in_proj=lin(), out_proj=lin())),
        "#.net.(in_proj|out_proj)",
        "",
    ),
    "without any word": (lambda: both(net=lambda: named("Thing", a=lin(), out_proj=lin())), "#.net.(a|out_proj)", ""),
    "linear1 and linear2": (
        lambda: stack(nn.TransformerEncoderLayer(8, 2, 16), nn.TransformerEncoderLayer(8, 2, 16)),
        "#.linear(1|2)",
        "",
    ),
    "projections beside the MLP": (lambda: stack(qkv_flat(), qkv_flat()), "#.(fc1|fc2)", "#.(q|k|v|proj)"),
    "lists of attention and MLP": (
        lambda: nested_lists(lambda: PreNorm(named("FeedForward", net=nn.Sequential(lin(), nn.GELU(), lin())))),
        "#.1.fn.net.(0|2)",
        "#.0.fn.(to_q|to_kv|to_out.0)",
    ),
    "lists with a plain Sequential": (
        lambda: nested_lists(lambda: nn.Sequential(lin(), nn.GELU(), lin())),
        "#.1.(0|2)",
        "#.0.fn.(to_q|to_kv|to_out.0)",
    ),
    "an MLP in an attention block": (
        lambda: stack(
            *(named("B", attention_block=named("AttentionBlock", inner=Attention(), mlp=mlp_in_out())) for _ in "ab")
        ),
        "#.attention_block.mlp.(in_proj|mid|out_proj)",
        "#.attention_block.inner.(to_q|to_kv|to_out.0)",
    ),
    "a position bias in attention": (
        lambda: stack(
            *(
                named(
                    "B",
                    attn=named(
                        "WindowAttention", qkv=lin(), proj=lin(), cpb_mlp=nn.Sequential(lin(), nn.ReLU(), lin())
                    ),
                    mlp=mlp_in_out(),
                )
                for _ in "ab"
            )
        ),
        "#.mlp.(in_proj|mid|out_proj)",
        "#.attn.(qkv|proj|cpb_mlp.0|cpb_mlp.2)",
    ),
    "experts and their router": (lambda: both(moe=experts), "#.moe.experts.(0|1).(w1|w2)", ""),
    "a stage with patch merging": (
        lambda: stack(
            *(
                named(
                    "Stage",
                    blocks=nn.ModuleList([named("B", attn=Attention(), mlp=mlp_in_out())]),
                    downsample=named("PatchMerging", reduction=lin()),
                    extra=lin(),
                )
                for _ in "ab"
            )
        ),
        "#.blocks.0.mlp.(in_proj|mid|out_proj)",
        "#.blocks.0.attn.(to_q|to_kv|to_out.0)",
    ),
    "mixers beside attention": (lambda: both(mixer=mamba, mlp=mlp_in_out), "#.mlp.(in_proj|mid|out_proj)", ""),
    "mixers beside MLPs": (
        lambda: stack(*(named("MambaBlock", mixer=mamba(), feed_forward=mlp_in_out()) for _ in "ab")),
        "#.feed_forward.(in_proj|mid|out_proj)",
        None,
    ),
    "Hyena": (
        lambda: stack(*(named("B", filter=hyena(), mlp=mlp_in_out()) for _ in "ab")),
        "#.mlp.(in_proj|mid|out_proj)",
        None,
    ),
    "retention": (
        lambda: stack(*(named("B", mix=retention(), ffn=mlp_in_out()) for _ in "ab")),
        "#.ffn.(in_proj|mid|out_proj)",
        None,
    ),
    "a gated convolution": (
        lambda: stack(*(named("B", op=short_convolution(), ff=mlp_in_out()) for _ in "ab")),
        "#.ff.(in_proj|mid|out_proj)",
        None,
    ),
}


def spelled(pattern, prefix):
    names = [pattern] if pattern else []
    while any(set("|#") & set(name) for name in names):
        split = []
        for name in names:
            group = re.search(r"\(([^()]*)\)|#", name)
            options = "01" if group[0] == "#" else group[1].split("|")
            split += [name[: group.start()] + option + name[group.end() :] for option in options]
        names = split
    return {prefix + name for name in names}


@pytest.mark.parametrize("case", ROLES)
def test_what_a_layer_is_for_is_told_by_what_is_around_it(case):
    make, mlp, attention = ROLES[case]
    net = make()
    uncalled = {name for name, part in net.named_modules() if type(part).__name__.startswith("NonDynamically")}
    choice = choose_layers(net, "mlp")
    everything = [name for name, part in net.named_modules() if isinstance(part, nn.Linear)]
    assert set(choice.resolve([name for name in everything if name in choice.modules], {"1"})) == spelled(mlp, "0.")
    if attention is None:
        with pytest.raises(ValueError, match="Preset 'attention' does not apply"):
            choose_layers(net, "attention")
    else:
        assert set(choose_layers(net, "attention").modules) == spelled(attention, "0.") | uncalled
    assert set(choose_layers(net, "linear").modules) == set(everything)


def test_recurrent_cells_of_linear_layers_are_no_mlp():
    class GRUCell(Parts):
        pass

    net = nn.Sequential(nn.ModuleList([GRUCell(gates=lin(), candidate=lin())]), lin(8, 3))
    with pytest.raises(ValueError, match=r"Preset 'mlp' does not apply .*: '0.0' \(GRUCell\).*layers=\['\*.0.gates'\]"):
        choose_layers(net, "mlp")

    class LSTM(Parts):
        """A whole network around a recurrent layer of torch."""

    net = nn.Sequential(LSTM(lstm=nn.LSTM(8, 8), fc1=lin(), fc2=lin(8, 3)))
    assert resolve_all(net, "mlp", {"0.fc2"}) == ["0.fc1"]


def resolve_all(net, layers, heads, dead=(), silent=(), read=()):
    """What is chosen if all candidates run, in the order in which they are written, but for some."""
    choice = choose_layers(net, layers)
    ran = [name for name in choice.modules if name not in silent]
    return choice.resolve(ran, set(heads), [name for name in dead if name in choice.modules], read)


def test_a_network_behind_a_module_that_reshapes_is_no_block():
    """Or the MLP of its head would be one of its blocks'."""
    blocks = nn.ModuleList(named("B", attn=Attention(), mlp=mlp_in_out()) for _ in "ab")
    net = nn.Sequential(nn.Flatten(), named("Net", blocks=blocks, mlp_head=named("MLP", fc1=lin(), fc2=lin(8, 3))))
    expected = spelled("#.mlp.(in_proj|mid|out_proj)", "1.blocks.")
    assert set(resolve_all(net, "mlp", {"1.mlp_head.fc2"})) == expected
    assert set(resolve_all(net[1], "mlp", {"mlp_head.fc2"})) == {name.removeprefix("1.") for name in expected}


def test_a_router_that_runs_last_is_not_the_output_of_an_mlp():
    gated = nn.Sequential(
        nn.ModuleList(
            [
                named(
                    "B", attn=nn.MultiheadAttention(8, 2), mlp=named("MLP", up=lin(), down=lin(), shared_gate=lin(8, 1))
                )
            ]
        ),
        lin(8, 3),
    )
    assert resolve_all(gated, "last-mlp", {"1"}) == ["0.0.mlp.down"]


# What does not run, or not with gradients ---------------------------------------------------------------------------


@pytest.fixture
def messages(monkeypatch):
    found = []
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_info", found.append)
    return found


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


# Weights that cannot be edited --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_preset_with_a_hole_is_refused_with_the_reason_and_the_remedy():
    net = nn.Sequential(nn.utils.weight_norm(lin()), lin(), lin(8, 3))
    for preset in ("mlp", "last-mlp", "linear"):
        with pytest.raises(
            ValueError, match=rf"Preset '{preset}' would leave out .* '0' .*remove_weight_norm\(module\)"
        ):
            choose_layers(net, preset)
    assert resolve(net, ["1"], "2", torch.randn(2, 8)) == ["1"]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_normalised_head_is_no_hole():
    net = nn.Sequential(lin(), lin(), nn.utils.weight_norm(lin(8, 3)))
    assert resolve_all(net, "mlp", ()) == ["0", "1"]
    with pytest.raises(RuntimeError, match=r"'2' \(its weight is computed .*weight_norm"):
        resolve_all(net, "mlp", ("1",))  # the head is another layer


def test_a_normalised_convolution_is_named_where_convolutions_are_what_is_left():
    net = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(1, 2, 3)), nn.Conv2d(2, 2, 3), nn.Flatten(), lin(8, 3))
    with pytest.raises(RuntimeError, match=r"Preset 'mlp' would leave out .* '0' .*remove_spectral_norm"):
        resolve_all(net, "mlp", {"3"})
    plain = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(1, 2, 3)), nn.Flatten(), lin(), lin(8, 3))
    assert resolve_all(plain, "mlp", {"3"}) == ["2"]


def test_lazy_layers_are_candidates():
    net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))
    choice = choose_layers(net, "mlp")
    assert list(choice.modules) == ["0", "2", "4"]
    assert choose_layers(net, "2").named == {"2"}
    net(torch.randn(2, 5))
    assert choice.resolve(["0", "2", "4"], {"4"}) == ["0", "2"]
    assert choice.modules["0"].weight.shape == (8, 5)


def test_the_last_of_layers_none_of_which_ran_is_an_error():
    net = nn.Sequential(lin(), lin(), nn.Conv2d(1, 1, 1), lin(8, 3))
    with pytest.raises(RuntimeError, match="Chosen layers '0', '1' never ran in the first collected batch"):
        choose_layers(net, ["last-mlp", "2"]).resolve(["2", "3"], {"3"})


def test_nothing_but_the_head():
    choice = choose_layers(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), "last-mlp")
    with pytest.raises(RuntimeError, match=r"nothing to edit besides the output head \('1'\)"):
        choice.resolve(["1"], {"1"})
