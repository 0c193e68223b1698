"""Every metric with random input and its slow value."""

import random
from dataclasses import dataclass, field

import torch

from lightning_curvature.metrics import (
    ExtractionStrength,
    LongestExactPrefix,
    LooseMemorization,
    MinKProbability,
    NormalizedEditDistance,
    Perplexity,
    RankingOverlap,
    RecallAccuracy,
    StrictMemorization,
)
from lightning_curvature.metrics import functional as F
from tests.support import text_reference as slow


def token_pairs(seed, n=23, length=12):
    """Sequences that range from equal to unrelated, with shifts, early stops and wrong tokens."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(5, (n, length), generator=generator)
    preds = target.clone()
    for row in range(0, n, 2):
        shift = int(torch.randint(3, (1,), generator=generator))
        preds[row] = preds[row].roll(shift)
    for row in range(0, n, 3):
        start = int(torch.randint(length, (1,), generator=generator))
        preds[row, start:] = -1
    for row in range(0, n, 4):
        wrong = torch.rand(length, generator=generator) < 0.3
        preds[row][wrong] = torch.randint(5, (int(wrong.sum()),), generator=generator)
    return preds, target


def scored_tokens(seed, n=23, length=12, vocabulary=17, ignore_index=-100):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, length, vocabulary, generator=generator, dtype=torch.float64)
    target = torch.randint(vocabulary, (n, length), generator=generator)
    target[torch.rand(n, length, generator=generator) < 0.3] = ignore_index
    target[n // 2] = ignore_index
    return logits, target


def rankings(seed, n=23):
    logits, _ = scored_tokens(seed, n)
    generator = torch.Generator().manual_seed(seed + 1)
    return logits, logits + torch.randn(logits.shape, generator=generator, dtype=torch.float64)


def questions(seed, n=23):
    chooser = random.Random(seed)
    words = [
        "The Nile",
        "nile!",
        "a River  Nile",
        "Oslo",
        "\uff2f\uff33\uff2c\uff2f",
        "oslo-fjord",
        "Öland",
        "an",
        "\u201cOslo\u201d",
        "The  a",
    ]
    return (
        [chooser.choice(words) for _ in range(n)],
        [[chooser.choice(words) for _ in range(chooser.randint(1, 3))] for _ in range(n)],
    )


def mean_min_k(logits, target, percent, ignore_index):
    return slow.mean(
        value
        for value in slow.min_k_scores(logits.tolist(), target.tolist(), percent, ignore_index)
        if value is not None
    )


def lists(function):
    return lambda *tensors: function(*(tensor.tolist() for tensor in tensors))


@dataclass(frozen=True)
class Case:
    """A metric, its functional twin, random input and the slow value of it."""

    kind: type
    twin: object
    inputs: object
    reference: object
    higher: bool
    dtype: torch.dtype
    args: dict = field(default_factory=dict)

    def metric(self):
        return self.kind(**self.args)

    def twin_mean(self, *inputs):
        return self.twin(*inputs, **self.args).double().mean()


CASES = {
    "strict": Case(
        StrictMemorization, F.strict_memorization, token_pairs, lists(slow.strict_memorization), False, torch.int64
    ),
    "loose": Case(
        LooseMemorization, F.loose_memorization, token_pairs, lists(slow.loose_memorization), False, torch.int64
    ),
    "loose-0.4": Case(
        LooseMemorization,
        F.loose_memorization,
        token_pairs,
        lambda p, t: slow.loose_memorization(p.tolist(), t.tolist(), 40),
        False,
        torch.int64,
        {"threshold": 0.4},
    ),
    "edit": Case(
        NormalizedEditDistance,
        F.normalized_edit_distance,
        token_pairs,
        lists(slow.normalized_edit_distance),
        True,
        torch.float64,
    ),
    "extraction": Case(
        ExtractionStrength, F.extraction_strength, token_pairs, lists(slow.extraction_strength), False, torch.float64
    ),
    "prefix": Case(
        LongestExactPrefix,
        F.longest_exact_prefix,
        token_pairs,
        lambda p, t: slow.mean(slow.longest_exact_prefix(p.tolist(), t.tolist())),
        False,
        torch.int64,
    ),
    "min-k": Case(
        MinKProbability,
        F.min_k_probability,
        scored_tokens,
        lambda x, t: mean_min_k(x, t, 20, -100),
        False,
        torch.float64,
    ),
    "min-k-0.07": Case(
        MinKProbability,
        F.min_k_probability,
        lambda seed: scored_tokens(seed, 7, 100, 5, 0),
        lambda x, t: mean_min_k(x, t, 7, 0),
        False,
        torch.float64,
        {"k": 0.07, "ignore_index": 0},
    ),
    "perplexity": Case(
        Perplexity,
        F.perplexity,
        scored_tokens,
        lambda x, t: slow.perplexity(x.flatten(0, 1).tolist(), t.flatten().tolist(), -100),
        False,
        torch.float64,
    ),
    "perplexity-ignore-3": Case(
        Perplexity,
        F.perplexity,
        lambda seed: scored_tokens(seed, ignore_index=3),
        lambda x, t: slow.perplexity(x.flatten(0, 1).tolist(), t.flatten().tolist(), 3),
        False,
        torch.float64,
        {"ignore_index": 3},
    ),
    "ranking": Case(
        RankingOverlap,
        F.ranking_overlap,
        rankings,
        lambda x, b: slow.ranking_overlap(x.flatten(0, 1).tolist(), b.flatten(0, 1).tolist(), 10),
        True,
        torch.float64,
    ),
    "ranking-3": Case(
        RankingOverlap,
        F.ranking_overlap,
        rankings,
        lambda x, b: slow.ranking_overlap(x.flatten(0, 1).tolist(), b.flatten(0, 1).tolist(), 3),
        True,
        torch.float64,
        {"k": 3},
    ),
    "recall": Case(RecallAccuracy, F.recall_accuracy, questions, slow.recall_accuracy, True, torch.int64),
}


def feed(metric, inputs, size):
    for start in range(0, len(inputs[0]), size):
        metric.update(*(value[start : start + size] for value in inputs))
    return metric
