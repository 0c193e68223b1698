"""Scores, the soft edit and the coupled moments, against slow references."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.sums import LayerSums
from lightning_curvature.editing.scores import SCORES, score_coefficients
from lightning_curvature.factors.basis import coefficients, select_largest, shrink
from lightning_curvature.recording.options import CollectorOptions
from tests.support import models
from tests.support.by_example import collected, network
from tests.support.factors import random_factors


def test_coupled_moments_and_the_sums_of_their_score():
    factors, (a, g) = collected(network())
    layer = factors["0"]
    A = sum(g_n @ g_n * torch.outer(a_n, a_n) for a_n, g_n in zip(a, g, strict=True)) / len(a)
    G = sum(a_n @ a_n * torch.outer(g_n, g_n) for a_n, g_n in zip(a, g, strict=True)) / len(a)
    torch.testing.assert_close(layer.A_coupled, A)
    torch.testing.assert_close(layer.G_coupled, G)
    score = score_coefficients("coupled", torch.zeros(5, 6, dtype=torch.float64), layer)
    torch.testing.assert_close(score.sum(0), layer.eigenvalues.sum(0))
    torch.testing.assert_close(score.sum(1), layer.eigenvalues.sum(1))


def test_saliency_is_what_the_quadratic_model_loses():
    """Dropping one coefficient changes vec(W)^T (G x A) vec(W) by its score."""
    factors, _ = collected(network())
    layer, weight = factors["0"], network()[0].weight.detach()
    C = coefficients(weight, layer.basis)
    score = score_coefficients("saliency", C, layer)
    fisher = torch.kron(layer.G, layer.A)
    for i, j in ((0, 0), (2, 3), (4, 5)):
        part = (C[i, j] * torch.outer(layer.basis.U_G[:, i], layer.basis.U_A[:, j])).flatten()
        torch.testing.assert_close(part @ fisher @ part, score[i, j], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_every_score_edits_by_its_own_mask(score, soft):
    layer, energy = random_factors(), 0.7
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)).double()
    U_G, lam, U_A, mu = layer.basis
    C = U_G.T @ weight @ U_A
    scores = {
        "kfac": torch.outer(lam, mu),
        "ekfac": layer.eigenvalues,
        "coupled": torch.outer(((U_G.T @ layer.G_coupled @ U_G).diag()), (U_A.T @ layer.A_coupled @ U_A).diag()),
        "saliency": torch.outer(lam, mu) * C**2,
        "activations": mu.expand(5, -1),
    }[score]
    if soft:
        low, high = 0.0, 1e6
        for _ in range(200):
            middle = (low + high) / 2
            share = (scores * scores / (scores + middle)).sum() / scores.sum()
            low, high = (middle, high) if share > energy else (low, middle)
        keep = scores / (scores + high)
    else:
        keep, mass, last = torch.zeros_like(C), 0.0, -1.0
        for index in scores.flatten().argsort(descending=True).tolist():
            tied = abs(float(scores.flatten()[index]) - last) < 1e-12
            if mass >= energy * float(scores.sum()) and not tied:
                break
            last = float(scores.flatten()[index])
            keep.view(-1)[index] = 1.0
            mass += last
    editor = CurvatureEditor(energy, score=score, soft=soft)
    result = editor.project(weight, layer, energy)
    torch.testing.assert_close(result.weight, U_G @ (C * keep) @ U_A.T, rtol=1e-6, atol=1e-9)
    assert result.energy_kept == pytest.approx(float((scores * keep).sum() / scores.sum()), abs=1e-6)
    assert editor.method == (f"{score}, soft" if soft else score)


def test_selections_keep_ties_and_drop_zeros():
    keep, reached = select_largest(torch.tensor([[2.0, 2.0], [1.0, 0.0]]), 0.3)
    assert keep.tolist() == [[True, True], [False, False]]
    assert reached == pytest.approx(0.8)
    assert select_largest(torch.tensor([[2.0, 0.0]]), 0.9999)[0].tolist() == [[True, False]]
    for function in (select_largest, shrink):
        for bad in (torch.zeros(2, 2), torch.tensor([[1.0, float("nan")]])):
            with pytest.raises(ValueError, match="zero or not finite"):
                function(bad, 0.5)


def test_scores_say_what_they_miss(tmp_path):
    layer = dataclasses.replace(random_factors(), eigenvalues=None, A_coupled=None)
    factors = KroneckerFactors({"0": layer})
    module = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(ValueError, match=r"Layer '0': score='ekfac' needs corrected eigenvalues"):
        CurvatureEditor(score="ekfac").edit(module, factors)
    with pytest.raises(ValueError, match=r"Layer '0': score='coupled' needs norm-weighted moments.*coupled=True"):
        CurvatureEditor(score="coupled").edit(module, factors)
    with pytest.raises(ValueError, match="score must be one of"):
        CurvatureEditor(score="fisher")
    with pytest.raises(ValueError, match=r"eigenvalues must have the shape \[5, 6\], found \[6, 5\]"):
        dataclasses.replace(layer, eigenvalues=torch.ones(6, 5))
    whole = KroneckerFactors({"0": random_factors()})
    whole.save(tmp_path / "f.safetensors")
    loaded = KroneckerFactors.load(tmp_path / "f.safetensors")
    assert loaded.digest() == whole.digest() != factors.digest()
    merged = whole.merge(KroneckerFactors({"0": random_factors(1)}))["0"]
    assert merged.eigenvalues is None
    torch.testing.assert_close(merged.A_coupled, (random_factors().A_coupled + random_factors(1).A_coupled) / 2)


def test_coupled_sums_survive_an_interruption():

    images, labels = models.images(32).tensors
    torch.manual_seed(0)
    net = models.mlp()
    collector = Collector(net, CollectorOptions(coupled=True))
    recording = collector.step()
    recording.open()
    recording.backward(F.cross_entropy(net(images), labels))
    recording.close()
    (sums,) = collector.sums.values()
    again = LayerSums.from_state_dict(sums.state_dict()).factors()
    assert all(torch.equal(value, again.tensors[key]) for key, value in sums.factors().tensors.items())
    assert set(again.tensors) == {"A", "G", "A_coupled", "G_coupled"}
