"""Several processes: what they add up, share, save and resume, and how they fail together."""

import contextlib
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_curvature import CurvatureEditor, KFACEditCallback, KroneckerFactors
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.windows import WindowedFactors
from lightning_curvature.distributed import Ranks, whole
from lightning_curvature.trainer.support import check_validation
from tests.support import cells, models, processes
from tests.support.matrix import BOTH, DDP2, DDP3, FSDP2, ONE, TENSOR

pytestmark = pytest.mark.filterwarnings("ignore:The factors of layer .* rest on")


def here():
    """Return the ranks of this process, whose data are its own."""
    dist.init_process_group("gloo")
    return Ranks.of_run(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


# Talk ----------------------------------------------------------------------------------------------------------------


def failing_talk():
    ranks = here()
    found = []

    def broken():
        raise OSError("the disk is full")

    for call in (
        lambda: ranks.first(broken),
        lambda: ranks.on(1, broken),
        lambda: ranks.spread(["a"], {"a": broken} if ranks.rank == 1 else {}, {"a": 1}),
        lambda: ranks.send(None, 0),
    ):
        with pytest.raises((OSError, RuntimeError)) as error:
            call()
        found.append(str(error.value))
    results = ranks.spread(
        ["a", "b"],
        {"ab"[ranks.rank]: lambda: int("x")} if ranks.rank else {"a": lambda: (torch.ones(2), "told")},
        {"a": 0, "b": 1},
    )
    return (
        found,
        results["a"][0].tolist(),
        results["a"][1],
        type(results["b"]).__name__,
        ranks.part(7),
        ranks.is_counted,
    )


def test_a_failure_on_one_process_is_raised_on_all():
    one, two = processes.run(2, failing_talk)
    assert one[:4] == two[:4]
    assert one[0] == ["the disk is full"] * 3 + ["Process 0 has no tensor to send."]
    assert one[1:4] == ([1.0, 1.0], "told", "ValueError")
    assert (one[4], two[4]) == (4, 3)
    assert one[5]
    assert two[5]


# Sums ----------------------------------------------------------------------------------------------------------------


def networks(seed):
    """Return a random network, its data and layers, and how it is cut into processes and batches."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    widths = [rng.randint(1, 9) for _ in range(3)]
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16])
    net = nn.Sequential(
        nn.Linear(widths[0], widths[1]), nn.Tanh(), nn.Linear(widths[1], widths[2]), nn.Tanh(), nn.Linear(widths[2], 3)
    )
    n = rng.randint(6, 30)
    data = torch.randn(n, widths[0]), torch.randint(3, (n,))
    return rng, net.to(dtype), (data[0].to(dtype), data[1])


def batches_of(rng, indices):
    """Cut indices into batches of random sizes, some of them empty."""
    indices = list(indices)
    while indices:
        size = rng.randint(0, len(indices))
        yield indices[:size]
        indices = indices[size:]


def run_over(collector, net, data, batches):
    for batch in batches:
        if batch:  # the mean over nothing is no loss
            collector.open()
            collector.backward(F.cross_entropy(net(data[0][batch]).float(), data[1][batch]))
        collector.close()
    collector.abort()


def random_splits(seeds):
    """Collect random data in random parts on every process, and compare with one process that sees all of it."""
    alone, ranks = Ranks(), here()
    worst = 0.0
    for seed in seeds:
        rng, net, data = networks(seed)
        fisher, shard = rng.choice(["exact", "empirical"]), rng.random() < 0.5
        coupled, options = rng.random() < 0.3, {"layers": ["0", "2"], "positions": "all"}
        whole = Collector(net, **options, fisher=fisher, coupled=coupled, ranks=alone)
        run_over(whole, net, data, batches_of(rng, range(len(data[1]))))
        expected = WindowedFactors(whole, None, {}).factors

        owner = [rng.randrange(ranks.size) for _ in data[1]]  # a process may have nothing
        collector = Collector(net, **options, fisher=fisher, coupled=coupled, ranks=ranks, shard=shard)
        own = [index for index, rank in enumerate(owner) if rank == ranks.rank]
        run_over(collector, net, data, batches_of(random.Random(ranks.rank), own))
        collector.accumulator.drain()
        found = WindowedFactors(collector, None, {}).synchronise()
        assert found.counts() == expected.counts(), seed
        modules = {name: net.get_submodule(name) for name in found}
        editor = CurvatureEditor(0.8, min_positions=0)
        editor.ranks = ranks
        weights = {name: module.weight for name, module in modules.items()}
        edited, _ = editor.edit_layers(weights, found)
        for name, weight in CurvatureEditor(0.8, min_positions=0).edit_layers(weights, expected)[0].items():
            change = (edited[name].double() - weight.double()).norm() / weight.double().norm().clamp(min=1e-9)
            assert float(change) < 2e-2, (seed, name, change)  # a pair at the edge of the kept set may change sides
        gathered = found.gathered()
        if ranks.rank == 0:
            assert list(gathered) == list(expected)
            for name, layer in gathered.items():
                for key, tensor in expected[name].tensors.items():
                    difference = (layer.tensors[key] - tensor).norm() / tensor.norm().clamp(min=1e-30)
                    # bfloat16 sums of other batches round otherwise
                    worst = max(worst, float(difference) / (1000 if data[0].dtype == torch.bfloat16 else 1))
                assert layer.numbers == expected[name].numbers, seed
    return worst


@pytest.mark.parametrize("size", [2, 3])
def test_any_split_over_processes_and_batches_gives_the_same_factors_and_edit(size):
    assert 0 < processes.run(size, random_splits, range(25 * size, 25 * size + 25))[0] < 1e-5


def uneven(folder, shard):
    """Validate on 3 batches on one process, 1 on another one, none on the third; every step may take part."""

    class Part(IterableDataset):
        def __init__(self, data, indices):
            self.items = [data[index] for index in indices]

        def __iter__(self):
            return iter(self.items)

    class Uneven(cells.Net):
        def val_dataloader(self):
            return DataLoader(Part(self.data, [range(36), range(36, 48), []][self.trainer.global_rank]), 12)

    _, callback, factors = cells.run("validate", "exact", DDP3, kind=Uneven, folder=folder, shard_factors=shard)
    return callback.report.layers["net.1"].relative_change, factors.counts(), factors["net.3"].A


def test_a_validation_that_a_process_may_skip_is_refused():
    class Skipping(cells.Net):
        def __init__(self):
            super().__init__()
            self.allow_zero_length_dataloader_with_multiple_devices = True

    trainer = models.trainer(".", callback := KFACEditCallback(loop="validation"))
    callback.setup(trainer, Skipping(), "fit")  # one process may
    ranks = Ranks()
    ranks.size = 2
    with pytest.raises(MisconfigurationException, match="a process without batches would skip the validation"):
        check_validation(ranks, Skipping(), None)


@pytest.mark.parametrize("shard", [False, True])
def test_processes_with_other_numbers_of_batches_or_none(shard, tmp_path):
    one, *_ = processes.run(3, uneven, tmp_path, shard)
    _, callback, factors = cells.run("validate", "exact", ONE, folder=tmp_path / "one")
    assert one[1] == factors.counts() == {"net.1": 48, "net.3": 48}
    torch.testing.assert_close(one[2], factors["net.3"].A, rtol=1e-5, atol=1e-7)
    assert one[0] == pytest.approx(callback.report.layers["net.1"].relative_change, abs=1e-5)


def sharded_sums(shard):
    """Return how many entries of sums each process keeps, and what it says of layers of others."""
    ranks = here()
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    collector = Collector(net, "linear", ranks=ranks, shard=shard)
    x, y = torch.randn(8, 16), torch.randint(16, (8,))
    collector.open()
    collector.backward(F.cross_entropy(net(x), y))
    collector.close()
    entries = sum(m.total.numel() for sums in collector.sums.values() for m in sums.moments.values())
    collection = WindowedFactors(collector, None, {})
    factors = collection.synchronise()
    messages = []
    for name in factors:
        try:
            assert factors[name].A.shape == (16, 16)
        except RuntimeError as error:
            messages.append(str(error))
    assert repr(factors)
    assert ("1" in factors, "9" in factors) == (True, False)
    with pytest.raises(KeyError, match="No factors of layer '9'"):
        factors["9"]
    digests = {factors.digest(), *ranks.gather(factors.digest())}
    return entries, len(factors), messages, len(digests)


def test_sharded_sums_take_a_share_of_the_memory():
    whole, _ = processes.run(2, sharded_sums, False)
    one, two = processes.run(2, sharded_sums, True)
    assert whole[1] == one[1] == two[1] == 5  # the output head is left out
    assert one[0] + two[0] == whole[0]
    assert max(one[0], two[0]) <= 0.6 * whole[0]
    assert not whole[2]
    assert len(one[2]) + len(two[2]) == 5
    assert "are kept by process 1, this is process 0 (shard_factors=True). Read them from the factor file" in one[2][0]
    assert whole[3] == one[3] == 1


def other_layers():
    """One process sees another last layer than the other one."""
    ranks = here()
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    collector = Collector(net, "last-mlp", ranks=ranks)
    collector.open()
    collector.backward(F.cross_entropy(net["head"](net["ab"[ranks.rank]](torch.randn(3, 4))), torch.tensor([0, 1, 1])))
    collector.close()
    with pytest.raises(RuntimeError) as error:
        WindowedFactors(collector, None, {"layers": "last-mlp"}).synchronise()
    named = Collector(net, ["a", "b"], ranks=ranks)
    for _ in range(2):
        named.open()
        loss = F.cross_entropy(net["head"](net["ab"[ranks.rank]](torch.randn(3, 4))), torch.tensor([0, 1, 1]))
        named.backward(loss)
        named.close()
    return str(error.value), WindowedFactors(named, None, {}).synchronise().counts()


def test_layers_that_only_some_processes_run():
    one, two = processes.run(2, other_layers)
    assert one[0] == two[0]
    assert "layers='last-mlp' chose 'a' on one process and 'b' on process 1" in one[0]
    assert one[1] == two[1] == {"a": 6, "b": 6}


def other_order(shard, idle):
    """Layers run in another order on the other process, or in no batch of it."""
    ranks = here()
    torch.manual_seed(0)
    net = nn.ModuleDict({"2": nn.Linear(4, 4), "10": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    collector = Collector(net, ["2", "10"], ranks=ranks, shard=shard)
    for index in range(0 if idle and ranks.rank else 2):
        layer = net[["2", "10"][(ranks.rank + index) % 2]]
        collector.open()
        collector.backward(F.cross_entropy(net["head"](layer(torch.randn(3, 4))), torch.tensor([0, 1, 1])))
        collector.close()
    collector.accumulator.drain()
    factors = WindowedFactors(collector, None, {}).synchronise()
    editor = CurvatureEditor(0.6, min_positions=0)
    editor.ranks = ranks
    edited, _ = editor.edit_layers({name: net[name].weight for name in factors}, factors)
    return list(factors), {name: weight.detach().sum().item() for name, weight in edited.items()}


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("shard", [False, True])
def test_all_processes_edit_the_layers_in_one_order(shard, idle):
    one, two = processes.run(2, other_order, shard, idle)
    assert one == two
    assert one[0] == ["2", "10"]


# Runs ----------------------------------------------------------------------------------------------------------------


def trained(strategy, folder, own, **options):
    """Train with or without the callback; return the weights, gathered."""
    size, make, parallel = cells.STRATEGIES[strategy]
    callbacks = [KFACEditCallback(cells.LAYERS, **own)] if own is not None else []
    trainer = models.trainer(
        folder,
        *callbacks,
        devices=size,
        strategy=make(),
        max_epochs=2,
        enable_checkpointing=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        **options,
    )
    net = cells.Net(parallel)
    trainer.fit(net)
    return {name: whole(value).clone() for name, value in net.state_dict().items()}


def traces(strategy, folder):
    found = {}
    for name, options in (("plain", {}), ("accumulated", {"accumulate_grad_batches": 2})):
        expected = trained(strategy, folder, None, **options)
        for fisher in ("sketched", "empirical"):
            weights = trained(strategy, folder, {"fisher": fisher}, **options)
            found[name, fisher] = all(torch.equal(weights[key], value) for key, value in expected.items())
    return found


@pytest.mark.parametrize("strategy", [DDP2, FSDP2, BOTH])
def test_no_trace_on_training(strategy, tmp_path):
    for found in processes.run(cells.STRATEGIES[strategy][0], traces, strategy, tmp_path):
        assert all(found.values()), found


def saving(strategy, folder, options, full=True):
    """Fit with a checkpoint in each epoch, keep the best two; return the files, and whether the sibling is right."""
    size, make, parallel = cells.STRATEGIES[strategy]
    made = make()
    if isinstance(made, ModelParallelStrategy):
        made._save_distributed_checkpoint = not full
    callback = KFACEditCallback(cells.LAYERS, fisher="exact", **options)
    callback.editor.min_positions = 0  # there are fewer images than inputs
    saver = ModelCheckpoint(folder, "{step}", monitor="step", mode="max", save_top_k=2)
    trainer = models.trainer(
        folder, callback, saver, devices=size, strategy=made, max_epochs=3, use_distributed_sampler=False
    )
    trainer.fit(cells.Net(parallel))
    trainer.strategy.barrier()
    report = {name: edit.relative_change for name, edit in callback.report.layers.items()}
    return sorted(path.name for path in Path(folder).iterdir()), report


def plain_weights(path):
    """Return the weights of a checkpoint, a file or a folder of shards."""
    if path.is_dir():
        return _load_distributed_checkpoint(path)["state_dict"]
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    ("strategy", "options", "full"),
    [
        (DDP2, {}, True),
        (DDP2, {"shard_factors": True}, True),
        (DDP2, {"loop": "validation"}, True),
        (FSDP2, {}, True),
        (FSDP2, {"loop": "validation"}, False),
        (TENSOR, {}, False),
        (BOTH, {"shard_factors": True}, False),
    ],
)
def test_siblings_are_those_of_one_process(strategy, options, full, tmp_path):
    (files, report), *others = processes.run(
        cells.STRATEGIES[strategy][0], saving, strategy, tmp_path / "many", options, full
    )
    assert all(other[1] == report for other in others)
    marks = ("-edited-factors.safetensors", "-edited.ckpt", ".ckpt")
    assert files == sorted(f"step={step}{mark}" for step in (8, 12) for mark in marks)
    alone = {key: value for key, value in options.items() if key != "shard_factors"}
    (tmp_path / "one").mkdir()
    saving(ONE, tmp_path / "one", alone)
    for step in (8, 12):
        one, many = (
            {mark: plain_weights(tmp_path / where / f"step={step}{mark}.ckpt") for mark in ("", "-edited")}
            for where in ("one", "many")
        )
        for mark in ("", "-edited"):
            assert one[mark].keys() == many[mark].keys()
            for key, value in one[mark].items():
                torch.testing.assert_close(many[mark][key], value, rtol=1e-3, atol=1e-5)
        for key, value in many[""].items():
            edited = key in {f"{layer}.weight" for layer in cells.LAYERS}
            assert torch.equal(value, many["-edited"][key]) != edited
        factors = [
            KroneckerFactors.load(tmp_path / where / f"step={step}-edited-factors.safetensors")
            for where in ("one", "many")
        ]
        for name, layer in factors[0].items():
            torch.testing.assert_close(factors[1][name].A, layer.A, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(factors[1][name].G, layer.G, rtol=1e-4, atol=1e-7)
            assert factors[1][name].numbers == layer.numbers


def resuming(strategy, folder, own, stop, ckpt_path):
    """Fit for some epochs, saving the last checkpoint; return the factors."""
    size, make, parallel = cells.STRATEGIES[strategy]
    callback = KFACEditCallback(cells.LAYERS, **own)
    callback.editor.min_positions = 0  # there are fewer images than inputs
    saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = models.trainer(
        folder,
        callback,
        saver,
        devices=size,
        strategy=make(),
        max_epochs=stop,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(cells.Net(parallel), ckpt_path=ckpt_path)
    factors = callback._collection.synchronise().gathered()
    return {name: (layer.A, layer.G, layer.numbers) for name, layer in factors.items()}


@pytest.mark.parametrize(
    ("strategy", "own"),
    [
        (ONE, {"fisher": "sketched", "window": 72}),
        (DDP2, {"fisher": "sketched", "window": 72}),
        (DDP2, {"fisher": "sketched", "window": 10_000}),
        (DDP3, {"fisher": "sampled", "shard_factors": True, "window": 72}),
        (FSDP2, {"fisher": "empirical", "window": 72}),
        (TENSOR, {"fisher": "sketched", "window": 10_000}),
    ],
)
def test_a_resumed_run_has_the_factors_of_an_uninterrupted_one(strategy, own, tmp_path):
    size = cells.STRATEGIES[strategy][0]
    whole = processes.run(size, resuming, strategy, tmp_path / "a", own, 4, None)[0]
    processes.run(size, resuming, strategy, tmp_path / "b", own, 2, None)
    resumed = processes.run(size, resuming, strategy, tmp_path / "b", own, 4, tmp_path / "b" / "epoch=1.ckpt")[0]
    for name, (A, G, numbers) in whole.items():
        torch.testing.assert_close(resumed[name][0], A, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(resumed[name][1], G, rtol=1e-5, atol=1e-7)
        assert resumed[name][2] == numbers
    if own == {"fisher": "sketched", "window": 10_000} and strategy == DDP2:  # other numbers of processes go on, too
        more = processes.run(3, resuming, DDP3, tmp_path / "b", own, 4, tmp_path / "b" / "epoch=1.ckpt")[0]
        for name, (A, _, numbers) in whole.items():
            torch.testing.assert_close(more[name][0], A, rtol=1e-4, atol=1e-5)
            assert more[name][2] == numbers


class Probed(cells.Net):
    def probe_dataloader(self):
        return {"val": models.loader(models.images(64, 1))}


def probing(strategy, folder, target):
    own = {"target": target} if target else {}
    _, callback, _ = cells.run("fit", "exact", strategy, folder=folder, kind=Probed, max_epochs=3, **own)
    match = callback.match and (callback.match.energy, callback.match.value)
    return callback.probe_results, match, callback.editor.energy


@pytest.mark.filterwarnings("ignore:Every edit that was tried stays within 0.9 times")
@pytest.mark.parametrize("target", [None, {"val/accuracy": 0.9}])
@pytest.mark.parametrize("strategy", [DDP2, FSDP2, TENSOR])
def test_probes_and_targets_say_the_same_on_all_processes(strategy, target, tmp_path):
    one = probing(ONE, tmp_path / "one", target)
    for results, match, energy in processes.run(cells.STRATEGIES[strategy][0], probing, strategy, tmp_path, target):
        assert results == pytest.approx(one[0], abs=0.05)
        assert set(results) == {"curvature/val/accuracy/before", "curvature/val/accuracy/after"}
        assert energy == pytest.approx(one[2], abs=0.05)
        assert (match is None) == (target is None)
        assert match is None or match[1] >= 0.9


def vocabulary(fisher, sequence):
    """Collect from logits that are sharded over the classes; with sequence parallelism, inputs are sharded, too."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    ranks = Ranks.of_run(0, 1, torch.device("cpu"))
    found = []
    for parallel in (False, True):
        torch.manual_seed(0)
        layers = {"up": nn.Linear(6, 8), "norm": nn.LayerNorm(8), "down": nn.Linear(8, 6), "head": nn.Linear(6, 6)}
        net = nn.ModuleDict(layers)
        if parallel:
            rows = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1) if sequence else Replicate())
            heads = ColwiseParallel(
                input_layouts=Shard(1) if sequence else Replicate(), output_layouts=Shard(-1), use_local_output=False
            )
            plan = {"up": ColwiseParallel(output_layouts=Replicate()), "down": rows, "head": heads}
            parallelize_module(net, mesh, plan)
        x, y = torch.randn(3, 4, 6), torch.randint(5, (12,))
        collector = Collector(net, ["up", "down"], fisher=fisher, ranks=ranks if parallel else Ranks())
        collector.open()
        logits = net["head"](net["down"](net["norm"](net["up"](x)).relu()))
        with loss_parallel() if parallel else contextlib.nullcontext():
            loss = F.cross_entropy(logits.flatten(0, 1), y)
            collector.before_backward(loss)
            loss.backward()
        collector.close()
        factors = WindowedFactors(collector, None, {}).synchronise()
        found.append({name: (layer.A, layer.G, layer.numbers) for name, layer in factors.items()})
    return found


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("fisher", ["sketched", "sampled", "exact", "empirical"])
def test_logits_that_are_sharded_over_the_vocabulary(fisher, sequence):
    for one, many in processes.run(2, vocabulary, fisher, sequence):
        for name, (A, G, numbers) in one.items():
            torch.testing.assert_close(many[name][0], A)
            torch.testing.assert_close(many[name][1], G, rtol=1e-4, atol=1e-6)
            assert many[name][2] == numbers


