"""Which positions of a batch count."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTForImageClassification

from lightning_curvature.collect.collector import Collector
from lightning_curvature.recording.options import CollectorOptions
from tests.support import models
from tests.support.steps import data, gather, images, network, same


def test_only_the_class_token_counts_in_the_last_block_of_a_vit():
    torch.manual_seed(0)
    model, (x, y) = models.vit(), images()
    step = lambda _: F.cross_entropy(model(x), y)  # noqa: E731
    factors = gather(model, step, layers=["blocks.*"], fisher="sketched")
    cls = gather(model, step, layers=["blocks.*"], fisher="sketched", positions="first")
    for name in ("blocks.1.fc1", "blocks.1.fc2", "blocks.1.attention.proj"):
        assert (factors[name].num_inputs, factors[name].num_seen) == (12, 60)
        torch.testing.assert_close(factors[name].A, cls[name].A)
        torch.testing.assert_close(factors[name].G, cls[name].G)
    for name in ("blocks.0.fc2", "blocks.1.attention.qkv"):
        assert factors[name].num_inputs == 60


def test_transformers_vit_finds_the_same_rule():
    torch.manual_seed(0)
    model, (x, y) = ViTForImageClassification(models.hf_vit_config()), images()
    factors = gather(model, lambda _: model(pixel_values=x[:, None], labels=y).loss, layers=["*.1.mlp.*"])
    assert factors["vit.layers.1.mlp.fc2"].num_inputs == 12


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.fc(x)))


def test_ignored_positions_do_not_count_as_an_explicit_mask_says():
    torch.manual_seed(0)
    model, x, y = Padded(), torch.randn(5, 7, 4), torch.randint(3, (5, 7))
    mask = torch.arange(7) < torch.tensor([7, 5, 3, 1, 6])[:, None]
    y[~mask] = -100
    x[~mask] = 1e3  # whatever stands at padding
    batch = {"attention_mask": mask}
    step = lambda _: F.cross_entropy(model(x).flatten(0, 1), y.flatten())  # noqa: E731
    for kind in ("sketched", "empirical", "exact", "sampled"):
        rule = gather(model, step, [batch], layers=["fc"], fisher=kind)
        explicit = gather(model, step, [batch], layers=["fc"], fisher=kind, positions="mask:attention_mask")
        same(rule, explicit)
        assert rule["fc"].num_inputs == 22
    assert gather(model, step, layers=["fc"], positions="all")["fc"].num_inputs == 35


def test_classes_in_dimension_one_and_class_probabilities():
    torch.manual_seed(0)
    model, x, y = Padded().double(), torch.randn(5, 7, 4).double(), torch.randint(3, (5, 7))
    y[0, 3:] = -100
    flat = lambda _: F.cross_entropy(model(x).flatten(0, 1), y.flatten())  # noqa: E731
    channels = lambda _: F.cross_entropy(model(x).movedim(-1, 1), y)  # noqa: E731
    for kind in ("exact", "empirical"):
        same(gather(model, flat, layers=["fc"], fisher=kind), gather(model, channels, layers=["fc"], fisher=kind))
    full = torch.randint(3, (5, 7))
    soft = lambda _: F.cross_entropy(model(x).flatten(0, 1), F.one_hot(full.flatten(), 3).double())  # noqa: E731
    hard = lambda _: F.cross_entropy(model(x).flatten(0, 1), full.flatten())  # noqa: E731
    same(gather(model, soft, layers=["fc"]), gather(model, hard, layers=["fc"]))


def test_bad_positions():
    with pytest.raises(ValueError, match="positions must be one of"):
        Collector(models.mlp(), CollectorOptions(layers="mlp", positions="last"))
    model, x, y = Padded(), torch.randn(5, 7, 4), torch.randint(3, (5, 7))
    step = lambda _: F.cross_entropy(model(x).flatten(0, 1), y.flatten())  # noqa: E731
    with pytest.raises(RuntimeError, match=r"the batch has no 'mask', found \['ids'\]"):
        gather(model, step, [{"ids": x}], layers=["fc"], positions="mask:mask")
    with pytest.raises(RuntimeError, match=r"positions \[5, 7\], the mask is \[2, 2\]"):
        gather(model, step, [{"mask": torch.ones(2, 2)}], layers=["fc"], positions="mask:mask")
    deep = lambda _: F.cross_entropy(model(x[None])[0].flatten(0, 1), y.flatten())  # noqa: E731
    with pytest.raises(RuntimeError, match=r"positions='first': layer 'fc' has outputs \[1, 5, 7, 6\]"):
        gather(model, deep, layers=["fc"], positions="first")
    single = network()
    x, y = data()
    plain = lambda _: F.cross_entropy(single(x), y)  # noqa: E731
    same(gather(single, plain, positions="first"), gather(single, plain))
