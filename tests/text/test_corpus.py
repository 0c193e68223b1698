"""Windows of a corpus."""

import json

import pytest

from lightning_curvature.storage import jsonl
from lightning_curvature.text import corpus
from tests.support import language


def test_windows_of_text_and_of_json_lines(tmp_path, monkeypatch):
    tokenizer = language.tokenizer()
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    ids = language.tokens(1, 50)[0].tolist()
    text.write_text("\n".join(language.words(ids[i : i + 10]) for i in range(0, 50, 10)))
    expected = [ids[i : i + 8] for i in range(0, 48, 8)]
    assert list(corpus.token_windows(text, tokenizer, 8)) == expected
    monkeypatch.setattr(corpus, "_CHUNK", 5)  # each line is a chunk of its own
    assert len(list(corpus.read_documents(text, tokenizer))) == 5
    assert list(corpus.token_windows(text, tokenizer, 8)) == expected
    assert list(corpus.token_windows(text, tokenizer, 8, limit=23)) == expected[:2]
    jsonl.write_jsonl(lines, [{"text": language.words(ids[:5])}, {"text": language.words(ids[5:12])}])
    assert list(corpus.read_documents(lines, tokenizer)) == [[*ids[:5], 0], [*ids[5:12], 0]]
    assert list(corpus.token_windows(lines, tokenizer, 7)) == [[*ids[:5], 0, ids[5]], [*ids[6:12], 0]]


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "X.JSONL"])
def test_a_mark_of_the_byte_order_is_no_text(tmp_path, name):
    tokenizer, path = language.tokenizer(), tmp_path / name
    text = json.dumps({"text": "w3 w4"}) + "\n" if name.lower().endswith("jsonl") else "w3 w4\n"
    path.write_bytes(text.encode())
    expected = list(corpus.read_documents(path, tokenizer))
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert list(corpus.read_documents(path, tokenizer)) == expected
    assert expected[0][:2] == tokenizer("w3 w4", add_special_tokens=False)["input_ids"]
    path.write_bytes(b"\xef\xbb\xbf\n")
    if name != "x.txt":
        with pytest.raises(ValueError, match="the file is empty"):
            list(corpus.read_documents(path, tokenizer))


def test_bad_corpora(tmp_path):
    tokenizer, path = language.tokenizer(), tmp_path / "a.txt"
    path.write_text("w1 w2 w3")
    with pytest.raises(ValueError, match="3 tokens are less than one window of 4"):
        list(corpus.token_windows(path, tokenizer, 4))
    with pytest.raises(ValueError, match="A limit of 3 tokens is shorter than one window of 4"):
        list(corpus.token_windows(path, tokenizer, 4, limit=3))
    path.write_text("")
    with pytest.raises(ValueError, match="the file is empty; expected text"):
        list(corpus.token_windows(path, tokenizer, 4))
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 3}')
    with pytest.raises(ValueError, match="line 1: text must be a string, found 3"):
        list(corpus.token_windows(path, tokenizer, 4))
