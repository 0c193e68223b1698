"""What the presets take of language models of transformers, written by hand from their code."""

import pytest
import transformers as hf

from tests.support.architectures import Case, check_as_it_runs
from tests.support.hf_builders import LLAMA_SIZES, causal, old, text

_QKVO = "layers.#.self_attn.(q|k|v|o)_proj"
_SWIGLU = "layers.#.mlp.(gate|up|down)_proj"


def swiglu(kind, **changes):
    return Case(
        lambda: causal(kind, **changes), text, "lm_head", "model.", _SWIGLU, _QKVO, "layers.1.mlp.down_proj", "/lm_head"
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
        lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**LLAMA_SIZES, head_dim=4)),
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
}


@pytest.mark.parametrize("architecture", CASES)
def test_presets_of_transformers(architecture):
    check_as_it_runs(CASES[architecture])
