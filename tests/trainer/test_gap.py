"""The callback without arguments on classifiers that recite labels: training batches tell what to edit."""

import csv
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_curvature import KFACEditCallback
from lightning_curvature.trainer.validated import validated_factors
from tests.support import models
from tests.trainer.test_price import Text, counting


def noisy(n, seed):
    """Images of which a quarter has a wrong label."""
    images = models.images(n, seed)
    labels = torch.stack([images[i][1] for i in range(n)])
    labels[::4] = (labels[::4] + 1) % 4
    return torch.utils.data.TensorDataset(torch.stack([images[i][0] for i in range(n)]), labels)


def fit(module, callback, tmp_path, train=None, epochs=40, **options):
    trainer = models.trainer(
        tmp_path, callback, ModelCheckpoint(tmp_path), max_epochs=epochs, check_val_every_n_epoch=epochs, **options
    )
    loader = models.loader(noisy(192, 0)) if train is None else train
    trainer.fit(module, loader, models.loader(models.images(256, 1)))
    return trainer


def reciting(tmp_path, network="mlp", **options):
    pl.seed_everything(0)
    module = models.Classifier(network, lr=0.01)
    callback = KFACEditCallback(**{"min_positions": 0} | options)
    return module, callback, fit(module, callback, tmp_path)


@pytest.mark.parametrize("network", ["mlp", "vit", "cnn"])
def test_the_edit_closes_the_gap_and_validation_loses_next_to_nothing(network, tmp_path, caplog):
    caplog.set_level("INFO")
    _, callback, trainer = reciting(tmp_path, network)
    match = callback.match
    assert match.name in ("default layers", "all linear layers, soft")
    gaps = [costs["validation error"] - costs["training error"] for costs in (match.before, match.after)]
    assert gaps[1] < gaps[0]
    error = min(costs["validation error"] for costs in match.points.values())
    assert match.after["validation error"] <= error + max(0.005, (0.25 / 128) ** 0.5)
    assert match.after["validation loss"] <= 1.1 * match.before["validation loss"]
    assert set(match.held_out) == {"validation error", "validation loss"}
    assert "What edits do, on training and on validation batches" in caplog.text
    assert "closes most of the gap between training and validation" in str(match)
    path = trainer.checkpoint_callback.best_model_path.replace(".ckpt", "-edited.ckpt")
    edited = torch.load(path)
    assert set(edited["lightning_curvature"]["layers"]) == set(callback.factors)
    assert edited["lightning_curvature"]["method"] == callback.editor.method


def test_what_was_tried_is_logged_after_the_results(tmp_path):
    """A step for each edit, after the last one of training: some loggers take no earlier ones."""
    logger = CSVLogger(tmp_path, name="csv")
    pl.seed_everything(0)
    callback = KFACEditCallback(min_positions=0)
    trainer = fit(models.Classifier(lr=0.01), callback, tmp_path / "run", logger=logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    tried = callback.match.tried
    assert set(tried) == {"default layers", "all linear layers, soft"}
    for name, points in tried.items():
        logged = [row for row in rows if row.get(f"curvature/choice/{name}/budget")]
        assert [float(row[f"curvature/choice/{name}/budget"]) for row in logged] == pytest.approx(list(points))
        for row, costs in zip(logged, points.values(), strict=True):
            assert int(row["step"]) > trainer.global_step
            for cost, value in costs.items():
                assert float(row[f"curvature/choice/{name}/{cost}"]) == pytest.approx(value)


def test_no_edit_where_none_closes_the_gap(tmp_path, monkeypatch):
    """Spending a price would cost accuracy, and remove nothing."""
    monkeypatch.setattr("lightning_curvature.trainer.price.choose", lambda *args: ([], None))
    with pytest.warns(UserWarning, match="The edited copies are the checkpoints. No edit closes the gap between"):
        _, callback, trainer = reciting(tmp_path)
    path = trainer.checkpoint_callback.best_model_path
    before, after = (torch.load(name)["state_dict"] for name in (path, path.replace(".ckpt", "-edited.ckpt")))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert callback.match.budget == 0.0


@pytest.mark.parametrize(("wins", "network"), [("default layers", "mlp"), ("all linear layers, soft", "vit")])
def test_what_is_chosen_is_what_is_saved(wins, network, tmp_path, monkeypatch):
    """Its layers, its factors, and whether it is soft; and the next run decides anew."""
    from lightning_curvature.trainer import price

    choose = price.choose

    def of_one(candidates, *args):
        (tried,), best = choose([candidate for candidate in candidates if candidate.name == wins], *args)
        return [tried], best or (tried, min(tried.points))  # whatever rounding has made of the network

    monkeypatch.setattr(price, "choose", of_one)
    module, callback, trainer = reciting(tmp_path / "1", network)
    is_soft = wins.endswith("soft")
    assert callback.editor.soft == is_soft
    assert callback.editor.budget == callback.match.budget
    assert (len(callback.factors) > 1) == is_soft
    edited = torch.load(trainer.checkpoint_callback.best_model_path.replace(".ckpt", "-edited.ckpt"))
    expected, _ = callback.editor.edit_state_dict(module.state_dict(), callback.factors)
    assert all(torch.allclose(edited["state_dict"][name], tensor) for name, tensor in expected.items())
    fit(models.Classifier(network, lr=0.003), callback, tmp_path / "2", models.loader(models.images(64)), epochs=1)
    assert list(callback.run.windows.factors) == [{"mlp": "net.3", "vit": "net.blocks.1.fc2"}[network]]


@pytest.mark.parametrize(
    "options", [{"layers": "last-mlp"}, {"soft": True}, {"loop": "validation"}, {"budget": 0.01}, {"energy": 0.9}]
)
def test_who_says_what_to_edit_gets_that(options, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_curvature.trainer.price.choose", None)
    _, callback, _ = reciting(tmp_path, **options)
    assert list(callback.report.layers) == ["net.3"]


class Strict(models.Classifier):
    """Takes pairs in validation, and triples in training."""

    def validation_step(self, batch, batch_idx):
        _, _ = batch
        super().validation_step(batch, batch_idx)


class Triples(torch.utils.data.TensorDataset):
    """With a number for each example."""

    def __init__(self, data):
        super().__init__(*data.tensors, torch.arange(len(data)))


class Uncopied:
    """Labels that cannot be copied."""

    def __init__(self, pairs):
        self.labels = torch.stack([label for _, label in pairs])

    def __deepcopy__(self, memo):
        raise TypeError("not me")


class Unwrapping(models.Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0], batch[1].labels), batch_idx)


