"""Metrics of scored tokens."""

import math

import pytest
import torch
import torchmetrics.text
from torch.testing import assert_close

from lightning_curvature.metrics import MinKProbability, Perplexity
from lightning_curvature.metrics import functional as F
from tests.support import text_reference as slow
from tests.support.metric_cases import CASES, scored_tokens


# Scored tokens
@pytest.mark.parametrize("percent", [1, 7, 20, 50, 100])
@pytest.mark.parametrize("seed", range(2))
def test_min_k_of_each_sequence(percent, seed):
    logits, target = scored_tokens(seed)
    scores = F.min_k_scores(logits, target, percent / 100)
    expected = slow.min_k_scores(logits.tolist(), target.tolist(), percent, -100)
    assert expected[11] is None
    assert_close(scores, torch.tensor([math.nan if v is None else v for v in expected]).double(), equal_nan=True)


def test_the_share_of_tokens_is_rounded_up_but_not_for_rounding_errors():
    logits, _ = scored_tokens(0, 1, 100, 5)
    target = torch.zeros(1, 100, dtype=torch.int64)
    log_probs = logits.log_softmax(-1)[0, :, 0].sort().values
    assert 0.07 * 100 > 7
    for k, taken in ((0.07, 7), (0.0701, 8), (1e-12, 1), (1, 100)):
        assert_close(F.min_k_scores(logits, target, k)[0], log_probs[:taken].mean())


def test_all_tokens_of_one_text_give_its_perplexity():
    logits, target = scored_tokens(0, 1)
    target[:] = 2
    assert_close(F.min_k_probability(logits, target, k=1.0).neg().exp(), F.perplexity(logits, target))


def test_nan_and_impossible_tokens_show():
    logits, target = torch.zeros(2, 4, 3), torch.ones(2, 4, dtype=torch.int64)
    logits[0, 1] = torch.nan
    assert F.min_k_scores(logits, target, 0.25).isnan().tolist() == [True, False]
    assert F.min_k_probability(logits, target).isnan()
    target[0, 1] = -100  # does not count, whatever the model says there
    assert_close(F.min_k_scores(logits, target), torch.full((2,), -math.log(3), dtype=torch.float64))
    assert_close(F.perplexity(logits, target), torch.tensor(3.0, dtype=torch.float64), rtol=1e-6, atol=0.0)
    logits[0, 0, 1] = -torch.inf
    assert F.min_k_scores(logits, target)[0] == -torch.inf
    assert F.perplexity(logits, target) == torch.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_logits_lose_only_their_own_rounding(dtype):
    logits, target = scored_tokens(0)
    logits = logits.to(dtype)
    for name in ("min-k", "perplexity"):
        measured = CASES[name].twin(logits, target)
        assert measured.dtype == torch.float64
        assert float(measured) == pytest.approx(CASES[name].reference(logits.double(), target), rel=1e-6)
    baseline = (logits + torch.arange(17, dtype=dtype)).contiguous()
    expected = F.ranking_overlap(logits, baseline.topk(10).indices)
    assert_close(F.ranking_overlap(logits, baseline), expected)
    assert F.ranking_overlap(logits, logits) == pytest.approx(1.0, abs=1e-12)


def test_very_unlikely_tokens_stay_finite():
    logits = torch.zeros(1, 2, 4, dtype=torch.float16)
    logits[0, 0, 0] = 40
    target = torch.tensor([[3, 1]])
    expected = math.exp((40 + math.log(4)) / 2)
    ours, theirs = Perplexity(), torchmetrics.text.Perplexity()
    ours.update(logits, target)
    theirs.update(logits, target)
    assert float(ours.compute()) == pytest.approx(expected, rel=1e-6)
    assert theirs.compute() == torch.inf
    assert float(F.min_k_probability(logits, target)) == pytest.approx(-40)


LOGITS, IDS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
REFUSED = {
    "shapes": (LOGITS, IDS[:, 1:], r"logits \[\.\.\., V\] and target \[\.\.\.\], found \[2, 3, 5\] and \[2, 2\]"),
    "integer logits": (LOGITS.long(), IDS, "found torch.int64 and torch.int64"),
    "int32 ids": (LOGITS, IDS.int(), "found torch.float32 and torch.int32"),
    "ids too large": (LOGITS, IDS + 5, r"ids in \[0, 5\), found 5\. .* ignore_index, here -100"),
    "negative ids": (LOGITS, IDS - 1, r"ids in \[0, 5\), found -1\."),
}


@pytest.mark.parametrize("name", ["min-k", "perplexity"])
@pytest.mark.parametrize("through", ["class", "twin"])
@pytest.mark.parametrize("fault", REFUSED)
def test_scored_tokens_are_checked(fault, name, through):
    case, (scores, target, message) = CASES[name], REFUSED[fault]
    call = case.metric().update if through == "class" else case.twin
    with pytest.raises(ValueError, match=message):
        call(scores, target)


def test_dimensions_and_ignore_index_are_checked():
    ids = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"Expected logits \[n, L, V\], found \[3, 5\]\. A single text has n = 1"):
        F.min_k_scores(torch.zeros(3, 5), ids)
    with pytest.raises(ValueError, match=r"found \[\] and \[\]"):
        F.perplexity(torch.tensor(0.0), torch.tensor(0))
    for bad in (None, 1.0, True):
        for call in (
            lambda bad=bad: Perplexity(bad),
            lambda bad=bad: MinKProbability(ignore_index=bad),
            lambda bad=bad: F.perplexity(torch.zeros(3, 5), ids, bad),
        ):
            with pytest.raises(ValueError, match=f"ignore_index must be an integer, found {bad}. Keep -100"):
                call()
