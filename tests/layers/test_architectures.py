"""What the presets take of the architectures that people have, written by hand from their code."""

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torchvision
import transformers as hf
from torch import nn

from lightning_curvature.layers.kinds import is_matmul
from lightning_curvature.layers.selection import choose_layers

V = 20
_LLAMA = {
    "vocab_size": V,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
_BERT = {
    "vocab_size": V,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "num_labels": 3,
}
_VISION = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 3,
}


def causal(kind, **changes):
    config = getattr(hf, f"{kind}Config")(**({**_LLAMA, **changes}))
    return getattr(hf, f"{kind}ForCausalLM")(config)


def old(kind, **options):
    shared = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False}
    kinds = {"GPT2": "GPT2LMHeadModel"}
    return getattr(hf, kinds.get(kind, f"{kind}ForCausalLM"))(getattr(hf, f"{kind}Config")(**shared, **options))


def encoder(kind, **changes):
    return getattr(hf, f"{kind}ForSequenceClassification")(getattr(hf, f"{kind}Config")(**({**_BERT, **changes})))


def vision(kind, **changes):
    return getattr(hf, f"{kind}ForImageClassification")(getattr(hf, f"{kind}Config")(**({**_VISION, **changes})))


def text():
    return {"input_ids": torch.arange(1, 13).view(2, 6)}


def pair():
    return {**text(), "decoder_input_ids": torch.arange(1, 9).view(2, 4)}


def pixels(size=8):
    return {"pixel_values": torch.randn(2, 3, size, size)}


def image(size=32):
    return torch.randn(2, 3, size, size)


def clip_inputs():
    return {**text(), **pixels()}


@dataclass
class Case:
    """Layers are relative to ``inside``; ``#`` stands for 0 and 1, ``a|b`` for a and b."""

    make: Any
    inputs: Any
    head: str
    inside: str = ""
    mlp: str = ""
    attention: str = ""
    last: str = ""
    other: str = ""
    uncalled: str = ""

    def names(self, field):
        """Write a field out."""
        found = set()
        for pattern in getattr(self, field).split():
            options = [pattern[1:] if pattern.startswith("/") else self.inside + pattern]
            while any(set("|#") & set(name) for name in options):
                options = [part for name in options for part in _expand(name)]
            found |= set(options)
        return found


def _expand(name):
    if "#" in name:
        return [name.replace("#", str(i), 1) for i in (0, 1)]
    group = re.search(r"\(([^()]*)\)", name)
    if group is None:
        return [name]
    return [name[: group.start()] + option + name[group.end() :] for option in group[1].split("|")]


_QKVO = "layers.#.self_attn.(q|k|v|o)_proj"
_SWIGLU = "layers.#.mlp.(gate|up|down)_proj"
_SELF = "attention.(self.(query|key|value)|output.dense)"


def swiglu(kind, **changes):
    return Case(
        lambda: causal(kind, **changes), text, "lm_head", "model.", _SWIGLU, _QKVO, "layers.1.mlp.down_proj", "/lm_head"
    )


def bert(kind, inside, head, other="", **changes):
    return Case(
        lambda: encoder(kind, **changes),
        text,
        head,
        f"{inside}.encoder.layer.",
        "#.intermediate.dense #.output.dense",
        f"#.{_SELF}",
        "1.output.dense",
        f"/{head} {other}",
    )


