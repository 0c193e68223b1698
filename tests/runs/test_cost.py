"""What collecting costs, counted: products, backward passes, waits and bytes. Nothing here is timed."""

import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_curvature import KFACEditCallback
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.moments import packed_size
from lightning_curvature.collect.passes import collect
from lightning_curvature.collect.streams import SideStreams
from lightning_curvature.collect.sums import LayerSums
from lightning_curvature.collect.windows import WindowedFactors
from lightning_curvature.recording import fisher, taps
from lightning_curvature.recording.calls import BatchGradients
from lightning_curvature.recording.options import CollectorOptions
from tests.support.peak import peak_bytes

ROWS, IN, HIDDEN = 96, 256, 512
NAMES = ["1.gate", "1.up", "1.down"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(IN, HIDDEN), nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, IN)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def network():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(IN, 10))


@pytest.fixture
def step():
    """One training step, with a collector or without."""
    model, x, y = network(), torch.randn(ROWS, IN), torch.randint(10, (ROWS,))

    def run(collector=None):
        if collector is not None:
            recording = collector.step()
            recording.open()
        loss = F.cross_entropy(model(x), y)
        if collector is not None:
            recording.before_backward(loss)
            recording.stop_recording()
        loss.backward()
        if collector is not None:
            recording.close()

    run.model = model
    return run


