"""Accuracy under noisy labels, against a loop."""

import math

import pytest
import torch

from lightning_curvature.metrics import NoisyLabelAccuracy
from lightning_curvature.metrics.functional import noisy_label_accuracy
from tests.support.noisy import slow


@pytest.mark.parametrize("seed", range(5))
def test_against_a_loop_and_in_batches(seed):
    torch.manual_seed(seed)
    logits, noised, clean = torch.randn(50, 4), torch.randint(4, (50,)), torch.randint(4, (50,))
    expected = slow(logits, noised, clean)
    metric = NoisyLabelAccuracy()
    for part in torch.arange(50).split(7):
        metric.update(logits[part], noised[part], clean[part])
    for rates in (noisy_label_accuracy(logits, noised, clean), metric.compute()):
        assert {name: float(value) for name, value in rates.items()} == pytest.approx(expected)
    partial = NoisyLabelAccuracy()
    partial.update(logits[:20], noised[:20], clean[:20])
    assert metric.counts.dtype == partial.counts.dtype == torch.int64
    assert metric.higher_is_better is None


def test_counts_stay_integers_in_a_module_of_another_dtype():
    metric = NoisyLabelAccuracy().set_dtype(torch.float16)
    torch.nn.ModuleList([metric]).to(torch.bfloat16).half()
    metric.update(torch.eye(2).repeat(1500, 1), torch.ones(3000).long(), torch.zeros(3000).long())
    assert metric.counts.dtype == torch.int64
    assert metric.counts.tolist() == [1500, 1500, 3000]


def test_without_a_noised_label_there_is_no_rate():
    labels = torch.tensor([0, 1])
    assert all(math.isnan(rate) for rate in noisy_label_accuracy(torch.eye(2), labels, labels).values())


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"found \[2, 2\], \[3\] and \[2\]"):
        NoisyLabelAccuracy().update(torch.eye(2), torch.zeros(3).long(), torch.zeros(2).long())


def test_plot():
    metric = NoisyLabelAccuracy()
    metric.update(torch.eye(2), torch.tensor([1, 1]), torch.tensor([0, 0]))
    figure, _ = metric.plot()
    assert figure.axes
