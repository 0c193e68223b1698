"""Sums of several processes: whatever the part of each, the factors are those of all data."""

import random

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_curvature import CurvatureEditor, KFACEditCallback
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.windows import WindowedFactors
from lightning_curvature.distributed import Ranks
from lightning_curvature.recording.options import CollectorOptions
from lightning_curvature.trainer.refusals import check_validation
from tests.support import cells, models, processes
from tests.support.matrix import DDP3, ONE
from tests.support.processes import here

pytestmark = pytest.mark.filterwarnings("ignore:The factors of layer .* rest on")


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
        if not batch:  # the mean over nothing is no loss
            collector.add_nothing()
            continue
        with collector.step() as step:
            step.backward(F.cross_entropy(net(data[0][batch]).float(), data[1][batch]))


def random_splits(seeds):
    """Collect random data in random parts on every process, and compare with one process that sees all of it."""
    alone, ranks = Ranks(), here()
    worst = 0.0
    for seed in seeds:
        rng, net, data = networks(seed)
        fisher, shard = rng.choice(["exact", "empirical"]), rng.random() < 0.5
        coupled, options = rng.random() < 0.3, {"layers": ["0", "2"], "positions": "all"}
        whole = Collector(net, CollectorOptions(**options, fisher=fisher, coupled=coupled), ranks=alone)
        run_over(whole, net, data, batches_of(rng, range(len(data[1]))))
        expected = WindowedFactors(whole, None, {}).factors

        owner = [rng.randrange(ranks.size) for _ in data[1]]  # a process may have nothing
        collector = Collector(
            net, CollectorOptions(**options, fisher=fisher, coupled=coupled), ranks=ranks, shard=shard
        )
        indices = [index for index, rank in enumerate(owner) if rank == ranks.rank]
        run_over(collector, net, data, batches_of(random.Random(ranks.rank), indices))
        collector.drain()
        summed = WindowedFactors(collector, None, {}).synchronise()
        assert summed.counts() == expected.counts(), seed
        modules = {name: net.get_submodule(name) for name in summed}
        editor = CurvatureEditor(0.8, min_positions=0)
        editor.ranks = ranks
        weights = {name: module.weight for name, module in modules.items()}
        edited, _ = editor.edit_layers(weights, summed)
        for name, weight in CurvatureEditor(0.8, min_positions=0).edit_layers(weights, expected)[0].items():
            change = (edited[name].double() - weight.double()).norm() / weight.double().norm().clamp(min=1e-9)
            assert float(change) < 2e-2, (seed, name, change)  # a pair at the edge of the kept set may change sides
        gathered = summed.gathered()
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
    first, *_ = processes.run(3, uneven, tmp_path, shard)
    _, callback, factors = cells.run("validate", "exact", ONE, folder=tmp_path / "one")
    assert first[1] == factors.counts() == {"net.1": 48, "net.3": 48}
    torch.testing.assert_close(first[2], factors["net.3"].A, rtol=1e-5, atol=1e-7)
    assert first[0] == pytest.approx(callback.report.layers["net.1"].relative_change, abs=1e-5)


def sharded_sums(shard):
    """Return how many entries of sums each process keeps, and what it says of layers of others."""
    ranks = here()
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    collector = Collector(net, CollectorOptions(layers="linear"), ranks=ranks, shard=shard)
    x, y = torch.randn(8, 16), torch.randint(16, (8,))
    recording = collector.step()
    recording.open()
    recording.backward(F.cross_entropy(net(x), y))
    recording.close()
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
    first, second = processes.run(2, sharded_sums, True)
    assert whole[1] == first[1] == second[1] == 5  # the output head is left out
    assert first[0] + second[0] == whole[0]
    assert max(first[0], second[0]) <= 0.6 * whole[0]
    assert not whole[2]
    assert len(first[2]) + len(second[2]) == 5
    assert (
        "are kept by process 1, this is process 0 (shard_factors=True). Read them from the factor file" in first[2][0]
    )
    assert whole[3] == first[3] == 1


def other_layers():
    """One process sees another last layer than the other one."""
    ranks = here()
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    collector = Collector(net, CollectorOptions(layers="last-mlp"), ranks=ranks)
    recording = collector.step()
    recording.open()
    recording.backward(F.cross_entropy(net["head"](net["ab"[ranks.rank]](torch.randn(3, 4))), torch.tensor([0, 1, 1])))
    recording.close()
    with pytest.raises(RuntimeError) as error:
        WindowedFactors(collector, None, {"layers": "last-mlp"}).synchronise()
    named = Collector(net, CollectorOptions(layers=["a", "b"]), ranks=ranks)
    for _ in range(2):
        with named.step() as step:
            step.backward(
                F.cross_entropy(net["head"](net["ab"[ranks.rank]](torch.randn(3, 4))), torch.tensor([0, 1, 1]))
            )
    return str(error.value), WindowedFactors(named, None, {}).synchronise().counts()


def test_layers_that_only_some_processes_run():
    first, second = processes.run(2, other_layers)
    assert first[0] == second[0]
    assert "layers='last-mlp' chose 'a' on one process and 'b' on process 1" in first[0]
    assert first[1] == second[1] == {"a": 6, "b": 6}


def other_order(shard, idle):
    """Layers run in another order on the other process, or in no batch of it."""
    ranks = here()
    torch.manual_seed(0)
    net = nn.ModuleDict({"2": nn.Linear(4, 4), "10": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    collector = Collector(net, CollectorOptions(layers=["2", "10"]), ranks=ranks, shard=shard)
    for index in range(0 if idle and ranks.rank else 2):
        layer = net[["2", "10"][(ranks.rank + index) % 2]]
        recording = collector.step()
        recording.open()
        recording.backward(F.cross_entropy(net["head"](layer(torch.randn(3, 4))), torch.tensor([0, 1, 1])))
        recording.close()
    collector.drain()
    factors = WindowedFactors(collector, None, {}).synchronise()
    editor = CurvatureEditor(0.6, min_positions=0)
    editor.ranks = ranks
    edited, _ = editor.edit_layers({name: net[name].weight for name in factors}, factors)
    return list(factors), {name: weight.detach().sum().item() for name, weight in edited.items()}


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("shard", [False, True])
def test_all_processes_edit_the_layers_in_one_order(shard, idle):
    first, second = processes.run(2, other_order, shard, idle)
    assert first == second
    assert first[0] == ["2", "10"]
