"""The callback without arguments: the price of its edit is measured on batches of the validation loop."""

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
import transformers
from lightning.pytorch.loggers import CSVLogger

from lightning_curvature import CurvatureEditor, KFACEditCallback
from lightning_curvature.collect.validation_step import CollectedStep
from lightning_curvature.distributed import Ranks
from lightning_curvature.search import price as search_price
from lightning_curvature.search.price import Price
from lightning_curvature.trainer import price as trainer_price
from lightning_curvature.trainer.samples import Sample
from tests.support import models


class Leaving(models.Classifier):
    """Its validation step leaves things everywhere."""

    def __init__(self):
        super().__init__("mlp")
        self.seen, self.by_index, self.nested = [], {}, {"all": [[], ()]}
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=4)
        self.hidden = [torchmetrics.MeanMetric()]
        self.register_buffer("steps", torch.zeros(()))
        self.ran = 0

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.seen.append(loss)
        self.nested["all"][0].append(batch_idx)
        self.by_index[batch_idx] = logits
        self.accuracy(logits, labels)
        self.hidden[0].update(loss)
        self.steps += 1
        self.ran += 1
        self.late = torch.rand(1)
        self.log("val_loss", loss)
        self.log_dict({"accuracy": self.accuracy})
        self.logger.log_metrics({"own": float(loss)})
        return loss

    def state(self):
        return copy.deepcopy(
            (self.seen, self.by_index, self.nested, self.hidden[0].metric_state, self.accuracy.metric_state, self.ran)
        ), self.steps.clone()


def fit(module, callback, tmp_path, validated=256, **options):
    loaders = [models.loader(models.images(256))]
    loaders += [models.loader(models.images(validated, 1))] if validated else []
    trainer = models.trainer(tmp_path, callback, max_epochs=6, **options)
    trainer.fit(module, *loaders)
    return trainer


def test_steps_that_run_again_leave_nothing(tmp_path):
    states = []
    for callbacks in ([], [KFACEditCallback()]):
        pl.seed_everything(0)
        module = Leaving()
        logger = CSVLogger(tmp_path, name=f"with {len(callbacks)}")
        trainer = models.trainer(tmp_path, *callbacks, max_epochs=2, logger=logger)
        trainer.fit(module, models.loader(models.images(128)), models.loader(models.images(96, 1)))
        states.append((module.state(), module.state_dict(), torch.rand(3), module.late))
        assert "log" not in vars(module)
    flat = [torch.utils._pytree.tree_leaves(state) for state in states]
    assert len(flat[0]) == len(flat[1])
    for first, second in zip(*flat, strict=True):
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
    assert callbacks[0].match is not None


@pytest.mark.parametrize("network", ["mlp", "vit"])
def test_a_classifier_loses_no_more_than_half_a_point(network, tmp_path):
    pl.seed_everything(0)
    module, callback = models.Classifier(network, lr=0.003), KFACEditCallback(layers="last-mlp")
    fit(module, callback, tmp_path)
    match = callback.match
    assert set(match.before) == {"validation error", "validation loss"} == set(match.held_out)
    error = match.before["validation error"]
    assert match.after["validation error"] <= error + max(0.005, (error * (1 - error) / 128) ** 0.5)
    assert match.after["validation loss"] <= min(c["validation loss"] for c in match.points.values()) + 0.05
    assert callback.report.predicted_loss == pytest.approx(match.predicted, rel=1e-6)
    assert callback.editor.budget == match.budget


