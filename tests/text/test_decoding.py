"""Greedy continuations, against decoding one token at a time."""

import pytest
import torch

from lightning_curvature.text import decoding, evaluation
from lightning_curvature.text.sequences import PromptedSequence
from tests.support import language
from tests.support.decoding import prompted, slow_greedy


@pytest.mark.parametrize("family", language.FAMILIES)
def test_one_forward_pass_decides_strict_recitation(family):
    """Greedy decoding says the suffix if and only if the teacher-forced argmax does at every position."""
    rows = language.tokens(12, 12, seed=5)
    net = language.train(language.model(family), rows[:6], 60)
    asked = prompted(rows, 6)
    for said in decoding.continuations(net, asked, batch_size=5):
        for row, index in enumerate(said.indices):
            greedy = slow_greedy(net, asked[index].prefix_ids, 6)
            assert said.greedy[row].tolist() == greedy
            recited = greedy == list(asked[index].suffix_ids)
            assert recited == bool((said.forced[row] == said.target[row]).all())
            assert bool(said.generated[row]) == (not recited)
            wrong = (said.forced[row] != said.target[row]).nonzero().flatten().tolist()
            first = wrong[0] if wrong else 6
            assert said.forced[row, : first + 1].tolist() == greedy[: first + 1]  # they agree up to the first error
    strict = [bool((s.greedy == s.target).all()) for s in decoding.continuations(net, asked, 1, strict_only=True)]
    assert strict == [slow_greedy(net, s.prefix_ids, 6) == list(s.suffix_ids) for s in asked]
    assert any(strict)
    assert not all(strict)


def test_an_end_of_text_inside_the_suffix_is_generated():
    rows = language.tokens(4, 12, seed=5)
    rows[:, 9] = 0
    net = language.train(language.model(), rows, 150)
    asked = prompted(rows, 6)
    (said,) = decoding.continuations(net, asked)
    assert bool((said.forced == said.target).all())
    assert bool(said.generated.all())
    assert said.greedy.tolist() == [slow_greedy(net, s.prefix_ids, 6) for s in asked]
    assert said.greedy[0, 4:].tolist() == [decoding.NO_TOKEN] * 2
    assert evaluation.strict_rate(net, asked) == 0.0
    closed = [PromptedSequence(s.prefix_ids, s.suffix_ids[:4]) for s in asked]  # it may end with one
    assert evaluation.strict_rate(net, closed) == 1.0


def test_a_repetition_penalty_is_generated(reciter):
    net, _ = reciter
    rows = language.tokens(4, 12, seed=9)
    rows[:, 6:] = rows[:, :6]
    net = language.train(language.model(), rows, 150)
    asked = prompted(rows, 6)
    assert evaluation.strict_rate(net, asked) == 1.0
    net.generation_config.repetition_penalty = 5.0
    (said,) = decoding.continuations(net, asked, strict_only=True)
    assert bool(said.generated.all())
    assert said.greedy.tolist() == [slow_greedy(net, s.prefix_ids, 6, 5.0) for s in asked]
    assert evaluation.strict_rate(net, asked) < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_are_generated(dtype):
    net = language.model().to(dtype)
    with torch.no_grad():
        net.lm_head.weight.zero_()
    asked = [PromptedSequence((1, 2), (0,)), PromptedSequence((3, 4), (0,))]  # the argmax of equal logits is token 0
    (said,) = decoding.continuations(net, asked, strict_only=True)
    assert bool((said.forced == said.target).all())
    assert bool(said.generated.all())


def test_left_padded_prompts_continue_as_they_do_alone(reciter):
    net, rows = reciter
    prompts = [rows[i, : 4 + i].tolist() for i in range(4)]
    ids = torch.tensor([[0] * (8 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (8 - len(p)) + [1] * len(p) for p in prompts])
    continuations = decoding.greedy_continuation(net, ids, 5, mask)
    assert continuations.tolist() == [slow_greedy(net, p, 5) for p in prompts]


def test_models_without_an_end_token_or_with_several(reciter):
    net, rows = reciter
    ends = net.generation_config.eos_token_id
    try:
        net.generation_config.eos_token_id = None
        assert decoding.greedy_continuation(net, rows[:2, :8], 8).tolist() == rows[:2, 8:].tolist()
        net.generation_config.eos_token_id = [0, int(rows[0, 10])]
        said = decoding.greedy_continuation(net, rows[:1, :8], 8)[0].tolist()
        assert said == [*rows[0, 8:11].tolist(), *[decoding.NO_TOKEN] * 5]
    finally:
        net.generation_config.eos_token_id = ends
