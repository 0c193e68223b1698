"""Layers that read one tensor have one A on all processes, or on none."""

import pytest
import torch
from torch import distributed as dist

from lightning_curvature.collect.collector import Collector
from lightning_curvature.distributed import Ranks
from lightning_curvature.recording.options import CollectorOptions
from tests.support import processes
from tests.support.gated import PROJECTIONS, Gated, add, batches, gathered


def on_two_processes(apart, shard):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ranks = Ranks.of_run(rank, 2, torch.device("cpu"))
    model, data = Gated(), batches(seed=rank)
    collector = Collector(model, CollectorOptions(layers=PROJECTIONS), ranks=ranks, shard=shard)
    for number, batch in enumerate(data):
        model.apart = apart and rank == 1 and number == 3
        add(collector, batch)
    from lightning_curvature.collect.windows import WindowedFactors

    collection = WindowedFactors(collector, None, {})
    factors = collection.synchronise().gathered()
    state = collector.state_dict()
    shares = state["shared"].get("up") == "gate"
    return (
        {name: (layer.A, layer.num_inputs, layer.A_error) for name, layer in factors.items()},
        shares,
        (bool(factors) and factors["gate"].A is factors["up"].A),
    )


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_layers_share_on_all_processes_or_on_none(apart, shard):
    (factors, in_state, in_factors), _ = processes.run(2, on_two_processes, apart, shard)
    assert in_state == in_factors == (not apart)
    rows = torch.cat(
        [
            x + 0.5 * (apart and rank == 1 and number == 3)
            for rank in (0, 1)
            for number, (x, _) in enumerate(batches(seed=rank))
        ]
    )
    for name, shift in (("gate", 0.0), ("up", 1.0)):
        want = rows if shift else torch.cat([x for rank in (0, 1) for x, _ in batches(seed=rank)])
        torch.testing.assert_close(factors[name][0], want.T @ want / 48)
        assert factors[name][1] == 48


def test_the_standard_error_after_several_processes():
    (factors, _, _), _ = processes.run(2, on_two_processes, False, False)
    first, second = (gathered(Gated(), batches(seed=rank)) for rank in (0, 1))
    for name, layer in first.merge(second).items():
        assert factors[name][2] == pytest.approx(layer.A_error, rel=1e-5)
    # Where sums are spread, each batch of each process is a group.
    (factors, _, _), _ = processes.run(2, on_two_processes, False, True)
    products = torch.stack([x.T @ x for rank in (0, 1) for x, _ in batches(seed=rank)])
    spread = (products - products.mean(0)).square().sum((1, 2)).sum() * 8 / 7
    assert factors["gate"][2] == pytest.approx(float(spread.sqrt() / products.sum(0).norm()), rel=1e-4)


def only_some(order):
    """Collect where one process sees a layer later than the other, and ends earlier; gate and up are together."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ranks, model = Ranks.of_run(rank, 2, torch.device("cpu")), Gated()
    collector = Collector(model, CollectorOptions(layers=PROJECTIONS), ranks=ranks, shard=True)
    for number, batch in enumerate(batches(seed=rank)[: 4 - rank]):
        model.apart = number in order.get(rank, ())
        add(collector, batch)
    collector.drain()
    owners, kept = collector.owners, collector.sums
    shares = "up" in kept and kept["up"].inputs is kept["gate"].inputs
    means = {name: (sums.inputs.mean(), sums.inputs.count, sums.gradients.count) for name, sums in kept.items()}
    state = [collector.state_dict()]
    dist.broadcast_object_list(state)
    again = Collector(model, CollectorOptions(layers=PROJECTIONS), ranks=ranks, shard=True)
    again.load_state_dict(state[0])
    assert list(again.sums) == list(kept)
    assert shares == ("up" in kept and again.sums["up"].inputs is again.sums["gate"].inputs)
    return owners, shares, means


@pytest.mark.parametrize(("order", "shares"), [({}, True), ({0: (3,)}, False), ({0: (0,), 1: (0,)}, False)])
def test_sums_that_are_spread_over_processes_share(order, shares):
    (owners, are_tied, means), (_, _, others) = processes.run(2, only_some, order)
    assert (owners, are_tied) == ({"gate": 0, "up": 0, "down": 1}, shares)
    assert (sorted(means), sorted(others)) == (["gate", "up"], ["down"])
    data = [
        (x, number in order.get(rank, ()))
        for rank in (0, 1)
        for number, (x, _) in enumerate(batches(seed=rank)[: 4 - rank])
    ]
    for name, shift in (("gate", 0.0), ("up", 0.5)):
        rows = torch.cat([x + shift * apart for x, apart in data])
        torch.testing.assert_close(means[name][0], rows.T @ rows / 42)
        assert means[name][1:] == (42, 42)
