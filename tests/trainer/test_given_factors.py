"""A callback that is given a file of factors, and collects nothing."""

import copy

import lightning.pytorch as pl
import peft
import pytest
import torch
from torch import nn

from lightning_curvature import CurvatureEditor, KFACEditCallback, KroneckerFactors
from lightning_curvature.collect.passes import collect
from tests.support import models
from tests.trainer.test_price import fit


def start_and_factors(tmp_path, network="mlp"):
    """A module, and a file of factors of its network alone: names have no prefix."""
    pl.seed_everything(0)
    module = models.Classifier(network, lr=0.003)
    module.eval()
    loader = models.loader(models.images(256))
    criterion = nn.CrossEntropyLoss()
    factors = collect(module.net, loader, lambda batch: criterion(module.net(batch[0]), batch[1]), layers="linear")
    module.train()
    factors.save(tmp_path / "base.safetensors")
    return module, factors, str(tmp_path / "base.safetensors")


def test_the_factors_of_the_start_edit_the_fine_tune(tmp_path):
    module, factors, file = start_and_factors(tmp_path)
    start = copy.deepcopy(module.state_dict())
    callback = KFACEditCallback(factors=file, reference="start", budget=1e-4)
    trainer = fit(module, callback, tmp_path)
    assert callback.run is None
    assert list(callback.factors) == [f"net.{name}" for name in factors]
    path = trainer.checkpoint_callback.best_model_path
    edited = torch.load(path.replace(".ckpt", "-edited.ckpt"))
    expected, _ = CurvatureEditor(budget=1e-4, soft=True).edit_state_dict(
        module.state_dict(), callback.factors, reference=start
    )
    assert all(torch.allclose(edited["state_dict"][name], tensor) for name, tensor in expected.items())
    assert callback.report.update_kept < 1
    assert not list(tmp_path.glob("**/*-edited-factors.safetensors"))  # they are in the file that was given


def test_nothing_runs_in_training(tmp_path, monkeypatch):
    module, _, file = start_and_factors(tmp_path)
    monkeypatch.setattr("lightning_curvature.collect.collector.Collector", None)
    callback = KFACEditCallback(factors=file, reference="start")
    fit(module, callback, tmp_path)
    assert callback.match is not None
    assert callback.match.held_out


@pytest.mark.filterwarnings("ignore:The factors in")
def test_a_target_is_searched_with_them(tmp_path):
    module, _, file = start_and_factors(tmp_path)
    module.probe_dataloader = lambda: {"val": models.loader(models.images(64, 1))}
    callback = KFACEditCallback(factors=file, target={"val/accuracy": 0.9})
    trainer = fit(module, callback, tmp_path)
    assert callback.match.energy == callback.editor.energy < 1.0
    assert "curvature/val/accuracy/after" in trainer.callback_metrics


def test_validate_edits_with_them(tmp_path, capsys):
    module, factors, file = start_and_factors(tmp_path)
    callback = KFACEditCallback(factors=file, energy=0.7)
    models.trainer(tmp_path, callback).validate(module, models.loader(models.images(32)))
    expected = CurvatureEditor(0.7).edited_weights(module.net, factors)[1]
    changes = [report.layers[name].relative_change for report, name in ((callback.report, "net.3"), (expected, "3"))]
    assert changes[0] == pytest.approx(changes[1])


def test_patterns_choose_layers_of_the_file(tmp_path):
    module, factors, file = start_and_factors(tmp_path)
    first = f"net.{next(iter(factors))}"
    callback = KFACEditCallback(factors=file, layers=[first], energy=0.7)
    models.trainer(tmp_path, callback).validate(module, models.loader(models.images(32)))
    assert list(callback.report.layers) == [first]
    callback = KFACEditCallback(factors=file, layers="nothing", energy=0.7)
    with pytest.raises(ValueError, match="nothing"):
        models.trainer(tmp_path, callback).validate(module, models.loader(models.images(32)))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_goes_on_without_a_file_beside_its_checkpoint(tmp_path):
    module, _, file = start_and_factors(tmp_path)
    callback = KFACEditCallback(factors=file, reference="start", budget=1e-4)
    trainer = fit(module, callback, tmp_path)
    again = KFACEditCallback(factors=file, reference="start", budget=1e-4)
    path = trainer.checkpoint_callback.best_model_path
    models.trainer(tmp_path, again, max_epochs=7).fit(
        models.Classifier(lr=0.003), models.loader(models.images(256)), ckpt_path=path
    )
    assert all(torch.equal(again._start[name], callback._start[name]) for name in callback._start)
    assert set(again.report.layers) == set(callback.report.layers)


