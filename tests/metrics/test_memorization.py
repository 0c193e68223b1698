"""Metrics of written tokens."""

import math

import pytest
import torch
from torch.testing import assert_close

from lightning_curvature.metrics import LooseMemorization, MinKProbability
from lightning_curvature.metrics import functional as F
from tests.support import text_reference as slow
from tests.support.metric_cases import CASES, token_pairs


# Written tokens
@pytest.mark.parametrize("seed", range(4))
def test_prefix_of_each_sequence(seed):
    preds, target = token_pairs(seed)
    lengths = F.longest_exact_prefix(preds, target)
    assert lengths.dtype == torch.int64
    assert lengths.tolist() == slow.longest_exact_prefix(preds.tolist(), target.tolist())
    assert {0, 12} <= set(lengths.tolist())


@pytest.mark.parametrize("length", [3, 6, 7, 10, 12, 48, 49, 100])
def test_a_similarity_at_the_threshold_counts_whatever_the_rounding(length):
    target = torch.arange(length)[None]
    for wrong in range(length):
        preds = target.clone()
        preds[0, :wrong] = -1
        for threshold in ((length - wrong) / length, 1 - wrong / length):
            assert F.loose_memorization(preds, target, threshold) == 1
            if wrong:
                assert F.loose_memorization(preds, target, threshold + 1e-6) == 0


def test_twelve_of_48_wrong_tokens_are_still_loosely_memorized():
    target = torch.arange(48)[None]
    for wrong, expected in ((12, 1.0), (13, 0.0)):
        preds = target.clone()
        preds[0, -wrong:] = -1
        assert F.loose_memorization(preds, target) == expected
    shifted = target.roll(1, 1)  # one insertion, one deletion
    assert F.loose_memorization(shifted, target) == 1
    assert F.strict_memorization(shifted, target) == 0
    assert_close(F.normalized_edit_distance(shifted, target), torch.tensor(2 / 48, dtype=torch.float64))


def test_a_threshold_of_one_is_the_strict_match():
    preds, target = token_pairs(0)
    assert F.loose_memorization(preds, target, 1.0) == F.strict_memorization(preds, target)


def test_large_and_negative_ids():
    target = torch.tensor([[2**40, 2**40 + 1, -1, -2]])
    assert F.normalized_edit_distance(torch.tensor([[2**40, 2**40 + 1, -2, -1]]), target) == 0.5
    assert F.normalized_edit_distance(target, target) == 0


@pytest.mark.parametrize(
    ("preds", "expected"), [([1, 2, 3, 4], 1.0), ([9, 2, 3, 4], 0.75), ([9, 2, 9, 4], 0.25), ([1, 2, 3, 9], 0.0)]
)
def test_extraction_strength_looks_at_the_end(preds, expected):
    target = torch.tensor([[1, 2, 3, 4]])
    assert F.extraction_strength(torch.tensor([preds]), target) == expected


IDS = torch.zeros(2, 3, dtype=torch.int64)
REFUSED = {
    "lengths": (IDS[:, :2], IDS, r"\[2, 2\] and \[2, 3\]\. Fill shorter sequences .* -1"),
    "one dimension": (IDS[0], IDS[0], r"L >= 1, found \[3\] and \[3\]"),
    "no token": (IDS[:, :0], IDS[:, :0], r"L >= 1, found \[2, 0\] and \[2, 0\]"),
    "int32 predictions": (IDS.int(), IDS, r"found torch.int32 and torch.int64\. Take the argmax"),
    "floating target": (IDS, IDS.float(), "found torch.int64 and torch.float32"),
}


@pytest.mark.parametrize("name", ["strict", "loose", "edit", "extraction", "prefix"])
@pytest.mark.parametrize("through", ["class", "twin"])
@pytest.mark.parametrize("fault", REFUSED)
def test_token_pairs_are_checked(fault, name, through):
    case, (preds, target, message) = CASES[name], REFUSED[fault]
    call = case.metric().update if through == "class" else case.twin
    with pytest.raises(ValueError, match=message):
        call(preds, target)


@pytest.mark.parametrize("bad", [0, 0.0, -0.5, 1.01, True, "0.5", None, math.nan])
def test_shares_are_checked(bad):
    ids, logits = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, 2)
    for what, call in (
        ("threshold", lambda: LooseMemorization(bad)),
        ("threshold", lambda: F.loose_memorization(ids, ids, bad)),
        ("k", lambda: MinKProbability(bad)),
        ("k", lambda: F.min_k_probability(logits, ids, bad)),
        ("k", lambda: F.min_k_scores(logits, ids, bad)),
    ):
        with pytest.raises(ValueError, match=rf"^{what} must be a number in \(0, 1\], found {bad!r}"):
            call()
