"""Runs of several processes: what they train, save, resume and probe."""

import contextlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler

from lightning_curvature import KFACEditCallback, KroneckerFactors
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.windows import WindowedFactors
from lightning_curvature.distributed import Ranks, whole
from lightning_curvature.recording.options import CollectorOptions
from tests.support import cells, models, processes
from tests.support.matrix import BOTH, DDP2, DDP3, FSDP2, ONE, TENSOR

pytestmark = pytest.mark.filterwarnings("ignore:The factors of layer .* rest on")


# Runs ----------------------------------------------------------------------------------------------------------------


def trained(strategy, folder, settings, **options):
    """Train with or without the callback; return the weights, gathered."""
    size, make, parallel = cells.STRATEGIES[strategy]
    callbacks = [KFACEditCallback(cells.LAYERS, **{"energy": 0.85} | settings)] if settings is not None else []
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
    are_equal = {}
    for name, options in (("plain", {}), ("accumulated", {"accumulate_grad_batches": 2})):
        expected = trained(strategy, folder, None, **options)
        for fisher in ("sketched", "empirical"):
            weights = trained(strategy, folder, {"fisher": fisher}, **options)
            are_equal[name, fisher] = all(torch.equal(weights[key], value) for key, value in expected.items())
    return are_equal


@pytest.mark.parametrize("strategy", [DDP2, FSDP2, BOTH])
def test_no_trace_on_training(strategy, tmp_path):
    for are_equal in processes.run(cells.STRATEGIES[strategy][0], traces, strategy, tmp_path):
        assert all(are_equal.values()), are_equal


def saving(strategy, folder, options, full=True):
    """Fit with a checkpoint in each epoch, keep the best two; return the files, and whether the sibling is right."""
    size, make, parallel = cells.STRATEGIES[strategy]
    made = make()
    if isinstance(made, ModelParallelStrategy):
        made._save_distributed_checkpoint = not full
    callback = KFACEditCallback(cells.LAYERS, fisher="exact", **{"energy": 0.85} | options)
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
    assert all(result[1] == report for result in others)
    marks = ("-edited-factors.safetensors", "-edited.ckpt", ".ckpt")
    assert files == sorted(f"step={step}{mark}" for step in (8, 12) for mark in marks)
    alone = {key: value for key, value in options.items() if key != "shard_factors"}
    (tmp_path / "one").mkdir()
    saving(ONE, tmp_path / "one", alone)
    for step in (8, 12):
        alone_weights, many = (
            {mark: plain_weights(tmp_path / where / f"step={step}{mark}.ckpt") for mark in ("", "-edited")}
            for where in ("one", "many")
        )
        for mark in ("", "-edited"):
            assert alone_weights[mark].keys() == many[mark].keys()
            for key, value in alone_weights[mark].items():
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