CASES = {
    "GPT-2": Case(
        lambda: old("GPT2", n_embd=8, n_layer=2, n_head=2),
        text,
        "lm_head",
        "transformer.h.",
        "#.mlp.(c_fc|c_proj)",
        "#.attn.(c_attn|c_proj)",
        "1.mlp.c_proj",
        "/lm_head",
    ),
    "GPT-NeoX": Case(
        lambda: old("GPTNeoX", hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2),
        text,
        "lm_head|embed_out",
        "gpt_neox.layers.",
        "#.mlp.(dense_h_to_4h|dense_4h_to_h)",
        "#.attention.(query_key_value|dense)",
        "1.mlp.dense_4h_to_h",
    ),
    "GPT-J": Case(
        lambda: old("GPTJ", n_embd=8, n_layer=2, n_head=2, rotary_dim=4),
        text,
        "lm_head",
        "transformer.h.",
        "#.mlp.(fc_in|fc_out)",
        "#.attn.(q|k|v|out)_proj",
        "1.mlp.fc_out",
        "/lm_head",
    ),
    "OPT": Case(
        lambda: old(
            "OPT",
            hidden_size=8,
            ffn_dim=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=6,
            max_position_embeddings=32,
        ),
        text,
        "lm_head",
        "model.decoder.layers.",
        "#.(fc1|fc2)",
        "#.self_attn.(q|k|v|out)_proj",
        "1.fc2",
        "/lm_head /model.decoder.project_(in|out)",
    ),
    "BLOOM": Case(
        lambda: old("Bloom", hidden_size=8, n_layer=2, n_head=2),
        text,
        "lm_head",
        "transformer.h.",
        "#.mlp.(dense_h_to_4h|dense_4h_to_h)",
        "#.self_attention.(query_key_value|dense)",
        "1.mlp.dense_4h_to_h",
        "/lm_head",
    ),
    "Falcon": Case(
        lambda: old("Falcon", hidden_size=8, num_hidden_layers=2, num_attention_heads=2),
        text,
        "lm_head",
        "transformer.h.",
        "#.mlp.(dense_h_to_4h|dense_4h_to_h)",
        "#.self_attention.(query_key_value|dense)",
        "1.mlp.dense_4h_to_h",
        "/lm_head",
    ),
    "MPT": Case(
        lambda: old("Mpt", d_model=8, n_heads=2, n_layers=2, max_seq_len=32),
        text,
        "lm_head",
        "transformer.blocks.",
        "#.ffn.(up|down)_proj",
        "#.attn.(Wqkv|out_proj)",
        "1.ffn.down_proj",
        "/lm_head",
    ),
    "Llama": swiglu("Llama"),
    "Mistral": swiglu("Mistral"),
    "Qwen2": swiglu("Qwen2"),
    "Qwen3": swiglu("Qwen3", head_dim=4),
    "Gemma": swiglu("Gemma", head_dim=4),
    "Gemma 2": swiglu("Gemma2", head_dim=4),
    "OLMo-2": swiglu("Olmo2"),
    "StableLM": swiglu("StableLm"),
    "Gemma 3": Case(
        lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_LLAMA, head_dim=4)),
        text,
        "lm_head",
        "model.",
        _SWIGLU,
        _QKVO,
        "layers.1.mlp.down_proj",
        "/lm_head",
    ),
    "Phi": Case(
        lambda: causal("Phi"),
        text,
        "lm_head",
        "model.layers.",
        "#.mlp.(fc1|fc2)",
        "#.self_attn.(q_proj|k_proj|v_proj|dense)",
        "1.mlp.fc2",
        "/lm_head",
    ),
    "Phi-3": Case(
        lambda: causal("Phi3"),
        text,
        "lm_head",
        "model.layers.",
        "#.mlp.(gate_up|down)_proj",
        "#.self_attn.(qkv|o)_proj",
        "1.mlp.down_proj",
        "/lm_head",
    ),
    "BERT": bert("Bert", "bert", "classifier", "/bert.pooler.dense"),
    "RoBERTa": bert("Roberta", "roberta", "classifier.out_proj", "/classifier.dense"),
    "ELECTRA": bert("Electra", "electra", "classifier.out_proj", "/classifier.dense", embedding_size=8),
    "DistilBERT": Case(
        lambda: encoder("DistilBert", dim=8, hidden_dim=12, n_layers=2, n_heads=2),
        text,
        "classifier",
        "distilbert.transformer.layer.",
        "#.ffn.(lin1|lin2)",
        "#.attention.(q|k|v|out)_lin",
        "1.ffn.lin2",
        "/classifier /pre_classifier",
    ),
    "ALBERT": Case(
        lambda: encoder("Albert", embedding_size=6),
        text,
        "classifier",
        "albert.encoder.albert_layer_groups.0.albert_layers.0.",
        "ffn ffn_output",
        "attention.(query|key|value|dense)",
        "ffn_output",
        "/classifier /albert.pooler /albert.encoder.embedding_hidden_mapping_in",
    ),
    "T5": Case(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=V,
                d_model=8,
                d_kv=4,
                d_ff=12,
                num_layers=2,
                num_heads=2,
                tie_word_embeddings=False,
                feed_forward_proj="gated-gelu",
                decoder_start_token_id=0,
            )
        ),
        pair,
        "lm_head",
        "",
        "encoder.block.#.layer.1.DenseReluDense.(wi_0|wi_1|wo) decoder.block.#.layer.2.DenseReluDense.(wi_0|wi_1|wo)",
        "(encoder|decoder).block.#.layer.0.SelfAttention.(q|k|v|o) decoder.block.#.layer.1.EncDecAttention.(q|k|v|o)",
        "decoder.block.1.layer.2.DenseReluDense.wo",
    ),
    "BART": Case(
        lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(
                vocab_size=V,
                d_model=8,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=12,
                decoder_ffn_dim=12,
                max_position_embeddings=32,
                pad_token_id=0,
                bos_token_id=0,
                eos_token_id=0,
                decoder_start_token_id=0,
                forced_eos_token_id=None,
                tie_word_embeddings=False,
            )
        ),
        pair,
        "lm_head",
        "model.",
        "(encoder|decoder).layers.#.(fc1|fc2)",
        "(encoder|decoder).layers.#.self_attn.(q|k|v|out)_proj decoder.layers.#.encoder_attn.(q|k|v|out)_proj",
        "decoder.layers.1.fc2",
        "/lm_head",
    ),
    "ViT": Case(
        lambda: vision("ViT"),
        pixels,
        "classifier",
        "vit.layers.",
        "#.mlp.(fc1|fc2)",
        "#.attention.(q|k|v|o)_proj",
        "1.mlp.fc2",
        "/classifier",
    ),
    "DeiT": Case(
        lambda: vision("DeiT"),
        pixels,
        "classifier",
        "deit.layers.",
        "#.mlp.(fc1|fc2)",
        "#.attention.(q|k|v|o)_proj",
        "1.mlp.fc2",
        "/classifier",
    ),
    "BEiT": Case(
        lambda: vision("Beit", vocab_size=V),
        pixels,
        "classifier",
        "beit.layers.",
        "#.mlp.(fc1|fc2)",
        "#.attention.(q|k|v|o)_proj",
        "1.mlp.fc2",
        "/classifier",
    ),
    "DINOv2": Case(
        lambda: vision("Dinov2"),
        pixels,
        "classifier",
        "dinov2.encoder.layer.",
        "#.mlp.(fc1|fc2)",
        "#.attention.(q|k|v|o)_proj",
        "1.mlp.fc2",
        "/classifier",
    ),
    "Swin": Case(
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(
                image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, num_labels=3
            )
        ),
        lambda: pixels(16),
        "classifier",
        "swin.encoder.layers.",
        "#.blocks.0.mlp.(fc1|fc2)",
        "#.blocks.0.attention.(q|k|v|o)_proj",
        "1.blocks.0.mlp.fc2",
        "/classifier 0.downsample.reduction",
    ),
    "CLIP": Case(
        lambda: hf.CLIPModel(
            hf.CLIPConfig(text_config={**_BERT, "max_position_embeddings": 16}, vision_config=_VISION, projection_dim=8)
        ),
        clip_inputs,
        "",
        "",
        "(text|vision)_model.encoder.layers.#.mlp.(fc1|fc2)",
        "(text|vision)_model.encoder.layers.#.self_attn.(q|k|v|out)_proj",
        "ANY",
        "text_projection visual_projection",
    ),
    "SigLIP": Case(
        lambda: hf.SiglipModel(
            hf.SiglipConfig(
                text_config={**_BERT, "max_position_embeddings": 16, "projection_size": 8}, vision_config=_VISION
            )
        ),
        clip_inputs,
        "",
        "",
        "(text|vision)_model.encoder.layers.#.mlp.(fc1|fc2)",
        "(text|vision)_model.encoder.layers.#.self_attn.(q|k|v|out)_proj",
        "ANY",
        "vision_model.head.mlp.(fc1|fc2) text_model.head",
        "vision_model.head.attention.out_proj",
    ),
    "ConvNeXt": Case(
        lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, num_labels=3)
        ),
        lambda: pixels(16),
        "classifier",
        "convnext.encoder.stages.",
        "#.layers.0.pwconv(1|2)",
        "",
        "1.layers.0.pwconv2",
        "/classifier",
    ),
    # Hybrids: the mixers are in neither, and in "linear".
    "Jamba": Case(
        lambda: causal(
            "Jamba",
            num_experts=1,
            num_experts_per_tok=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            use_mamba_kernels=False,
            mamba_d_state=4,
            mamba_dt_rank=3,
        ),
        text,
        "lm_head",
        "model.layers.",
        "#.feed_forward.(gate|up|down)_proj",
        "1.self_attn.(q|k|v|o)_proj",
        "1.feed_forward.down_proj",
        "/lm_head 0.mamba.(in|x|out)_proj",
        "0.mamba.dt_proj",
    ),
    "Falcon-H1": Case(
        lambda: causal(
            "FalconH1", head_dim=4, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=4
        ),
        text,
        "lm_head",
        "model.layers.",
        "#.feed_forward.(gate|up|down)_proj",
        "#.self_attn.(q|k|v|o)_proj",
        "1.feed_forward.down_proj",
        "/lm_head #.mamba.(in|out)_proj",
    ),
    "Bamba": Case(
        lambda: causal(
            "Bamba",
            attn_layer_indices=[1],
            mamba_n_heads=2,
            mamba_d_head=8,
            mamba_n_groups=1,
            mamba_d_state=4,
            mamba_expand=2,
        ),
        text,
        "lm_head",
        "model.layers.",
        "#.feed_forward.(gate|up|down)_proj",
        "1.self_attn.(q|k|v|o)_proj",
        "1.feed_forward.down_proj",
        "/lm_head 0.mamba.(in|out)_proj",
    ),
    "RecurrentGemma": Case(
        lambda: causal(
            "RecurrentGemma", block_types=["recurrent", "attention"], lru_width=8, attention_window_size=8, head_dim=4
        ),
        text,
        "lm_head",
        "model.layers.",
        "#.mlp_block.(gate|up|down)_proj",
        "1.temporal_block.(q|k|v|o)_proj",
        "1.mlp_block.down_proj",
        "/lm_head 0.temporal_block.linear_(x|y|out)",
    ),
    "Zamba 2": Case(
        lambda: causal(
            "Zamba2",
            layers_block_type=["mamba", "hybrid"],
            hybrid_layer_ids=[1],
            mamba_d_state=4,
            mamba_ngroups=1,
            n_mamba_heads=2,
            mamba_headdim=8,
            num_mem_blocks=1,
            use_shared_attention_adapter=False,
            adapter_rank=2,
            attention_head_dim=8,
        ),
        text,
        "lm_head",
        "model.layers.",
        "1.shared_transformer.feed_forward.(gate_up|down)_proj "
        "1.shared_transformer.feed_forward.gate_up_proj_adapter_list.0.#",
        "1.shared_transformer.self_attn.(q|k|v|o)_proj",
        "1.shared_transformer.feed_forward.down_proj",
        "/lm_head 1.linear 0.mamba.(in|out)_proj 1.mamba_decoder.mamba.(in|out)_proj",
    ),
    "xLSTM": Case(
        lambda: old("xLSTM", hidden_size=8, num_hidden_layers=2, num_heads=2),
        None,
        "lm_head",
        "backbone.blocks.",
        "#.ffn.(proj_up|proj_up_gate|proj_down)",
        "",
        "1.ffn.proj_down",
        "/lm_head #.mlstm_layer.(q|k|v|(i|f|o)gate_preact|out_proj)",
    ),
    "RWKV": Case(
        lambda: old(
            "Rwkv", hidden_size=8, attention_hidden_size=8, intermediate_size=12, num_hidden_layers=2, context_length=16
        ),
        text,
        "head",
        "rwkv.blocks.",
        "#.feed_forward.(key|value|receptance)",
        "",
        "1.feed_forward.value",
        "/head #.attention.(key|value|receptance|output)",
    ),
}
MIXERS = {
    "Mamba": (
        lambda: old("Mamba", hidden_size=8, state_size=4, num_hidden_layers=2, time_step_rank=3),
        text,
        r"'backbone.layers.0.mixer' \(MambaMixer\)",
        "*.mixer.out_proj",
        "#.mixer.(in_proj|x_proj|out_proj)",
    ),
    "Mamba 2": (
        lambda: old(
            "Mamba2", hidden_size=8, state_size=4, num_hidden_layers=2, num_heads=2, head_dim=8, expand=2, n_groups=1
        ),
        text,
        r"'backbone.layers.0.mixer' \(Mamba2Mixer\)",
        "*.mixer.out_proj",
        "#.mixer.(in_proj|out_proj)",
    ),
}


