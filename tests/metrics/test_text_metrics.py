import copy
import io
import itertools
import math
import pickle
import random
from dataclasses import dataclass, field

import pytest
import torch
import torchmetrics.text
from torch import nn
from torch.testing import assert_close
from torchmetrics import MetricCollection

from lightning_curvature.metrics import (
    ExtractionStrength,
    LongestExactPrefix,
    LooseMemorization,
    MinKProbability,
    NoisyLabelAccuracy,
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

each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def feed(metric, inputs, size):
    for start in range(0, len(inputs[0]), size):
        metric.update(*(value[start : start + size] for value in inputs))
    return metric


@each
@pytest.mark.parametrize("seed", range(4))
def test_against_the_slow_reference_whole_and_in_batches(case, seed):
    inputs = case.inputs(seed)
    expected = case.reference(*inputs)
    assert float(case.twin_mean(*inputs)) == pytest.approx(expected, rel=1e-6)
    for size in (1, 5, 23):
        assert float(feed(case.metric(), inputs, size).compute()) == pytest.approx(expected, rel=1e-6)


@each
def test_references_are_neither_trivial_nor_constant(case):
    values = {case.reference(*case.inputs(seed)) for seed in range(4)}
    assert len(values) > 1
    assert not values & {0.0, 1.0}


@each
def test_states_and_results(case):
    metric = feed(case.metric(), case.inputs(0), 9)
    assert (metric.total.dtype, metric.count.dtype) == (case.dtype, torch.int64)
    assert metric.total.dim() == metric.count.dim() == 0
    assert metric.compute().dtype == (torch.float32 if case.dtype == torch.int64 else torch.float64)
    assert metric.higher_is_better is case.higher
    assert metric.is_differentiable is metric.full_state_update is False


@each
def test_two_ranks_agree_with_one(case):
    inputs = case.inputs(1)
    whole = feed(case.metric(), inputs, 23)
    mine = feed(case.metric(), [value[:4] for value in inputs], 4)
    other = feed(case.metric(), [value[4:] for value in inputs], 5)
    others = iter([other.total, other.count])  # what the other rank sends, in the order in which states are gathered
    mine.sync(dist_sync_fn=lambda state, group: [state, next(others)], distributed_available=lambda: True)
    assert mine.count == whole.count
    assert (mine.total.dtype, mine.count.dtype) == (case.dtype, torch.int64)
    assert_close(mine.total, whole.total)


@each
def test_forward_gives_the_value_of_the_batch_and_reset_forgets(case):
    inputs = case.inputs(2)
    metric = feed(case.metric(), inputs, 23)
    part = [value[:6] for value in inputs]
    assert_close(metric(*part).double(), case.twin_mean(*part), rtol=1e-6, atol=0.0)
    metric.reset()
    assert metric.count == metric.total == 0


@each
def test_nothing_seen_is_nan(case):
    metric = case.metric()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert math.isnan(metric.compute())
    empty = [value[:0] for value in case.inputs(0)]
    metric.update(*empty)
    assert math.isnan(metric.compute())
    assert math.isnan(case.twin_mean(*empty))


@each
def test_a_module_of_another_dtype_leaves_the_sums_alone(case):
    inputs = case.inputs(3)
    expected = feed(case.metric(), inputs, 5).compute()
    model = nn.Module()
    model.metric = case.metric()
    model.metric.update(*(value[:8] for value in inputs))
    model.to(torch.bfloat16).half()
    feed(model.metric, [value[8:] for value in inputs], 5)
    assert model.metric.total.dtype == case.dtype
    assert_close(model.metric.compute(), expected)
    model.metric.reset()
    assert model.metric.total.dtype == case.dtype
    assert model.metric.to("meta").total.device.type == "meta"


@each
def test_copies(case):
    metric = feed(case.metric(), case.inputs(0), 23)
    for copied in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric), metric.clone()):
        assert_close(copied.compute(), metric.compute())


