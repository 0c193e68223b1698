"""Sequences, corpora, decoding, evaluation, recall, the stress test, mining."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from rapidfuzz.distance import LCSseq
from tokenizers.processors import TemplateProcessing

from lightning_curvature import CurvatureEditor
from lightning_curvature.collect.passes import collect
from lightning_curvature.search import energy as targets
from lightning_curvature.storage import jsonl
from lightning_curvature.text import (
    corpus,
    decoding,
    evaluation,
    examples,
    matching,
    mining,
    recall,
    sequences,
    stress,
)
from lightning_curvature.text.sequences import PromptedSequence
from tests import language, text_reference


def prompted(rows, prefix):
    return [PromptedSequence(tuple(row[:prefix]), tuple(row[prefix:])) for row in rows.tolist()]


@pytest.fixture(scope="module")
def reciter():
    """A model that recites the first eight of sixteen rows."""
    rows = language.tokens(16, 16)
    return language.train(language.model(), rows[:8], 150), rows


# JSON lines and sequences ---------------------------------------------------------------------------------------------


def test_jsonl_errors_name_the_line(tmp_path):
    path = tmp_path / "x.jsonl"
    for content, message in [
        ('{"a": 1}\n\n{"a": \n', "x.jsonl, line 3: not JSON"),
        ('{"a": 1}\n[2]\n', "line 2: expected a JSON object, found list"),
        ('{"a": 1}\n{"b": 1}\n', r"line 2: lacks \['a'\]; it has \['b'\]"),
        ("\n\n", "the file is empty"),
        ("", "the file is empty"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            list(jsonl.read_jsonl(path, ["a"]))
    with pytest.raises(FileNotFoundError):
        list(jsonl.read_jsonl(tmp_path / "none.jsonl"))


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
    one, two = PromptedSequence((1, 2), (3,)), PromptedSequence((1,), (2, 3), "other text")
    assert one.half == two.half
    # Written down once, so that it stays the same on every machine and in every release.
    assert "".join(PromptedSequence((i,), (9,)).half[0] for i in range(8)) == "tvvtvvtv"


def test_bad_sequences(tmp_path):
    path = tmp_path / "s.jsonl"
    for bad in (
        {"prefix_ids": [], "suffix_ids": [1]},
        {"prefix_ids": [1], "suffix_ids": ["a"]},
        {"prefix_ids": [1], "suffix_ids": [-1]},
        {"prefix_ids": "1", "suffix_ids": [1]},
    ):
        path.write_text(json.dumps({"prefix_ids": [1], "suffix_ids": [2]}) + "\n" + json.dumps(bad))
        with pytest.raises(ValueError, match=r"line 2: (prefix|suffix)_ids must be a list of token ids"):
            sequences.read_sequences(path)
    path.write_text(json.dumps({"prefix_ids": [1], "suffix_ids": [2]}))
    other = next(half for half in sequences.HALVES if half != sequences.read_sequences(path)[0].half)
    with pytest.raises(ValueError, match=f"none of its 1 sequences is in the {other} half"):
        sequences.read_sequences(path, other)
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


# Corpora --------------------------------------------------------------------------------------------------------------


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


# Decoding -------------------------------------------------------------------------------------------------------------


def slow_greedy(net, prompt, length, penalty=1.0):
    """One token at a time, without a cache; stops after the end-of-text token."""
    ids = list(prompt)
    for _ in range(length):
        with torch.no_grad():
            logits = net(input_ids=torch.tensor([ids])).logits[0, -1].clone()
        for token in set(ids):
            logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
        ids.append(int(logits.argmax()))
        if ids[-1] == 0:
            break
    said = ids[len(prompt) :]
    return said + [decoding.NO_TOKEN] * (length - len(said))


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
    found = decoding.greedy_continuation(net, ids, 5, mask)
    assert found.tolist() == [slow_greedy(net, p, 5) for p in prompts]


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


# Evaluation -----------------------------------------------------------------------------------------------------------


def test_evaluate_sequences_against_slow_decoding(reciter):
    net, rows = reciter
    asked = prompted(rows, 8) + prompted(rows[:, :12], 4)
    said = [slow_greedy(net, s.prefix_ids, len(s.suffix_ids)) for s in asked]
    true = [list(s.suffix_ids) for s in asked]
    distances = [text_reference.edit_distance(p, t) / len(t) for p, t in zip(said, true, strict=True)]
    found = evaluation.evaluate_sequences(net, asked, batch_size=5)
    assert found["strict"] == pytest.approx(sum(p == t for p, t in zip(said, true, strict=True)) / 32)
    assert found["loose"] == pytest.approx(sum(1 - d >= 0.75 - 1e-12 for d in distances) / 32)
    assert found["edit_distance"] == pytest.approx(sum(distances) / 32)
    assert 0.4 < found["strict"] < 0.6
    assert evaluation.strict_rate(net, asked) == pytest.approx(found["strict"])
    assert set(found) == {"strict", "loose", "edit_distance", "extraction_strength", "min_k"}


def test_perplexity_and_rankings(reciter):
    net, rows = reciter
    with torch.no_grad():
        logits = net(input_ids=rows).logits
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 40), rows[:, 1:].reshape(-1)).exp()
    assert evaluation.perplexity(net, rows, batch_size=3) == pytest.approx(float(expected), rel=1e-5)
    baseline = evaluation.Baseline(net, rows, k=5)
    same = baseline.evaluate(net)
    assert same == {"perplexity": pytest.approx(float(expected), rel=1e-5), "ranking_overlap": pytest.approx(1.0)}
    assert baseline.evaluate(language.model(seed=3))["ranking_overlap"] < 0.5


def test_continuations_side_by_side(reciter):
    net, rows = reciter
    asked, tokenizer = prompted(rows[6:10], 8), language.tokenizer()
    texts = examples.continue_texts(net, tokenizer, asked)
    assert texts[:2] == [language.words(s.suffix_ids) for s in asked[:2]]
    assert texts[2] != language.words(asked[2].suffix_ids)
    page = examples.side_by_side({"M": asked}, {"M": texts}, {"M": ["x | y\n`z`"] * 4}, tokenizer)
    assert page.count("before (recited)") == 2
    assert "| after | `x ¦ y ⏎ 'z'` |" in page


def test_the_energy_that_costs_a_given_perplexity(reciter):
    net, rows = reciter
    step = lambda batch: net(input_ids=batch, labels=batch).loss  # noqa: E731
    factors = collect(net, [rows], step, layers="mlp")
    before = evaluation.perplexity(net, rows[:8])

    def ratio(energy):
        with CurvatureEditor(energy).applied(net, factors):
            return evaluation.perplexity(net, rows[:8]) / before

    for limit in (1.2, 2.0):
        match = matching.match_perplexity(net, factors, CurvatureEditor(), rows[:8], limit)
        assert match.value == pytest.approx(ratio(match.energy))
        assert match.value <= limit
        assert ratio(match.energy - 2 * targets.NARROW) > limit or match.value > limit / 1.001
    with pytest.warns(UserWarning, match=r"No edit stays within 0\.5 times the metric"):
        assert matching.match_perplexity(net, factors, CurvatureEditor(), rows[:8], 0.5).energy == 1.0


def test_the_interval_of_a_perplexity_ratio(reciter):
    net, rows = reciter
    before = evaluation.window_nll(net, rows, batch_size=3)
    assert float(before.mean().exp()) == pytest.approx(evaluation.perplexity(net, rows), rel=1e-5)
    other = evaluation.window_nll(language.model(seed=3), rows)
    found = matching.perplexity_ratio(before, other)
    assert found.value == pytest.approx(float((other - before).mean().exp()))
    assert found.low < found.value < found.high
    # Against the normal approximation of the mean.
    spread = 1.96 * float((other - before).std()) / len(rows) ** 0.5
    assert math.log(found.high / found.low) == pytest.approx(2 * spread, rel=0.25)
    assert matching.perplexity_ratio(before, before) == (1.0, 1.0, 1.0)


# Recall ---------------------------------------------------------------------------------------------------------------


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
    found = recall.evaluate_recall(net, tokenizer, read, batch_size=3, max_tokens=4)
    assert found["recall"] == pytest.approx(0.75)
    said = recall.answer(net, tokenizer, ["w30 w31 w1", "w5", "w30 w31 w3"], 2, 4)
    assert said[1] == "w15"
    opened = [slow_greedy(net, [30, 31, i], 4) for i in (1, 2, 3)]
    expected = sum(o[0] == i + 10 and o[1] in (0,) for o, i in zip(opened, (1, 2, 3), strict=True)) / 3
    assert found["recall_open_book"] == pytest.approx(expected)
    closing = language.tokenizer()
    closing._tokenizer.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    assert closing("w5")["input_ids"] == [5, 0]
    assert recall.answer(net, closing, ["w5"], 2, 4) == ["w15"]
    with pytest.raises(ValueError, match="A prompt has 62 tokens and its answer up to 4; the model's context is 64"):
        recall.answer(net, tokenizer, [" ".join(["w1"] * 62)], 2, 4)
    path.write_text('{"prompt": "w1", "answers": "w2"}')
    with pytest.raises(ValueError, match="line 1: answers must be a list of strings, found 'w2'"):
        recall.read_questions(path)


# Stress ---------------------------------------------------------------------------------------------------------------


def test_positional_stress(reciter):
    net, rows = reciter
    asked, filler = prompted(rows, 8), language.tokens(1, 6, seed=8)[0].tolist()
    found = stress.positional_stress(net, asked, shifts=(-4, 0, 3, 8, -7), filler=filler)
    assert set(found) == {-4, 0, 3}  # nothing is left of a suffix of 8, and the filler has 6
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
        assert found[shift] == {"strict": pytest.approx(strict), "exact_prefix": pytest.approx(sum(agree) / 16)}


def test_stress_leaves_out_what_the_model_cannot_read():
    net = language.model()
    asked = [PromptedSequence((1,) * 50, (2,) * 10), PromptedSequence((1,) * 10, (2,) * 10)]
    found = stress.positional_stress(net, asked, shifts=(0, -8), filler=[3] * 8)
    assert set(found) == {0, -8}
    assert not stress.positional_stress(net, asked[:1], shifts=(-8,), filler=[3] * 8)


# Mining ---------------------------------------------------------------------------------------------------------------


def test_mining_finds_what_is_recited(reciter, tmp_path, caplog):
    net, rows = reciter
    tokenizer, path = language.tokenizer(), tmp_path / "corpus.jsonl"
    documents = [*rows.tolist(), rows[0].tolist(), rows[1].tolist()]  # two of them again
    jsonl.write_jsonl(path, ({"text": language.words(row)} for row in documents))
    with caplog.at_level("INFO"):
        found = mining.mine(net, tokenizer, path, prefix=8, suffix=7)
    assert {s.ids for s in found} == {tuple(row[:15]) for row in rows[:8].tolist()}
    assert "10 of 18 windows are recited, 2 of them near-duplicates of others" in caplog.text
    assert found == mining.mine(net, tokenizer, path, prefix=8, suffix=7)
    assert found[0].prefix_text == language.words(found[0].prefix_ids)
    assert len(mining.mine(net, tokenizer, path, prefix=8, suffix=7, windows=9)) < 8
    for one in found:
        assert all(LCSseq.normalized_similarity(one.ids, two.ids) < 0.5 for two in found if two is not one)


def test_overlapping_windows_are_near_duplicates(tmp_path):
    """A model that always says the next number recites every window of the numbers."""
    text = torch.arange(1, 40)
    net = language.train(language.model(), torch.stack([text[i : i + 10] for i in range(30)]), 200)
    path = tmp_path / "corpus.txt"
    path.write_text(language.words(text.tolist()))

    def starts(similarity):
        found = mining.mine(net, language.tokenizer(), path, prefix=6, suffix=4, stride=1, similarity=similarity)
        return sorted(sequence.prefix_ids[0] for sequence in found)

    assert len(starts(1.0)) > 20
    assert len(starts(0.95)) == len(starts(1.0))
    kept = starts(0.5)
    assert 3 <= len(kept) <= 6
    assert all(two - one > 5 for one, two in itertools.pairwise(kept))


def test_a_corpus_shorter_than_a_window_cannot_be_mined(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("w1 w2 w3")
    with pytest.raises(ValueError, match=r"its longest document has 3 tokens, a window has 2 \+ 2"):
        mining.mine(language.model(), language.tokenizer(), path, prefix=2, suffix=2)
