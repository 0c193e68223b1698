"""The callback's checkpoints: edited siblings, factors beside them, resumed runs, plugins and averaged weights."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.optim.swa_utils import get_ema_avg_fn

from lightning_curvature import CurvatureEditor, KFACEditCallback, KroneckerFactors
from lightning_curvature.checkpoints.facts import ENTRY
from lightning_curvature.checkpoints.opening import open_checkpoint
from lightning_curvature.collect import windows as collection
from lightning_curvature.storage.hashes import content_hash, tensor_hashes
from tests.support import models

NO_WARNING = "ignore:Be aware that when using `ckpt_path`"


class Resumable:
    """A loader that goes on in the middle of an epoch."""

    def __init__(self, data, batch_size=32):
        self.batches = list(models.loader(data, batch_size))
        self.next = 0

    def __iter__(self):
        self.next %= len(self.batches)  # Lightning does not exhaust a loader whose length it knows
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]

    def __len__(self):
        return len(self.batches)

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def run(folder, *callbacks, module=models.Validated, ckpt_path=None, data=None, **options):
    """Fit with fixed batches, and return the trainer."""
    pl.seed_everything(0)
    trainer = models.trainer(folder, *callbacks, **options)
    trainer.fit(
        module() if isinstance(module, type) else module,
        data or models.loader(models.images(192), 32),
        models.loader(models.images(64, 1)),
        ckpt_path=ckpt_path,
        weights_only=True,
    )
    return trainer


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def equal(factors, expected):
    return factors.digest() == expected.digest() and factors.provenance == expected.provenance


def assert_edit_of(edited_path, original_path, factors, energy=None):
    """The sibling holds the edit of the weights in the original, of an energy or the budget that it names."""
    edited, original = (torch.load(path, weights_only=True) for path in (edited_path, original_path))
    budget = edited[ENTRY]["budget"] if energy is None else None
    expected, _ = CurvatureEditor(energy, budget=budget).edit_state_dict(original["state_dict"], factors)
    assert all(torch.equal(value, expected[key]) for key, value in edited["state_dict"].items())
    assert any(not torch.equal(value, original["state_dict"][key]) for key, value in edited["state_dict"].items())
    checkpoint = open_checkpoint(original_path)
    assert edited[ENTRY]["source"] == content_hash(tensor_hashes(checkpoint.shapes(), checkpoint.read))
    assert edited[ENTRY]["factors"] == factors.digest()
    assert edited[ENTRY]["package"].startswith("lightning_curvature ")


# Factors beside a checkpoint, and resumed runs ------------------------------------------------------------------------


def test_factors_lie_beside_the_checkpoint_and_not_in_it(tmp_path):
    callback = KFACEditCallback()
    run(tmp_path, callback, ModelCheckpoint(tmp_path / "c", filename="x"))
    assert names(tmp_path / "c") == ["x-edited-factors.safetensors", "x-edited.ckpt", "x.ckpt"]
    factors = KroneckerFactors.load(tmp_path / "c" / "x-edited-factors.safetensors")
    assert equal(factors, callback.factors)
    assert_edit_of(tmp_path / "c" / "x-edited.ckpt", tmp_path / "c" / "x.ckpt", factors)
    (state,) = (
        s
        for key, s in torch.load(tmp_path / "c" / "x.ckpt", weights_only=True)["callbacks"].items()
        if key.startswith("KFACEditCallback")
    )
    assert state["batches"] == 12
    assert not any(isinstance(value, torch.Tensor) for value in state.values())


@pytest.mark.filterwarnings(NO_WARNING)
@pytest.mark.parametrize("window", [64, 100_000])
@pytest.mark.parametrize("fisher", ["sketched", "empirical"])
def test_a_resumed_run_has_the_factors_of_an_uninterrupted_one(window, fisher, tmp_path):
    """In the middle of a window, before the first one is complete, and in the middle of an epoch."""

    def options():
        return {"window": window, "fisher": fisher}

    whole = KFACEditCallback(**options())
    saver = ModelCheckpoint(tmp_path / "c", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    run(tmp_path, whole, saver, max_epochs=3, data=Resumable(models.images(192)))
    for step in (6, 9):
        resumed = KFACEditCallback(**options())
        run(
            tmp_path,
            resumed,
            max_epochs=3,
            enable_checkpointing=False,
            data=Resumable(models.images(192)),
            ckpt_path=tmp_path / "c" / f"step={step}.ckpt",
        )
        assert equal(resumed.factors, whole.factors)
        assert resumed.factors["net.3"].num_inputs == min(window, 3 * 192)


@pytest.mark.filterwarnings(NO_WARNING)
def test_factors_of_validation_are_resumed(tmp_path):
    first, second = KFACEditCallback(loop="validation"), KFACEditCallback(loop="validation")
    run(tmp_path, first, ModelCheckpoint(tmp_path / "c", filename="x"))
    run(
        tmp_path,
        second,
        ckpt_path=tmp_path / "c" / "x.ckpt",
        limit_val_batches=0,
        max_epochs=3,
        enable_checkpointing=False,
    )
    assert equal(second.factors, first.factors)


@pytest.mark.filterwarnings(NO_WARNING)
def test_what_cannot_be_resumed_starts_anew_with_a_warning(tmp_path, monkeypatch):
    run(tmp_path, KFACEditCallback(), enable_checkpointing=False).save_checkpoint(tmp_path / "x.ckpt")
    file = tmp_path / "x-edited-factors.safetensors"

    def resume(**options):
        callback = KFACEditCallback(**options)
        run(tmp_path, callback, max_epochs=3, enable_checkpointing=False, ckpt_path=tmp_path / "x.ckpt")
        return callback.factors["net.3"].num_inputs

    with pytest.warns(UserWarning, match=r"x.ckpt was saved, it starts anew: .* collected with other 'fisher'"):
        assert resume(fisher="empirical") == 192
    assert resume(energy=0.5) == 3 * 192  # the energy is no setting of the collection
    whole = file.read_bytes()
    KroneckerFactors.load(file).save(file)
    with pytest.warns(UserWarning, match=r"x-edited-factors.safetensors was written with another checkpoint"):
        assert resume() == 192
    file.write_bytes(whole)
    monkeypatch.setattr(collection, "STATE_VERSION", 0)
    with pytest.warns(UserWarning, match=r"starts anew: x-edited-factors.safetensors was written by another version"):
        assert resume() == 192
    monkeypatch.undo()
    file.write_bytes(whole[:-10])
    with pytest.warns(UserWarning, match=r"starts anew: its factors cannot be read: .* not a complete factor file"):
        assert resume() == 192
    file.unlink()
    with pytest.warns(UserWarning, match=r"in a file beside it, which is not there \(move them together\)"):
        assert resume() == 192
    # A run without the callback leaves nothing to go on with.
    run(tmp_path, enable_checkpointing=False).save_checkpoint(tmp_path / "x.ckpt")
    assert resume() == 192


@pytest.mark.parametrize("kind", [True, "link"])
@pytest.mark.filterwarnings(NO_WARNING, "ignore:Checkpoint directory")
def test_the_last_checkpoint_is_never_an_edited_one(kind, tmp_path):
    """Lightning takes the latest file whose name begins with "last"."""

    def saver():
        return ModelCheckpoint(tmp_path / str(kind), save_last=kind, filename="{epoch}")

    callback = KFACEditCallback()
    run(tmp_path, callback, saver())
    resumed = KFACEditCallback()
    trainer = run(tmp_path, resumed, saver(), ckpt_path="last", max_epochs=3)
    assert trainer.ckpt_path == str(tmp_path / str(kind) / "last.ckpt")
    assert resumed.factors["net.3"].num_inputs == 3 * 192


def test_a_failing_edit_does_not_cost_the_checkpoint(tmp_path):
    callback = KFACEditCallback()
    trainer = run(tmp_path, callback, enable_checkpointing=False)
    callback.editor.layers = ["nothing"]
    with pytest.warns(UserWarning, match="has no edited copy: .*'nothing' matches no layer"):
        trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert "x.ckpt" in names(tmp_path)
    assert "x-edited.ckpt" not in names(tmp_path)


def test_siblings_of_an_older_run_do_not_stay(tmp_path):
    run(tmp_path, KFACEditCallback(), enable_checkpointing=False).save_checkpoint(tmp_path / "x.ckpt")
    trainer = models.trainer(tmp_path, callback := KFACEditCallback(), enable_checkpointing=False)

    class Early(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "x.ckpt")

    trainer.callbacks.append(Early())
    trainer.fit(models.Classifier(), models.loader(models.images(64)))
    assert [name for name in names(tmp_path) if name.startswith("x")] == ["x.ckpt"]
    assert callback.factors


@pytest.mark.filterwarnings(NO_WARNING)
def test_a_remote_folder(tmp_path):
    """Checkpoints go wherever fsspec writes."""
    path = "memory://checkpoints/x.ckpt"
    first, second, whole = KFACEditCallback(), KFACEditCallback(), KFACEditCallback()
    run(tmp_path, first, enable_checkpointing=False).save_checkpoint(path)
    run(tmp_path, second, ckpt_path=path, max_epochs=3, enable_checkpointing=False)
    run(tmp_path, whole, max_epochs=3, enable_checkpointing=False)
    assert equal(second.factors, whole.factors)
    trainer = run(tmp_path, KFACEditCallback(), enable_checkpointing=False)
    trainer.save_checkpoint(path)
    trainer.strategy.remove_checkpoint(path)
    files = pl.utilities.cloud_io.get_filesystem(path) if hasattr(pl.utilities, "cloud_io") else None
    assert files is None or not files.ls("/checkpoints")


# Other writers of checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", [None, AsyncCheckpointIO])
def test_siblings_of_every_kind_of_saving(plugin, tmp_path):
    """Each one is the edit of the weights beside it, though training goes on while it is written."""
    steps = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss", save_top_k=2, save_last=True, filename="{epoch}")
    options = {} if plugin is None else {"plugins": [plugin()]}
    run(tmp_path, KFACEditCallback(window=64), steps, best, max_epochs=4, **options)
    kept = sorted([*(tmp_path / "steps").glob("step=[0-9]*.ckpt"), *(tmp_path / "best").glob("*.ckpt")])
    originals = [path for path in kept if not path.stem.endswith("-edited")]
    assert len(originals) == 12 + 3
    files = [path for folder in ("steps", "best") for path in (tmp_path / folder).iterdir()]
    assert len(files) == 3 * len(originals)
    for path in originals:
        factors = KroneckerFactors.load(path.with_name(f"{path.stem}-edited-factors.safetensors"))
        assert factors.provenance["step"] <= int(torch.load(path, weights_only=True)["global_step"])
        assert_edit_of(path.with_name(f"{path.stem}-edited.ckpt"), path, factors)


class Probed(models.Validated):
    def probe_dataloader(self):
        return {"val": models.loader(models.images(64, 1))}


@pytest.mark.parametrize("first", ["editor", "averaging"])
def test_averaged_weights(first, tmp_path):
    """Factors, siblings and probes are those of the averaged weights, in either order of the callbacks."""
    callback = KFACEditCallback(loop="validation")
    averaging = WeightAveraging(avg_fn=get_ema_avg_fn(0.9))
    order = [callback, averaging] if first == "editor" else [averaging, callback]
    saver = ModelCheckpoint(tmp_path / "c", filename="x")
    run(tmp_path, *order, saver, module=Probed, max_epochs=3)
    path = tmp_path / "c" / "x.ckpt"
    content = torch.load(path, weights_only=True)
    assert not torch.equal(content["state_dict"]["net.3.weight"], content["current_model_state"]["net.3.weight"])
    assert_edit_of(tmp_path / "c" / "x-edited.ckpt", path, callback.factors)

    averaged = Probed.load_from_checkpoint(path, weights_only=True)
    expected = KFACEditCallback()
    models.trainer(tmp_path, expected, enable_checkpointing=False).validate(
        averaged, models.loader(models.images(64, 1)), verbose=False
    )
    torch.testing.assert_close(callback.factors["net.3"].A, expected.factors["net.3"].A)
    assert callback.probe_results["curvature/val/accuracy/before"] == pytest.approx(
        expected.probe_results["curvature/val/accuracy/before"]
    )
    assert callback.report.layers["net.3"].relative_change == pytest.approx(
        expected.report.layers["net.3"].relative_change, rel=0.2
    )


def test_averaged_weights_are_refused_where_live_ones_are_collected(tmp_path):
    with pytest.raises(
        pl.utilities.exceptions.MisconfigurationException, match=r"Use WeightAveraging with .*validation"
    ):
        run(tmp_path, KFACEditCallback(), WeightAveraging())


def test_weights_averaged_after_validation_have_no_edited_copy(tmp_path):
    """They are not the ones that the factors describe."""

    class ByEpoch(WeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return epoch_idx is not None

    saver = ModelCheckpoint(tmp_path / "c", filename="x")
    with pytest.warns(UserWarning, match="the weights were averaged further since, and it has no edited copy"):
        run(tmp_path, KFACEditCallback(loop="validation"), ByEpoch(), saver)
    assert names(tmp_path / "c") == ["x-edited-factors.safetensors", "x.ckpt"]


class Renaming(models.Validated):
    """Its checkpoints hold other names, and things that are no tensors."""

    def get_extra_state(self):
        return {"note": 1}

    def set_extra_state(self, state):
        pass

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {f"model.{key}": value for key, value in checkpoint["state_dict"].items()}


def test_checkpoints_with_other_names_are_edited(tmp_path):
    callback = KFACEditCallback()
    run(tmp_path, callback, ModelCheckpoint(tmp_path / "c", filename="x"), module=Renaming)
    edited, original = (
        torch.load(tmp_path / "c" / f"x{mark}.ckpt", weights_only=True)["state_dict"] for mark in ("-edited", "")
    )
    assert list(edited) == list(original)
    changed = [
        key
        for key, value in edited.items()
        if isinstance(value, torch.Tensor) and not torch.equal(value, original[key])
    ]
    assert changed == ["model.net.3.weight"]


def test_factors_without_a_signal_do_not_stop_the_training(tmp_path):
    """An output layer that begins with zeros sends none back in the first step."""

    class Zero(models.Validated):
        def __init__(self):
            super().__init__()
            torch.nn.init.zeros_(self.net[5].weight)

    saver = ModelCheckpoint(tmp_path / "c", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    with pytest.warns(UserWarning, match="step 1 has no edited copy: Layer 'net.3': Factor G is zero"):
        run(tmp_path, KFACEditCallback(layers="last-mlp"), saver, module=Zero, max_epochs=1)
    assert {"step=1.ckpt", "step=6.ckpt", "step=6-edited.ckpt"} <= set(names(tmp_path / "c"))


# Several callbacks ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(NO_WARNING)
@pytest.mark.parametrize("loop", ["train", "validation"])
def test_several_callbacks_in_one_trainer(loop, tmp_path):
    """Each collects what it would collect alone; their siblings, states and probes do not mix."""

    def options():
        mild = KFACEditCallback(loop=loop, energy=0.95, fisher="empirical")
        return [mild, KFACEditCallback(loop=loop, energy=0.5, layers=["net.1", "net.3"], name="strong")]

    together = options()
    run(tmp_path, *together, ModelCheckpoint(tmp_path / "c", filename="x"), module=Probed)
    for index, name, energy in ((0, "edited", 0.95), (1, "strong", 0.5)):
        alone = options()[index]
        run(tmp_path / name, alone, enable_checkpointing=False, module=Probed)
        assert equal(alone.factors, together[index].factors)
        assert alone.probe_results == together[index].probe_results
        path = tmp_path / "c" / "x.ckpt"
        assert_edit_of(tmp_path / "c" / f"x-{name}.ckpt", path, alone.factors, energy)
    assert set(together[1].probe_results) == {f"curvature-strong/val/accuracy/{when}" for when in ("before", "after")}
    assert len(names(tmp_path / "c")) == 5
    assert together[0].state_key != together[1].state_key
    resumed = options()
    module = Probed()
    run(tmp_path, *resumed, module=module, ckpt_path=path, max_epochs=2, enable_checkpointing=False)
    assert all(equal(callback.factors, expected.factors) for callback, expected in zip(resumed, together, strict=True))
    assert "validation_step" not in vars(module)


def test_a_step_of_ones_own_comes_back(tmp_path):
    """A validation step that somebody put on the instance stays there."""
    module = models.Validated()
    step = module.validation_step
    module.validation_step = lambda batch, batch_idx: step(batch, batch_idx)
    replacement = module.validation_step
    run(tmp_path, KFACEditCallback(loop="validation"), module=module, enable_checkpointing=False)
    assert module.validation_step is replacement


def test_names_are_checked(tmp_path):
    with pytest.raises(ValueError, match="name must be a part of a file name"):
        KFACEditCallback(name="a/b")
    trainer = models.trainer(tmp_path, KFACEditCallback(), KFACEditCallback(energy=0.5))
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="have the name 'edited'"):
        trainer.fit(models.Classifier(), models.loader(models.images(32)))
