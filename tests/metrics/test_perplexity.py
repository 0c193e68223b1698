"""Perplexity in half precision, over batches and in any shape."""

import pytest
import torch
import torchmetrics.text
from torch.testing import assert_close

from lightning_curvature.metrics import Perplexity
from lightning_curvature.metrics import functional as F
from tests.support import text_reference as slow
from tests.support.metric_cases import scored_tokens


def test_long_half_precision_batches_stay_finite():
    logits, target = torch.zeros(1, 100_000, 2, dtype=torch.float16), torch.zeros(1, 100_000, dtype=torch.int64)
    ours, theirs = Perplexity(), torchmetrics.text.Perplexity()
    ours.update(logits, target)
    theirs.update(logits, target)
    assert float(ours.compute()) == pytest.approx(2.0, rel=1e-6)
    assert theirs.compute() == torch.inf


def test_counts_grow_beyond_the_integers_of_float32():
    ours, theirs = Perplexity(), torchmetrics.text.Perplexity()
    for metric in (ours, theirs):
        metric.update(torch.zeros(1, 1, 4), torch.tensor([[0]]))
        metric.count.fill_(2**24)
        for _ in range(5):
            metric.update(torch.zeros(1, 1, 4), torch.tensor([[0]]))
    assert int(ours.count) == 2**24 + 5
    assert theirs.count.dtype == torch.float32
    assert int(theirs.count) == 2**24


def test_perplexity_weighs_tokens_not_batches():
    logits, target = scored_tokens(0)
    short, long = (logits[:1, :1], torch.zeros(1, 1, dtype=torch.int64)), (logits[1:], target[1:])
    metric = Perplexity()
    metric.update(*short)
    metric.update(*long)
    rows = [*short[0].flatten(0, 1).tolist(), *long[0].flatten(0, 1).tolist()]
    tokens = [*short[1].flatten().tolist(), *long[1].flatten().tolist()]
    assert float(metric.compute()) == pytest.approx(slow.perplexity(rows, tokens, -100))
    averaged = (F.perplexity(*short) + F.perplexity(*long)) / 2
    assert float(metric.compute()) != pytest.approx(float(averaged), rel=0.05)


def test_perplexity_takes_any_leading_dimensions_and_shifts_nothing():
    logits, target = scored_tokens(0)
    expected = F.perplexity(logits, target)
    assert_close(F.perplexity(logits.flatten(0, 1), target.flatten()), expected)
    assert_close(F.perplexity(logits[:, None], target[:, None]), expected)
    assert_close(F.perplexity(torch.zeros(3), torch.tensor(1)), torch.tensor(3.0).double(), rtol=1e-6, atol=0.0)
    certain = torch.eye(5)[None] * 100
    assert F.perplexity(certain, torch.arange(5)[None]) == 1
    assert F.perplexity(certain, torch.arange(5).roll(-1)[None]) > 1e9
