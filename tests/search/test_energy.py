"""Edits by what they may cost: the search, the callback's target, and the interval on other text."""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_curvature import CurvatureEditor, KFACEditCallback
from lightning_curvature.checkpoints.facts import ENTRY
from lightning_curvature.search.energy import NARROW, Match, match_energy
from lightning_curvature.trainer.target import Limit, Target
from tests.support import models


class Curve:
    """Looks like an editor; the module's metric is a function of its energy."""

    def __init__(self, function):
        self.function, self.energy, self.calls = function, 1.0, 0

    def at(self, energy):
        self.next = energy
        return self

    def applied(self, module, factors):
        return self

    def __enter__(self):
        self.energy = self.next

    def __exit__(self, *error):
        self.energy = 1.0

    def __call__(self):
        self.calls += 1
        return 50.0 * self.function(self.energy)


def search(function, limit, **options):
    curve = Curve(function)
    return match_energy(curve, None, None, curve, limit, **options), curve


@pytest.mark.parametrize("limit", [1.02, 1.05, 1.1, 1.2])
@pytest.mark.parametrize(
    ("function", "most"),
    [
        (lambda e: 1 + 2 * (1 - e), 12),
        (lambda e: 2.718 ** (30 * (1 - e) ** 2), 6),
        (lambda e: 2.718 ** ((1 - e) ** 4 * 40) if e > 0.2 else float("nan"), 8),
        (lambda e: 1.0 + 3.0 * (1 - e) ** 0.5, 22),
    ],
)
def test_the_limit_is_met_from_the_allowed_side(function, most, limit):
    match, curve = search(function, limit)
    assert limit / 1.001 <= match.value <= limit
    assert function(match.energy) == pytest.approx(match.value)
    assert curve.calls <= most + 2  # two more measure the unedited module
    assert match.points[match.energy] == match.value
    assert not match.violations()


def test_a_metric_with_steps_and_a_benefit():
    steps = lambda e: 1 - round(20 * (1 - e) ** 2) / 40  # noqa: E731
    match, _ = search(steps, 0.88, higher_is_better=True)
    assert match.value >= 0.88 > steps(match.energy - 2 * NARROW)


def test_nothing_may_be_lost_where_edits_help():
    """A limit of 1 is not the unedited model: the strongest edit that costs nothing is."""
    match, _ = search(lambda e: 1.0 if e == 1.0 else 1.05 if e > 0.6 else 0.9, 1.0, higher_is_better=True)
    assert match.energy == pytest.approx(0.6, abs=1e-3)


@pytest.mark.filterwarnings("ignore:The metric is not monotone")
@pytest.mark.parametrize("top", [0.88, 0.78, 0.68, 0.58, 0.48, 0.28])
@pytest.mark.parametrize("below", [1.0, 0.99])
def test_a_cost_that_falls_again_is_not_jumped_over(top, below):
    """A hump of the cost between energies that cost nothing: none of those below it is chosen."""
    hump = lambda e: 1.5 if top - 0.1 <= e <= top + 0.03 else 1.0 if e > top else below  # noqa: E731
    match, curve = search(hump, 1.1)
    assert top + 0.03 < match.energy < top + 0.031
    assert match.value == 1.0
    assert curve.calls < 40


def test_a_spectrum_with_one_giant():
    """Energies close to 1 matter where one direction holds almost all of the mass."""
    match, curve = search(lambda e: 1 + 3e3 * (1 - e) ** 0.5 if e > 0 else float("nan"), 1.1)
    assert 1.099 <= match.value <= 1.1
    assert 1 - match.energy == pytest.approx(1.1e-9, rel=0.2)
    assert curve.calls <= 32


def test_points_of_an_earlier_search_are_used():
    function = lambda e: 1 + 2 * (1 - e)  # noqa: E731
    first, _ = search(function, 1.1)
    again, curve = search(function, 1.1, points=first.points)
    assert again == first
    assert curve.calls == 1
    milder, _ = search(function, 1.05, points=first.points)
    assert milder.energy > first.energy