def resuming(strategy, folder, settings, stop, ckpt_path):
    """Fit for some epochs, saving the last checkpoint; return the factors."""
    size, make, parallel = cells.STRATEGIES[strategy]
    callback = KFACEditCallback(cells.LAYERS, **{"energy": 0.85} | settings)
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
    factors = callback.run.windows.synchronise().gathered()
    return {name: (layer.A, layer.G, layer.numbers) for name, layer in factors.items()}


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        (ONE, {"fisher": "sketched", "window": 72}),
        (DDP2, {"fisher": "sketched", "window": 72}),
        (DDP2, {"fisher": "sketched", "window": 10_000}),
        (DDP3, {"fisher": "sampled", "shard_factors": True, "window": 72}),
        (FSDP2, {"fisher": "empirical", "window": 72}),
        (TENSOR, {"fisher": "sketched", "window": 10_000}),
    ],
)
def test_a_resumed_run_has_the_factors_of_an_uninterrupted_one(strategy, settings, tmp_path):
    size = cells.STRATEGIES[strategy][0]
    whole = processes.run(size, resuming, strategy, tmp_path / "a", settings, 4, None)[0]
    processes.run(size, resuming, strategy, tmp_path / "b", settings, 2, None)
    resumed = processes.run(size, resuming, strategy, tmp_path / "b", settings, 4, tmp_path / "b" / "epoch=1.ckpt")[0]
    for name, (A, G, numbers) in whole.items():
        torch.testing.assert_close(resumed[name][0], A, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(resumed[name][1], G, rtol=1e-5, atol=1e-7)
        assert resumed[name][2] == numbers
    if (
        settings == {"fisher": "sketched", "window": 10_000} and strategy == DDP2
    ):  # other numbers of processes go on, too
        more = processes.run(3, resuming, DDP3, tmp_path / "b", settings, 4, tmp_path / "b" / "epoch=1.ckpt")[0]
        for name, (A, _, numbers) in whole.items():
            torch.testing.assert_close(more[name][0], A, rtol=1e-4, atol=1e-5)
            assert more[name][2] == numbers


class Probed(cells.Net):
    def probe_dataloader(self):
        return {"val": models.loader(models.images(64, 1))}


def probing(strategy, folder, target):
    settings = {"target": target} if target else {}
    _, callback, _ = cells.run("fit", "exact", strategy, folder=folder, kind=Probed, max_epochs=3, **settings)
    match = callback.match and (callback.match.energy, callback.match.value)
    return callback.probe_results, match, callback.editor.energy


@pytest.mark.filterwarnings("ignore:Every edit that was tried stays within 0.9 times")
@pytest.mark.parametrize("target", [None, {"val/accuracy": 0.9}])
@pytest.mark.parametrize("strategy", [DDP2, FSDP2, TENSOR])
def test_probes_and_targets_say_the_same_on_all_processes(strategy, target, tmp_path):
    alone = probing(ONE, tmp_path / "one", target)
    for results, match, energy in processes.run(cells.STRATEGIES[strategy][0], probing, strategy, tmp_path, target):
        assert results == pytest.approx(alone[0], abs=0.05)
        assert set(results) == {"curvature/val/accuracy/before", "curvature/val/accuracy/after"}
        assert energy == pytest.approx(alone[2], abs=0.05)
        assert (match is None) == (target is None)
        assert match is None or match[1] >= 0.9


def vocabulary(fisher, sequence):
    """Collect from logits that are sharded over the classes; with sequence parallelism, inputs are sharded, too."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    ranks = Ranks.of_run(0, 1, torch.device("cpu"))
    collected = []
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
        collector = Collector(
            net, CollectorOptions(layers=["up", "down"], fisher=fisher), ranks=ranks if parallel else Ranks()
        )
        recording = collector.step()
        recording.open()
        logits = net["head"](net["down"](net["norm"](net["up"](x)).relu()))
        with loss_parallel() if parallel else contextlib.nullcontext():
            loss = F.cross_entropy(logits.flatten(0, 1), y)
            recording.before_backward(loss)
            loss.backward()
        recording.close()
        factors = WindowedFactors(collector, None, {}).synchronise()
        collected.append({name: (layer.A, layer.G, layer.numbers) for name, layer in factors.items()})
    return collected


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("fisher", ["sketched", "sampled", "exact", "empirical"])
def test_logits_that_are_sharded_over_the_vocabulary(fisher, sequence):
    for alone, many in processes.run(2, vocabulary, fisher, sequence):
        for name, (A, G, numbers) in alone.items():
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
    settings = {"target": {"val/accuracy": 0.8}}
    _, callback, _ = cells.run("fit", "exact", DDP2, folder=folder, kind=PartlyProbed, max_epochs=3, **settings)
    return callback.probe_results, callback.editor.energy


def test_processes_with_other_probes_decide_together(tmp_path):
    first, second = processes.run(2, partly_probed, tmp_path)
    assert first == second


def alone_afterwards(folder, same):
    """The first process goes on alone, with a Trainer of one device."""
    callback = KFACEditCallback(cells.LAYERS, energy=0.85)
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
        second = callback if same else KFACEditCallback(cells.LAYERS, energy=0.85)
        alone = models.trainer(folder, second, devices=1)
        alone.validate(module)
        alone.save_checkpoint(folder / "x.ckpt")
        return second.factors.counts(), (folder / "x-edited.ckpt").exists()
    return callback.factors.counts(), True


@pytest.mark.parametrize("same", [True, False])
def test_one_process_goes_on_alone(same, tmp_path):
    counts = {"net.1": 48, "net.3": 48}
    assert processes.run(2, alone_afterwards, tmp_path, same) == [(counts, True)] * 2