@each
def test_plot(case):
    from matplotlib import pyplot

    metric = feed(case.metric(), case.inputs(0), 23)
    figure, axes = metric.plot()
    again, _ = metric.plot([metric.compute(), metric.compute()])
    assert axes is figure.axes[0]
    assert again.axes[0].lines
    pyplot.close("all")
    bounds = {
        LongestExactPrefix: (0.0, None),
        MinKProbability: (None, 0.0),
        Perplexity: (1.0, None),
    }
    assert (metric.plot_lower_bound, metric.plot_upper_bound) == bounds.get(case.kind, (0.0, 1.0))


# Inference mode: what was made in it cannot be changed in place outside


def noisy_predictions(seed, n=23):
    generator = torch.Generator().manual_seed(seed)
    clean, noised = torch.randint(3, (2, n), generator=generator)
    return torch.randn(n, 3, generator=generator), noised, clean


KINDS = {name: (case.metric, case.inputs) for name, case in CASES.items()}
KINDS["noisy"] = (NoisyLabelAccuracy, noisy_predictions)
any_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def value(metric):
    found = metric.compute()
    return {key: float(rate) for key, rate in (found if isinstance(found, dict) else {"": found}).items()}


def forward(metric, inputs, size):
    for start in range(0, len(inputs[0]), size):
        metric(*(part[start : start + size] for part in inputs))


def saved(metric, _inputs):
    metric.persistent(True)
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    file.seek(0)
    metric.load_state_dict(torch.load(file, weights_only=True))


BEFORE = {
    "nothing": lambda metric, inputs: None,
    "reset": lambda metric, inputs: metric.reset(),
    "update": lambda metric, inputs: feed(metric, inputs, 9),
    "forward": lambda metric, inputs: forward(metric, inputs, 9),
    "compute": lambda metric, inputs: feed(metric, inputs, 9).compute(),
    "sync": lambda metric, inputs: feed(metric, inputs, 9).sync(
        dist_sync_fn=lambda state, group: [state, state], distributed_available=lambda: True
    ),
    "unsync": lambda metric, inputs: (BEFORE["sync"](metric, inputs), metric.unsync()),
    "to": lambda metric, inputs: feed(metric, inputs, 9).to("cpu", torch.bfloat16).cpu(),
    "load": lambda metric, inputs: saved(feed(metric, inputs, 9), inputs),
}


@any_kind
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("copied", ["itself", "pickled", "copied", "saved"])
def test_a_metric_used_in_inference_mode_goes_on_outside(kind, before, copied):
    make, inputs = kind
    expected = make()
    BEFORE[before](expected, inputs(0))
    with torch.inference_mode():
        metric = make()
        BEFORE[before](metric, inputs(0))
    if copied == "pickled":
        metric = pickle.loads(pickle.dumps(metric))
    elif copied == "copied":
        metric = copy.deepcopy(metric)
    elif copied == "saved":
        saved(metric, None)
    for later in (feed, forward):
        for one in (metric, expected):
            if before == "sync" and one._is_synced:
                one.unsync()
            later(one, inputs(1), 9)
    assert value(metric) == pytest.approx(value(expected), nan_ok=True)
    for one in (metric, expected):
        one.reset()
        feed(one, inputs(2), 9)
    with torch.inference_mode():
        assert value(metric) == pytest.approx(value(expected), nan_ok=True)


# Collections: torchmetrics gives the states of one metric to those that hold the same after the first batch


CALLS = {
    "tokens": (token_pairs, ["strict", "loose", "loose-0.4", "edit", "extraction", "prefix", "strict"]),
    "scores": (
        lambda seed, n=23: scored_tokens(seed, n, ignore_index=0),
        ["min-k", "min-k-0.07", "perplexity", "perplexity-ignore-3", "min-k"],
    ),
    "rankings": (rankings, ["ranking", "ranking-3", "ranking"]),
    "questions": (questions, ["recall", "recall"]),
    "noisy": (noisy_predictions, ["noisy", "noisy"]),
}
PAIRS = [(call, *pair) for call, (_, names) in CALLS.items() for pair in itertools.combinations(names, 2)]


