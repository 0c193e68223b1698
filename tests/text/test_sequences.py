"""Sequences to recite, in files and in halves."""

import json

import pytest

from lightning_curvature.text import evaluation, sequences
from lightning_curvature.text.sequences import PromptedSequence
from tests.support import language


def test_sequences_come_back_from_a_file(tmp_path):
    path = tmp_path / "s.jsonl"
    made = [PromptedSequence((1, 2, i), (4, i + 5), "ä", "b\nc") for i in range(40)]
    sequences.write_sequences(path, made)
    assert sequences.read_sequences(path) == made
    halves = [sequences.read_sequences(path, half) for half in sequences.HALVES]
    assert [len(half) for half in halves] == [sum(s.half == half for s in made) for half in sequences.HALVES]
    assert min(map(len, halves)) > 10
    record = {
        "prefix_ids": [3],
        "suffix_ids": [4],
        "doc_index": 7,
        "model": "m",
        "prefix_text": "p",
        "suffix_text": "s",
    }
    path.write_text(json.dumps(record) + "\n")
    assert sequences.read_sequences(path) == [PromptedSequence((3,), (4,), "p", "s")]


def test_halves_depend_on_the_tokens_alone():
    sequence, cut_elsewhere = PromptedSequence((1, 2), (3,)), PromptedSequence((1,), (2, 3), "other text")
    assert sequence.half == cut_elsewhere.half
    # Written down once, so that it stays the same on every machine and in every release.
    assert "".join(PromptedSequence((i,), (9,)).half[0] for i in range(8)) == "tvvtvvtv"


@pytest.mark.parametrize(("prefix", "suffix"), [([], [1]), ([1], ["a"]), ([1], [-1]), ("1", [1])])
def test_ids_that_are_none_are_refused(prefix, suffix, tmp_path):
    records = {"prefix_ids": [1], "suffix_ids": [2]}, {"prefix_ids": prefix, "suffix_ids": suffix}
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(ValueError, match=r"line 2: (prefix|suffix)_ids must be a list of token ids"):
        sequences.read_sequences(tmp_path / "s.jsonl")


def test_halves_that_hold_nothing_are_refused(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"prefix_ids": [1], "suffix_ids": [2]}))
    wrong_half = next(half for half in sequences.HALVES if half != sequences.read_sequences(path)[0].half)
    with pytest.raises(ValueError, match=f"none of its 1 sequences is in the {wrong_half} half"):
        sequences.read_sequences(path, wrong_half)
    with pytest.raises(ValueError, match="half must be one of"):
        sequences.read_sequences(path, "train")


def test_sequences_that_a_model_cannot_read():
    net = language.model()
    with pytest.raises(
        ValueError, match=r"holds the token 40, the model's vocabulary has 40. Were the .* another model"
    ):
        evaluation.evaluate_sequences(net, [PromptedSequence((1, 40), (2,))])
    with pytest.raises(ValueError, match=r"has 60 \+ 5 tokens, the model's context is 64"):
        evaluation.evaluate_sequences(net, [PromptedSequence((1,) * 60, (2,) * 5)])
