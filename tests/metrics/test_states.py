"""Metrics used in inference mode, and metrics of a collection."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_curvature.metrics import LooseMemorization, NoisyLabelAccuracy, StrictMemorization
from tests.support.metric_cases import CASES, feed, questions, rankings, scored_tokens, token_pairs


# Inference mode: what was made in it cannot be changed in place outside
def noisy_predictions(seed, n=23):
    generator = torch.Generator().manual_seed(seed)
    clean, noised = torch.randint(3, (2, n), generator=generator)
    return torch.randn(n, 3, generator=generator), noised, clean


KINDS = {name: (case.metric, case.inputs) for name, case in CASES.items()}
KINDS["noisy"] = (NoisyLabelAccuracy, noisy_predictions)
any_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def value(metric):
    computed = metric.compute()
    return {key: float(rate) for key, rate in (computed if isinstance(computed, dict) else {"": computed}).items()}


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
        for used in (metric, expected):
            if before == "sync" and used._is_synced:
                used.unsync()
            later(used, inputs(1), 9)
    assert value(metric) == pytest.approx(value(expected), nan_ok=True)
    for used in (metric, expected):
        used.reset()
        feed(used, inputs(2), 9)
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
    clone = collection.clone()
    clone.load_state_dict(collection.state_dict())
    return clone


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
@pytest.mark.parametrize(("call", "first", "second"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_metrics_of_a_collection_are_what_they_are_alone(call, first, second, made):
    inputs = CALLS[call][0]
    alone = [KINDS[first][0](), KINDS[second][0]()]
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
    metric, same, another_threshold = (feed(LooseMemorization(t), token_pairs(0), 9) for t in (0.75, 0.75, 0.5))
    expected = metric.compute()
    metric.merge_state(same)
    assert metric.count == 2 * same.count
    assert metric.compute() == expected
    for foreign in (
        another_threshold,
        another_threshold.metric_state,
        feed(StrictMemorization(), token_pairs(0), 9).metric_state,
    ):
        with pytest.raises(ValueError, match="LooseMemorization_threshold_0_75 to be present"):
            metric.merge_state(foreign)


def test_states_without_a_mark_are_loaded():
    metric = LooseMemorization()
    metric.load_state_dict({"total": torch.tensor(3), "count": torch.tensor(4)})
    metric.update(*token_pairs(0, n=0))
    assert metric.compute() == 0.75
