"""Recitation of prompts that move."""

import pytest

from lightning_curvature.text import stress
from lightning_curvature.text.sequences import PromptedSequence
from tests.support import language
from tests.support.decoding import prompted, slow_greedy


def test_positional_stress(reciter):
    net, rows = reciter
    asked, filler = prompted(rows, 8), language.tokens(1, 6, seed=8)[0].tolist()
    results = stress.positional_stress(net, asked, shifts=(-4, 0, 3, 8, -7), filler=filler)
    assert set(results) == {-4, 0, 3}  # nothing is left of a suffix of 8, and the filler has 6
    for shift, prompts in {
        0: [(s.prefix_ids, s.suffix_ids) for s in asked],
        3: [((s.prefix_ids + s.suffix_ids[:3])[3:], s.suffix_ids[3:]) for s in asked],
        -4: [(tuple(filler[2:]) + s.prefix_ids, s.suffix_ids) for s in asked],
    }.items():
        agree = []
        for prefix, suffix in prompts:
            said = slow_greedy(net, prefix, len(suffix))
            agree.append(next((i for i, (a, b) in enumerate(zip(said, suffix, strict=True)) if a != b), len(suffix)))
        strict = sum(n == len(suffix) for n, (_, suffix) in zip(agree, prompts, strict=True)) / 16
        assert results[shift] == {"strict": pytest.approx(strict), "exact_prefix": pytest.approx(sum(agree) / 16)}


def test_stress_leaves_out_what_the_model_cannot_read():
    net = language.model()
    asked = [PromptedSequence((1,) * 50, (2,) * 10), PromptedSequence((1,) * 10, (2,) * 10)]
    results = stress.positional_stress(net, asked, shifts=(0, -8), filler=[3] * 8)
    assert set(results) == {0, -8}
    assert not stress.positional_stress(net, asked[:1], shifts=(-8,), filler=[3] * 8)
