"""What goes wrong in a run: an error or a counted warning that says so, nothing lost, live weights untouched."""

import resource
import signal
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_curvature import CurvatureEditor, KFACEditCallback, KroneckerFactors
from lightning_curvature.checkpoints.facts import ENTRY
from lightning_curvature.collect.passes import collect
from tests.support import cells, models, processes
from tests.support.matrix import DDP2

pytestmark = [
    pytest.mark.filterwarnings("ignore:The factors of layer .* rest on"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


def test_factors_of_one_row_singular_and_one_by_one():
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 3, bias=False))
    x, y = torch.tensor([[2.0]]), torch.tensor([1])
    factors = collect(
        net, [(x, y)], lambda batch: F.cross_entropy(net(batch[0]), batch[1]), layers=["0", "1"], fisher="exact"
    )
    assert factors["0"].shape == (1, 1)
    before = net[0].weight.clone()
    report = CurvatureEditor(0.5).edit(net, factors)
    torch.testing.assert_close(net[0].weight, before)  # its one direction is kept
    assert report.layers["0"].energy_kept == pytest.approx(1.0)
    assert report.layers["1"].kept >= 1


@pytest.mark.parametrize("fisher", ["sketched", "empirical"])
def test_batches_without_rows_count_nothing(fisher):
    net = models.mlp()
    data = models.images(8).tensors

    def step(batch):
        return F.cross_entropy(net(data[0][batch]), data[1][batch], reduction="sum")

    with_empty = collect(net, [[0, 1, 2], [], [3, 4, 5, 6, 7]], step, layers=["1", "3"], fisher=fisher, positions="all")
    without = collect(net, [[0, 1, 2], [3, 4, 5, 6, 7]], step, layers=["1", "3"], fisher=fisher, positions="all")
    for name, layer in without.items():
        assert with_empty[name].num_inputs == layer.num_inputs == 8
        torch.testing.assert_close(with_empty[name].A, layer.A)


# Layers that do not always run ----------------------------------------------------------------------------------------


class Sometimes(models.Classifier):
    """A second branch runs in every third batch, or never."""

    def __init__(self, never=False):
        super().__init__()
        self.save_hyperparameters()
        self.never = never
        self.branch = nn.Linear(64, 4)
        self.step = 0

    def forward(self, x):
        self.step += 1
        logits = self.net(x)
        return logits + self.branch(x.flatten(1)) if self.step % 3 == 0 and not self.never else logits


@pytest.mark.parametrize("fisher", ["sketched", "empirical"])
def test_a_layer_that_runs_in_some_batches_is_collected_from_those(fisher, tmp_path):
    callback = KFACEditCallback(["net.3", "branch"], fisher=fisher, window=10_000)
    with pytest.warns(UserWarning, match="Chosen layers 'branch' did not run in the first collected batch"):
        models.trainer(tmp_path, callback, enable_checkpointing=False).fit(
            Sometimes(), models.loader(models.images(192), 32)
        )
    assert callback.factors.counts() == {"net.3": 12 * 32, "branch": 4 * 32}
    assert set(callback.report.layers) == {"net.3", "branch"}


def test_a_layer_that_never_runs_is_told_in_the_end_and_the_others_are_edited(tmp_path):
    def fit(**options):
        callback = KFACEditCallback(["net.3", "branch"], **options)
        saver = ModelCheckpoint(tmp_path, "x", enable_version_counter=False)
        try:
            models.trainer(tmp_path, callback, saver, max_epochs=1).fit(
                Sometimes(True), models.loader(models.images(64))
            )
        finally:
            assert (tmp_path / "x-edited.ckpt").exists()
        return callback

    for options in ({}, {"skip_faulty": True}):
        with (
            pytest.warns(UserWarning, match="Chosen layers 'branch' did not run in the first"),
            pytest.warns(UserWarning, match="Chosen layers 'branch' never ran, and stay as they are"),
        ):
            assert list(fit(**options).report.layers) == ["net.3"]
    net = Sometimes(True)
    images, labels = models.images(4).tensors
    with (
        pytest.warns(UserWarning, match="did not run in the first"),
        pytest.raises(RuntimeError, match="Chosen layers 'branch' never ran"),
    ):
        collect(net, [images], lambda batch: F.cross_entropy(net(batch), labels), layers=["net.3", "branch"])