def test_what_cannot_be_met_is_said():
    with pytest.warns(UserWarning, match=r"No edit stays within 1\.1 times the metric: .* at the energy 0\.85"):
        match, _ = search(lambda e: 1.0 if e == 1.0 else 2.0, 1.1)
    assert (match.energy, match.value) == (1.0, 1.0)
    with pytest.warns(UserWarning, match=r"not monotone.*: 0\.6\d* is beyond the limit, and .* of 0\.3 is not"):
        nearest, _ = search(lambda e: 1.0 + 2 * (1 - e), 1.7, points={0.3: 1.2, 0.6: 1.8})
    assert nearest.violations() == [(0.3, 0.6)]
    assert 0.65 <= nearest.energy < 0.651
    assert Match(1.0, 1.0, {0.5: 0.8, 0.9: 0.9, 1.0: 1.0}).violations() == []  # an edit that helps costs nothing
    assert Match(1.0, 1.0, {0.5: 0.9, 0.9: 0.8, 1.0: 1.0}).violations(higher_is_better=True) == [(0.5, 0.9)]
    # A step that costs too much by itself is not searched for.
    with pytest.warns(
        UserWarning, match=r"No edit stays within 1\.1 times the metric: 1\.5 times the metric at the energy 1"
    ):
        nearest, curve = search(lambda e: 1.5, 1.1, before=50.0)
    assert (nearest.energy, nearest.value, curve.calls) == (1.0, 1.5, 1)
    # A metric that hardly depends on the edit is not a licence to remove everything without a word.
    with pytest.warns(
        UserWarning, match=r"Every edit that was tried stays within 1\.1 times .* It hardly depends on these layers"
    ):
        nearest, curve = search(lambda e: 1.01, 1.1)
    assert nearest.energy <= 0.05
    with pytest.raises(ValueError, match="A limit is a positive multiple"):
        search(lambda e: 1.0, -1.0)
    with pytest.raises(ValueError, match=r"unedited module must be a positive number, found 0\.0"):
        search(lambda e: 0.0, 1.1)


def test_an_editor_at_another_energy_is_that_editor():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 5))
    from lightning_curvature import KroneckerFactors
    from tests.editing.test_scores import random_factors

    factors = KroneckerFactors({"0": random_factors()})
    for score in ("kfac", "saliency"):
        for soft in (False, True):
            editor = CurvatureEditor(score=score, soft=soft).at(1.0)  # it and those made from it share
            for energy in (0.5, 0.8):
                expected = CurvatureEditor(energy, score=score, soft=soft).edited_weights(module, factors)
                weights = editor.at(energy).edited_weights(module, factors)
                assert torch.equal(weights[0]["0"], expected[0]["0"])
                assert weights[1] == expected[1]
            with torch.no_grad():
                module[0].weight += 1  # the coefficients of other weights are not those
            expected = CurvatureEditor(0.5, score=score, soft=soft).edited_weights(module, factors)[0]["0"]
            assert torch.equal(editor.at(0.5).edited_weights(module, factors)[0]["0"], expected)
    assert editor.energy == 1.0
    with pytest.raises(ValueError, match="energy must be in"):
        editor.at(0.0)


# In the callback ------------------------------------------------------------------------------------------------------


class Probed(models.Classifier):
    def probe_dataloader(self):
        return {"val": models.loader(models.images(256, 1)), "other": models.loader(models.images(64, 2))}


