"""A checkpoint has an edited copy if its weights are those that the factors describe."""

import warnings

import lightning.pytorch as pl
import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_curvature import CurvatureEditor, KFACEditCallback, KroneckerFactors
from lightning_curvature.trainer.weight_watch import WeightWatch
from tests.support.rows import Plain, fit, loader, saved


class Average(pl.Callback):
    """Keeps averages of the weights."""

    def on_train_start(self, trainer, module):
        self.average = {name: value.detach().clone() for name, value in module.state_dict().items()}

    def on_train_batch_end(self, trainer, module, *args):
        for name, value in module.state_dict().items():
            self.average[name].mul_(0.9).add_(value, alpha=0.1)


class IntoTheFile(Average):
    def on_save_checkpoint(self, trainer, module, checkpoint):
        checkpoint["state_dict"] = {name: value.clone() for name, value in self.average.items()}


class IntoTheModule(Average):
    """Puts them into the module for each validation, and takes them out again."""

    def on_validation_start(self, trainer, module):
        if hasattr(self, "average"):
            self.own = {name: value.detach().clone() for name, value in module.state_dict().items()}
            module.load_state_dict(self.average)

    def on_validation_end(self, trainer, module):
        if hasattr(self, "own") and not self.stays:
            module.load_state_dict(self.own)

    stays = False


class AtTheEnd(Average):
    def on_train_end(self, trainer, module):
        module.load_state_dict(self.average)


class OfTheModule(Plain):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {name: 2 * value for name, value in checkpoint["state_dict"].items()}


def test_other_weights_in_the_file_have_no_edited_copy(tmp_path):
    for callbacks, module in (([IntoTheFile()], Plain()), ([], OfTheModule())):
        folder = tmp_path / type(module).__name__
        saver = ModelCheckpoint(folder / "c", filename="x")
        with pytest.warns(
            UserWarning, match="no edited copy: it holds other weights than those that were trained"
        ) as told:
            fit(folder, module, *callbacks, KFACEditCallback(), saver, max_epochs=2)
        assert len([1 for warning in told if "no edited copy" in str(warning.message)]) == 1  # of two epochs
        assert saved(folder) == ["x-edited-factors.safetensors", "x.ckpt"]