def order_of(net, inputs):
    """Run a network and return its linear layers and convolutions in the order in which they run."""
    order, names = [], {module: name for name, module in net.named_modules()}
    kinds = [module for module in names if is_matmul(module) or isinstance(module, nn.Conv2d)]
    handles = [module.register_forward_hook(lambda m, *_: order.append(names[m])) for module in kinds]
    net.eval()
    net(**inputs) if isinstance(inputs, dict) else net(inputs)
    for handle in handles:
        handle.remove()
    return order


def resolve(net, preset, order, head):
    choice = choose_layers(net, preset)
    return choice.resolve([name for name in order if name in choice.modules], {head})


def check(case, net, order):
    head = next(name for name in (*case.head.split("|"), "") if name in dict(net.named_modules()))
    mlp, attention, other, uncalled = (case.names(field) for field in ("mlp", "attention", "other", "uncalled"))
    if mlp:
        assert set(resolve(net, "mlp", order, head)) == mlp
    if attention:
        assert set(resolve(net, "attention", order, head)) == attention
    elif not uncalled:
        with pytest.raises(ValueError, match="Preset 'attention'"):
            choose_layers(net, "attention")
    if case.last != "ANY":
        assert resolve(net, "last-mlp", order, head) == sorted(case.names("last"))
    tied = {"lm_head"} if architecture_ties(net) else set()
    linear = {name for name in mlp | attention | other | {head} - {""} if is_matmul(net.get_submodule(name))} - tied
    assert set(choose_layers(net, "linear").modules) == linear | uncalled
    if linear - {head}:
        assert set(resolve(net, "linear", order, head)) == linear - {head}


