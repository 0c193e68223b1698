"""What the presets take of the vision models of torchvision and timm."""

from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

from tests.support.architectures import Case, check, image, order_of, resolve

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
