"""The callback renews the statistics of batch norms, for the weights of each edited copy."""

import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_curvature import KFACEditCallback
from lightning_curvature.distributed import Ranks
from lightning_curvature.editing.batch_norm import Recalibration, estimate
from tests.support import models

NORM = "net.2"
STATISTICS = [f"{NORM}.running_mean", f"{NORM}.running_var"]


class Network(models.Classifier):
    """Its batch norm lies behind the layer that is edited."""

    def __init__(self):
        super().__init__("cnn", lr=0.01)


def fit(tmp_path, module, validated=True, loaders=1, max_epochs=2, **options):
    pl.seed_everything(0)
    callback = KFACEditCallback(**{"layers": ["net.1"], "budget": 0.05} | options)
    saver = ModelCheckpoint(tmp_path / "c", save_top_k=-1, filename="{epoch}", monitor=None, every_n_epochs=1)
    trainer = models.trainer(tmp_path, callback, saver, max_epochs=max_epochs)
    data, held_out = models.images(256), models.loader(models.images(128, 1))
    trainer.fit(module, models.loader(data), ([held_out] * loaders if loaders > 1 else held_out) if validated else None)
    return callback, data


def saved(tmp_path, name):
    return torch.load(tmp_path / "c" / name)


def test_each_copy_has_those_of_its_own_weights(tmp_path):
    callback, data = fit(tmp_path, Network())
    for epoch in (0, 1):
        before, after = (saved(tmp_path, f"epoch={epoch}{mark}.ckpt") for mark in ("", "-edited"))
        module = Network()
        module.load_state_dict(after["state_dict"])
        batches = data.tensors[0].split(32)
        run = Recalibration(lambda module=module, batches=batches: [module(x) for x in batches], {NORM})
        expected = estimate(module.eval(), run, Ranks())
        for name in STATISTICS:
            torch.testing.assert_close(after["state_dict"][name], expected[name])
            assert not torch.allclose(after["state_dict"][name], before["state_dict"][name], rtol=0.01)
        assert after["lightning_curvature"]["batch_norms"] == 1
    assert "Statistics of 1 batch norm were estimated anew" in str(callback.report)


def test_the_run_is_what_it_is_without(tmp_path):
    states = []
    for recalibrate in (True, False):
        pl.seed_everything(0)
        module = Network()
        fit(tmp_path / str(recalibrate), module, recalibrate=recalibrate)
        states.append({name: value.clone() for name, value in module.state_dict().items()})
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])


def stay(tmp_path, callback):
    before, after = (saved(tmp_path, f"epoch=1{mark}.ckpt")["state_dict"] for mark in ("", "-edited"))
    assert all(torch.equal(before[name], after[name]) for name in STATISTICS)
    assert "1 batch norm keeps statistics of the unedited weights" in str(callback.report)


def test_they_stay_where_nobody_wants_them_renewed(tmp_path):
    callback, _ = fit(tmp_path, Network(), recalibrate=False)
    stay(tmp_path, callback)


class Frozen(Network):
    def on_train_epoch_start(self):
        self.net[2].eval()


def test_frozen_ones_stay(tmp_path):
    callback, _ = fit(tmp_path, Frozen())
    stay(tmp_path, callback)


class Strict(Network):
    """Takes pairs in training alone."""

    def validation_step(self, batch, batch_idx):
        if len(batch) > 32 or self.trainer.state.fn != "fit" or not self.trainer.validating:
            raise TypeError("no training batches here")


def test_training_batches_that_cannot_be_validated_are_told(tmp_path):
    with pytest.warns(UserWarning, match="batch norms .1. stay those of the unedited weights, since train"):
        callback, _ = fit(tmp_path, Strict())
    stay(tmp_path, callback)


