"""Where updates are edited, factors come from the validation batches that measure the price."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curvature import CurvatureEditor, KFACEditCallback
from lightning_curvature.collect.passes import collect
from tests.support import cells, models, processes
from tests.trainer.test_price import Text, counting


def fit(callback, tmp_path, module=None, validated=64, step=1, **options):
    pl.seed_everything(0)
    module = module or Text()
    start = {name: weight.clone() for name, weight in module.state_dict().items()}
    trainer = models.trainer(tmp_path, callback, max_epochs=2, **options)
    loaders = [models.loader(counting(validated, 1, step))] if validated else []
    trainer.fit(module, models.loader(counting(64, 3, 5)), *loaders)
    return module, start, trainer


def test_an_update_is_edited_with_factors_of_the_validation(tmp_path):
    """It is validated on text like that which it is trained on, so that a part of its update stays."""
    module, start, trainer = fit(callback := KFACEditCallback(reference="start"), tmp_path, step=5)
    assert 0.1 < callback.report.update_kept < 0.9 * callback.match.scale
    expected = collect(
        module, torch.split(counting(64, 1, 5), 32), lambda b: module.model(input_ids=b, labels=b).loss, layers="linear"
    )
    assert set(callback.factors) == set(expected)
    assert callback.factors.provenance["loop"] == "validation"
    for name, factors in callback.factors.items():
        torch.testing.assert_close(factors.A, expected[name].A)
        torch.testing.assert_close(factors.G, expected[name].G, rtol=0.5, atol=1e-4)  # of other random signs
        assert factors.num_inputs == expected[name].num_inputs
    copy = torch.load(trainer.checkpoint_callback.best_model_path.replace(".ckpt", "-edited.ckpt"))["state_dict"]
    editor = CurvatureEditor(budget=callback.match.budget, soft=True).based_on(start, callback.match.scale)
    edited, _ = editor.edit_state_dict(module.state_dict(), callback.factors)
    assert all(torch.equal(copy[name], tensor) for name, tensor in edited.items())


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_weights_are_edited_with_those_of_training_steps(tmp_path):
    fit(callback := KFACEditCallback(reference=None, layers="mlp"), tmp_path)
    assert "loop" not in callback.factors.provenance
    fit(callback := KFACEditCallback(reference="start", loop="train"), tmp_path)
    assert "loop" not in callback.factors.provenance
    fit(callback := KFACEditCallback(reference="start", budget=1e-3), tmp_path)
    assert "loop" not in callback.factors.provenance
    fit(callback := KFACEditCallback(reference="start"), tmp_path, validated=0)
    assert "loop" not in callback.factors.provenance


def test_a_validation_of_too_few_positions_gives_none(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(callback := KFACEditCallback(reference="start"), tmp_path, validated=1)
    assert "loop" not in callback.factors.provenance
    assert callback.match is not None
    assert "validation batches gave none. ValueError: Layer" in caplog.text


def test_a_step_without_a_gradient_gives_none(tmp_path, caplog):
    class Silent(Text):
        @torch.no_grad()
        def validation_step(self, batch, batch_idx):
            return super().validation_step(batch, batch_idx)

    with caplog.at_level("INFO"):
        fit(callback := KFACEditCallback(reference="start"), tmp_path, Silent())
    assert "validation batches gave none" in caplog.text
    assert callback.match.budget > 0


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("loop", ["auto", "validation"])
def test_another_fit_begins_without_them(loop, tmp_path):
    callback = KFACEditCallback(reference="start", loop=loop)
    fit(callback, tmp_path)
    first = callback.factors
    fit(callback, tmp_path)
    assert callback.factors is not first
    assert callback.factors.provenance["loop"] == "validation"


class Expert(cells.Net):
    """One of its layers runs in the validation of the first process alone."""

    def __init__(self, parallel=()):
        super().__init__(parallel)
        self.expert = nn.Linear(4, 4)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.expert(self.net(batch[0])), batch[1])

    def validation_step(self, batch, batch_idx):
        out = self.net(batch[0])
        return F.cross_entropy(self.expert(out) if self.global_rank == 0 else out, batch[1])


def together(strategy, folder, kind=cells.Net, layers=cells.LAYERS):
    size, make, _ = cells.STRATEGIES[strategy]
    pl.seed_everything(0)
    callback = KFACEditCallback(layers, fisher="exact", reference="start")
    callback.editor.min_positions = 0  # the first layer has more inputs than there are images
    trainer = models.trainer(
        folder, callback, devices=size, strategy=make(), max_epochs=1, use_distributed_sampler=False
    )
    trainer.fit(kind())
    assert callback.problem is None
    return {name: (layer.A, layer.G, layer.num_inputs) for name, layer in callback.factors.items()}, callback.match


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_processes_collect_them_together(tmp_path):
    alone, match = together("one process", tmp_path / "one")
    for factors, its_match in processes.run(2, together, "DDP, 2 processes", tmp_path / "two"):
        for name, (A, G, count) in factors.items():
            torch.testing.assert_close(A, alone[name][0], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(G, alone[name][1], rtol=1e-3, atol=1e-5)
            assert count == alone[name][2] == 48
        assert its_match.scale == match.scale
        assert its_match.before == pytest.approx(match.before, abs=0.3)  # halves of other batches


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_layer_that_only_some_processes_validate_is_collected_there(tmp_path):
    first, second = processes.run(2, together, "DDP, 2 processes", tmp_path, Expert, ["net.3", "expert"])
    for factors, match in (first, second):
        assert {name: count for name, (_, _, count) in factors.items()} == {"net.3": 48, "expert": 24}
        assert match.budget == first[1].budget


def test_a_layer_named_like_a_preset_is_that_layer(tmp_path):
    class Named(models.Classifier):
        def __init__(self):
            super().__init__("mlp")
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(super().forward(x))

    callback = KFACEditCallback(layers="lin*r", reference="start")
    pl.seed_everything(0)
    trainer = models.trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(Named(), models.loader(models.images(64)), models.loader(models.images(64, 1)))
    assert callback.factors.provenance["loop"] == "validation"
    assert list(callback.factors) == list(callback.report.layers) == ["linear"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_goes_on_that_collected_from_training_steps_by_name(tmp_path):
    """During a fit both collect the same."""
    _, _, trainer = fit(KFACEditCallback(reference="start", loop="train"), tmp_path)
    path = trainer.checkpoint_callback.best_model_path
    again = models.trainer(tmp_path, callback := KFACEditCallback(reference="start"), max_epochs=3)
    loaders = [models.loader(counting(64, 3, 5)), models.loader(counting(64, 1))]
    again.fit(Text(), *loaders, ckpt_path=path)  # a warning would say that it starts anew
    assert callback.factors.provenance["loop"] == "validation"
