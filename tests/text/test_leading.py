"""Tokens that a tokenizer puts in front of a text: every window and every prompt begins with them."""

import itertools

import pytest

from lightning_curvature.storage.jsonl import read_jsonl, write_jsonl
from lightning_curvature.text import mining, stress
from lightning_curvature.text.leading import leading_tokens
from lightning_curvature.text.sequences import PromptedSequence, read_sequences, write_sequences
from tests.support import language
from tests.support.leading import BOS, INNER, PREFIX, SUFFIX, recites, run

# What a tokenizer puts in front --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("$A", ()),
        ("<s> $A", (BOS,)),
        ("<s> $A <end>", (BOS,)),
        ("$A <end>", ()),
        ("<s> <i> $A", (BOS, INNER)),
        ("<end> $A", (0,)),
        ("<end> $A <end>", (0,)),
        ("<s> <s> $A <s>", (BOS, BOS)),
    ],
)
def test_it_is_asked_of_the_tokenizer(template, expected):
    assert leading_tokens(language.fronted_tokenizer(template)) == expected


def test_it_is_told_from_what_an_unknown_word_is():
    """Here <s> also stands for every word that the vocabulary lacks, and all of the first texts are such words."""
    tokenizer = language.fronted_tokenizer("<s> $A <s>")
    tokenizer.backend_tokenizer.model.unk_token = "<s>"
    assert leading_tokens(tokenizer) == (BOS,)


def test_a_bos_token_that_is_not_put_in_front_is_not_one():
    tokenizer = language.fronted_tokenizer("$A")
    assert tokenizer.bos_token_id == BOS
    assert leading_tokens(tokenizer) == ()


@pytest.mark.parametrize(
    "around",
    [
        lambda ids: [BOS, *ids] if len(ids) > 1 else ids,  # depends on the text
        lambda ids: [BOS, *ids[::-1]],
    ],  # changes it
)
def test_what_differs_from_text_to_text_is_refused(around):
    plain = language.fronted_tokenizer("$A")

    class Changing:
        all_special_ids = plain.all_special_ids

        def __len__(self):
            return len(plain)

        def decode(self, ids):
            return plain.decode(ids)

        def __call__(self, text, add_special_tokens, **_):
            ids = plain(text.replace("3", "w3").replace("quick", "w7"))["input_ids"]
            return {"input_ids": around(ids) if add_special_tokens else ids}

    with pytest.raises(ValueError, match=r"What this Changing puts in front of a text cannot be told: it makes .*'a'"):
        leading_tokens(Changing())


# Mining, and files of sequences --------------------------------------------------------------------------------------


def test_mine(fronted, capsys, tmp_path):
    run(
        capsys,
        "mine",
        "--model",
        fronted.model,
        "--corpus",
        fronted.path / "corpus.jsonl",
        "--prefix",
        PREFIX,
        "--suffix",
        SUFFIX,
        "--out",
        tmp_path / "m.jsonl",
    )
    records = [record for _, record in read_jsonl(tmp_path / "m.jsonl")]
    expected = list(itertools.compress(fronted.rows.tolist(), recites(fronted, fronted.net)))
    assert len(expected) >= 5
    assert sorted(record["suffix_ids"] for record in records) == sorted(row[PREFIX:] for row in expected)
    for record in records:
        words = record["prefix_ids"][len(fronted.front) :]
        assert record["prefix_ids"] == [*fronted.front, *words]
        assert record["prefix_text"] == language.words(words)
        assert record["half"] == PromptedSequence(tuple(words), tuple(record["suffix_ids"])).half
        assert record.get("num_leading") == (len(fronted.front) or None)  # other files look as they always did
    assert {s.ids[len(fronted.front) :] for s in read_sequences(tmp_path / "m.jsonl", None, fronted.front)} == {
        tuple(row) for row in expected
    }


def test_near_duplicates_are_told_by_their_text():
    """What stands in front of all windows makes no two of them more alike."""
    first = PromptedSequence((BOS, INNER, 1, 2), (3, 4), num_leading=2)
    second = PromptedSequence((BOS, INNER, 5, 6), (3, 7), num_leading=2)
    assert mining.distinct([first, second], 0.5) == [first, second]
    assert mining.distinct([first, second], 0.25) == [first]


def test_halves_of_files_stay(fronted):
    plain = [PromptedSequence(tuple(row[:PREFIX]), tuple(row[PREFIX:])) for row in fronted.rows.tolist()]
    for file in ("plain", "marked"):
        for half in ("tuning", "validation"):
            sequences = read_sequences(fronted.path / f"{file}.jsonl", half, fronted.front)
            assert [s.ids[len(fronted.front) :] for s in sequences] == [s.ids for s in plain if s.half == half]
            assert all(s.half == half and s.prefix_ids[: len(fronted.front)] == fronted.front for s in sequences)
    asked = read_sequences(fronted.path / "by_hand.jsonl", None, fronted.front)
    assert [s.prefix_ids for s in asked] == [(*fronted.front, *s.prefix_ids) for s in plain]
    # A file without the mark that begins with them all the same: its halves are those that it always had.
    assert [s.half for s in asked] == [PromptedSequence(s.prefix_ids, s.suffix_ids).half for s in asked]


def test_a_file_cut_behind_other_tokens_is_refused(tmp_path):
    write_sequences(tmp_path / "s.jsonl", [PromptedSequence((BOS, 1), (2,), num_leading=1)])
    for leading in ((), (INNER,), (BOS, INNER)):
        with pytest.raises(ValueError, match=r"s\.jsonl, line 1: the prefix begins with \[39\] in front of the text"):
            read_sequences(tmp_path / "s.jsonl", None, leading)
    for wrong in ("1", -1, 3, 1.0, True, None):
        write_jsonl(tmp_path / "t.jsonl", [{"prefix_ids": [BOS, 1], "suffix_ids": [2], "num_leading": wrong}])
        with pytest.raises(ValueError, match=r"line 1: num_leading must be a number of tokens of its prefix"):
            read_sequences(tmp_path / "t.jsonl")


def test_moved_prompts_of_a_marked_sequence():
    sequence = PromptedSequence((BOS, 1, 2), (3, 4), num_leading=1)
    assert stress.moved(sequence, -1, [9]).prefix_ids == (BOS, 9, 1, 2)
    assert stress.moved(sequence, 1).prefix_ids == (BOS, 2, 3)
    assert stress.moved(PromptedSequence((1, 2), (3, 4)), 1, leading=(BOS, INNER)).prefix_ids == (BOS, INNER, 2, 3)