class Text(pl.LightningModule):
    """A small language model."""

    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=12, max_position_embeddings=32, tie_word_embeddings=True, **sizes)
        )

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def counting(n, seed, step=1):
    starts = torch.randint(12, (n, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + step * torch.arange(16)) % 12


def test_texts_have_a_price_each(tmp_path):
    pl.seed_everything(0)
    module, callback = Text(), KFACEditCallback(layers="linear", soft=True, min_positions=0)
    trainer = models.trainer(tmp_path, callback, max_epochs=4)
    loaders = [models.loader(counting(32, seed, step)) for seed, step in ((1, 1), (2, 5))]
    trainer.fit(module, models.loader(torch.cat([counting(64, 0), counting(64, 3, 5)])), loaders)
    match = callback.match
    assert set(match.before) == {"validation 0 loss", "validation 1 loss"}
    assert match.budget > 0
    for name in match.before:
        assert match.after[name] <= match.before[name] + 0.0199


@pytest.mark.parametrize(("reference", "found_by"), [("start", "spend_on_update"), (None, "spend")])
def test_the_price_of_a_text_counts_from_its_lowest_loss(reference, found_by, tmp_path, monkeypatch):
    prices = []

    def noted(*arguments, **options):
        prices.extend(argument for argument in arguments if isinstance(argument, Price))
        return getattr(search_price, found_by)(*arguments, **options)

    monkeypatch.setattr(trainer_price, found_by, noted)
    pl.seed_everything(0)
    callback = KFACEditCallback(layers="linear", reference=reference, min_positions=0)
    trainer = models.trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(Text(), models.loader(counting(64, 0)), models.loader(counting(32, 1)))
    assert [price.allowed for price in prices] == [{"validation loss": (0.02, True)}]


def test_without_a_validation_the_price_is_predicted(tmp_path, caplog):
    pl.seed_everything(0)
    callback = KFACEditCallback()
    with caplog.at_level("INFO"):
        fit(models.Classifier(lr=0.003), callback, tmp_path, validated=0)
    assert callback.match is None
    assert callback.report.predicted_loss <= 0.02
    assert "was not measured, since there was no validation" in caplog.text


def test_a_step_that_does_not_run_again_costs_a_warning(tmp_path):
    class Refusing(models.Classifier):
        calls = 0

        def validation_step(self, batch, batch_idx):
            Refusing.calls += 1
            if Refusing.calls > 8 * 6:
                raise KeyError("no more")
            super().validation_step(batch, batch_idx)

    callback = KFACEditCallback()
    with pytest.warns(UserWarning, match=r"could not be measured: KeyError: 'no more'"):
        trainer = fit(Refusing(lr=0.003), callback, tmp_path, num_sanity_val_steps=0)
    assert callback.match is None
    assert callback.report is not None
    assert trainer.checkpoint_callback.best_model_path


@pytest.mark.parametrize("loop", ["train", "validation"])
def test_another_callback_collects_nothing_from_steps_that_run_again(loop, tmp_path):
    pl.seed_everything(0)
    callbacks = [KFACEditCallback(loop=loop), KFACEditCallback(loop="validation", name="other")]
    trainer = models.trainer(tmp_path, *callbacks, max_epochs=2)
    trainer.fit(models.Classifier(), models.loader(models.images(128)), models.loader(models.images(96, 1)))
    assert callbacks[1].factors["net.3"].num_inputs == 96
    assert all(callback.match is not None for callback in callbacks)
    assert not isinstance(trainer.lightning_module.validation_step, CollectedStep)


def test_validate_measures_the_price(tmp_path):
    pl.seed_everything(0)
    module = models.Classifier(lr=0.003)
    fit(module, KFACEditCallback(), tmp_path)
    callback = KFACEditCallback()
    models.trainer(tmp_path, callback).validate(module, models.loader(models.images(256, 1)))
    assert callback.match.budget > 0
    assert callback.report.predicted_loss == pytest.approx(callback.match.predicted, rel=1e-6)


def test_one_strength_is_asked_for():
    with pytest.raises(ValueError, match="give one of them"):
        KFACEditCallback(energy=0.8, budget=0.1)
    with pytest.raises(ValueError, match="give one of them"):
        KFACEditCallback(target={"a/perplexity": 1.1}, energy=0.1)
    callback = KFACEditCallback(budget=0.1)
    assert callback.price is None
    assert callback.editor.budget == 0.1


def test_a_budget_decides_the_edited_copy(tmp_path):
    pl.seed_everything(0)
    module, callback = models.Classifier(lr=0.003), KFACEditCallback(budget=0.01)
    trainer = fit(module, callback, tmp_path)
    edited = torch.load(trainer.checkpoint_callback.best_model_path.replace(".ckpt", "-edited.ckpt"))
    expected, _ = CurvatureEditor(budget=0.01).edit_state_dict(module.state_dict(), callback.factors)
    assert all(torch.equal(edited["state_dict"][name], tensor) for name, tensor in expected.items())


def reference_run(tmp_path, **options):
    pl.seed_everything(0)
    module = models.Classifier(lr=0.003)
    start = copy.deepcopy(module.state_dict())
    callback = KFACEditCallback(**{"reference": "start", "budget": 1e-4, **options})
    return start, module, callback, fit(module, callback, tmp_path)


def test_the_update_since_the_start_is_edited(tmp_path):
    start, module, callback, trainer = reference_run(tmp_path)
    assert set(callback.report.layers) == {"net.1", "net.3"}
    edited = torch.load(trainer.checkpoint_callback.best_model_path.replace(".ckpt", "-edited.ckpt"))
    expected, _ = CurvatureEditor(budget=1e-4, soft=True).edit_state_dict(
        module.state_dict(), callback.factors, reference=start
    )
    assert all(torch.allclose(edited["state_dict"][name], tensor) for name, tensor in expected.items())
    assert edited["lightning_curvature"]["reference"] == {"name": "start", "scale": 1.0}


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_that_goes_on_knows_its_start(tmp_path):
    start, _, _, trainer = reference_run(tmp_path)
    path = trainer.checkpoint_callback.best_model_path
    callback = KFACEditCallback(reference="start", budget=1e-4)
    again = models.trainer(tmp_path, callback, max_epochs=7)
    again.fit(models.Classifier(lr=0.003), models.loader(models.images(256)), ckpt_path=path)
    assert all(torch.equal(callback._start[name], start[name]) for name in callback._start)


def test_the_reference_may_be_a_file(tmp_path):
    pl.seed_everything(0)
    module = models.Classifier(lr=0.003)
    torch.save(module.state_dict(), tmp_path / "start.pt")
    callback = KFACEditCallback(reference=str(tmp_path / "start.pt"), budget=1e-4)
    fit(module, callback, tmp_path)
    same = reference_run(tmp_path / "other")[2]
    assert callback.report.update_kept == pytest.approx(same.report.update_kept)
    assert callback._start is None


def test_start_is_for_a_fit(tmp_path):
    trainer = models.trainer(tmp_path, KFACEditCallback(reference="start"))
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="is for a fit"):
        trainer.validate(models.Classifier(), models.loader(models.images(32)))