def architecture_ties(net):
    return hasattr(net, "lm_head") and net.lm_head.weight is net.get_input_embeddings().weight


@pytest.mark.parametrize("architecture", CASES)
def test_presets_of_transformers(architecture):
    torch.manual_seed(0)
    case = CASES[architecture]
    net = case.make()
    # One that does not run at a tiny size runs in the order in which it is written.
    check(case, net, order_of(net, case.inputs()) if case.inputs else list(choose_layers(net, "linear").modules))


@pytest.mark.parametrize("architecture", MIXERS)
@pytest.mark.parametrize("preset", ["mlp", "last-mlp", "attention"])
def test_a_network_of_mixers_alone_is_refused_by_name(architecture, preset):
    make, _, words, pattern, _ = MIXERS[architecture]
    with pytest.raises(ValueError, match=rf"Preset '{preset}' does not apply .* mixers, .*: {words}") as error:
        choose_layers(make(), preset)
    assert f"layers=['{pattern}']" in str(error.value)


@pytest.mark.parametrize("architecture", MIXERS)
def test_layers_of_mixers_that_are_called(architecture):
    """Some weights are read by a kernel, or by a product in the mixer's own code: "linear" leaves those layers out."""
    make, inputs, _, pattern, called = MIXERS[architecture]
    net = make()
    order, head = order_of(net, inputs()), "lm_head"
    names = Case(None, None, "", "backbone.layers.", called).names("mlp")
    assert set(resolve(net, "linear", order, head)) == names
    assert set(resolve(net, pattern, order, head)) == {name for name in names if name.endswith("out_proj")}
    if architecture == "Mamba":
        assert "backbone.layers.0.mixer.dt_proj" in choose_layers(net, "linear").modules
        with pytest.raises(RuntimeError, match=r"mixer.dt_proj' never ran"):
            resolve(net, ["*.in_proj", "*.0.mixer.dt_proj"], order, head)