def test_training_batches_that_cannot_be_validated_are_told_and_a_price_is_measured(tmp_path, caplog):
    caplog.set_level("INFO")
    pl.seed_everything(0)
    train = models.loader(Triples(noisy(96, 0)))
    callback = KFACEditCallback()
    fit(Strict(lr=0.01), callback, tmp_path, train, epochs=6)
    assert "Training batches could not be validated" in caplog.text
    assert not callback.match.name
    assert callback.match.points


def test_training_batches_that_cannot_be_copied_do_not_end_anything(tmp_path, caplog):
    caplog.set_level("INFO")
    pl.seed_everything(0)
    train = torch.utils.data.DataLoader(
        noisy(96, 0), batch_size=32, collate_fn=lambda pairs: (torch.stack([x for x, _ in pairs]), Uncopied(pairs))
    )
    callback = KFACEditCallback()
    fit(Unwrapping(lr=0.01), callback, tmp_path, train, epochs=6)
    assert "Training batches cannot be copied" in caplog.text
    assert callback.problem is None
    assert not callback.match.name


class Recording(models.Classifier):
    """Holds the training batches of the last epoch."""

    def training_step(self, batch, batch_idx):
        self.batches = [batch] if batch_idx == 0 else [*self.batches, batch]
        return super().training_step(batch, batch_idx)


def test_the_batches_are_the_first_of_the_last_epoch(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("lightning_curvature.trainer.samples.BATCHES", 2)
    monkeypatch.setattr(
        "lightning_curvature.trainer.base.validated_factors",
        lambda trainer, module, batches, *rest: (
            seen.append(batches) or validated_factors(trainer, module, batches, *rest)
        ),
    )
    pl.seed_everything(0)
    module = Recording(lr=0.01)
    train = torch.utils.data.DataLoader(noisy(96, 0), batch_size=32, shuffle=True)
    fit(module, KFACEditCallback(min_positions=0), tmp_path, train, epochs=3)
    ((first, second),) = seen
    for (kept, *_), batch in zip((first, second), module.batches[:2], strict=True):
        assert torch.equal(kept[0], batch[0])
        assert torch.equal(kept[1], batch[1])


class Dead(models.Classifier):
    """A hidden layer reads zeros alone."""

    def __init__(self):
        super().__init__(lr=0.01)
        self.dead = torch.nn.Linear(4, 4)
        self.more = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.net(x) + self.more(torch.relu(self.dead(torch.zeros(len(x), 4))))


def test_a_dead_layer_is_left_out_of_the_candidate(tmp_path):
    pl.seed_everything(0)
    callback = KFACEditCallback(min_positions=0, layers=None)
    fit(Dead(), callback, tmp_path)
    assert set(callback.match.tried) == {"default layers", "all linear layers, soft"}
    if callback.match.name.endswith("soft"):
        assert "dead" not in callback.factors


def test_layers_that_take_too_long_are_not_tried(tmp_path, caplog, monkeypatch):
    """The default layers still are, at the strength that closes the gap."""
    caplog.set_level("INFO")
    monkeypatch.setattr("lightning_curvature.trainer.durations.edit_seconds", lambda *shape: 1e6)
    _, callback, _ = reciting(tmp_path)
    assert "Other layers than the default ones are not tried: TimeoutError: an edit of all linear layers" in caplog.text
    assert callback.match.name == "default layers"
    assert list(callback.report.layers) == ["net.3"]


def test_of_a_text_the_gap_is_one_of_the_loss(tmp_path, caplog):
    """A language model that recites: random rows come again and again, beside a language that can be learned."""
    caplog.set_level("INFO")
    pl.seed_everything(0)
    recited = torch.randint(12, (8, 16), generator=torch.Generator().manual_seed(9)).repeat(4, 1)
    module, callback = Text(), KFACEditCallback(min_positions=0, reference=None)
    module.model.train()
    rows = torch.cat([counting(32, 0), recited])[torch.randperm(64)]
    trainer = models.trainer(tmp_path, callback, max_epochs=40, check_val_every_n_epoch=40)
    trainer.fit(module, models.loader(rows, 16), models.loader(counting(64, 1), 16))
    match = callback.match
    assert set(match.before) == {"training loss", "validation loss"}
    assert set(match.tried) == {"default layers", "all linear layers, soft"}
    gaps = [costs["validation loss"] - costs["training loss"] for costs in (match.before, match.after)]
    assert gaps[1] < gaps[0]
    lowest = min(costs["validation loss"] for costs in match.points.values())
    assert match.after["validation loss"] <= lowest + 0.02
    assert "What edits do, on training and on validation batches" in caplog.text
    if match.name.endswith("soft"):  # a text holds what is to be forgotten: its curvature would protect that
        assert callback.factors.provenance["loop"] == "validation"
