"""The callback in real Trainers."""

import csv

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_curvature import CurvatureEditor, KFACEditCallback
from lightning_curvature.checkpoints.facts import ENTRY as CHECKPOINT_KEY
from tests.support import models
from tests.support.networks import NETWORKS, accuracy


@pytest.mark.parametrize("name", NETWORKS)
def test_no_argument_leaves_an_edited_checkpoint_that_helps_and_does_not_harm(name, tmp_path, caplog):
    kind, options, layer = NETWORKS[name]
    pl.seed_everything(0)
    module, callback = kind(**options, lr=0.003), KFACEditCallback()
    trainer = models.trainer(tmp_path, callback, max_epochs=12)
    with caplog.at_level("INFO"):
        trainer.fit(module, models.loader(models.images(512)), models.loader(models.images(256, 1)))
    assert list(callback.factors) == list(callback.report.layers) == [layer]
    assert f"\n{layer}" in caplog.text

    path = trainer.checkpoint_callback.best_model_path
    edited_path = path.replace(".ckpt", "-edited.ckpt")
    original, edited = (kind.load_from_checkpoint(p, weights_only=True) for p in (path, edited_path))
    for key, value in module.state_dict().items():
        assert torch.equal(original.state_dict()[key], value)
        is_edited = key == f"{layer}.weight" or key.endswith(("running_mean", "running_var"))
        assert torch.equal(edited.state_dict()[key], value) == (not is_edited)
    budget = callback.match.budget
    CurvatureEditor(budget=budget).edit(module, callback.factors)
    assert torch.equal(module.state_dict()[f"{layer}.weight"], edited.state_dict()[f"{layer}.weight"])
    assert torch.load(edited_path, weights_only=True)[CHECKPOINT_KEY]["budget"] == budget

    held_out = models.images(2000, 2)
    assert accuracy(original, held_out) > 0.9
    assert accuracy(edited, held_out) >= accuracy(original, held_out) - 0.005


