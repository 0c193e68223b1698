"""What collecting costs, counted: products, backward passes, waits and bytes. Nothing here is timed."""

import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.support.measuring import peak_bytes
from lightning_curvature import KFACEditCallback
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.moments import SecondMoment, block_columns, packed_size
from lightning_curvature.collect.passes import collect
from lightning_curvature.collect.plan import DoesNotFitError, place_sums
from lightning_curvature.collect.streams import SideStreams
from lightning_curvature.collect.sums import LayerSums
from lightning_curvature.collect.tied_inputs import STATE_VERSION
from lightning_curvature.collect.windows import WindowedFactors
from lightning_curvature.memory import edit_bytes, place_edit
from lightning_curvature.recording import fisher, taps
from lightning_curvature.recording.rows import BatchGradients
from tests import models

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
            collector.open()
        loss = F.cross_entropy(model(x), y)
        if collector is not None:
            collector.before_backward(loss)
            collector.stop()
        loss.backward()
        if collector is not None:
            collector.close()

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
    collector = Collector(step.model, NAMES, fisher="empirical")
    first, second = (flops(lambda: step(collector)) for _ in range(2))
    assert first - second == checked(*(step.model.get_submodule(name) for name in NAMES)) > 0


def collected_once(step, **options):
    """Return a collector that has checked its layers."""
    collector = Collector(step.model, NAMES, **options)
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
    passes, backward = [], fisher._backward
    plain, collector = flops(step), collected_once(step, fisher="sketched", draws=draws)
    monkeypatch.setattr(fisher, "_backward", lambda *given: passes.append(1) or backward(*given))
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
        collector = Collector(step.model, names, fisher="empirical")
        collector.open()
        step.model(torch.randn(ROWS, IN))
        collector.abort()
        counts.append(len(seen))
        seen.clear()
    assert counts[0] == counts[1] > 0


