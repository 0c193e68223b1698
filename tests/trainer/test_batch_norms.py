"""The callback renews the statistics of batch norms, for the weights of each edited copy."""

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


def fit(tmp_path, module, images=256, **options):
    pl.seed_everything(0)
    callback = KFACEditCallback(**{"layers": ["net.1"], "budget": 0.05} | options)
    saver = ModelCheckpoint(tmp_path / "c", save_top_k=-1, filename="{epoch}", monitor=None, every_n_epochs=1)
    trainer = models.trainer(tmp_path, callback, saver, max_epochs=2)
    data = models.images(images)
    trainer.fit(module, models.loader(data), models.loader(models.images(128, 1)))
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