@pytest.mark.filterwarnings("ignore:The metric is not monotone")
def test_the_callback_edits_by_what_it_may_cost(tmp_path):
    pl.seed_everything(0)
    callback = KFACEditCallback(target={"val/accuracy": 0.9}, score="activations")
    early = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")
    late = ModelCheckpoint(dirpath=tmp_path / "late", filename="last")
    trainer = models.trainer(tmp_path, callback, early, late, max_epochs=3, limit_train_batches=4)
    module = Probed(lr=0.003)
    with pytest.warns(UserWarning, match=r"it was saved before the energy for target val/accuracy x 0\.9 was"):
        trainer.fit(module, models.loader(models.images(128)), models.loader(models.images(64, 3)))
    assert callback.match.value >= 0.9
    before, after = (callback.probe_results[f"curvature/val/accuracy/{when}"] for when in ("before", "after"))
    assert after / before == pytest.approx(callback.match.value)
    assert callback.report.method == "activations"
    assert {edit.energy for edit in callback.report.layers.values()} == {callback.match.energy} != {0.85}
    saved = torch.load(tmp_path / "late" / "last-edited.ckpt", weights_only=True)[ENTRY]["layers"]
    assert {layer["energy"] for layer in saved.values()} == {callback.match.energy}
    assert not list(tmp_path.rglob("step=1-edited.ckpt"))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:The metric is not monotone")
