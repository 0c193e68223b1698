"""What a layer is for is told by what is around it."""

import pytest
import torch
from torch import nn

from lightning_curvature.layers.selection import choose_layers
from tests.support.blocks import Attention, Parts, both, experts, lin, mlp_in_out, named, resolve_all, spelled, stack


def qkv_flat():
    return named("Block", q=lin(), k=lin(), v=lin(), proj=lin(), fc1=lin(), fc2=lin(), norm=nn.LayerNorm(8))


class PreNorm(Parts):
    def __init__(self, fn):
        super().__init__(norm=nn.LayerNorm(8), fn=fn)


def nested_lists(feed_forward):
    return nn.Sequential(nn.ModuleList(nn.ModuleList([PreNorm(Attention()), feed_forward()]) for _ in "ab"), lin(8, 3))


def mamba():
    mixer = named("MambaMixer", in_proj=lin(), x_proj=lin(), dt_proj=lin(), out_proj=lin())
    mixer.A_log = nn.Parameter(torch.zeros(3))
    return mixer


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
