"""What goes wrong in a run: an error or a counted warning that says so, nothing lost, live weights untouched."""

import dataclasses
import functools
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

from lightning_curvature import CurvatureEditor, KFACEditCallback, KroneckerFactors, LayerFactors
from lightning_curvature.baselines import RandomBasisEditor, SVDEditor
from lightning_curvature.checkpoints.facts import ENTRY
from lightning_curvature.collect.passes import collect
from lightning_curvature.editing.bulk import BulkStepEditor
from lightning_curvature.factors.basis import TooFewPositionsError, decompose
from tests import reference
from tests.support import cells, models, processes
from tests.support.matrix import DDP2

pytestmark = [
    pytest.mark.filterwarnings("ignore:The factors of layer .* rest on"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


def factors(d_in=3, d_out=2, **changes):
    torch.manual_seed(0)
    x, g = torch.randn(20, d_in), torch.randn(20, d_out)
    return LayerFactors(**({"A": x.T @ x / 20, "G": g.T @ g / 20, "num_inputs": 20, "num_gradients": 20} | changes))


# Decomposition -------------------------------------------------------------------------------------------------------


def failing_eigh(monkeypatch, times):
    """Let the solver not converge a number of times, as LAPACK and cuSOLVER say it."""
    real, calls = torch.linalg.eigh, []

    def eigh(matrix):
        calls.append(matrix.device.type)
        if len(calls) <= times:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge.")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    return calls


def test_a_solver_that_does_not_converge_is_tried_again_on_the_cpu(monkeypatch):
    A = factors().A
    expected = decompose(A, "Factor A")
    calls = failing_eigh(monkeypatch, 1)
    for one, two in zip(decompose(A, "Factor A"), expected, strict=True):
        assert torch.equal(one, two)
    assert calls == ["cpu", "cpu"]


def test_a_full_gpu_is_no_fault_of_the_factor(monkeypatch):
    def full(_):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(torch.linalg, "eigh", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        decompose(torch.eye(2), "Factor A")


def test_a_layer_whose_factor_cannot_be_decomposed_is_named(monkeypatch):
    failing_eigh(monkeypatch, 100)
    monkeypatch.setattr(torch.linalg, "svd", torch.linalg.eigh)
    net = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"Layer '0': Factor G could not be decomposed, neither on cpu"):
        CurvatureEditor(0.5).edit(net, KroneckerFactors({"0": factors()}))


FAULTS = {
    "NaN in A": (lambda net: None, {"A": torch.full((3, 3), torch.nan)}, "Factor A holds NaN"),
    "zero G": (lambda net: None, {"G": torch.zeros(2, 2)}, "Factor G is zero"),
    "zero A": (lambda net: None, {"A": torch.zeros(3, 3)}, "Factor A is zero"),
    "infinite weight": (lambda net: net[0].weight.data.fill_(torch.inf), {}, "its weight holds NaN or infinite"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_layer_stops_the_edit_or_is_left_as_it_is(name):
    damage, changes, message = FAULTS[name]
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))
    damage(net)
    found = KroneckerFactors({"0": factors(**changes), "1": factors()})
    before = [layer.weight.clone() for layer in net]
    with pytest.raises(ValueError, match=f"Layer '0': .*{message}"):
        CurvatureEditor(0.5).edit(net, found)
    assert all(torch.equal(a, b.weight) for a, b in zip(before, net, strict=True))
    with pytest.warns(UserWarning, match=f"Left as it is: Layer '0': .*{message}"):
        report = CurvatureEditor(0.5, skip_faulty=True).edit(net, found)
    assert torch.equal(before[0], net[0].weight)
    assert not torch.equal(before[1], net[1].weight)
    assert list(report.layers) == ["1"]
    assert message in report.skipped["0"]
    assert f"Left as it is: {report.skipped['0']}" in str(report)
    with pytest.raises(ValueError, match="No layer can be edited: Layer '0'"):
        CurvatureEditor(0.5, ["0"], skip_faulty=True).edit(net, found)


# Factors that rest on too few positions -------------------------------------------------------------------------------


def moment(positions, live, dead=0, seed=0):
    x = torch.randn(positions, live, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    whole = torch.zeros(live + dead, live + dead, dtype=torch.float64)
    whole[dead:, dead:] = x.T @ x / positions
    return whole


def spectrum(*values):
    """Return a factor with these eigenvalues and no direction that is an axis."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))[0]
    return turn @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ turn.T


FEW = {
    "rank of A": ((moment(5, 8), 5, moment(20, 4), 20), "Factor A rests on 5 positions, too few for its 8 live inputs"),
    "rank of G": (
        (moment(20, 8), 20, moment(3, 4), 3),
        "Factor G rests on 3 positions, too few for its 4 live outputs",
    ),
    "one position": ((moment(1, 8), 1, moment(1, 4), 1), "Factor A rests on 1 positions"),
    "dead inputs, too": ((moment(5, 8, 30), 5, moment(20, 4), 20), "too few for its 8 live inputs"),
    "nearly": ((spectrum(1, 1, 1.9e-3), 2, moment(9, 4), 9), "Factor A rests on 2 positions"),
    "float32": ((moment(5, 300).float(), 5, moment(20, 4), 20), "too few for its 300 live inputs"),
    "small numbers": ((1e-300 * moment(5, 8), 5, moment(20, 4), 20), "too few for its 8 live inputs"),
}
ENOUGH = {
    "as many as live": (moment(8, 8), 8, moment(4, 4), 4),
    "dead inputs": (moment(9, 8, 30), 9, moment(9, 4, 50), 9),
    "by hand": (torch.eye(8), 3, torch.eye(4), 2),
    "no count": (moment(5, 8), 0, moment(2, 4), 0),
    "not quite of that rank": (spectrum(1, 1, 2.1e-3), 2, moment(9, 4), 9),
    "several draws of a position": (moment(20, 8), 20, moment(6, 4), 3),
}


def few(A, num_inputs, G, num_gradients):
    return LayerFactors(A=A, G=G, num_inputs=num_inputs, num_gradients=num_gradients)


@pytest.mark.parametrize("name", FEW)
def test_factors_say_that_they_rest_on_too_few_positions(name):
    arguments, message = FEW[name]
    assert message in few(*arguments).too_few_positions()


@pytest.mark.parametrize("name", ENOUGH)
def test_factors_that_rest_on_enough_positions_say_nothing(name, monkeypatch):
    A, num_inputs, G, num_gradients = ENOUGH[name]
    calls = failing_eigh(monkeypatch, 0)
    assert few(A, num_inputs, G, num_gradients).too_few_positions() is None
    lacking = [count < int((factor.diagonal() != 0).sum()) for factor, count in ((A, num_inputs), (G, num_gradients))]
    assert len(calls) == sum(lacking)  # nothing is decomposed that need not be


def two_layers(**options):
    """Layers of which the first one's factors rest on too few positions."""
    extra = {
        "margins": torch.ones(4, 8),
        "eigenvalues": torch.arange(1.0, 33.0).view(4, 8),
        "A_coupled": moment(20, 8),
        "G_coupled": moment(20, 4),
    } | options
    layers = [few(*FEW["rank of A"][0]), few(moment(20, 8), 20, moment(20, 4), 20)]
    return KroneckerFactors({str(i): dataclasses.replace(layer, **extra) for i, layer in enumerate(layers)})


def linears():
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])


SCORES = ("kfac", "ekfac", "coupled", "saliency", "activations")
CURVATURE_EDITORS = {
    **{
        f"{score}, soft={soft}": functools.partial(CurvatureEditor, 0.7, score=score, soft=soft)
        for score in SCORES
        for soft in (False, True)
    },
    "bulk": functools.partial(BulkStepEditor, 0.3),
    "bulk and edit": functools.partial(BulkStepEditor, 0.3, 0.7),
}


def edited(way, editor, net, found):
    """Return the report of an edit, and the weights that it makes of the two layers."""
    if way == "state dict":
        state, report = editor.edit_state_dict(net.state_dict(), found)
        return report, [state["0.weight"], state["1.weight"]]
    if way == "applied":
        with editor.applied(net, found) as report:
            return report, [layer.weight.clone() for layer in net]
    editor = editor.at(editor.energy) if way == "at" else editor
    return editor.edit(net, found), [layer.weight for layer in net]


@pytest.mark.parametrize("name", CURVATURE_EDITORS)
@pytest.mark.parametrize("way", ["edit", "applied", "state dict", "at"])
def test_a_layer_on_too_few_positions_is_left_as_it_is(name, way):
    editor, net, found = CURVATURE_EDITORS[name](), linears(), two_layers()
    before = [layer.weight.clone() for layer in net]
    with pytest.warns(UserWarning, match="Left as it is: Layer '0': Factor A rests on 5 positions"):
        report, after = edited(way, editor, net, found)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    assert list(report.layers) == ["1"]
    assert "Layer '0': Factor A rests on 5 positions, too few" in report.skipped["0"]
    assert f"Left as it is: {report.skipped['0']}" in str(report)
    with pytest.raises(ValueError, match="No layer can be edited: Layer '0': Factor A rests on 5 positions"):
        editor.edit(net, KroneckerFactors({"0": found["0"]}))
    insist = r"Layer '0': Factor A .* insist \(CurvatureEditor\(min_positions=0\), --min-positions 0\)"
    with pytest.raises(TooFewPositionsError, match=insist):
        editor.edit_weight("0", before[0], found["0"], 0.7, False)


@pytest.mark.parametrize("name", CURVATURE_EDITORS)
def test_an_edit_on_too_few_positions_can_be_insisted_on(name):
    net, found = linears(), two_layers()
    before = net[0].weight.detach().double()
    report = CURVATURE_EDITORS[name](min_positions=0).edit(net, found)
    assert list(report.layers) == ["0", "1"]
    assert not torch.equal(before, net[0].weight.double())
    assert "rest on fewer positions than the larger side of the weight: '0' (5 of 8). Their" in str(report)
    assert "collect more positions" in str(report)
    if name == "kfac, soft=False":
        expected = reference.edit(before, found["0"].A, found["0"].G, 0.7)
        torch.testing.assert_close(net[0].weight.double(), expected, rtol=1e-5, atol=1e-6)
    strict = CURVATURE_EDITORS[name](min_positions=6)
    with pytest.warns(
        UserWarning, match="Layer '0': its factors rest on 5 positions, and min_positions=6 asks for more"
    ):
        assert list(strict.edit(linears(), found).layers) == ["1"]
    with pytest.raises(ValueError, match=r"No layer can be edited: .* min_positions=21"):
        CURVATURE_EDITORS[name](min_positions=21).edit(linears(), found)


def test_what_reads_no_factors_or_changes_nothing_needs_no_positions():
    for editor in (SVDEditor(0.7), RandomBasisEditor(0.7), CurvatureEditor({"0": 1.0, "1": 0.7})):
        report = editor.edit(linears(), two_layers())
        assert list(report.layers) == ["0", "1"]
        assert ("fewer positions" in str(report)) == isinstance(editor, CurvatureEditor)


def test_an_edit_with_dead_inputs_is_done_and_the_table_says_that_they_are_many():
    A, n, G, _ = ENOUGH["dead inputs"]
    report = CurvatureEditor(0.7).edit_layers({"0": torch.ones(54, 38)}, KroneckerFactors({"0": few(A, n, G, n)}))[1]
    assert "'0' (9 of 54)" in str(report)


def test_min_positions_is_checked():
    for bad in (1.5, True, "3"):
        with pytest.raises(TypeError, match="min_positions must be an integer or None, found"):
            CurvatureEditor(min_positions=bad)
    with pytest.raises(ValueError, match="min_positions must not be negative, found -1"):
        CurvatureEditor(min_positions=-1)


def test_factors_of_one_row_singular_and_one_by_one():
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 3, bias=False))
    x, y = torch.tensor([[2.0]]), torch.tensor([1])
    found = collect(
        net, [(x, y)], lambda batch: F.cross_entropy(net(batch[0]), batch[1]), layers=["0", "1"], fisher="exact"
    )
    assert found["0"].shape == (1, 1)
    before = net[0].weight.clone()
    report = CurvatureEditor(0.5).edit(net, found)
    torch.testing.assert_close(net[0].weight, before)  # its one direction is kept
    assert report.layers["0"].energy_kept == pytest.approx(1.0)
    assert report.layers["1"].kept >= 1


