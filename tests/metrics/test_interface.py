"""What all metrics have in common: references, states, ranks, copies, plots."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_curvature.metrics import LongestExactPrefix, MinKProbability, Perplexity
from tests.support.metric_cases import CASES, feed

each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


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
    second = feed(case.metric(), [value[4:] for value in inputs], 5)
    others = iter([second.total, second.count])  # what the other rank sends, in the order in which states are gathered
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
