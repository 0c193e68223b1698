"""Which runs edit the update of a fine-tune, when nothing is said."""

import copy
import dataclasses

import lightning.pytorch as pl
import peft
import pytest
import torch

from lightning_curvature import KFACEditCallback
from lightning_curvature.demos.vit import ViT
from lightning_curvature.layers.selection import DEEP
from lightning_curvature.search.energy import Match
from lightning_curvature.search.price import Purchase
from tests.layers.test_trained import stand_out
from tests.support import models
from tests.trainer.test_price import Text, counting, fit


def tuned(tmp_path, module=None, **options):
    pl.seed_everything(0)
    module = stand_out(models.Classifier(lr=0.003)) if module is None else module
    start, callback = copy.deepcopy(module.state_dict()), KFACEditCallback(**options)
    return start, module, callback, fit(module, callback, tmp_path)


def test_a_fit_that_begins_with_trained_weights_edits_what_it_changes(tmp_path, caplog):
    start, _, callback, trainer = tuned(tmp_path, budget=1e-4)
    assert callback.keeps_start
    assert set(callback.report.layers) == {"net.1", "net.3"}
    assert callback.report.update_kept is not None
    assert all(torch.equal(callback._start[name], start[name]) for name in callback._start)
    path = trainer.checkpoint_callback.best_model_path
    facts = torch.load(path.replace(".ckpt", "-edited.ckpt"))["lightning_curvature"]
    assert (facts["reference"]["name"], facts["method"]) == ("start", "kfac, soft")


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")
def test_a_run_that_goes_on_edits_what_it_edited_before(tmp_path):
    start, _, _, trainer = tuned(tmp_path / "1", budget=1e-4)
    path = trainer.checkpoint_callback.best_model_path
    callback = KFACEditCallback(budget=1e-4)
    again = models.trainer(tmp_path / "2", callback, max_epochs=7)
    again.fit(models.Classifier(lr=0.003), models.loader(models.images(256)), ckpt_path=path)
    assert callback.keeps_start
    assert all(torch.equal(callback._start[name], start[name]) for name in callback._start)
    assert set(callback.report.layers) == {"net.1", "net.3"}


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")
def test_a_run_that_goes_on_with_its_own_training_edits_weights(tmp_path):
    """Its weights are trained by then, and what it began with is not known."""
    _, module, callback, trainer = tuned(tmp_path / "1", models.Classifier(lr=0.003), budget=1e-4)
    assert not callback.keeps_start
    path = trainer.checkpoint_callback.best_model_path
    checkpoint = torch.load(path)
    torch.save({**checkpoint, "state_dict": stand_out(module).state_dict()}, path)
    callback = KFACEditCallback(budget=1e-4)
    again = models.trainer(tmp_path / "2", callback, max_epochs=7)
    again.fit(models.Classifier(lr=0.003), models.loader(models.images(256)), ckpt_path=path)
    assert not callback.keeps_start
    assert set(callback.report.layers) == {"net.3"}
    assert callback.report.reference is None


@pytest.mark.parametrize("options", [{"reference": None, "budget": 1e-4}, {"energy": 0.9}])
def test_who_wants_the_weights_edited_says_so(tmp_path, options):
    callback = tuned(tmp_path, **options)[2]
    assert not callback.keeps_start
    assert set(callback.report.layers) == {"net.3"}
    assert callback.report.reference is None


def test_the_next_fit_of_a_callback_decides_anew(tmp_path):
    callback = tuned(tmp_path / "1", budget=1e-4)[2]
    fit(models.Classifier(lr=0.003), callback, tmp_path / "2")
    assert not callback.keeps_start
    assert set(callback.report.layers) == {"net.3"}
    assert callback.report.reference is None


def test_a_start_without_room_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_curvature.trainer.runs.free_memory", lambda device: 1000)
    with pytest.warns(UserWarning, match="there is no room to keep a copy"):
        callback = tuned(tmp_path, budget=1e-4)[2]
    assert callback.report.reference is None
    assert set(callback.report.layers) == {"net.3"}


def test_no_process_keeps_a_start_alone(tmp_path, monkeypatch):
    """Whether there is room is asked on all processes, as collectives are."""
    asked = []
    gather = "lightning_curvature.distributed.Ranks.gather"
    monkeypatch.setattr(gather, lambda self, value: asked.append(value) or [value])
    tuned(tmp_path, budget=1e-4)
    assert asked[:2] == [True, True]


class Deep(models.Classifier):
    """A transformer of as many blocks as small pretrained models have."""

    def __init__(self, depth):
        super().__init__("vit", lr=0.003)
        self.net = ViT(image_size=8, patch=4, classes=4, width=16, depth=depth, heads=2, inner=8, mlp_ratio=2)


