"""Questions with and without the text that answers them."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from lightning_curvature.storage import jsonl
from lightning_curvature.text import recall
from tests.support import language
from tests.support.decoding import slow_greedy


def test_recall_closed_and_open_book(tmp_path):
    """Facts w1 -> w11, ...: some are known by heart; others can only be looked up, which is trained as copying."""
    known = [[i, i + 10, 0] for i in range(1, 7)]
    net = language.train(language.model(), torch.tensor(known), 150)
    path = tmp_path / "q.jsonl"
    questions = [{"prompt": f"w{i}", "answers": ["other", f"W{i + 10}!"], "context": "w30 w31 "} for i in (1, 2, 3)]
    questions += [{"prompt": "w4", "answers": ["w29"]}]
    jsonl.write_jsonl(path, questions)
    read = recall.read_questions(path)
    assert read[0] == recall.Question("w1", ("other", "W11!"), "w30 w31 ")
    tokenizer = language.tokenizer()
    results = recall.evaluate_recall(net, tokenizer, read, batch_size=3, max_tokens=4)
    assert results["recall"] == pytest.approx(0.75)
    said = recall.answer(net, tokenizer, ["w30 w31 w1", "w5", "w30 w31 w3"], 2, 4)
    assert said[1] == "w15"
    opened = [slow_greedy(net, [30, 31, i], 4) for i in (1, 2, 3)]
    expected = sum(o[0] == i + 10 and o[1] in (0,) for o, i in zip(opened, (1, 2, 3), strict=True)) / 3
    assert results["recall_open_book"] == pytest.approx(expected)
    closing = language.tokenizer()
    closing._tokenizer.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    assert closing("w5")["input_ids"] == [5, 0]
    assert recall.answer(net, closing, ["w5"], 2, 4) == ["w15"]
    with pytest.raises(ValueError, match="A prompt has 62 tokens and its answer up to 4; the model's context is 64"):
        recall.answer(net, tokenizer, [" ".join(["w1"] * 62)], 2, 4)
    path.write_text('{"prompt": "w1", "answers": "w2"}')
    with pytest.raises(ValueError, match="line 1: answers must be a list of strings, found 'w2'"):
        recall.read_questions(path)