def test_a_target_without_validation_in_a_second_fit_and_after_a_resume(tmp_path):
    loader = models.loader(models.images(128))
    callback = KFACEditCallback(layers="mlp", target={"val/accuracy": 0.98})
    saver = ModelCheckpoint(dirpath=tmp_path / "a", filename="last")
    models.trainer(tmp_path, callback, saver, max_epochs=2).fit(Probed(lr=0.003), loader)
    energy = callback.match.energy
    saved = torch.load(tmp_path / "a" / "last-edited.ckpt", weights_only=True)[ENTRY]["layers"]
    assert {layer["energy"] for layer in saved.values()} == {energy}
    # Another fit of the same callback starts without the energy of the first.
    early = ModelCheckpoint(dirpath=tmp_path / "b", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.warns(UserWarning, match=r"it was saved before the energy"):
        models.trainer(tmp_path, callback, early, max_epochs=1, limit_train_batches=2).fit(Probed(), loader)
    assert not list((tmp_path / "b").glob("step=1-edited.ckpt"))
    # A resumed run has it until it searches again.
    again = KFACEditCallback(layers="mlp", target={"val/accuracy": 0.98})
    late = ModelCheckpoint(dirpath=tmp_path / "c", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = models.trainer(tmp_path, again, late, max_epochs=3)
    trainer.fit(Probed(lr=0.003), loader, ckpt_path=tmp_path / "a" / "last.ckpt", weights_only=True)
    first = min((tmp_path / "c").glob("*-edited.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    layers = torch.load(first, weights_only=True)[ENTRY]["layers"]
    assert {layer["energy"] for layer in layers.values()} == {energy}


def test_a_metric_that_is_zero_does_not_stop_a_run(tmp_path):
    class Wrong(models.Classifier):
        def probe_dataloader(self):
            images, labels = models.images(64, 1).tensors
            return {"val": [(images, labels + 100)]}

    callback = KFACEditCallback(target={"val/accuracy": 0.9})
    loader = models.loader(models.images(64))
    with pytest.warns(UserWarning, match=r"val/accuracy of the unedited model is 0\.0, there is nothing to keep yet"):
        models.trainer(tmp_path, callback, enable_checkpointing=False).fit(Wrong(), loader)
    assert callback.report is None
    assert callback.probe_results == {}


def test_the_callback_can_collect_for_another_score(tmp_path):
    callback = KFACEditCallback(score="coupled", soft=True)
    models.trainer(tmp_path, callback, enable_checkpointing=False).fit(
        models.Classifier(), models.loader(models.images(64)), models.loader(models.images(64, 1))
    )
    assert callback.report.method == "coupled, soft"
    assert all(layer.A_coupled is not None for layer in callback.factors.values())
    with pytest.raises(ValueError, match="score='ekfac' needs a second pass"):
        KFACEditCallback(score="ekfac")


def test_targets_that_mean_nothing(tmp_path):
    for entry, error, message in [
        (1.1, TypeError, "must be a dict such as"),
        ({}, TypeError, "must be a dict such as"),
        ({"val/loss": 1.1}, ValueError, r"The metric of target 'val/loss' must be one of \['perplexity'"),
        ({"val/perplexity": "much"}, TypeError, "must be a number"),
        ({"val/perplexity": 0.9}, ValueError, "must be above 1"),
        ({"val/accuracy": 1.1}, ValueError, "must be at most 1"),
    ]:
        with pytest.raises(error, match=message):
            KFACEditCallback(target=entry)
    assert str(Target({"val/perplexity": 1.1})) == "target val/perplexity x 1.1"
    loaders = models.loader(models.images(64)), models.loader(models.images(64, 1))
    trainer = models.trainer(tmp_path, KFACEditCallback(target={"val/accuracy": 0.9}), enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"there is no probe 'val'\. Give a file, probes=\{'val': \.\.\.\}"):
        trainer.fit(models.Classifier(), *loaders)
    trainer = models.trainer(tmp_path, KFACEditCallback(target={"vall/accuracy": 0.9}), enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"no probe measures vall/accuracy\. .*measured: nothing"):
        trainer.fit(Probed(), *loaders)
    trainer = models.trainer(tmp_path, KFACEditCallback(target={"val/recall": 0.9}), enable_checkpointing=False)
    with pytest.raises(ValueError, match="measured: 'val/accuracy'"):
        trainer.fit(Probed(), *loaders)


class TwoProbes(Probed):
    """Has a probe of other images, too, whose accuracy falls sooner or later than that of the first one."""

    def probe_dataloader(self):
        return {**super().probe_dataloader(), "other": models.loader(models.images(96, 5))}


@pytest.mark.filterwarnings("ignore:The metric is not monotone")
def test_of_several_limits_none_is_exceeded(tmp_path, caplog):
    energies = {}
    for entry in ({"val/accuracy": 0.9}, {"other/accuracy": 0.8}, {"val/accuracy": 0.9, "other/accuracy": 0.8}):
        pl.seed_everything(0)
        callback = KFACEditCallback(layers="mlp", target=entry)
        trainer = models.trainer(tmp_path, callback, enable_checkpointing=False, max_epochs=2)
        trainer.fit(TwoProbes(lr=0.003), models.loader(models.images(256)))
        energies[tuple(entry)] = callback.match.energy
        results = callback.probe_results
        for name, multiple in entry.items():
            before, after = (results[f"curvature/{name}/{when}"] for when in ("before", "after"))
            assert after >= multiple * before
    assert max(energies.values()) < 1.0
    assert "of what the dearest of them allows" in caplog.text


def test_what_is_used_of_a_limit():
    assert Limit("val/accuracy", 0.81).used(0.9) == pytest.approx(0.5)
    assert Limit("val/accuracy", 1.0).used(1.0) == 0.0
    assert Limit("val/accuracy", 1.0).used(0.99) == math.inf
    assert Limit("val/perplexity", 1.1).used(math.nan) == math.inf
    target = Target({"a/perplexity": 1.1, "b/accuracy": 0.5})
    before = {"a/perplexity": 10.0, "b/accuracy": 0.8}
    assert target.spent({"a/perplexity": 11.0, "b/accuracy": 0.8}, before) == pytest.approx(target.most)
    assert target.spent({"a/perplexity": 10.0, "b/accuracy": 0.4}, before) == pytest.approx(target.most)
    assert target.spent({"a/perplexity": math.inf, "b/accuracy": 0.8}, before) > 1e300
    assert str(target) == "target a/perplexity x 1.1, b/accuracy x 0.5"


def test_a_warning_speaks_of_several_limits(tmp_path):
    """Of limits that nothing exceeds it says what share of them is used."""
    target = {"val/accuracy": 1e-3, "other/accuracy": 1e-3}
    trainer = models.trainer(tmp_path, KFACEditCallback(target=target), enable_checkpointing=False)
    pl.seed_everything(0)
    with pytest.warns(UserWarning, match=r"stays within 100% of what the dearest of them allows: .* makes it \d+% of"):
        trainer.fit(TwoProbes(lr=0.003), models.loader(models.images(256)))