def nested(metrics):
    parts = {name: MetricCollection({"in": metric}, prefix="a_", postfix="_z") for name, metric in metrics.items()}
    return MetricCollection(parts)


def added(metrics):
    collection = MetricCollection(dict(list(metrics.items())[:1]))
    collection.add_metrics(dict(list(metrics.items())[1:]))
    return collection


def loaded(metrics):
    collection = MetricCollection(metrics)
    collection.persistent(True)
    other = collection.clone()
    other.load_state_dict(collection.state_dict())
    return other


MADE = {
    "collection": MetricCollection,
    "prefix": lambda metrics: MetricCollection(metrics, prefix="val/", postfix="_end"),
    "clone": lambda metrics: MetricCollection(metrics).clone(prefix="val/"),
    "nested": nested,
    "added": added,
    "loaded": loaded,
    "pickled": lambda metrics: pickle.loads(pickle.dumps(MetricCollection(metrics))),
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize(("call", "one", "two"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_metrics_of_a_collection_are_what_they_are_alone(call, one, two, made):
    inputs = CALLS[call][0]
    alone = [KINDS[one][0](), KINDS[two][0]()]
    together = MADE[made](dict(zip(("first", "second"), (metric.clone() for metric in alone), strict=True)))
    batches = [[part[:0] for part in inputs(0)], inputs(1), inputs(2)]  # after the first all states are zeros
    for use in ("update", "forward", "update", "reset and update", "load and update"):
        if use.startswith("reset"):
            for metric in (together, *alone):
                metric.reset()
        elif use.startswith("load"):
            together.persistent(True)
            together.load_state_dict(together.state_dict())
        for batch in batches:
            for metric in (together, *alone):
                metric(*batch) if use == "forward" else metric.update(*batch)
        expected = [rate for metric in alone for rate in value(metric).values()]
        assert [float(rate) for rate in together.compute().values()] == pytest.approx(expected, nan_ok=True), use


def test_states_are_shared_by_metrics_that_mean_the_same_and_only_by_those():
    metrics = {
        "loose": LooseMemorization(),
        "same": LooseMemorization(0.75),
        "other": LooseMemorization(0.5),
        "strict": StrictMemorization(),
    }
    collection = MetricCollection(metrics)
    collection.update(*token_pairs(0, n=0))
    assert sorted(map(sorted, collection.compute_groups.values())) == [["loose", "same"], ["other"], ["strict"]]
    metrics["other"].persistent(True)
    with pytest.raises(RuntimeError, match="LooseMemorization_threshold_0_5"):
        LooseMemorization().load_state_dict(metrics["other"].state_dict())


@pytest.mark.skipif(not hasattr(StrictMemorization, "merge_state"), reason="needs torchmetrics 1.6")
def test_states_of_metrics_that_mean_something_else_are_not_merged():
    one, same, other = (feed(LooseMemorization(t), token_pairs(0), 9) for t in (0.75, 0.75, 0.5))
    expected = one.compute()
    one.merge_state(same)
    assert one.count == 2 * same.count
    assert one.compute() == expected
    for foreign in (other, other.metric_state, feed(StrictMemorization(), token_pairs(0), 9).metric_state):
        with pytest.raises(ValueError, match="LooseMemorization_threshold_0_75 to be present"):
            one.merge_state(foreign)


def test_states_without_a_mark_are_loaded():
    metric = LooseMemorization()
    metric.load_state_dict({"total": torch.tensor(3), "count": torch.tensor(4)})
    metric.update(*token_pairs(0, n=0))
    assert metric.compute() == 0.75


# Written tokens


@pytest.mark.parametrize("seed", range(4))
def test_prefix_of_each_sequence(seed):
    preds, target = token_pairs(seed)
    found = F.longest_exact_prefix(preds, target)
    assert found.dtype == torch.int64
    assert found.tolist() == slow.longest_exact_prefix(preds.tolist(), target.tolist())
    assert {0, 12} <= set(found.tolist())


def test_a_similarity_at_the_threshold_counts_whatever_the_rounding():
    for length in (3, 6, 7, 10, 12, 48, 49, 100):
        target = torch.arange(length)[None]
        for wrong in range(length):
            preds = target.clone()
            preds[0, :wrong] = -1
            for threshold in ((length - wrong) / length, 1 - wrong / length):
                assert F.loose_memorization(preds, target, threshold) == 1
                if wrong:
                    assert F.loose_memorization(preds, target, threshold + 1e-6) == 0


def test_twelve_of_48_wrong_tokens_are_still_loosely_memorized():
    target = torch.arange(48)[None]
    for wrong, expected in ((12, 1.0), (13, 0.0)):
        preds = target.clone()
        preds[0, -wrong:] = -1
        assert F.loose_memorization(preds, target) == expected
    shifted = target.roll(1, 1)  # one insertion, one deletion
    assert F.loose_memorization(shifted, target) == 1
    assert F.strict_memorization(shifted, target) == 0
    assert_close(F.normalized_edit_distance(shifted, target), torch.tensor(2 / 48, dtype=torch.float64))


def test_a_threshold_of_one_is_the_strict_match():
    preds, target = token_pairs(0)
    assert F.loose_memorization(preds, target, 1.0) == F.strict_memorization(preds, target)


def test_large_and_negative_ids():
    target = torch.tensor([[2**40, 2**40 + 1, -1, -2]])
    assert F.normalized_edit_distance(torch.tensor([[2**40, 2**40 + 1, -2, -1]]), target) == 0.5
    assert F.normalized_edit_distance(target, target) == 0


def test_extraction_strength_looks_at_the_end():
    target = torch.tensor([[1, 2, 3, 4]])
    for preds, expected in (([1, 2, 3, 4], 1.0), ([9, 2, 3, 4], 0.75), ([9, 2, 9, 4], 0.25), ([1, 2, 3, 9], 0.0)):
        assert F.extraction_strength(torch.tensor([preds]), target) == expected


@pytest.mark.parametrize("name", ["strict", "loose", "edit", "extraction", "prefix"])
@pytest.mark.parametrize("through", ["class", "twin"])
def test_token_pairs_are_checked(name, through):
    case = CASES[name]
    call = case.metric().update if through == "class" else case.twin
    ids = torch.zeros(2, 3, dtype=torch.int64)
    for preds, target, found in (
        (ids[:, :2], ids, r"\[2, 2\] and \[2, 3\]\. Fill shorter sequences .* -1"),
        (ids[0], ids[0], r"L >= 1, found \[3\] and \[3\]"),
        (ids[:, :0], ids[:, :0], r"L >= 1, found \[2, 0\] and \[2, 0\]"),
        (ids.int(), ids, r"found torch.int32 and torch.int64\. Take the argmax"),
        (ids, ids.float(), "found torch.int64 and torch.float32"),
    ):
        with pytest.raises(ValueError, match=found):
            call(preds, target)


@pytest.mark.parametrize("bad", [0, 0.0, -0.5, 1.01, True, "0.5", None, math.nan])
def test_shares_are_checked(bad):
    ids, logits = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, 2)
    for what, call in (
        ("threshold", lambda: LooseMemorization(bad)),
        ("threshold", lambda: F.loose_memorization(ids, ids, bad)),
        ("k", lambda: MinKProbability(bad)),
        ("k", lambda: F.min_k_probability(logits, ids, bad)),
        ("k", lambda: F.min_k_scores(logits, ids, bad)),
    ):
        with pytest.raises(ValueError, match=rf"^{what} must be a number in \(0, 1\], found {bad!r}"):
            call()


# Scored tokens


@pytest.mark.parametrize("percent", [1, 7, 20, 50, 100])
@pytest.mark.parametrize("seed", range(2))
def test_min_k_of_each_sequence(percent, seed):
    logits, target = scored_tokens(seed)
    found = F.min_k_scores(logits, target, percent / 100)
    expected = slow.min_k_scores(logits.tolist(), target.tolist(), percent, -100)
    assert expected[11] is None
    assert_close(found, torch.tensor([math.nan if v is None else v for v in expected]).double(), equal_nan=True)


def test_the_share_of_tokens_is_rounded_up_but_not_for_rounding_errors():
    logits, _ = scored_tokens(0, 1, 100, 5)
    target = torch.zeros(1, 100, dtype=torch.int64)
    log_probs = logits.log_softmax(-1)[0, :, 0].sort().values
    assert 0.07 * 100 > 7
    for k, taken in ((0.07, 7), (0.0701, 8), (1e-12, 1), (1, 100)):
        assert_close(F.min_k_scores(logits, target, k)[0], log_probs[:taken].mean())


def test_all_tokens_of_one_text_give_its_perplexity():
    logits, target = scored_tokens(0, 1)
    target[:] = 2
    assert_close(F.min_k_probability(logits, target, k=1.0).neg().exp(), F.perplexity(logits, target))


def test_nan_and_impossible_tokens_show():
    logits, target = torch.zeros(2, 4, 3), torch.ones(2, 4, dtype=torch.int64)
    logits[0, 1] = torch.nan
    assert F.min_k_scores(logits, target, 0.25).isnan().tolist() == [True, False]
    assert F.min_k_probability(logits, target).isnan()
    target[0, 1] = -100  # does not count, whatever the model says there
    assert_close(F.min_k_scores(logits, target), torch.full((2,), -math.log(3), dtype=torch.float64))
    assert_close(F.perplexity(logits, target), torch.tensor(3.0, dtype=torch.float64), rtol=1e-6, atol=0.0)
    logits[0, 0, 1] = -torch.inf
    assert F.min_k_scores(logits, target)[0] == -torch.inf
    assert F.perplexity(logits, target) == torch.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_logits_lose_only_their_own_rounding(dtype):
    logits, target = scored_tokens(0)
    logits = logits.to(dtype)
    for name in ("min-k", "perplexity"):
        found = CASES[name].twin(logits, target)
        assert found.dtype == torch.float64
        assert float(found) == pytest.approx(CASES[name].reference(logits.double(), target), rel=1e-6)
    baseline = (logits + torch.arange(17, dtype=dtype)).contiguous()
    expected = F.ranking_overlap(logits, baseline.topk(10).indices)
    assert_close(F.ranking_overlap(logits, baseline), expected)
    assert F.ranking_overlap(logits, logits) == pytest.approx(1.0, abs=1e-12)


def test_very_unlikely_tokens_stay_finite():
    logits = torch.zeros(1, 2, 4, dtype=torch.float16)
    logits[0, 0, 0] = 40
    target = torch.tensor([[3, 1]])
    expected = math.exp((40 + math.log(4)) / 2)
    ours, theirs = Perplexity(), torchmetrics.text.Perplexity()
    ours.update(logits, target)
    theirs.update(logits, target)
    assert float(ours.compute()) == pytest.approx(expected, rel=1e-6)
    assert theirs.compute() == torch.inf
    assert float(F.min_k_probability(logits, target)) == pytest.approx(-40)


def test_long_half_precision_batches_stay_finite():
    logits, target = torch.zeros(1, 100_000, 2, dtype=torch.float16), torch.zeros(1, 100_000, dtype=torch.int64)
    ours, theirs = Perplexity(), torchmetrics.text.Perplexity()
    ours.update(logits, target)
    theirs.update(logits, target)
    assert float(ours.compute()) == pytest.approx(2.0, rel=1e-6)
    assert theirs.compute() == torch.inf


def test_counts_grow_beyond_the_integers_of_float32():
    ours, theirs = Perplexity(), torchmetrics.text.Perplexity()
    for metric in (ours, theirs):
        metric.update(torch.zeros(1, 1, 4), torch.tensor([[0]]))
        metric.count.fill_(2**24)
        for _ in range(5):
            metric.update(torch.zeros(1, 1, 4), torch.tensor([[0]]))
    assert int(ours.count) == 2**24 + 5
    assert theirs.count.dtype == torch.float32
    assert int(theirs.count) == 2**24


def test_perplexity_weighs_tokens_not_batches():
    logits, target = scored_tokens(0)
    short, long = (logits[:1, :1], torch.zeros(1, 1, dtype=torch.int64)), (logits[1:], target[1:])
    metric = Perplexity()
    metric.update(*short)
    metric.update(*long)
    rows = [*short[0].flatten(0, 1).tolist(), *long[0].flatten(0, 1).tolist()]
    tokens = [*short[1].flatten().tolist(), *long[1].flatten().tolist()]
    assert float(metric.compute()) == pytest.approx(slow.perplexity(rows, tokens, -100))
    averaged = (F.perplexity(*short) + F.perplexity(*long)) / 2
    assert float(metric.compute()) != pytest.approx(float(averaged), rel=0.05)


def test_perplexity_takes_any_leading_dimensions_and_shifts_nothing():
    logits, target = scored_tokens(0)
    expected = F.perplexity(logits, target)
    assert_close(F.perplexity(logits.flatten(0, 1), target.flatten()), expected)
    assert_close(F.perplexity(logits[:, None], target[:, None]), expected)
    assert_close(F.perplexity(torch.zeros(3), torch.tensor(1)), torch.tensor(3.0).double(), rtol=1e-6, atol=0.0)
    certain = torch.eye(5)[None] * 100
    assert F.perplexity(certain, torch.arange(5)[None]) == 1
    assert F.perplexity(certain, torch.arange(5).roll(-1)[None]) > 1e9


@pytest.mark.parametrize("name", ["min-k", "perplexity"])
@pytest.mark.parametrize("through", ["class", "twin"])
def test_scored_tokens_are_checked(name, through):
    case = CASES[name]
    call = case.metric().update if through == "class" else case.twin
    logits, ids = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    for scores, target, found in (
        (logits, ids[:, 1:], r"logits \[\.\.\., V\] and target \[\.\.\.\], found \[2, 3, 5\] and \[2, 2\]"),
        (logits.long(), ids, "found torch.int64 and torch.int64"),
        (logits, ids.int(), "found torch.float32 and torch.int32"),
        (logits, ids + 5, r"ids in \[0, 5\), found 5\. .* ignore_index, here -100"),
        (logits, ids - 1, r"ids in \[0, 5\), found -1\."),
    ):
        with pytest.raises(ValueError, match=found):
            call(scores, target)


def test_dimensions_and_ignore_index_are_checked():
    ids = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"Expected logits \[n, L, V\], found \[3, 5\]\. A single text has n = 1"):
        F.min_k_scores(torch.zeros(3, 5), ids)
    with pytest.raises(ValueError, match=r"found \[\] and \[\]"):
        F.perplexity(torch.tensor(0.0), torch.tensor(0))
    for bad in (None, 1.0, True):
        for call in (
            lambda bad=bad: Perplexity(bad),
            lambda bad=bad: MinKProbability(ignore_index=bad),
            lambda bad=bad: F.perplexity(torch.zeros(3, 5), ids, bad),
        ):
            with pytest.raises(ValueError, match=f"ignore_index must be an integer, found {bad}. Keep -100"):
                call()


# Rankings


@pytest.mark.parametrize("seed", range(4))
def test_stored_ids_are_as_good_as_logits(seed):
    logits, baseline = rankings(seed)
    expected = F.ranking_overlap(logits, baseline, k=4)
    for stored in (4, 9):
        assert_close(F.ranking_overlap(logits, baseline.topk(stored).indices, k=4), expected)
    assert_close(F.ranking_overlap(logits.flatten(0, 1), baseline.flatten(0, 1), k=4), expected)


def test_rankings_from_identical_to_disjoint():
    logits = torch.arange(6.0)
    assert F.ranking_overlap(logits, 2 * logits + 1, k=6) == pytest.approx(1.0, abs=1e-12)
    assert F.ranking_overlap(logits, -logits, k=3) == 0
    assert 0 < F.ranking_overlap(logits, -logits, k=4) < F.ranking_overlap(logits, logits.roll(1), k=4) < 1
    assert F.ranking_overlap(logits, -logits, k=1) == 0
    for seed in range(4):
        many, _ = rankings(seed)
        for k in range(1, 18):
            assert F.ranking_overlap(many, many, k=k) == pytest.approx(1.0, abs=1e-12)
            assert F.ranking_overlap(many, many, k=k) <= 1


def test_rankings_are_checked():
    logits, ids = torch.zeros(2, 3, 5), torch.tensor([0, 1]).expand(2, 3, 2)
    for scores, baseline, k, found in (
        (logits, logits, 6, r"at least k=6 tokens, found \[2, 3, 5\]\. Choose k of at most 5"),
        (logits.long(), ids, 2, r"floating logits \[\.\.\., V\], found torch.int64 \[2, 3, 5\]"),
        (torch.tensor(0.0), ids, 2, r"found torch.float32 \[\]"),
        (logits, logits[..., 1:], 2, r"shape of logits, \[2, 3, 5\], found \[2, 3, 4\]"),
        (logits, ids.int(), 2, "floating logits or int64 token ids, found torch.int32"),
        (logits, ids, 3, r"token ids \[2, 3, '>= 3'\], found \[2, 3, 2\]\. Keep at least k"),
        (logits, ids[0], 2, r"found \[3, 2\]"),
        (logits, ids[:, :2], 2, r"found \[2, 2, 2\]"),
        (logits, ids + 4, 2, r"2 distinct baseline token ids in \[0, 5\) at each position"),
        (logits, ids - 1, 2, "Are they of another vocabulary, or padded"),
        (logits, torch.zeros_like(ids), 2, "2 distinct baseline token ids"),
    ):
        with pytest.raises(ValueError, match=found):
            F.ranking_overlap(scores, baseline, k)
        with pytest.raises(ValueError, match=found):
            RankingOverlap(k).update(scores, baseline)
    for call in (lambda: RankingOverlap(0), lambda: F.ranking_overlap(logits, logits, 0)):
        with pytest.raises(ValueError, match="k must be an integer of at least 1, found 0"):
            call()


# Answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel\n\tTower.", "eiffel tower"),
        ("a cat, an owl & the theory", "cat owl theory"),
        ("U.S.A.", "usa"),
        ("well-known", "wellknown"),
        ("\u201c\uff2f\uff53\uff4c\uff4f\u201d\u00a0\u2163", "oslo iv"),
        ("it\u2019s it's", "its its"),
        ("Ärger \ufb01n", "ärger fin"),
        ("$1,000", "1000"),
        ("THE", ""),
        ("", ""),
    ],
)
def test_normalize_answer(text, expected):
    assert F.normalize_answer(text) == expected
    assert F.normalize_answer(expected) == expected


def test_answers_are_checked():
    for preds, answers, found in (
        (["Oslo"], ["Oslo"], r"answers\[0\] must be a list .* found the string 'Oslo'\. Write \['Oslo'\]"),
        (["Oslo", "Nile"], [["Oslo"], []], r"answers\[1\] is empty, .* leave the question out"),
        (["Oslo"], [], "found 1 predictions and 0 lists of answers"),
        ("Oslo", [["Oslo"]] * 4, "preds must be a list with one entry for each question, found the string 'Oslo'"),
        (["Oslo"], "O", "answers must be a list .* found the string 'O'"),
        ([7], [["Oslo"]], r"Expected an answer as a string, found 7\. Decode token ids first"),
        (["Oslo"], [[b"Oslo"]], "found b'Oslo'"),
    ):
        for call in (F.recall_accuracy, RecallAccuracy().update):
            with pytest.raises(ValueError, match=found):
                call(preds, answers)
