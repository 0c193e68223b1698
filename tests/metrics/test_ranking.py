"""Overlap of rankings of next tokens."""

import pytest
import torch
from torch.testing import assert_close

from lightning_curvature.metrics import RankingOverlap
from lightning_curvature.metrics import functional as F
from tests.support.metric_cases import rankings


# Rankings
@pytest.mark.parametrize("seed", range(4))
def test_stored_ids_are_as_good_as_logits(seed):
    logits, baseline = rankings(seed)
    expected = F.ranking_overlap(logits, baseline, k=4)
    for stored in (4, 9):
        assert_close(F.ranking_overlap(logits, baseline.topk(stored).indices, k=4), expected)
    assert_close(F.ranking_overlap(logits.flatten(0, 1), baseline.flatten(0, 1), k=4), expected)


def test_rankings_from_identical_to_disjoint():
    logits = torch.arange(6.0)
    assert F.ranking_overlap(logits, 2 * logits + 1, k=6) == pytest.approx(1.0, abs=1e-12)
    assert F.ranking_overlap(logits, -logits, k=3) == 0
    assert 0 < F.ranking_overlap(logits, -logits, k=4) < F.ranking_overlap(logits, logits.roll(1), k=4) < 1
    assert F.ranking_overlap(logits, -logits, k=1) == 0
    for seed in range(4):
        many, _ = rankings(seed)
        for k in range(1, 18):
            assert F.ranking_overlap(many, many, k=k) == pytest.approx(1.0, abs=1e-12)
            assert F.ranking_overlap(many, many, k=k) <= 1


LOGITS, IDS = torch.zeros(2, 3, 5), torch.tensor([0, 1]).expand(2, 3, 2)
REFUSED = {
    "k too large": (LOGITS, LOGITS, 6, r"at least k=6 tokens, found \[2, 3, 5\]\. Choose k of at most 5"),
    "integer logits": (LOGITS.long(), IDS, 2, r"floating logits \[\.\.\., V\], found torch.int64 \[2, 3, 5\]"),
    "no dimension": (torch.tensor(0.0), IDS, 2, r"found torch.float32 \[\]"),
    "another vocabulary": (LOGITS, LOGITS[..., 1:], 2, r"shape of logits, \[2, 3, 5\], found \[2, 3, 4\]"),
    "int32 ids": (LOGITS, IDS.int(), 2, "floating logits or int64 token ids, found torch.int32"),
    "too few ids": (LOGITS, IDS, 3, r"token ids \[2, 3, '>= 3'\], found \[2, 3, 2\]\. Keep at least k"),
    "no batch": (LOGITS, IDS[0], 2, r"found \[3, 2\]"),
    "other positions": (LOGITS, IDS[:, :2], 2, r"found \[2, 2, 2\]"),
    "ids too large": (LOGITS, IDS + 4, 2, r"2 distinct baseline token ids in \[0, 5\) at each position"),
    "negative ids": (LOGITS, IDS - 1, 2, "Are they of another vocabulary, or padded"),
    "repeated ids": (LOGITS, torch.zeros_like(IDS), 2, "2 distinct baseline token ids"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_rankings_are_checked(fault):
    scores, baseline, k, message = REFUSED[fault]
    with pytest.raises(ValueError, match=message):
        F.ranking_overlap(scores, baseline, k)
    with pytest.raises(ValueError, match=message):
        RankingOverlap(k).update(scores, baseline)


def test_k_is_checked():
    for call in (lambda: RankingOverlap(0), lambda: F.ranking_overlap(LOGITS, LOGITS, 0)):
        with pytest.raises(ValueError, match="k must be an integer of at least 1, found 0"):
            call()
