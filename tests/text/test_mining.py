"""Windows of a corpus that a model recites."""

import itertools

import pytest
import torch
from rapidfuzz.distance import LCSseq

from lightning_curvature.storage import jsonl
from lightning_curvature.text import mining
from tests.support import language


def test_mining_finds_what_is_recited(reciter, tmp_path, caplog):
    net, rows = reciter
    tokenizer, path = language.tokenizer(), tmp_path / "corpus.jsonl"
    documents = [*rows.tolist(), rows[0].tolist(), rows[1].tolist()]  # two of them again
    jsonl.write_jsonl(path, ({"text": language.words(row)} for row in documents))
    with caplog.at_level("INFO"):
        mined = mining.mine(net, tokenizer, path, prefix=8, suffix=7)
    assert {s.ids for s in mined} == {tuple(row[:15]) for row in rows[:8].tolist()}
    assert "10 of 18 windows are recited, 2 of them near-duplicates of others" in caplog.text
    assert mined == mining.mine(net, tokenizer, path, prefix=8, suffix=7)
    assert mined[0].prefix_text == language.words(mined[0].prefix_ids)
    assert len(mining.mine(net, tokenizer, path, prefix=8, suffix=7, windows=9)) < 8
    for sequence in mined:
        assert all(
            LCSseq.normalized_similarity(sequence.ids, another.ids) < 0.5
            for another in mined
            if another is not sequence
        )


def test_overlapping_windows_are_near_duplicates(tmp_path):
    """A model that always says the next number recites every window of the numbers."""
    text = torch.arange(1, 40)
    net = language.train(language.model(), torch.stack([text[i : i + 10] for i in range(30)]), 200)
    path = tmp_path / "corpus.txt"
    path.write_text(language.words(text.tolist()))

    def starts(similarity):
        mined = mining.mine(net, language.tokenizer(), path, prefix=6, suffix=4, stride=1, similarity=similarity)
        return sorted(sequence.prefix_ids[0] for sequence in mined)

    assert len(starts(1.0)) > 20
    assert len(starts(0.95)) == len(starts(1.0))
    kept = starts(0.5)
    assert 3 <= len(kept) <= 6
    assert all(next_start - start > 5 for start, next_start in itertools.pairwise(kept))


def test_a_corpus_shorter_than_a_window_cannot_be_mined(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("w1 w2 w3")
    with pytest.raises(ValueError, match=r"its longest document has 3 tokens, a window has 2 \+ 2"):
        mining.mine(language.model(), language.tokenizer(), path, prefix=2, suffix=2)
