"""Probes count as the metric of noisy labels does."""

import pytest
import torch

from lightning_curvature.layers.modules import evaluating
from lightning_curvature.metrics.functional import noisy_label_accuracy
from lightning_curvature.trainer.measuring import run_probes
from tests.support.noisy import slow


def test_probes():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.9))
    model[1].eval()
    x, noised, clean = torch.randn(20, 3), torch.arange(20) % 4, torch.arange(20) // 3 % 4
    with evaluating(model):
        results = run_probes(
            model, {"train": [(x[:9], noised[:9], clean[:9]), (x[9:], noised[9:], clean[9:])], "val": [(x, clean)]}
        )
    assert model.training
    assert not model[1].training
    logits = model[0](x)
    expected = {f"train/{key}": value for key, value in slow(logits, noised, clean).items()}
    same = noised == clean
    expected["train/accuracy"] = float((logits.argmax(1) == clean)[same].float().mean())
    expected["val/accuracy"] = float((logits.argmax(1) == clean).float().mean())
    assert results == pytest.approx(expected)
    for bad, kind in ((x, "Tensor"), ([x], "list of 1")):
        with pytest.raises(ValueError, match=f"Probe 'p': a batch must be .* found {kind}"):
            run_probes(model, {"p": [bad]})


def test_probes_count_in_integers_whatever_the_precision():
    """bfloat16 stops to count at 256."""
    model = torch.nn.Linear(2, 2).bfloat16()
    x = torch.randn(3000, 2)
    labels = model(x.bfloat16()).argmax(1)
    labels[::3] = 1 - labels[::3]
    batches = [(a, b) for a, b in zip(x.split(10), labels.split(10), strict=True)]
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        results = run_probes(model, {"p": batches}, lambda batch: [batch[0].bfloat16(), batch[1]])
        noisy = noisy_label_accuracy(torch.eye(2), torch.tensor([1, 1]), torch.tensor([0, 0]))
    finally:
        torch.set_default_dtype(default)
    assert results["p/accuracy"] == pytest.approx(2 / 3)
    assert noisy["recovered"].dtype == torch.float32