def test_the_start_of_a_second_fit_is_its_own(tmp_path):
    _, module, callback, _ = reference_run(tmp_path)
    second = copy.deepcopy(module.state_dict())
    models.trainer(tmp_path / "2", callback).fit(module, models.loader(models.images(64)))
    assert all(torch.equal(callback._start[name], second[name]) for name in callback._start)


def test_a_fine_tune_is_scaled_where_that_lowers_the_loss(tmp_path):
    """Text of the validation is what the start knows, and the fit makes it worse: the update goes as far as allowed."""
    pl.seed_everything(0)
    module = Text()
    models.trainer(tmp_path / "1", max_epochs=4, enable_checkpointing=False).fit(module, models.loader(counting(64, 0)))
    callback = KFACEditCallback(reference="start", min_positions=0)
    trainer = models.trainer(tmp_path / "2", callback, max_epochs=4)
    trainer.fit(module, models.loader(counting(64, 3, 5)), models.loader(counting(32, 1)))
    match = callback.match
    assert match.scale == callback.editor.scale < 1.0
    assert match.before["validation loss"] > match.points[0.0]["validation loss"]
    assert f"The update was scaled by {match.scale:g} first" in str(match)
    edited = torch.load(trainer.checkpoint_callback.best_model_path.replace(".ckpt", "-edited.ckpt"))
    assert edited["lightning_curvature"]["reference"]["scale"] == match.scale


class Seen(models.Classifier):
    """Notes what its validation steps get; changes its batches, and has hooks that do."""

    seen = ()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 2.0, *batch[1:]]

    def validation_step(self, batch, batch_idx):
        Seen.seen = (*Seen.seen, float(batch[0].abs().mean()))
        super().validation_step(batch, batch_idx)
        batch[0].mul_(3.0)
        batch.pop()


@pytest.mark.filterwarnings("ignore:The edited copies are the checkpoints")
def test_a_step_sees_its_batch_again_as_it_was(tmp_path):
    Seen.seen = ()
    callback = KFACEditCallback()
    trainer = models.trainer(tmp_path, callback, max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(Seen(), models.loader(models.images(64)), models.loader(models.images(64, 1)))
    assert callback.match is not None
    assert len(Seen.seen) > 6
    assert len(set(Seen.seen)) == 3  # two batches of the validation, and every second one of training


class Meter:
    """An object of somebody's own class."""

    def __init__(self):
        self.total, self.all = 0, []


class Counting(models.Classifier):
    def __init__(self):
        super().__init__()
        self.meter, self.matrix = Meter(), np.zeros(2)
        self.register_buffer("sparse", torch.eye(2).to_sparse())

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.matrix[0] += len(batch[1])
        self.meter.total += len(batch[1])
        self.meter.all.append(batch_idx)


def test_objects_and_arrays_of_a_module_are_put_back(tmp_path):
    module, callback = Counting(), KFACEditCallback()
    trainer = models.trainer(tmp_path, callback, max_epochs=1, num_sanity_val_steps=0, enable_checkpointing=False)
    trainer.fit(module, models.loader(models.images(64)), models.loader(models.images(96, 1)))
    assert callback.match is not None
    assert module.matrix.tolist() == [96.0, 0.0]
    assert (module.meter.total, module.meter.all) == (96, [0, 1, 2])


def test_what_is_kept_of_a_loop_is_forgotten(tmp_path):
    callback = KFACEditCallback()
    pl.seed_everything(0)
    fit(models.Classifier(lr=0.003), callback, tmp_path / "1")
    assert callback.match is not None
    fit(models.Classifier(lr=0.003), callback, tmp_path / "2", validated=0)
    assert callback.match is None
    assert callback.editor.budget == 0.02


def test_only_so_many_bytes_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_curvature.trainer.samples.BYTES", 32 * 64 * 4)
    sample = Sample()
    for index in range(5):
        sample.add(models.Classifier(), (torch.zeros(32, 8, 8), torch.zeros(32)), index, 0, 1)
    assert len(sample.shared(Ranks())) == 1


def test_an_accuracy_is_not_spent_on_the_scale_of_an_update():
    price = Price({"loss": (0.02, True), "error": (0.01, False)}, 0.1, {"loss": 1.0, "error": 0.1})
    assert price.excess(1.0, {0.0: {"loss": 0.8, "error": 0.1}, 1.0: {"loss": 0.7, "error": 0.2}}) > 1