def flops(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


DISTINCT = [IN, HIDDEN, HIDDEN, HIDDEN, IN]  # A of gate and up, G of both, A and G of down
PRODUCTS = sum(2 * ROWS * packed_size(dim) for dim in DISTINCT)


def checked(*layers):
    """Return what it costs to check a layer's computation, once: a product of 64 rows, and one of their squares."""
    return sum(2 * 2 * 64 * min(layer.out_features, 256) * layer.in_features for layer in layers)


def test_a_layer_is_checked_once(step):
    collector = Collector(step.model, CollectorOptions(layers=NAMES, fisher="empirical"))
    first, second = (flops(lambda: step(collector)) for _ in range(2))
    assert first - second == checked(*(step.model.get_submodule(name) for name in NAMES)) > 0


def collected_once(step, **options):
    """Return a collector that has checked its layers."""
    collector = Collector(step.model, CollectorOptions(layers=NAMES, **options))
    step(collector)
    return collector


def test_empirical_costs_the_products_of_distinct_factors_by_half(step):
    plain = flops(step)
    collector = collected_once(step, fisher="empirical")
    extra = flops(lambda: step(collector)) - plain
    assert extra == PRODUCTS
    full = sum(
        2 * ROWS * (m.in_features**2 + m.out_features**2)
        for m in (step.model[1].gate, step.model[1].up, step.model[1].down)
    )
    assert extra <= 0.6 * full


@pytest.mark.parametrize("draws", [1, 2])
def test_random_passes_stop_at_the_lowest_layer_and_take_no_weight_gradients(step, draws, monkeypatch):
    passes, backward = [], fisher.backpropagate
    plain, collector = flops(step), collected_once(step, fisher="sketched", draws=draws)
    monkeypatch.setattr(fisher, "backpropagate", lambda *given: passes.append(1) or backward(*given))
    extra = flops(lambda: step(collector)) - plain
    # From the logits through the head and down: nothing of gate and up, whose outputs are the goal, nor of block 0.
    down = 2 * ROWS * (10 * IN + IN * HIDDEN)
    gradients = (draws - 1) * sum(2 * ROWS * packed_size(dim) for dim in (HIDDEN, HIDDEN, IN))
    assert extra == draws * down + PRODUCTS + gradients
    assert len(passes) == draws


def test_nothing_that_a_hook_reads_goes_through_the_function_mode(step, monkeypatch):
    """Each time costs Python in a forward pass, however small a layer is."""
    seen, look = [], taps._FunctionTap.__torch_function__
    monkeypatch.setattr(taps._FunctionTap, "__torch_function__", lambda *given: seen.append(given[1]) or look(*given))
    counts = []
    for names in (NAMES[:1], NAMES):
        collector = Collector(step.model, CollectorOptions(layers=names, fisher="empirical"))
        recording = collector.step()
        recording.open()
        step.model(torch.randn(ROWS, IN))
        recording.abort()
        counts.append(len(seen))
        seen.clear()
    assert counts[0] == counts[1] > 0


def test_empirical_takes_no_backward_pass_of_its_own(step, monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", pytest.fail)
    step(Collector(step.model, CollectorOptions(layers=NAMES, fisher="empirical")))


def test_a_frozen_pass_takes_no_weight_gradients(step):
    model, x, y = step.model, torch.randn(ROWS, IN), torch.randint(10, (ROWS,))
    forward = flops(lambda: F.cross_entropy(model(x), y))
    counted = flops(
        lambda: collect(model, [0], lambda _: F.cross_entropy(model(x), y), layers=NAMES, fisher="empirical")
    )
    check = checked(*(model.get_submodule(name) for name in NAMES))
    assert counted == forward + 2 * ROWS * (10 * IN + IN * HIDDEN) + PRODUCTS + check


class Waits(TorchDispatchMode):
    """Counts what would wait for an accelerator: a number read from it, an index whose size it decides."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if any(part in name for part in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default")):
            self.found.append(name)
        if "index.Tensor" in name and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["sketched", "sampled", "empirical"])
def test_a_step_waits_once(step, kind, monkeypatch):
    """The one time is the list of numbers that the end of a batch reads, all together."""
    lists, tolist = [], torch.Tensor.tolist
    collector = Collector(step.model, CollectorOptions(layers=NAMES, fisher=kind, share=0.5))
    step(collector)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(1) or tolist(self))
    with Waits() as waits:
        step(collector)
    # The sample of positions is drawn and counted on the CPU.
    assert [name for name in waits.found if "_local_scalar_dense" not in name] == []
    assert len(waits.found) <= 1
    assert len(lists) == 1


def test_peak_memory_of_some_steps(step):
    """The sums of several batches included: their low part holds something at the end of most steps."""
    captured = 4 * ROWS * sum(DISTINCT)
    factors = 4 * sum(dim**2 for dim in DISTINCT)
    step()
    plain = peak_bytes(step)

    def steps(kind):
        collector = Collector(step.model, CollectorOptions(layers=NAMES, fisher=kind))
        for _ in range(4):
            step(collector)

    for kind in ("empirical", "sketched"):
        extra = peak_bytes(lambda kind=kind: steps(kind)) - plain
        # Four blocks up to the diagonal: 1.25, two of 256: 1.5; 1.09 at 11008.
        assert extra <= 1.35 * factors + captured


@pytest.mark.parametrize("kind", ["sketched", "sampled"])
def test_nothing_of_the_size_of_the_logits_stays_but_one(kind):
    """Logits of a large vocabulary are the largest tensor of a step: two while vectors are drawn, one from then on."""
    size = 4 * 64 * 2**14
    logits = torch.randn(64, 2**14, requires_grad=True)
    loss = fisher.OutputLoss(logits, 1, torch.ones(64, dtype=torch.bool))
    draws = fisher.fisher_vectors(kind, loss, [], 2, torch.Generator().manual_seed(0))
    assert peak_bytes(lambda: next(draws)) < 2.2 * size
    kept = [value for value in draws.gi_frame.f_locals.values() if isinstance(value, torch.Tensor)]
    assert all(value.numel() < logits.numel() for value in kept)


def test_sums_and_factors_are_never_there_as_a_whole(step, monkeypatch):
    """The sums of a layer are gone when the factors of the next but one are made: gate and up share A."""
    collector = Collector(step.model, CollectorOptions(layers=NAMES, fisher="empirical"))
    step(collector)
    totals = [weakref.ref(moment.total) for sums in collector.sums.values() for moment in sums.moments.values()]
    alive, factors = [], LayerSums.factors

    def counted(sums):
        alive.append(len({id(total()) for total in totals if total() is not None}))
        return factors(sums)

    monkeypatch.setattr(LayerSums, "factors", counted)
    collector.finish()
    assert alive == [5, 4, 2]
    assert not any(total() is not None for total in totals)
    assert collector.sums == {}


# Shares of positions ------------------------------------------------------------------------------------------------


def test_a_share_of_the_positions(step):
    whole, part = (
        Collector(step.model, CollectorOptions(layers=NAMES, share=share, positions="all")) for share in (1.0, 0.25)
    )
    step(whole)
    step(part)
    sampled, want = part.factors(), whole.factors()
    layer = sampled["1.gate"]
    assert layer.num_inputs == layer.num_seen < 0.5 * ROWS
    assert sampled["1.gate"].A is sampled["1.up"].A
    assert {count.num_inputs for count in sampled.values()} == {layer.num_inputs}
    assert sampled.provenance["share"] == 0.25
    assert "share" not in want.provenance
    again = Collector(step.model, CollectorOptions(layers=NAMES, share=0.25, positions="all"))
    step(again)
    assert again.factors().digest() == sampled.digest()  # a batch that is repeated gives the same
    A = torch.zeros(IN, IN)
    for seed in range(60):
        collector = Collector(step.model, CollectorOptions(layers=["1.gate"], share=0.25, positions="all", seed=seed))
        step(collector)
        A += collector.factors()["1.gate"].A / 60
    assert float((A - want["1.gate"].A).norm() / want["1.gate"].A.norm()) < 0.5 * float(
        (layer.A - want["1.gate"].A).norm() / want["1.gate"].A.norm()
    )
    for share in (0, 1.5, True, "half"):
        with pytest.raises(ValueError, match=r"share must be a number in \(0, 1\]"):
            Collector(step.model, CollectorOptions(layers=NAMES, share=share))


def test_every_must_be_a_count():
    with pytest.raises(ValueError, match="every must be an integer of at least 1"):
        KFACEditCallback(every=0)
    assert WindowedFactors(Collector(network(), CollectorOptions(layers=NAMES)), None, {}).is_due(0, float("inf"))


def test_what_else_is_read_or_written_beside_the_main_stream(step, monkeypatch):
    """A mask of the batch; and sums that are spread over processes, also by one that has no batch of its own."""
    mask = torch.ones(2, dtype=torch.bool)
    assert BatchGradients([], [], mask=mask).tensors == [mask]
    told = []
    monkeypatch.setattr(SideStreams, "beside", lambda self, tensors, devices: told.append([*devices]) or nullcontext())
    for shard in (False, True):
        collector = Collector(step.model, CollectorOptions(layers=NAMES), shard=shard)
        collector.add_nothing()
        collector.drain()
    assert told == [[torch.device("cpu")], [torch.device("cpu")]]  # of the spread sums alone
