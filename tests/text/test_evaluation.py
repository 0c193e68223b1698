"""What is measured of a language model, and the energy that a measure allows."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_curvature import CurvatureEditor
from lightning_curvature.collect.passes import collect
from lightning_curvature.search import energy as targets
from lightning_curvature.text import evaluation, examples, matching
from tests.support import language, text_reference
from tests.support.decoding import prompted, slow_greedy


def test_evaluate_sequences_against_slow_decoding(reciter):
    net, rows = reciter
    asked = prompted(rows, 8) + prompted(rows[:, :12], 4)
    said = [slow_greedy(net, s.prefix_ids, len(s.suffix_ids)) for s in asked]
    true = [list(s.suffix_ids) for s in asked]
    distances = [text_reference.edit_distance(p, t) / len(t) for p, t in zip(said, true, strict=True)]
    results = evaluation.evaluate_sequences(net, asked, batch_size=5)
    assert results["strict"] == pytest.approx(sum(p == t for p, t in zip(said, true, strict=True)) / 32)
    assert results["loose"] == pytest.approx(sum(1 - d >= 0.75 - 1e-12 for d in distances) / 32)
    assert results["edit_distance"] == pytest.approx(sum(distances) / 32)
    assert 0.4 < results["strict"] < 0.6
    assert evaluation.strict_rate(net, asked) == pytest.approx(results["strict"])
    assert set(results) == {"strict", "loose", "edit_distance", "extraction_strength", "min_k"}


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
    after = evaluation.window_nll(language.model(seed=3), rows)
    ratio = matching.perplexity_ratio(before, after)
    assert ratio.value == pytest.approx(float((after - before).mean().exp()))
    assert ratio.low < ratio.value < ratio.high
    # Against the normal approximation of the mean.
    spread = 1.96 * float((after - before).std()) / len(rows) ** 0.5
    assert math.log(ratio.high / ratio.low) == pytest.approx(2 * spread, rel=0.25)
    assert matching.perplexity_ratio(before, before) == (1.0, 1.0, 1.0)