@pytest.mark.parametrize(
    ("depth", "layers", "budget"), [(DEEP + 1, {"fc1", "fc2"}, 0.002), (DEEP, {"fc2"}, 0.02)], ids=["deep", "shallow"]
)
def test_all_mlps_of_a_deep_network_are_edited(depth, layers, budget, tmp_path):
    pl.seed_everything(0)
    callback = KFACEditCallback(min_positions=0)
    models.trainer(tmp_path, callback).fit(Deep(depth), models.loader(models.images(64)))
    assert {name.rpartition(".")[2] for name in callback.report.layers} == layers
    assert len(callback.report.layers) == (2 * depth if budget == 0.002 else 1)
    assert callback.editor.budget == budget
    assert not callback.editor.soft
    assert callback.report.predicted_loss <= 1.001 * budget


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_are_updates(tmp_path):
    """No start is kept, all adapters are edited, and they are scaled where that lowers the loss."""
    pl.seed_everything(0)
    module, callback = Text(), KFACEditCallback(min_positions=0)
    models.trainer(tmp_path / "1", max_epochs=4, enable_checkpointing=False).fit(module, models.loader(counting(64, 0)))
    module.model = peft.get_peft_model(module.model, peft.LoraConfig(r=4, target_modules="all-linear"))
    base = {name: tensor.clone() for name, tensor in module.state_dict().items() if "lora_" not in name}
    trainer = models.trainer(tmp_path / "2", callback, max_epochs=6)
    trainer.fit(module, models.loader(counting(64, 3, 5)), models.loader(counting(32, 1)))
    assert callback._start is None
    assert callback.match.scale < 1.0
    assert callback.report.reference == "base"
    assert len(callback.report.layers) == len([name for name in base if "base_layer.weight" in name])
    edited = torch.load(trainer.checkpoint_callback.best_model_path.replace(".ckpt", "-edited.ckpt"))
    assert all(torch.equal(edited["state_dict"][name], tensor) for name, tensor in base.items())
    assert edited["lightning_curvature"]["reference"] == {"name": "base", "scale": callback.match.scale}


def test_what_was_measured_counts_and_not_what_is_predicted():
    """An edit within the price is none that ruins the model; one that other batches contradict is."""
    purchase = Purchase(1.0, 1.0, {}, {}, {}, {"validation loss": (1.0, 1.2), "validation error": (0.1, 0.9)})
    assert purchase.warning is None
    for after in (1.5, float("nan")):
        ruined = dataclasses.replace(purchase, held_out={"validation loss": (1.0, after)})
        assert "on batches that did not choose it" in ruined.warning


class Probed(models.Classifier):
    """Measured on two data sets."""

    def probe_dataloader(self):
        return {"val": models.loader(models.images(256, 1)), "other": models.loader(models.images(256, 2))}


def probed(tmp_path, **target):
    pl.seed_everything(0)
    return tuned(
        tmp_path, stand_out(Probed(lr=0.003)), target={f"{name}/accuracy": kept for name, kept in target.items()}
    )


@pytest.mark.parametrize("target", [{"val": 0.95}, {"val": 0.95, "other": 0.8}, {"val": 0.8, "other": 0.95}])
def test_a_target_of_an_update_is_a_budget(target, tmp_path, caplog):
    """The one strength of a soft edit; none of its limits is exceeded, and one of them is used."""
    caplog.set_level("INFO")
    _, _, callback, trainer = probed(tmp_path, **target)
    assert isinstance(callback.match, Purchase)
    assert callback.editor.budget == callback.match.budget > 0
    results = callback.probe_results
    kept = {
        name: results[f"curvature/{name}/accuracy/after"] / results[f"curvature/{name}/accuracy/before"]
        for name in target
    }
    assert all(kept[name] >= target[name] for name in target)
    assert max(callback.match.after.values()) > 0.4
    found = f"the update times {callback.match.scale:g}, shrunk for a predicted {callback.match.predicted:.2g} nats"
    assert found in caplog.text
    path = trainer.checkpoint_callback.best_model_path
    facts = torch.load(path.replace(".ckpt", "-edited.ckpt"))["lightning_curvature"]
    assert (facts["method"], facts["reference"]["scale"]) == ("kfac, soft", callback.match.scale)


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")
def test_a_resumed_run_goes_on_with_the_budget_of_its_target(tmp_path):
    _, _, _, trainer = probed(tmp_path / "1", val=0.95)
    path = trainer.checkpoint_callback.best_model_path
    again = KFACEditCallback(target={"val/accuracy": 0.95})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_curvature.trainer.outcome.Outcome.search", lambda *_: None)
        models.trainer(tmp_path / "2", again, max_epochs=7).fit(
            Probed(lr=0.003), models.loader(models.images(256)), ckpt_path=path
        )
    saved = torch.load(path)["callbacks"]
    (state,) = (state["match"] for key, state in saved.items() if key.startswith("KFACEditCallback"))
    assert {"budget", "scale", "predicted", "after"} < set(state)
    assert (again.match.budget, again.match.scale) == (state["budget"], state["scale"])
    assert (again.editor.budget, again.editor.scale) == (state["budget"] or None, state["scale"])


@pytest.mark.parametrize("options", [{"reference": None}, {"soft": False}])
def test_other_targets_are_energies(options, tmp_path):
    module = stand_out(Probed(lr=0.003))
    callback = tuned(tmp_path, module, target={"val/accuracy": 0.95}, **options)[2]
    assert isinstance(callback.match, Match)
    assert callback.editor.budget is None


def test_each_search_decides_the_factor_of_updates_anew_and_starts_at_the_last_budget(tmp_path, monkeypatch):
    begun = []

    def match(self, trainer, module, editor, factors, target):
        begun.append((editor.scale, editor.budget))
        return Purchase(0.01, 0.01, {}, {}, {}, scale=0.8)

    monkeypatch.setattr("lightning_curvature.trainer.probes.Probes.match", match)
    callback = probed(tmp_path, val=0.95)[2]
    assert begun[:2] == [(1.0, None), (1.0, 0.01)]
    assert callback.editor.scale == 0.8
