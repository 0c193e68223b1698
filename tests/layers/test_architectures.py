"""What the presets take of the architectures that people have, written by hand from their code."""

import pytest
import torch
import transformers as hf

from lightning_curvature.layers.selection import choose_layers
from tests.support.architectures import Case, check, order_of
from tests.support.hf_builders import (
    _BERT,
    _LLAMA,
    _VISION,
    V,
    causal,
    clip_inputs,
    encoder,
    old,
    pair,
    pixels,
    text,
    vision,
)

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


@pytest.mark.parametrize("architecture", CASES)
def test_presets_of_transformers(architecture):
    torch.manual_seed(0)
    case = CASES[architecture]
    net = case.make()
    # One that does not run at a tiny size runs in the order in which it is written.
    check(case, net, order_of(net, case.inputs()) if case.inputs else list(choose_layers(net, "linear").modules))