@pytest.mark.parametrize("loss", ["module", "function", "nll"])
def test_every_way_to_write_the_loss_gives_the_same_factors(loss, tmp_path):
    def fit(loss):
        pl.seed_everything(0)
        callback = KFACEditCallback()
        trainer = models.trainer(tmp_path, callback, max_epochs=1, enable_checkpointing=False)
        trainer.fit(models.Classifier(loss=loss), models.loader(models.images(64)))
        return callback.factors["net.3"]

    factors, expected = fit(loss), fit("function")
    torch.testing.assert_close(factors.A, expected.A)
    torch.testing.assert_close(factors.G, expected.G, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("fisher", ["sketched", "sampled", "exact", "empirical"])
def test_no_trace_on_training(fisher, tmp_path):
    """Weights, optimizer state and random state are bit for bit those of a run without the callback."""

    def fit(*options):
        pl.seed_everything(0)
        callbacks = [KFACEditCallback(**option) for option in options]  # not even its construction draws a number
        module = models.Classifier("cnn")  # has dropout
        module.probe_dataloader = lambda: {"val": models.loader(models.images(64, 1))}
        trainer = models.trainer(
            tmp_path, *callbacks, gradient_clip_val=0.5, accumulate_grad_batches=2, enable_checkpointing=False
        )
        shuffled = torch.utils.data.DataLoader(models.images(96), batch_size=16, shuffle=True)
        trainer.fit(module, shuffled, models.loader(models.images(64, 1)))
        return module.state_dict(), trainer.optimizers[0].state_dict()["state"], torch.get_rng_state()

    with_callback = fit({"fisher": fisher, "layers": ["mlp", "net.1"]})
    without = fit()
    for key, value in without[0].items():
        assert torch.equal(value, with_callback[0][key])
    for index, state in without[1].items():
        assert all(torch.equal(value, with_callback[1][index][key]) for key, value in state.items())
    assert torch.equal(without[2], with_callback[2])


def test_accumulation_and_clipping_leave_empirical_factors_alone(tmp_path):
    class Still(models.Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    def fit(**options):
        pl.seed_everything(0)
        callback = KFACEditCallback(fisher="empirical", window=10_000)
        trainer = models.trainer(tmp_path, callback, max_epochs=1, enable_checkpointing=False, **options)
        trainer.fit(Still(), models.loader(models.images(64), 16))
        return callback.factors["net.3"]

    plain = fit()
    for options in ({"accumulate_grad_batches": 4}, {"gradient_clip_val": 1e-3}, {"precision": "64-true"}):
        factors = fit(**options)
        torch.testing.assert_close(factors.A.float(), plain.A, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(factors.G.float(), plain.G, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`", "ignore:The edited copies are the checkpoints"
)
def test_siblings_follow_checkpoints(tmp_path):
    """Also in the middle of training, with early stopping, and when checkpoints are deleted."""
    saver = ModelCheckpoint(
        tmp_path / "ckpt",
        monitor="val_accuracy",
        mode="max",
        save_top_k=1,
        save_last=True,
        every_n_train_steps=None,
        filename="{epoch}",
    )
    stopper = EarlyStopping("val_accuracy", mode="max", patience=1)
    module, callback = models.Classifier(lr=0.003), KFACEditCallback()
    trainer = models.trainer(tmp_path, callback, saver, stopper, max_epochs=8)
    trainer.fit(module, models.loader(models.images(128)), models.loader(models.images(64, 1)))
    names = sorted(path.name for path in (tmp_path / "ckpt").iterdir())
    best = saver.best_model_path.rsplit("/", 1)[1].removesuffix(".ckpt")
    assert names == sorted(
        f"{name}{mark}" for name in (best, "last") for mark in (".ckpt", "-edited.ckpt", "-edited-factors.safetensors")
    )
    trainer.save_checkpoint(tmp_path / "by_hand.ckpt")
    assert (tmp_path / "by_hand-edited.ckpt").exists()
    resumed = KFACEditCallback()
    trainer = models.trainer(tmp_path, resumed, max_epochs=10, enable_checkpointing=False)
    trainer.fit(
        module, models.loader(models.images(128)), ckpt_path=tmp_path / "ckpt" / "last.ckpt", weights_only=False
    )
    trainer.fit_loop.max_epochs = 11
    trainer.fit(
        module, models.loader(models.images(128))
    )  # the same Trainer again does not wrap its checkpoint IO twice
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert sorted(path.name for path in tmp_path.glob("again*")) == [
        "again-edited-factors.safetensors",
        "again-edited.ckpt",
        "again.ckpt",
    ]


def test_metrics_are_logged_before_and_after(tmp_path):
    from lightning_curvature.demos.noise import NoisyLabels

    x, y = models.images(160).tensors
    data = NoisyLabels(x, y, 128)
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    callback = KFACEditCallback()
    trainer = models.trainer(tmp_path, callback, logger=loggers, log_every_n_steps=1)
    trainer.fit(models.Classifier(), data)
    measured = ("train/memorized", "train/recovered", "train/accuracy", "val/accuracy")
    names = {f"curvature/{metric}/{when}" for metric in measured for when in ("before", "after")}
    assert set(callback.probe_results) == names
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert names | {"val_accuracy", "train_loss"} <= set(rows[0])
    assert float(rows[-1]["curvature/train/memorized/after"]) == pytest.approx(
        callback.probe_results["curvature/train/memorized/after"], abs=1e-6
    )
    assert any((tmp_path / "tb").rglob("events.out.tfevents*"))
    assert names <= set(trainer.callback_metrics)


@pytest.mark.parametrize("kind", ["sketched", "empirical"])
def test_manual_optimization(kind, tmp_path):
    class Manual(models.Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            if batch_idx % 2:
                self.manual_backward(loss)
            else:
                loss.backward()
            optimizer.step()

    callback = KFACEditCallback(fisher=kind)
    models.trainer(tmp_path, callback, enable_checkpointing=False).fit(Manual(), models.loader(models.images(64)))
    assert callback.factors["net.3"].num_inputs == 128


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"energy": 2}, ValueError, "energy must be in"),
        ({"fisher": "mc"}, ValueError, "fisher must be one of"),
        ({"draws": 0}, ValueError, "draws must be an integer of at least 1, found 0"),
        ({"window": 0.5}, ValueError, "window must be an integer"),
        ({"positions": "cls"}, ValueError, "positions must be one of"),
    ],
)
def test_arguments_are_checked_at_once(options, error, message):
    with pytest.raises(error, match=message):
        KFACEditCallback(**options)


def test_unknown_preset_is_an_error_before_training(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'last-mlp' or 'mlp'"):
        models.trainer(tmp_path, KFACEditCallback(layers="mlps")).fit(
            models.Classifier(), models.loader(models.images(32))
        )


def test_averaged_weights_are_refused(tmp_path):
    trainer = models.trainer(tmp_path, KFACEditCallback(), StochasticWeightAveraging(swa_lrs=0.01))
    with pytest.raises(MisconfigurationException, match="StochasticWeightAveraging leaves averaged ones"):
        trainer.fit(models.Classifier(), models.loader(models.images(32)))


def test_the_other_lightning_package_is_an_error(tmp_path):
    class Other(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(2, 2)

        def training_step(self, batch, batch_idx):
            return self.fc(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = pytorch_lightning.Trainer(
        callbacks=[KFACEditCallback()],
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        max_epochs=1,
    )
    with pytest.raises(MisconfigurationException, match=r"import lightning as L; L.Trainer"):
        trainer.fit(Other(), torch.utils.data.DataLoader(torch.ones(2, 2)))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_no_data_and_few_data(tmp_path):
    class NoStep(models.Classifier):
        def training_step(self, batch, batch_idx):
            return None

    with pytest.warns(UserWarning, match="KFACEditCallback collected no data"):
        models.trainer(tmp_path, KFACEditCallback()).fit(NoStep(), models.loader(models.images(32)))
    assert not list(tmp_path.rglob("*-edited.ckpt"))
    with pytest.warns(
        UserWarning, match=r"Layer 'net.3': Factor A rests on 16 positions, too few for its 32 live inputs"
    ):
        models.trainer(tmp_path / "few", KFACEditCallback(), max_epochs=1).fit(
            models.Classifier(), models.loader(models.images(16))
        )
    with pytest.raises(RuntimeError, match="setup was not called"):
        KFACEditCallback()._running()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_no_hook_survives_an_exception_in_the_step(error, tmp_path):
    class Failing(models.Classifier):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise error("stop")

    module = Failing()
    trainer = models.trainer(tmp_path, KFACEditCallback())
    with pytest.raises((error, SystemExit)):
        trainer.fit(module, models.loader(models.images(32)))
    assert all(not m._forward_hooks for m in module.modules())
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_skipped_epoch_leaves_no_hook(tmp_path):
    class Skipping(models.Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 else None

    module, callback = Skipping(), KFACEditCallback()
    models.trainer(tmp_path, callback, max_epochs=2).fit(module, models.loader(models.images(96)))
    assert callback.factors["net.3"].num_inputs == 64
    assert all(not m._forward_hooks for m in module.modules())