class PartlyProbed(cells.Net):
    """Each process gets other data for its probe."""

    def probe_dataloader(self):
        data = models.images(64, 1)
        part = self.trainer.distributed_sampler_kwargs
        return {"val": DataLoader(data, 8, sampler=DistributedSampler(data, shuffle=False, **part))}


def partly_probed(folder):
    own = {"target": {"val/accuracy": 0.8}}
    _, callback, _ = cells.run("fit", "exact", DDP2, folder=folder, kind=PartlyProbed, max_epochs=3, **own)
    return callback.probe_results, callback.editor.energy


def test_processes_with_other_probes_decide_together(tmp_path):
    one, two = processes.run(2, partly_probed, tmp_path)
    assert one == two


def alone_afterwards(folder, same):
    """The first process goes on alone, with a Trainer of one device."""
    callback = KFACEditCallback(cells.LAYERS)
    trainer = models.trainer(
        folder,
        callback,
        devices=2,
        strategy=DDPStrategy(),
        max_epochs=1,
        limit_val_batches=0,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    module = cells.Net()
    trainer.fit(module)
    if trainer.global_rank == 0:
        second = callback if same else KFACEditCallback(cells.LAYERS)
        alone = models.trainer(folder, second, devices=1)
        alone.validate(module)
        alone.save_checkpoint(folder / "x.ckpt")
        return second.factors.counts(), (folder / "x-edited.ckpt").exists()
    return callback.factors.counts(), True


@pytest.mark.parametrize("same", [True, False])
def test_one_process_goes_on_alone(same, tmp_path):
    counts = {"net.1": 48, "net.3": 48}
    assert processes.run(2, alone_afterwards, tmp_path, same) == [(counts, True)] * 2
