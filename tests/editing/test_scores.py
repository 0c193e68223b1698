"""Scores, the soft edit, EK-FAC's eigenvalues and the coupled moments, against slow references."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.eigenvalues import _EigenvalueCollector, correct_eigenvalues
from lightning_curvature.collect.passes import collect
from lightning_curvature.collect.sums import LayerSums
from lightning_curvature.distributed import Ranks
from lightning_curvature.editing.scores import SCORES, score_coefficients
from lightning_curvature.factors.basis import coefficients, select_largest, shrink
from tests import reference
from tests.support import models, processes


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def data(n=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, dtype=torch.float64, generator=generator), torch.randint(4, (n,), generator=generator)


def rows(model, layer, inputs, labels):
    """Inputs [n, d_in] and gradients [n, d_out] of the empirical Fisher, example by example."""
    a, g = [], []
    for index, x in enumerate(inputs):
        logits, layer_input, y = reference.layer_io(model, layer, x[None])
        (vector,) = reference.label_vectors(labels)(logits, index)
        a.append(layer_input[0])
        g.append(torch.autograd.grad(logits, y, vector)[0][0])
    return torch.stack(a), torch.stack(g)


def collected(model, **options):
    inputs, labels = data()
    batches = [(inputs[:5], labels[:5]), (inputs[5:], labels[5:])]
    step = lambda batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    options = {"fisher": "empirical", "positions": "all"} | options
    factors = collect(model, batches, step, layers=["0"], coupled=True, **options)
    return correct_eigenvalues(model, factors, batches, step, **options), rows(model, model[0], inputs, labels)


def test_corrected_eigenvalues_are_the_measured_ones():
    factors, (a, g) = collected(network())
    layer = factors["0"]
    expected = torch.zeros(5, 6, dtype=torch.float64)
    for i in range(5):
        for j in range(6):
            along = [
                (layer.basis.U_G[:, i] @ g_n) ** 2 * (layer.basis.U_A[:, j] @ a_n) ** 2
                for a_n, g_n in zip(a, g, strict=True)
            ]
            expected[i, j] = sum(along) / len(a)
    torch.testing.assert_close(layer.eigenvalues, expected)
    assert factors.provenance["fisher"] == "empirical"


def measured(layer, a, g):
    """By the definition: the mean over positions of the squared products along two directions."""
    along = (g.double() @ layer.basis.U_G).square().T @ (a.double() @ layer.basis.U_A).square()
    return along / len(a)


def test_eigenvalues_where_the_sums_are_spread():
    """One process is a special case of several."""
    factors, (a, g) = collected(network(), shard=True)
    torch.testing.assert_close(factors["0"].eigenvalues, measured(factors["0"], a, g))


def test_a_saved_collection_of_eigenvalues_goes_on():
    model, (inputs, labels) = network(), data()
    step = lambda batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    options = {"fisher": "empirical", "positions": "all"}
    factors = collect(model, [(inputs, labels)], step, layers=["0"], **options)
    for shard in (False, True):
        first, second, plain = (
            kind(model, *given, shard=shard, **options)
            for kind, given in ((_EigenvalueCollector, [factors]),) * 2 + ((Collector, [["0"]]),)
        )
        run_collector_once(first, (inputs[:5], labels[:5]), step)
        state = copy.deepcopy(first.state_dict())
        second.load_state_dict(state)
        run_collector_once(second, (inputs[5:], labels[5:]), step)
        a, g = rows(model, model[0], inputs, labels)
        torch.testing.assert_close(second.finish()["0"].eigenvalues, measured(factors["0"], a, g))
        with pytest.raises(ValueError, match="a collection of eigenvalues, which holds no factors"):
            plain.load_state_dict(state)
        with pytest.raises(ValueError, match="a collection of factors, which holds no eigenvalues"):
            second.load_state_dict(
                plain.state_dict() | {"sums": {"0": LayerSums.of(factors["0"]).state_dict()}, "shared": {"0": "0"}}
            )


def run_collector_once(collector, batch, step):
    collector.open(batch)
    collector.backward(step(batch))
    collector.close()


def eigenvalues_of_parts(shard):
    """Measure on another part of the data on each process; the first has two batches, the second one."""
    dist.init_process_group("gloo")
    ranks = Ranks.of_run(dist.get_rank(), 2, torch.device("cpu"))
    model, (inputs, labels) = network(), data()
    step = lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="sum")  # noqa: E731
    options = {"fisher": "empirical", "positions": "all"}
    factors = collect(model, [(inputs, labels)], step, layers=["0", "2"], **options)
    parts = [slice(0, 3), slice(3, 5)] if ranks.rank == 0 else [slice(5, None)]
    found = correct_eigenvalues(
        model, factors, [(inputs[part], labels[part]) for part in parts], step, ranks=ranks, shard=shard, **options
    )
    refusal = ""
    if shard:
        with pytest.raises(ValueError, match="these factors are spread over several") as error:
            correct_eigenvalues(model, found, [], step, ranks=ranks, shard=shard, **options)
        refusal = str(error.value)
        found = found.gathered()
    return {name: layer.eigenvalues for name, layer in found.items()}, refusal


@pytest.mark.parametrize("shard", [False, True])
def test_eigenvalues_of_several_processes_are_those_of_all_data(shard):
    (found, refusal), (others, _) = processes.run(2, eigenvalues_of_parts, shard)
    model, (inputs, labels) = network(), data()
    step = lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="sum")  # noqa: E731
    factors = collect(model, [(inputs, labels)], step, layers=["0", "2"], fisher="empirical", positions="all")
    for index, name in enumerate(("0", "2")):
        expected = measured(factors[name], *rows(model, model[2 * index], inputs, labels))
        torch.testing.assert_close(found[name], expected)
        if not shard:
            torch.testing.assert_close(others[name], expected)
    assert bool(refusal) == shard


def test_eigenvalues_of_several_draws_are_their_mean():
    exact, _ = collected(network(), fisher="exact")
    drawn, _ = collected(network(), fisher="sketched", draws=400)
    basis = exact["0"].basis
    rotated = dataclasses.replace(drawn["0"])
    same = KroneckerFactors({"0": dataclasses.replace(exact["0"], eigenvalues=None)})
    inputs, labels = data()
    model = network()
    step = lambda batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    again = correct_eigenvalues(model, same, [(inputs, labels)], step, fisher="sketched", draws=400, positions="all")
    torch.testing.assert_close(again["0"].eigenvalues, exact["0"].eigenvalues, rtol=0.2, atol=1e-4)
    assert rotated.shape == tuple(basis.U_G.shape[:1] + basis.U_A.shape[:1])


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


def random_factors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, g = torch.randn(40, 6, generator=generator).double(), torch.randn(40, 5, generator=generator).double()
    return LayerFactors(
        A=x.T @ x / 40,
        G=g.T @ g / 40,
        num_inputs=40,
        num_gradients=40,
        A_coupled=x.T @ x / 30,
        G_coupled=g.T @ g / 30,
        eigenvalues=torch.rand(5, 6, generator=generator).double(),
    )


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
    from lightning_curvature.collect.collector import Collector
    from lightning_curvature.collect.sums import LayerSums

    images, labels = models.images(32).tensors
    torch.manual_seed(0)
    net = models.mlp()
    collector = Collector(net, coupled=True)
    collector.open()
    collector.backward(F.cross_entropy(net(images), labels))
    collector.close()
    (sums,) = collector.sums.values()
    again = LayerSums.from_state_dict(sums.state_dict()).factors()
    assert all(torch.equal(value, again.tensors[key]) for key, value in sums.factors().tensors.items())
    assert set(again.tensors) == {"A", "G", "A_coupled", "G_coupled"}
