"""Tiny networks of transformers, by the names of their classes."""

import torch
import transformers as hf

V = 20
LLAMA_SIZES = {
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

BERT_SIZES = {
    "vocab_size": V,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "num_labels": 3,
}

VISION_SIZES = {
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
    config = getattr(hf, f"{kind}Config")(**({**LLAMA_SIZES, **changes}))
    return getattr(hf, f"{kind}ForCausalLM")(config)


def old(kind, **options):
    shared = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False}
    kinds = {"GPT2": "GPT2LMHeadModel"}
    return getattr(hf, kinds.get(kind, f"{kind}ForCausalLM"))(getattr(hf, f"{kind}Config")(**shared, **options))


def encoder(kind, **changes):
    return getattr(hf, f"{kind}ForSequenceClassification")(getattr(hf, f"{kind}Config")(**({**BERT_SIZES, **changes})))


def vision(kind, **changes):
    return getattr(hf, f"{kind}ForImageClassification")(getattr(hf, f"{kind}Config")(**({**VISION_SIZES, **changes})))


def text():
    return {"input_ids": torch.arange(1, 13).view(2, 6)}


def pair():
    return {**text(), "decoder_input_ids": torch.arange(1, 9).view(2, 4)}


def pixels(size=8):
    return {"pixel_values": torch.randn(2, 3, size, size)}


def clip_inputs():
    return {**text(), **pixels()}