def test_a_price_is_measured_with_those_of_the_edit(tmp_path, monkeypatch):
    """Also the candidates that are compared, and what is reported on other batches."""
    pl.seed_everything(0)
    callback = KFACEditCallback(layers=["net.1"])
    trainer = models.trainer(tmp_path, callback, ModelCheckpoint(tmp_path / "c", filename="x"), max_epochs=3)
    module = Network()
    trainer.fit(module, models.loader(models.images(256)), models.loader(models.images(128, 1)))
    assert callback.match.budget > 0
    after = Network()
    after.load_state_dict(saved(tmp_path, "x-edited.ckpt")["state_dict"])
    halves = [torch.stack(list(models.images(128, 1).tensors[0].split(32))[half::2]).flatten(0, 1) for half in (0, 1)]
    labels = [torch.stack(list(models.images(128, 1).tensors[1].split(32))[half::2]).flatten(0, 1) for half in (0, 1)]
    losses = [torch.nn.functional.cross_entropy(after.eval()(x), y).item() for x, y in zip(halves, labels, strict=True)]
    assert losses[0] == pytest.approx(callback.match.after["validation loss"], rel=1e-4)
    assert losses[1] == pytest.approx(callback.match.held_out["validation loss"][1], rel=1e-4)


class Twice(Network):
    """The network has a second name."""

    def __init__(self):
        super().__init__()
        self.also = self.net


def test_each_name_of_a_batch_norm_is_renewed(tmp_path):
    fit(tmp_path, Twice())
    before, after = (saved(tmp_path, f"epoch=1{mark}.ckpt")["state_dict"] for mark in ("", "-edited"))
    for name in STATISTICS:
        assert torch.equal(after[name], after[name.replace("net.", "also.", 1)])
        assert not torch.equal(after[name], before[name])


def test_the_editor_is_free_when_the_run_is_over_and_later_checkpoints_are_like_the_others(tmp_path):
    pl.seed_everything(0)
    callback = KFACEditCallback(layers=["net.1"], budget=0.05)
    trainer = models.trainer(tmp_path, callback, enable_checkpointing=False)
    module, data = Network(), models.loader(models.images(128))
    trainer.fit(module, data, data)
    assert callback.editor.recalibration is None
    pickle.dumps(callback.editor)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    trainer.validate(module, data, verbose=False)
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    copies = [torch.load(tmp_path / f"{name}-edited.ckpt") for name in ("first", "second")]
    for edited in copies:
        assert edited["lightning_curvature"]["batch_norms"] == 1
        for name in STATISTICS:
            torch.testing.assert_close(edited["state_dict"][name], copies[0]["state_dict"][name])
            assert not torch.equal(edited["state_dict"][name], module.state_dict()[name])


class Unvalidated(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = models.cnn()

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def test_without_a_validation_step_nothing_runs_and_that_is_told(tmp_path):
    with pytest.warns(UserWarning, match="unedited weights, since none of them runs in validation_step"):
        callback, _ = fit(tmp_path, Unvalidated(), validated=False)
    stay(tmp_path, callback)


class FrozenInStep(Network):
    def training_step(self, batch, batch_idx):
        self.net[2].eval()
        return super().training_step(batch, batch_idx)


def test_those_that_a_step_freezes_stay(tmp_path):
    callback, _ = fit(tmp_path, FrozenInStep(), max_epochs=1)
    assert callback.report.renewed == 0


class OfSeveralLoaders(Network):
    def validation_step(self, batch, batch_idx, dataloader_idx):
        super().validation_step(batch, batch_idx)


def test_a_step_that_needs_the_number_of_a_loader_gets_one(tmp_path):
    callback, _ = fit(tmp_path, OfSeveralLoaders(), loaders=2)
    assert callback.report.renewed == 1


@pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:You're resuming from a checkpoint that ended before the epoch",
)
def test_a_run_that_goes_on_in_the_middle_of_an_epoch_renews_too(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 2

    pl.seed_everything(0)
    saver = ModelCheckpoint(tmp_path / "c", every_n_train_steps=3, filename="x", save_top_k=-1)
    options = {"layers": ["net.1"], "budget": 0.05}
    data = models.loader(models.images(256))
    trainer = models.trainer(tmp_path, KFACEditCallback(**options), saver, Stop(), max_epochs=1)
    trainer.fit(Network(), data)
    callback = KFACEditCallback(**options)
    trainer = models.trainer(tmp_path, callback, max_epochs=1, enable_checkpointing=False)
    trainer.fit(Network(), data, ckpt_path=tmp_path / "c" / "x.ckpt", weights_only=False)
    assert trainer.global_step == 8
    assert callback.report.renewed == 1