def test_batches_without_rows_count_nothing():
    net = models.mlp()
    data = models.images(8).tensors

    def step(batch):
        return F.cross_entropy(net(data[0][batch]), data[1][batch], reduction="sum")

    for fisher in ("sketched", "empirical"):
        with_empty = collect(
            net, [[0, 1, 2], [], [3, 4, 5, 6, 7]], step, layers=["1", "3"], fisher=fisher, positions="all"
        )
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
    with pytest.warns(UserWarning, match="Left as it is: Layer 'net.1': Factor A is zero"):
        trainer.fit(Dead(), data)
    original, edited = (torch.load(tmp_path / f"x{mark}.ckpt", weights_only=True) for mark in ("", "-edited"))
    assert torch.equal(original["state_dict"]["net.1.weight"], edited["state_dict"]["net.1.weight"])
    assert not torch.equal(original["state_dict"]["net.3.weight"], edited["state_dict"]["net.3.weight"])
    assert list(edited[ENTRY]["layers"]) == ["net.3"]
    assert list(edited[ENTRY]["skipped"]) == ["net.1"]


def full_disk(folder):
    """Train where files of more than 30 kB cannot be written: the factors, and not the checkpoint of a small model."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    found = []

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
    found += sorted(path.name for path in folder.iterdir())
    return found, set(torch.load(folder / "x.ckpt", weights_only=True)["state_dict"])


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
    _, callback, found = cells.run("validate", "exact", strategy, kind=OneBad, folder=folder, shard_factors=shard)
    return found.counts(), found.provenance["batches_skipped"], callback.report.layers["net.3"].relative_change


@pytest.mark.parametrize("shard", [False, True])
def test_a_batch_that_one_process_leaves_out(shard, tmp_path):
    one, two = processes.run(2, one_bad, DDP2, tmp_path, shard)
    assert one == two
    assert one[:2] == ({"net.1": 42, "net.3": 42}, 1)


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