def test_factors_of_other_weights_are_told(tmp_path):
    _, _, file = start_and_factors(tmp_path)
    pl.seed_everything(1)
    with pytest.warns(UserWarning, match="collected on other weights than this run begins with, in 2 of 2 layers"):
        fit(models.Classifier(lr=0.003), KFACEditCallback(factors=file, budget=1e-7), tmp_path)
    torch.save(models.Classifier().state_dict(), tmp_path / "other.pt")
    callback = KFACEditCallback(factors=file, reference=str(tmp_path / "other.pt"), budget=1e-4)
    with pytest.warns(UserWarning, match=r"than the reference 'other.pt' has, in 2 of 2 layers"):
        fit(models.Classifier(lr=0.003), callback, tmp_path / "2")


def test_factors_of_a_training_tell_of_no_weights(tmp_path):
    pl.seed_everything(0)
    file = str(tmp_path / "trained.safetensors")
    fit(models.Classifier(lr=0.003), KFACEditCallback(save_factors=file, layers="linear", budget=1e-4), tmp_path / "1")
    assert not KroneckerFactors.load(file).fingerprints()
    torch.save(models.Classifier().state_dict(), tmp_path / "start.pt")
    callback = KFACEditCallback(factors=file, reference=str(tmp_path / "start.pt"), budget=1e-4)
    fit(models.Classifier(lr=0.003), callback, tmp_path / "2")
    assert callback.report.reference == "start.pt"


def test_factors_of_another_model_are_refused_before_training(tmp_path):
    _, _, file = start_and_factors(tmp_path)
    for network, message in (("vit", "have no weight"), ("cnn", "have no weight")):
        with pytest.raises(ValueError, match=message):
            fit(models.Classifier(network), KFACEditCallback(factors=file), tmp_path)
    module = models.Classifier()
    module.net[3] = nn.Linear(32, 25)
    module.net[5] = nn.Linear(25, 4)
    with pytest.raises(ValueError, match=r"has factors of a \[24, 32\] weight, and the module's weight is \[25, 32\]"):
        fit(module, KFACEditCallback(factors=file), tmp_path)


def test_mistakes_in_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file none"):
        KFACEditCallback(factors="none")
    with pytest.raises(ValueError, match="nothing is collected"):
        KFACEditCallback(factors="none", save_factors="factors")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="text"):
        fit(models.Classifier(), KFACEditCallback(factors=str(tmp_path / "text")), tmp_path)


def test_a_file_of_factors_survives_a_copy(tmp_path):
    module, factors, file = start_and_factors(tmp_path)
    callback = copy.deepcopy(KFACEditCallback(factors=file, energy=0.7))
    models.trainer(tmp_path, callback).validate(module, models.loader(models.images(32)))
    assert len(callback.report.layers) == len(KroneckerFactors.load(file)) == len(factors)


def test_a_budget_is_for_as_many_layers_as_are_edited(tmp_path):
    module, _, file = start_and_factors(tmp_path)
    for layers, budget in ((None, 0.002), (["net.3"], 0.02)):
        callback = KFACEditCallback(factors=file, reference=None, layers=layers)
        models.trainer(tmp_path, callback, enable_checkpointing=False).fit(
            copy.deepcopy(module), models.loader(models.images(64))
        )
        assert callback.editor.budget == budget


def test_lazy_modules_take_them_when_they_are_built(tmp_path):
    module, _, file = start_and_factors(tmp_path)
    lazy = copy.deepcopy(module)
    lazy.net[5] = nn.LazyLinear(4)
    callback = KFACEditCallback(factors=file, budget=1e-4)
    fit(lazy, callback, tmp_path)
    assert callback.report is not None


def test_factors_of_the_base_edit_its_adapters(tmp_path):
    module, factors, file = start_and_factors(tmp_path)
    config = peft.LoraConfig(r=2, target_modules=["1", "3"], init_lora_weights=False)
    module.net = peft.get_peft_model(module.net, config)
    callback = KFACEditCallback(factors=file, budget=1e-4)
    fit(module, callback, tmp_path)
    assert callback.report.reference == "base"
    assert len(callback.report.layers) == len(factors)
