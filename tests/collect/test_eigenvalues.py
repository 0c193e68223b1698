"""EK-FAC's eigenvalues, against the definition."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import distributed as dist

from lightning_curvature import KroneckerFactors
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.eigenvalues import EigenvalueCollector, correct_eigenvalues
from lightning_curvature.collect.passes import collect, collect_batch
from lightning_curvature.collect.sums import LayerSums
from lightning_curvature.distributed import Ranks
from lightning_curvature.recording.options import CollectorOptions
from tests.support import processes
from tests.support.by_example import collected, data, network, rows


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


@pytest.mark.parametrize("shard", [False, True])
def test_a_saved_collection_of_eigenvalues_goes_on(shard):
    model, (inputs, labels) = network(), data()
    step = lambda batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    options = {"fisher": "empirical", "positions": "all"}
    settings = CollectorOptions(layers=["0"], **options)
    factors = collect(model, [(inputs, labels)], step, layers=["0"], **options)
    first, second = (EigenvalueCollector(model, factors, settings, shard=shard) for _ in range(2))
    plain = Collector(model, settings, shard=shard)
    collect_batch(first, (inputs[:5], labels[:5]), step)
    state = copy.deepcopy(first.state_dict())
    second.load_state_dict(state)
    collect_batch(second, (inputs[5:], labels[5:]), step)
    a, g = rows(model, model[0], inputs, labels)
    torch.testing.assert_close(second.finish()["0"].eigenvalues, measured(factors["0"], a, g))
    with pytest.raises(ValueError, match="a collection of eigenvalues, which holds no factors"):
        plain.load_state_dict(state)
    with pytest.raises(ValueError, match="a collection of factors, which holds no eigenvalues"):
        second.load_state_dict(
            plain.state_dict() | {"sums": {"0": LayerSums.of(factors["0"]).state_dict()}, "shared": {"0": "0"}}
        )


def eigenvalues_of_parts(shard):
    """Measure on another part of the data on each process; the first has two batches, the second one."""
    dist.init_process_group("gloo")
    ranks = Ranks.of_run(dist.get_rank(), 2, torch.device("cpu"))
    model, (inputs, labels) = network(), data()
    step = lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="sum")  # noqa: E731
    options = {"fisher": "empirical", "positions": "all"}
    factors = collect(model, [(inputs, labels)], step, layers=["0", "2"], **options)
    parts = [slice(0, 3), slice(3, 5)] if ranks.rank == 0 else [slice(5, None)]
    corrected = correct_eigenvalues(
        model, factors, [(inputs[part], labels[part]) for part in parts], step, ranks=ranks, shard=shard, **options
    )
    refusal = ""
    if shard:
        with pytest.raises(ValueError, match="these factors are spread over several") as error:
            correct_eigenvalues(model, corrected, [], step, ranks=ranks, shard=shard, **options)
        refusal = str(error.value)
        corrected = corrected.gathered()
    return {name: layer.eigenvalues for name, layer in corrected.items()}, refusal


@pytest.mark.parametrize("shard", [False, True])
def test_eigenvalues_of_several_processes_are_those_of_all_data(shard):
    (eigenvalues, refusal), (others, _) = processes.run(2, eigenvalues_of_parts, shard)
    model, (inputs, labels) = network(), data()
    step = lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="sum")  # noqa: E731
    factors = collect(model, [(inputs, labels)], step, layers=["0", "2"], fisher="empirical", positions="all")
    for index, name in enumerate(("0", "2")):
        expected = measured(factors[name], *rows(model, model[2 * index], inputs, labels))
        torch.testing.assert_close(eigenvalues[name], expected)
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