# A run ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [True, False])
def test_a_layer_of_zeros_leaves_the_others_edited_if_so_told(skip, tmp_path):
    class Dead(models.Classifier):
        def forward(self, x):
            return super().forward(0 * x)  # the first layer reads zeros

    callback = KFACEditCallback(["net.1", "net.3"], skip_faulty=skip)
    trainer = models.trainer(tmp_path, callback, ModelCheckpoint(tmp_path, "x"), max_epochs=1)
    data = models.loader(models.images(64))
    if not skip:
        with (
            pytest.warns(UserWarning, match="has no edited copy: Layer 'net.1': Factor A is zero"),
            pytest.warns(UserWarning, match=r"no edit of the weights at the end: Layer 'net\.1': Factor A is zero"),
        ):
            trainer.fit(Dead(), data)
        assert not (tmp_path / "x-edited.ckpt").exists()
        assert (tmp_path / "x.ckpt").exists()
        return
    with pytest.warns(UserWarning, match="Not edited: Layer 'net.1': Factor A is zero"):
        trainer.fit(Dead(), data)
    original, edited = (torch.load(tmp_path / f"x{mark}.ckpt", weights_only=True) for mark in ("", "-edited"))
    assert torch.equal(original["state_dict"]["net.1.weight"], edited["state_dict"]["net.1.weight"])
    assert not torch.equal(original["state_dict"]["net.3.weight"], edited["state_dict"]["net.3.weight"])
    assert list(edited[ENTRY]["layers"]) == ["net.3"]
    assert list(edited[ENTRY]["skipped"]) == ["net.1"]


def full_disk(folder):
    """Train where files of more than 30 kB cannot be written: the factors, and not the checkpoint of a small model."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    files = []

    class Small(models.Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    callback = KFACEditCallback(["net.1", "net.3"])
    with pytest.warns(
        UserWarning, match=r"A sibling of .*x.ckpt could not be written \(.*; the checkpoint itself is not"
    ):
        models.trainer(folder, callback, ModelCheckpoint(folder, "x"), max_epochs=2).fit(
            Small(), models.loader(models.images(64))
        )
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    files += sorted(path.name for path in folder.iterdir())
    return files, set(torch.load(folder / "x.ckpt", weights_only=True)["state_dict"])


def test_a_disk_that_is_full_costs_the_factors_and_nothing_else(tmp_path):
    ((files, weights),) = processes.run(1, full_disk, tmp_path)
    assert files == ["x.ckpt"]
    assert "net.3.weight" in weights


class Stream(IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class OneBad(cells.Net):
    """The second batch of the last process holds a NaN."""

    def val_dataloader(self):
        batches = [tuple(tensor.clone() for tensor in batch) for batch in self.loader()]
        if self.trainer.global_rank == self.trainer.world_size - 1:
            batches[1][0][0, 0, 0] = torch.nan
        return DataLoader(Stream(batches), batch_size=None)


def one_bad(strategy, folder, shard):
    _, callback, factors = cells.run("validate", "exact", strategy, kind=OneBad, folder=folder, shard_factors=shard)
    return factors.counts(), factors.provenance["batches_skipped"], callback.report.layers["net.3"].relative_change


@pytest.mark.parametrize("shard", [False, True])
def test_a_batch_that_one_process_leaves_out(shard, tmp_path):
    first, second = processes.run(2, one_bad, DDP2, tmp_path, shard)
    assert first == second
    assert first[:2] == ({"net.1": 42, "net.3": 42}, 1)


def terminated(folder, who):
    """Some of two processes are told to stop, and a checkpoint is saved."""

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 6 and trainer.global_rank in who:
                signal.raise_signal(signal.SIGTERM)

    saver = OnExceptionCheckpoint(folder, "stopped")
    options = {"max_epochs": 3, "enable_checkpointing": True}
    stops = pytest.raises((SIGTERMException, SystemExit, RuntimeError))
    with warnings.catch_warnings(record=True) as told, stops as error:
        warnings.simplefilter("always")
        cells.run("fit", "empirical", DDP2, folder=folder, callbacks=[Stop(), saver], **options)
    return type(error.value).__name__, [str(warning.message) for warning in told]


def test_a_signal_to_all_processes(tmp_path):
    for error, _ in processes.run(2, terminated, tmp_path, (0, 1)):
        assert error in ("SIGTERMException", "SystemExit")
    counts = KroneckerFactors.load(tmp_path / "stopped-edited-factors.safetensors").counts()
    assert counts == {"net.1": 72, "net.3": 72}
    assert (tmp_path / "stopped-edited.ckpt").exists()


def test_a_signal_to_one_process_is_no_deadlock(tmp_path):
    """Lightning stops the other one at another place: what it would have added cannot be had."""
    _, told = processes.run(2, terminated, tmp_path, (0,))[0]
    assert any("saved while the run fails, and not all of its processes take part" in message for message in told)
    assert (tmp_path / "stopped.ckpt").exists()
    assert not list(tmp_path.glob("*-edited*"))