# Networks that are large, whatever their arguments, run on the meta device; their layers are chosen unwritten.

tv = torchvision.models


def classifier(name, **options):
    return lambda: getattr(tv, name)(num_classes=3, **options)


def tv_swin(version):
    kinds = (
        {}
        if version == 1
        else {
            "block": tv.swin_transformer.SwinTransformerBlockV2,
            "downsample_layer": tv.swin_transformer.PatchMergingV2,
        }
    )
    return lambda: tv.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=3, **kinds)


def tv_maxvit():
    return tv.MaxVit(
        input_size=(32, 32),
        stem_channels=8,
        partition_size=4,
        block_channels=[8, 16],
        block_layers=[1, 1],
        head_dim=4,
        stochastic_depth_prob=0.0,
        num_classes=3,
    )


def timm_model(name, **options):
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=3, **options)


_MLP03 = "features.(1|3).0.mlp.(0|3)"
_TIMM = Case(None, None, "head", "blocks.", "#.mlp.(fc1|fc2)", "#.attn.(qkv|proj)", "1.mlp.fc2")
VISION = {
    "torchvision ViT": Case(
        lambda: tv.VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=3),
        lambda: image(8),
        "heads.head",
        "encoder.layers.encoder_layer_#.",
        "mlp.(0|3)",
        "",
        "/encoder.layers.encoder_layer_1.mlp.3",
        "",
        "self_attention.out_proj",
    ),
    "torchvision Swin": Case(
        tv_swin(1),
        image,
        "head",
        "",
        _MLP03,
        "",
        "features.3.0.mlp.3",
        "features.2.reduction",
        "features.(1|3).0.attn.(qkv|proj)",
    ),
    "torchvision Swin 2": Case(
        tv_swin(2),
        image,
        "head",
        "",
        _MLP03,
        "features.(1|3).0.attn.cpb_mlp.(0|2)",
        "features.3.0.mlp.3",
        "features.2.reduction",
        "features.(1|3).0.attn.(qkv|proj)",
    ),
    "torchvision MaxViT": Case(
        tv_maxvit,
        image,
        "classifier.5",
        "blocks.#.layers.0.layers.(window|grid)_attention.",
        "mlp_layer.(1|3)",
        "attn_layer.1.(to_qkv|merge)",
        "/blocks.1.layers.0.layers.grid_attention.mlp_layer.3",
        "/classifier.3",
    ),
    "torchvision ConvNeXt": Case(
        lambda: tv.ConvNeXt(
            [tv.convnext.CNBlockConfig(8, 16, 1), tv.convnext.CNBlockConfig(16, None, 1)], num_classes=3
        ),
        image,
        "classifier.2",
        "features.",
        "(1|3).0.block.(3|5)",
        "",
        "3.0.block.5",
    ),
    "VGG": Case(
        classifier("vgg11", init_weights=False), image, "classifier.6", "", "classifier.(0|3)", "", "classifier.3"
    ),
    "AlexNet": Case(
        classifier("alexnet"), lambda: image(64), "classifier.6", "", "classifier.(1|4)", "", "classifier.4"
    ),
    "MobileNet 3": Case(
        classifier("mobilenet_v3_small"), image, "classifier.3", "", "classifier.0", "", "classifier.0"
    ),
    # No linear layer but the head: the convolutions, which are not grouped; the last one that runs.
    "ResNet": Case(classifier("resnet18"), image, "fc", "", "", "", "layer4.1.conv2"),
    "MobileNet 2": Case(classifier("mobilenet_v2"), image, "classifier.1", "", "", "", "features.18.0"),
    "EfficientNet": Case(classifier("efficientnet_b0"), image, "classifier.1", "", "", "", "features.8.0"),
    "DenseNet": Case(
        classifier("densenet121"), image, "classifier", "", "", "", "features.denseblock4.denselayer16.conv2"
    ),
    "timm ViT": replace(_TIMM, make=timm_model("vit_tiny_patch16_224", img_size=32, depth=2), inputs=image),
    "timm EVA": replace(
        _TIMM,
        make=timm_model("eva02_tiny_patch14_224", img_size=28, depth=2),
        inputs=lambda: image(28),
        attention="#.attn.proj",
        uncalled="#.attn.qkv",
    ),
    "timm Swin": Case(
        timm_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), num_heads=(2, 2), embed_dim=8),
        lambda: image(56),
        "head.fc",
        "layers.#.blocks.0.",
        "mlp.(fc1|fc2)",
        "attn.(qkv|proj)",
        "/layers.1.blocks.0.mlp.fc2",
        "/layers.1.downsample.reduction",
    ),
    "timm Swin 2": Case(
        timm_model("swinv2_tiny_window8_256", img_size=64, depths=(1, 1), num_heads=(2, 2), embed_dim=8),
        lambda: image(64),
        "head.fc",
        "layers.#.blocks.0.",
        "mlp.(fc1|fc2)",
        "attn.(proj|cpb_mlp.(0|2))",
        "/layers.1.blocks.0.mlp.fc2",
        "/layers.1.downsample.reduction",
        "attn.qkv",
    ),
    "timm MLP-Mixer": Case(
        timm_model("mixer_s32_224", img_size=64),
        lambda: image(64),
        "head",
        "blocks.",
        "(0|1|2|3|4|5|6|7).mlp_(tokens|channels).(fc1|fc2)",
        "",
        "7.mlp_channels.fc2",
    ),
    "timm ConvNeXt": Case(
        timm_model("convnext_nano_ols", depths=(1, 1, 1, 1)), image, "head.fc", "stages.", "", "", "3.blocks.0.mlp.fc2"
    ),
    "timm SigLIP": Case(
        timm_model("vit_base_patch16_siglip_224", img_size=32, depth=2),
        image,
        "head",
        "blocks.",
        "#.mlp.(fc1|fc2)",
        "#.attn.(qkv|proj) /attn_pool.(q|kv|proj)",
        "1.mlp.fc2",
        "/attn_pool.mlp.(fc1|fc2)",
    ),
}


@pytest.mark.parametrize("architecture", VISION)
def test_presets_of_vision_models(architecture):
    case = VISION[architecture]
    with torch.device("meta"):
        net = case.make()
    order = order_of(net, case.inputs().to("meta"))
    net.to_empty(device="cpu")
    check(case, net, order)
    if not case.mlp:
        plain = {name for name, part in net.named_modules() if isinstance(part, nn.Conv2d) and part.groups == 1}
        assert set(resolve(net, "mlp", order, case.head)) == plain