@pytest.mark.parametrize("stays", [True, False])
def test_weights_that_are_saved_as_they_are_validated(stays, tmp_path):
    """Averages that a validation sees are what its factors describe, and the live weights are not."""
    swap, callback = IntoTheModule(), KFACEditCallback(loop="validation")
    swap.stays = stays
    saver = ModelCheckpoint(tmp_path / "c", filename="x", save_on_train_epoch_end=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(tmp_path, Plain(), swap, callback, saver, validation=loader(32), max_epochs=2)
    assert ("x-edited.ckpt" in saved(tmp_path)) == stays
    assert any("other weights than those that were validated" in str(warning.message) for warning in told) != stays


def test_weights_that_are_swapped_after_the_last_step(tmp_path):
    saver = ModelCheckpoint(tmp_path / "c", filename="x", save_on_train_epoch_end=True)
    callback = KFACEditCallback()
    trainer = fit(tmp_path, Plain(lr=1.0), AtTheEnd(), callback, saver, max_epochs=2)
    assert "x-edited.ckpt" in saved(tmp_path)  # of before the swap
    del trainer


class Clamping(Plain):
    """Holds its weights in bounds after each step, which changes them a little."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(1 - 1e-5)


def test_a_small_change_after_each_step_is_no_swap(tmp_path):
    fit(tmp_path, Clamping(), KFACEditCallback(), ModelCheckpoint(tmp_path / "c", filename="x"), max_epochs=2)
    assert "x-edited.ckpt" in saved(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_watch_of_weights(dtype):
    weight = torch.ones(4, dtype=dtype)
    watch = WeightWatch(lambda: {"fc": weight})
    assert not watch.swapped()
    watch.end_step()
    assert not watch.swapped()
    kept = weight.clone()
    weight.mul_(2)
    assert watch.swapped()
    weight.copy_(kept)
    watch.begin_step()
    weight.add_(0.1)  # a step of training
    assert not watch.swapped()
    watch.end_step()
    kept = weight.clone()
    weight.mul_(2)
    assert watch.swapped()
    weight.copy_(kept)  # put back
    assert not watch.swapped()
    weight.data = torch.zeros_like(weight)
    assert watch.swapped()
    weight.data = kept.clone()
    assert not watch.swapped()
    weight.data.mul_(2)  # of which autograd keeps no trace
    assert watch.swapped()
    watch.begin_step()
    assert not watch.swapped()  # training goes on from there
    watch.end_step()
    weight.mul_(2)
    assert not watch.swapped()  # as usual
    weight.mul_(4)
    assert watch.swapped()


class WithoutTrace(IntoTheModule):
    """Swaps averages in through ``.data``, of which autograd keeps no trace, and keeps them in for the checkpoint."""

    def on_validation_start(self, trainer, module):
        for name, parameter in module.named_parameters():
            parameter.data.copy_(self.average[name] if hasattr(self, "average") else parameter.data)

    def on_validation_end(self, trainer, module):
        """Do not take them out."""


def test_weights_that_are_swapped_without_a_trace(tmp_path):
    """Factors of training steps do not describe averages that lie in the module when it is saved."""
    saver = ModelCheckpoint(tmp_path / "c", filename="x", save_on_train_epoch_end=False)
    with pytest.warns(UserWarning, match="no edited copy"):
        fit(tmp_path, Plain(lr=1.0), WithoutTrace(), KFACEditCallback(), saver, validation=loader(32), max_epochs=1)
    assert "x-edited.ckpt" not in saved(tmp_path)


def test_the_edited_copy_says_how_far_it_moved(tmp_path):
    callback = KFACEditCallback(layers=["net.0", "net.2"], energy=0.7)
    fit(tmp_path, Plain(), callback, ModelCheckpoint(tmp_path / "c", filename="x"))
    facts = torch.load(tmp_path / "c" / "x-edited.ckpt", weights_only=True)["lightning_curvature"]
    told = {name: layer["relative_change"] for name, layer in facts["layers"].items()}
    assert told == {name: edit.relative_change for name, edit in callback.report.layers.items()}
    assert KroneckerFactors.load(tmp_path / "c" / "x-edited-factors.safetensors").digest() == facts["factors"]


class Adapted(Plain):
    """Has LoRA adapters on two layers."""

    def __init__(self, **options):
        super().__init__()
        config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False, **options)
        self.net = peft.get_peft_model(self.net, config)


def test_the_edited_copy_of_an_adapted_module_has_edited_adapters(tmp_path):
    layer, module = "net.base_model.model.2", Adapted()
    callback = KFACEditCallback(layers=[f"{layer}.base_layer"], energy=0.7)
    fit(tmp_path, module, callback, ModelCheckpoint(tmp_path / "c", filename="x"), max_epochs=1)
    original, edited = (torch.load(tmp_path / "c" / f"x{mark}.ckpt", weights_only=True) for mark in ("", "-edited"))
    weights = original["state_dict"]
    changed = {name for name, tensor in edited["state_dict"].items() if not torch.equal(tensor, weights[name])}
    assert changed == {f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"}
    facts = edited["lightning_curvature"]
    assert list(facts["layers"]) == [f"{layer}.base_layer"]
    assert facts["reference"] == {"name": "base", "scale": 1.0}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    factors = KroneckerFactors.load(tmp_path / "c" / "x-edited-factors.safetensors")
    report = CurvatureEditor(0.7).edit(module, factors)
    assert all(torch.equal(tensor, edited["state_dict"][name]) for name, tensor in module.state_dict().items())
    assert report.layers == callback.report.layers


def test_an_adapter_that_cannot_be_edited_costs_the_copy(tmp_path):
    callback = KFACEditCallback(layers=["net.base_model.model.2.base_layer"], energy=0.7)
    saver = ModelCheckpoint(tmp_path / "c", filename="x")
    with (
        pytest.warns(UserWarning, match=r"KFACEditCallback stops.*2.base_layer'.* is of the kind DoRA"),
        pytest.warns(UserWarning, match=r"has no edited copy: .*2.base_layer'.* is of the kind DoRA"),
    ):
        fit(tmp_path, Adapted(use_dora=True), callback, saver, max_epochs=1)
    assert "x-edited.ckpt" not in saved(tmp_path)
    assert "DoRA" in callback.problem
