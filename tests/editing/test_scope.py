"""Scores are compared within each layer, or over all layers of the model; for energies and for budgets."""

import pytest
import torch

from lightning_curvature import CurvatureEditor, KFACEditCallback
from lightning_curvature.editing.bulk import BulkStepEditor
from lightning_curvature.editing.scores import SCORES, score_coefficients
from lightning_curvature.search.sweep import sweep
from tests.editing.test_budget import SIDES, made

BOTH = pytest.mark.parametrize("soft", [False, True])


def shares_of(net, factors, editor):
    """Scores, and the share of each coefficient that an editor keeps, by layer."""
    new = editor.edited_weights(net, factors)[0]
    pairs = {}
    for name, weight in new.items():
        basis = factors[name].basis
        C, after = (basis.U_G.T @ w.detach() @ basis.U_A for w in (net[int(name)].weight, weight))
        pairs[name] = score_coefficients(editor.score, C, factors[name]), after / C
    return pairs


@pytest.mark.parametrize("score", SCORES)
@BOTH
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_an_energy_of_the_model_is_a_share_of_all_scores(score, soft, energy):
    net, factors = made()
    editor = CurvatureEditor(energy, score=score, soft=soft, scope="model")
    pairs = shares_of(net, factors, editor)
    total = sum(float(scores.sum()) for scores, _ in pairs.values())
    kept = sum(float((scores * shares).sum()) for scores, shares in pairs.values())
    if soft:
        assert kept / total == pytest.approx(energy, abs=0.01)
        ratios = torch.cat([(scores / shares - scores).flatten() for scores, shares in pairs.values()])
        assert torch.allclose(ratios, ratios.median(), rtol=1e-4)  # one t
    else:
        assert kept / total >= energy - 1e-9
        is_kept = torch.cat([shares.flatten() > 0.5 for _, shares in pairs.values()])
        scores = torch.cat([scores.flatten() for scores, _ in pairs.values()])
        assert all(score < scores[is_kept].min() for score in scores[~is_kept])  # one threshold
        # No more than the threshold's bin could be dropped, too.
        spare = scores[is_kept].sort().values
        assert kept - float(spare[spare < 1.025 * spare[0]].sum()) < energy * total


@pytest.mark.parametrize("score", SCORES)
@BOTH
def test_a_budget_within_each_layer_is_one_energy(score, soft):
    net, factors = made()
    everything = CurvatureEditor(budget=1e9, score=score, soft=soft).edited_weights(net, factors)[1].predicted_loss
    for share in (0.03, 0.3):
        editor = CurvatureEditor(budget=share * everything, score=score, soft=soft, scope="layer")
        new, report = editor.edited_weights(net, factors)
        (energy,) = {edit.energy for edit in report.layers.values()}
        assert 0.0 < energy < 1.0
        expected = CurvatureEditor(energy, score=score, soft=soft).edited_weights(net, factors)[0]
        assert all(torch.equal(new[name], weight) for name, weight in expected.items())
        assert report.predicted_loss <= 1.03 * share * everything
        if soft:
            assert report.predicted_loss == pytest.approx(share * everything, rel=0.03)


@BOTH
def test_a_budget_that_pays_for_nothing_changes_nothing_within_each_layer(soft):
    net, factors = made()
    new, report = CurvatureEditor(budget=1e-30, soft=soft, scope="layer").edited_weights(net, factors)
    assert all(torch.allclose(weight, net[int(name)].weight, rtol=1e-9) for name, weight in new.items())
    assert report.predicted_loss <= 1e-20


@BOTH
@pytest.mark.parametrize(("scope", "given"), [("layer", {"energy": 0.7}), ("model", {"budget": 0.5})])
def test_the_scope_that_nobody_names(soft, scope, given):
    net, factors = made()
    named = CurvatureEditor(**given, soft=soft, scope=scope).edited_weights(net, factors)[0]
    silent = CurvatureEditor(**given, soft=soft).edited_weights(net, factors)[0]
    assert all(torch.equal(named[name], weight) for name, weight in silent.items())


def test_all_of_the_energy_changes_nothing():
    net, factors = made()
    new, report = CurvatureEditor(1.0, scope="model").edited_weights(net, factors)
    assert all(torch.equal(weight, net[int(name)].weight) for name, weight in new.items())
    assert report.predicted_loss == 0.0


def test_a_sweep_compares_scopes():
    net, factors = made()
    editors = {scope: CurvatureEditor(scope=scope, soft=True) for scope in ("layer", "model")}
    rows = sweep(net, factors, lambda: {"size": float(net[0].weight.detach().norm())}, editors, [0.9, 1.0])
    sizes = {(row["edit"], row["energy"]): row["size"] for row in rows}
    for scope in editors:
        with CurvatureEditor(0.9, soft=True, scope=scope).applied(net, factors):
            assert sizes[scope, 0.9] == pytest.approx(float(net[0].weight.detach().norm()))
        assert sizes[scope, 1.0] == sizes["unedited", 1.0]
    assert sizes["layer", 0.9] > 1.1 * sizes["model", 0.9]  # the scores of the first layer are small


def test_a_file_says_its_scope():
    factors = made()[1]
    assert CurvatureEditor(0.9, scope="model").facts(factors, "x")["scope"] == "model"
    assert "scope" not in CurvatureEditor(0.9).facts(factors, "x")


def test_wrong_scopes():
    with pytest.raises(ValueError, match="scope must be one of"):
        CurvatureEditor(scope="network")
    with pytest.raises(ValueError, match="one energy for all layers, and no dict"):
        CurvatureEditor({"0": 0.9}, scope="model")
    with pytest.raises(ValueError, match="one energy for all layers, and no dict"):
        CurvatureEditor(0.9, scope="model").at({"0": 0.9})
    with pytest.raises(ValueError, match="one energy for all layers, and no dict"):
        KFACEditCallback(energy={"0": 0.9}, scope="model")
    assert BulkStepEditor().scope is None


def test_the_callback_hands_it_on():
    assert KFACEditCallback(energy=0.9, scope="model").editor.scope == "model"
    assert SIDES.keys() == made()[1].keys()
