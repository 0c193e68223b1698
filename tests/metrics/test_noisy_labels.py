import math

import pytest
import torch

from lightning_curvature.layers.modules import evaluating
from lightning_curvature.metrics import NoisyLabelAccuracy
from lightning_curvature.metrics.functional import noisy_label_accuracy
from lightning_curvature.trainer.probes import run_probes


def slow(logits, noised, clean):
    memorized = recovered = total = 0
    for row, given, true in zip(logits.tolist(), noised.tolist(), clean.tolist(), strict=True):
        if given != true:
            answer = row.index(max(row))
            memorized, recovered, total = memorized + (answer == given), recovered + (answer == true), total + 1
    return {"memorized": memorized / total, "recovered": recovered / total}


@pytest.mark.parametrize("seed", range(5))
def test_against_a_loop_and_in_batches(seed):
    torch.manual_seed(seed)
    logits, noised, clean = torch.randn(50, 4), torch.randint(4, (50,)), torch.randint(4, (50,))
    expected = slow(logits, noised, clean)
    metric = NoisyLabelAccuracy()
    for part in torch.arange(50).split(7):
        metric.update(logits[part], noised[part], clean[part])
    for found in (noisy_label_accuracy(logits, noised, clean), metric.compute()):
        assert {name: float(value) for name, value in found.items()} == pytest.approx(expected)
    two = NoisyLabelAccuracy()
    two.update(logits[:20], noised[:20], clean[:20])
    assert metric.counts.dtype == two.counts.dtype == torch.int64
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
    for bad, found in ((x, "Tensor"), ([x], "list of 1")):
        with pytest.raises(ValueError, match=f"Probe 'p': a batch must be .* found {found}"):
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
