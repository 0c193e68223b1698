"""What the presets take of encoders and vision models of transformers, written by hand from their code."""

import pytest
import transformers as hf

from tests.support.architectures import Case, check_as_it_runs
from tests.support.hf_builders import BERT_SIZES, VISION_SIZES, V, clip_inputs, encoder, pair, pixels, text, vision

_SELF = "attention.(self.(query|key|value)|output.dense)"


def bert(kind, inside, head, linear="", **changes):
    return Case(
        lambda: encoder(kind, **changes),
        text,
        head,
        f"{inside}.encoder.layer.",
        "#.intermediate.dense #.output.dense",
        f"#.{_SELF}",
        "1.output.dense",
        f"/{head} {linear}",
    )


CASES = {
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
            hf.CLIPConfig(
                text_config={**BERT_SIZES, "max_position_embeddings": 16}, vision_config=VISION_SIZES, projection_dim=8
            )
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
                text_config={**BERT_SIZES, "max_position_embeddings": 16, "projection_size": 8},
                vision_config=VISION_SIZES,
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
}


@pytest.mark.parametrize("architecture", CASES)
def test_presets_of_transformers(architecture):
    check_as_it_runs(CASES[architecture])