def test_empirical_takes_no_backward_pass_of_its_own(step, monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", pytest.fail)
    step(Collector(step.model, NAMES, fisher="empirical"))


def test_a_frozen_pass_takes_no_weight_gradients(step):
    model, x, y = step.model, torch.randn(ROWS, IN), torch.randint(10, (ROWS,))
    forward = flops(lambda: F.cross_entropy(model(x), y))
    found = flops(lambda: collect(model, [0], lambda _: F.cross_entropy(model(x), y), layers=NAMES, fisher="empirical"))
    check = checked(*(model.get_submodule(name) for name in NAMES))
    assert found == forward + 2 * ROWS * (10 * IN + IN * HIDDEN) + PRODUCTS + check


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
    collector = Collector(step.model, NAMES, fisher=kind, share=0.5)
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
        collector = Collector(step.model, NAMES, fisher=kind)
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
    loss = fisher.SoftmaxLoss(logits, 1, torch.ones(64, dtype=torch.bool))
    draws = fisher._seeds(kind, loss, [], 2, torch.Generator().manual_seed(0))
    assert peak_bytes(lambda: next(draws)) < 2.2 * size
    kept = [value for value in draws.gi_frame.f_locals.values() if isinstance(value, torch.Tensor)]
    assert all(value.numel() < logits.numel() for value in kept)


def test_sums_and_factors_are_never_there_as_a_whole(step, monkeypatch):
    """The sums of a layer are gone when the factors of the next but one are made: gate and up share A."""
    collector = Collector(step.model, NAMES, fisher="empirical")
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


# Block columns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 5, 127, 128, 129, 300, 2049, 5000])
def test_block_columns_hold_the_upper_triangle_once(dim):
    rows = torch.randn(7, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moment = SecondMoment(dim)
    moment.add(rows)
    torch.testing.assert_close(moment.mean(), rows.T @ rows / 7)
    assert block_columns(dim)[0][0] == 0
    assert block_columns(dim)[-1][1] == dim
    assert len(block_columns(dim)) <= max(4, -(-dim // 1024))
    assert len(moment.total) == packed_size(dim) <= dim**2
    assert dim < 300 or packed_size(dim) <= (0.61 if dim == 5000 else 0.7) * dim**2
    again = SecondMoment.of(moment.mean(), moment.count)
    torch.testing.assert_close(again.total, moment.total)


def test_the_layout_of_saved_sums_has_a_version():
    """Sums of another layout would be read as nonsense: whoever changes it changes the version, and this test."""
    assert (STATE_VERSION, block_columns(1000)) == (5, [(0, 256), (256, 512), (512, 768), (768, 1000)])


def test_a_mean_is_one_tensor_as_long_as_it_is_used():
    moment = SecondMoment(3)
    moment.add(torch.ones(2, 3))
    mean = moment.mean()
    assert moment.mean() is mean
    moment.add(torch.zeros(2, 3))
    assert moment.mean() is not mean
    assert torch.equal(moment.mean(), mean / 2)
    assert moment.copy().mean() is not moment.mean()


def test_several_sets_of_rows_and_scales():
    one, two = torch.randn(4, 3), torch.randn(4, 3)
    moment = SecondMoment(3)
    moment.add(one, two, count=4, scale=0.5)
    torch.testing.assert_close(moment.mean(), (one.T @ one + two.T @ two) / 8)
    other = SecondMoment(3)
    other.add(one, torch.zeros(0, 3), two, count=4, scale=0.5)
    assert torch.equal(other.total, moment.total)
    other.add(count=4)  # positions at which nothing arrived
    torch.testing.assert_close(other.mean(), moment.mean() / 2)


def test_the_standard_error_is_that_of_repeated_collections():
    torch.manual_seed(0)
    scales = torch.arange(1, 151) ** -0.5

    def collected():
        moment = SecondMoment(150)
        for _ in range(40):
            shared = torch.randn(1, 150)  # rows of a batch resemble one another
            moment.add((0.5 * shared + torch.randn(8, 150)) * scales)
        return moment

    found = [collected() for _ in range(60)]
    means = torch.stack([moment.mean() for moment in found])
    truth = means.mean(0)
    spread = float(((means - truth).square().sum((1, 2)).mean() * 60 / 59).sqrt() / truth.norm())
    told = sum(moment.relative_error() for moment in found) / len(found)
    assert 0.85 * spread < told < 1.15 * spread
    assert SecondMoment(2).relative_error() is None
    one = SecondMoment(2)
    one.add(torch.ones(1, 2))
    assert one.relative_error() is None


# Shares of positions ------------------------------------------------------------------------------------------------


def test_a_share_of_the_positions(step):
    whole, part = (Collector(step.model, NAMES, share=share, positions="all") for share in (1.0, 0.25))
    step(whole)
    step(part)
    found, want = part.factors(), whole.factors()
    layer = found["1.gate"]
    assert layer.num_inputs == layer.num_seen < 0.5 * ROWS
    assert found["1.gate"].A is found["1.up"].A
    assert {count.num_inputs for count in found.values()} == {layer.num_inputs}
    assert found.provenance["share"] == 0.25
    assert "share" not in want.provenance
    again = Collector(step.model, NAMES, share=0.25, positions="all")
    step(again)
    assert again.factors().digest() == found.digest()  # a batch that is repeated gives the same
    A = torch.zeros(IN, IN)
    for seed in range(60):
        one = Collector(step.model, ["1.gate"], share=0.25, positions="all", seed=seed)
        step(one)
        A += one.factors()["1.gate"].A / 60
    assert float((A - want["1.gate"].A).norm() / want["1.gate"].A.norm()) < 0.5 * float(
        (layer.A - want["1.gate"].A).norm() / want["1.gate"].A.norm()
    )
    for share in (0, 1.5, True, "half"):
        with pytest.raises(ValueError, match=r"share must be a number in \(0, 1\]"):
            Collector(step.model, NAMES, share=share)


# Pauses -------------------------------------------------------------------------------------------------------------


def taken(every, steps, window, batch=32, **options):
    """Return the training batches that are collected, and the collection."""
    seen = []

    class Watch(pl.Callback):
        def on_before_backward(self, trainer, module, loss):
            if callback._collection.collector.is_open:
                seen.append(trainer.fit_loop.total_batch_idx)

    callback = KFACEditCallback(layers=["net.3"], window=window, every=every)
    trainer = models.trainer(None, callback, Watch(), enable_checkpointing=False, **options)
    trainer.fit(models.Classifier(), models.loader(models.images(batch * steps), batch))
    return seen, callback


@pytest.mark.filterwarnings("ignore:The factors of layer")
def test_one_window_in_so_many_and_the_last(tmp_path):
    seen, callback = taken(4, 30, 64, max_epochs=1)  # a window is two steps
    assert seen == [0, 1, 8, 9, 16, 17, 24, 25, 27, 28]  # the last one a little early, so that it is complete in time
    assert callback.factors.provenance["step"] == 29
    assert callback.factors["net.3"].num_inputs == 64
    assert taken(1, 8, 64, max_epochs=1)[0] == list(range(8))
    assert taken(4, 5, 64, max_epochs=2)[0] == [0, 1, 7, 8]
    assert taken(4, 6, 10_000, max_epochs=1)[0] == list(range(6))  # until there is a window, each step counts
    limited = taken(4, 30, 64, max_epochs=-1, max_steps=10)[0]
    assert limited == [0, 1, 7, 8]


@pytest.mark.filterwarnings("ignore:The factors of layer")
def test_a_run_whose_end_is_not_known_has_no_last_window(tmp_path):
    class Endless(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.fit_loop.total_batch_idx == 12

    seen, callback = [], KFACEditCallback(layers=["net.3"], window=64, every=4)

    class Watch(pl.Callback):
        def on_before_backward(self, trainer, module, loss):
            if callback._collection.collector.is_open:
                seen.append(trainer.fit_loop.total_batch_idx)

    trainer = models.trainer(tmp_path, callback, Watch(), Endless(), max_epochs=-1, enable_checkpointing=False)
    trainer.fit(models.Classifier(), models.loader(models.images(320), 32))
    assert seen == [0, 1, 8, 9]


def test_nothing_is_intercepted_in_a_pause(tmp_path):
    hooks = []

    class Watch(pl.Callback):
        def on_before_backward(self, trainer, module, loss):
            hooks.append(sum(len(m._forward_hooks) for m in module.modules()))

    callback = KFACEditCallback(layers=["net.3"], window=64, every=4)
    trainer = models.trainer(tmp_path, Watch(), callback, max_epochs=1, enable_checkpointing=False)
    trainer.fit(models.Classifier(), models.loader(models.images(320), 32))
    assert [count > 0 for count in hooks] == [True, True, *[False] * 5, True, True, False]


def test_every_must_be_a_count():
    with pytest.raises(ValueError, match="every must be an integer of at least 1"):
        KFACEditCallback(every=0)
    assert WindowedFactors(Collector(network(), NAMES), None, {}).is_due(0, float("inf"))


# Where sums live ----------------------------------------------------------------------------------------------------


def test_sums_live_where_they_fit(monkeypatch, caplog):
    cuda, cpu = torch.device("cuda:0"), torch.device("cpu")
    layers = {"fc": (1000, 1000)}
    free = {"cuda": 2**30, "cpu": 2**40}
    monkeypatch.setattr("lightning_curvature.memory.free_memory", lambda device: free[device.type])
    with caplog.at_level("INFO"):
        assert place_sums(layers, cuda, "auto") == place_sums(layers, cuda, "model") == cuda
        assert place_sums(layers, cuda, "cpu") == cpu
        assert place_sums(layers, torch.device("mps"), "model") == cpu
        assert place_sums({}, cuda, "auto") == cuda
        assert "do not fit" not in caplog.text
        free["cuda"] = 2**20
        assert place_sums(layers, cuda, "auto") == cpu
        assert "does not fit there: they are summed on the CPU" in caplog.text
    with pytest.raises(DoesNotFitError, match="accumulate_on='cpu'"):
        place_sums(layers, cuda, "model")
    free["cpu"] = 2**20
    with pytest.raises(DoesNotFitError, match=r"cpu has 1\.00 MiB left"):
        place_sums(layers, cuda, "auto")


def test_a_layer_is_edited_on_the_gpu_if_there_is_room(monkeypatch):
    cuda, cpu = torch.device("cuda:0"), torch.device("cpu")
    shape, free = (64, 256), {"cuda": 2 * edit_bytes(64, 256) + 2**28, "cpu": 0}
    monkeypatch.setattr("lightning_curvature.memory.free_memory", lambda device: free[device.type])
    assert place_edit(cuda, cpu, shape) == cuda
    assert place_edit(cpu, cuda, shape) == place_edit(cuda, cuda, shape) == cuda
    assert place_edit(cpu, cpu, shape) == place_edit(torch.device("mps"), cpu, shape) == cpu
    free["cuda"] -= 1
    assert place_edit(cuda, cpu, shape) == cpu
    assert place_edit(cuda, cuda, shape) == cuda


def test_work_runs_beside_the_main_stream(monkeypatch):
    """The order of what CUDA is told; there is none here."""
    told = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {getattr(other, 'name', other)}")

    class Entered:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            told.append(f"enter {self.stream.name}")

        def __exit__(self, *error):
            told.append(f"leave {self.stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(f"side {device}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(f"main {device}"))
    monkeypatch.setattr(torch.cuda, "stream", Entered)
    tensor = SimpleNamespace(
        device=torch.device("cuda:0"), record_stream=lambda stream: told.append(f"kept for {stream.name}")
    )
    streams = SideStreams()
    streams.join()
    with streams.beside([tensor, torch.ones(1)]):
        told.append("work")
    streams.join()
    assert told == [
        "side cuda:0 waits for main cuda:0",
        "enter side cuda:0",
        "work",
        "kept for side cuda:0",
        "leave side cuda:0",
        "main cuda:0 waits for side cuda:0",
    ]
    told.clear()
    with streams.beside([torch.ones(1)], [torch.device("cpu")]):
        pass
    assert told == []
    part = SimpleNamespace(device=torch.device("cuda:0"), _local_tensor=tensor)  # of a tensor spread over processes
    with streams.beside([part], [torch.device("cuda:1")]):
        assert {"enter side cuda:0", "enter side cuda:1"} <= set(told)
    assert told.count("kept for side cuda:0") == 1


def test_what_else_is_read_or_written_beside_the_main_stream(step, monkeypatch):
    """A mask of the batch; and sums that are spread over processes, also by one that has no batch of its own."""
    mask = torch.ones(2, dtype=torch.bool)
    assert BatchGradients([], [], mask=mask).tensors == [mask]
    told = []
    monkeypatch.setattr(SideStreams, "beside", lambda self, tensors, devices: told.append([*devices]) or nullcontext())
    for shard in (False, True):
        collector = Collector(step.model, NAMES, shard=shard)
        collector.accumulator.add(None, collector.kinds)
        collector.accumulator.drain()
    assert told == [[], [], [torch.device("cpu")], [torch.device("cpu")]]
