"""What the presets take of networks of mixers beside attention and MLPs, written by hand from their code."""

import pytest

from tests.support.architectures import Case, check_as_it_runs
from tests.support.hf_builders import causal, old, text

CASES = {
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
    check_as_it_runs(CASES[architecture])
