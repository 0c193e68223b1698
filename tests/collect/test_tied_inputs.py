"""Layers that read the same positions of the same tensor have one sum of A."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTForImageClassification

from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.moments import block_columns
from lightning_curvature.collect.passes import collect
from lightning_curvature.collect.sums import LayerKind, LayerSums
from lightning_curvature.collect.tied_inputs import (
    STATE_VERSION,
    state_of,
    sums_from,
    tie_again,
    tied_by_all,
    tied_inputs,
)
from lightning_curvature.recording.options import CollectorOptions
from tests.support import language, models
from tests.support.gated import PROJECTIONS, Gated, add, batches, gathered, same, separately


@pytest.mark.parametrize("fisher", ["sketched", "sampled", "exact", "empirical"])
def test_gate_and_up_share(fisher):
    model, data = Gated(), batches()
    factors = gathered(model, data, fisher=fisher)
    assert factors["gate"].A is factors["up"].A
    assert factors["gate"].A is not factors["down"].A
    same(factors, separately(model, data, fisher=fisher))


def test_presets_of_language_models_share():
    net, ids = language.model(), language.tokens(4, 8)
    factors = collect(net, [ids], lambda b: net(input_ids=b, labels=b).loss, layers=["mlp", "attention"])
    for block in (0, 1):
        mlp, attention = f"model.layers.{block}.mlp.", f"model.layers.{block}.self_attn."
        assert factors[mlp + "gate_proj"].A is factors[mlp + "up_proj"].A
        q, k, v = (factors[f"{attention}{name}_proj"].A for name in "qkv")
        assert k is v  # also the last position is seen by its own key and value alone
        assert (q is k) == (factors[attention + "q_proj"].num_inputs == factors[attention + "k_proj"].num_inputs)


def test_other_positions_are_not_shared():
    """In a ViT's last block the query counts the class token, key and value count everything."""
    torch.manual_seed(0)
    model = ViTForImageClassification(models.hf_vit_config()).eval()
    x, y = models.images(6).tensors
    step = lambda _: F.cross_entropy(model(x[:, None]).logits, y)  # noqa: E731
    factors = collect(model, [None], step, layers=["attention"])
    names = [name for name in factors if name.endswith(("query", "key", "value", "q_proj", "k_proj", "v_proj"))]
    first, last = names[:3], names[-3:]
    assert len({id(factors[name].A) for name in first}) == 1
    q, k, v = (next(name for name in last if name.split(".")[-1][0] == letter) for letter in "qkv")
    assert factors[k].A is factors[v].A
    assert factors[q].A is not factors[k].A
    assert factors[q].num_inputs < factors[k].num_inputs
    everything = collect(model, [None], step, layers=["attention"], positions="all")
    assert len({id(everything[name].A) for name in last}) == 1


def test_layers_that_read_the_same_at_first_go_their_own_ways():
    model, data = Gated(), batches()
    collector = Collector(model, CollectorOptions(layers=PROJECTIONS, seed=3))
    for number, batch in enumerate(data):
        model.apart = number >= 2
        add(collector, batch)
        assert (collector.sums["gate"].inputs is collector.sums["up"].inputs) == (number < 2)
    factors = collector.finish()
    model.apart = False
    gate = separately(model, data, ["gate"])["gate"]
    torch.testing.assert_close(factors["gate"].A, gate.A)
    rows = torch.cat([x + 0.5 * (number >= 2) for number, (x, _) in enumerate(data)])
    torch.testing.assert_close(factors["up"].A, rows.T @ rows / len(rows))


def test_layers_that_first_read_apart_never_share():
    model, data = Gated(), batches()
    collector = Collector(model, CollectorOptions(layers=PROJECTIONS))
    for number, batch in enumerate(data):
        model.apart = number == 0
        add(collector, batch)
    assert collector.sums["gate"].inputs is not collector.sums["up"].inputs
    rows = torch.cat([x + 0.5 * (number == 0) for number, (x, _) in enumerate(data)])
    torch.testing.assert_close(collector.factors()["up"].A, rows.T @ rows / len(rows))


def test_a_layer_that_comes_later_does_not_join():
    class Late(Gated):
        def forward(self, x):
            return self.head(self.down(F.silu(self.gate(x)) * (self.up(x) if self.apart else 1.0)))

    model, data = Late(), batches()
    collector = Collector(model, CollectorOptions(layers=PROJECTIONS))
    with pytest.warns(UserWarning, match="'up' did not run in the first collected batch"):
        add(collector, data[0])
    model.apart = True
    for batch in data[1:]:
        add(collector, batch)
    factors = collector.factors()
    assert (factors["gate"].num_inputs, factors["up"].num_inputs) == (24, 18)
    rows = torch.cat([x for x, _ in data[1:]])
    torch.testing.assert_close(factors["up"].A, rows.T @ rows / 18)


def test_layers_that_read_a_tensor_in_other_ways_do_not_share():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)
            self.wide, self.rows = nn.Conv2d(2, 3, 3, padding=1, dilation=1, stride=2), nn.Linear(6, 5)
            self.head = nn.Linear(3 + 4 + 3 + 5, 3)

        def forward(self, x):
            parts = [layer(x).flatten(2).mean(-1) for layer in (self.one, self.two, self.wide)]
            return self.head(torch.cat([*parts, self.rows(x).flatten(1, 2).mean(1)], 1))

    torch.manual_seed(0)
    model, x, y = Mixed(), torch.randn(4, 2, 6, 6), torch.randint(3, (4,))
    names = ["one", "two", "wide", "rows"]
    step = lambda _: F.cross_entropy(model(x), y)  # noqa: E731
    factors = collect(model, [None], step, layers=names)
    assert factors["one"].A is factors["two"].A
    assert len({id(layer.A) for layer in factors.values()}) == 3
    same(factors, {name: collect(model, [None], step, layers=[name])[name] for name in names})


def test_shared_weights_of_a_layer_called_twice():
    class Twice(Gated):
        def forward(self, x):
            twice = F.silu(self.gate(x)) * self.up(x)
            return self.head(self.down(twice + F.silu(self.gate(x + 1)) * self.up(x)))

    model, data = Twice(), batches()
    factors = gathered(model, data)
    assert factors["gate"].A is not factors["up"].A
    same(factors, separately(model, data))


def test_a_resumed_collection_shares_as_before():
    model, data = Gated(), batches()
    whole, first, second = (Collector(model, CollectorOptions(layers=PROJECTIONS)) for _ in range(3))
    for batch in data[:2]:
        add(first, batch)
    state = first.state_dict()
    assert sum("inputs" in layer["moments"] for layer in state["sums"].values()) == 2
    second.load_state_dict(state)
    assert second.sums["gate"].inputs is second.sums["up"].inputs
    for batch in data[2:]:
        add(second, batch)
    for batch in data:
        add(whole, batch)
    uninterrupted, resumed = whole.factors(), second.factors()
    assert uninterrupted.digest() == resumed.digest()
    assert resumed["gate"].A is resumed["up"].A
    assert resumed["gate"].A_error == uninterrupted["gate"].A_error > 0


def test_a_state_is_loaded_into_a_collector_that_was_used():
    """What shared in its own batches says nothing of the sums that it goes on with."""
    model, (first, second, *_) = Gated(), batches()
    together, used, fresh = (Collector(model, CollectorOptions(layers=PROJECTIONS, fisher="exact")) for _ in range(3))
    add(together, first)
    model.apart = True
    add(used, first)
    for collector in (used, fresh):
        collector.load_state_dict(copy.deepcopy(together.state_dict()))
        add(collector, second)
    factors = used.factors()
    assert factors["gate"].A is not factors["up"].A
    same(factors, fresh.factors())


def test_the_layout_of_saved_sums_has_a_version():
    """Sums of another layout would be read as nonsense: whoever changes it changes the version, and this test."""
    assert (STATE_VERSION, block_columns(1000)) == (5, [(0, 256), (256, 512), (512, 768), (768, 1000)])


def test_tied_sums_come_back_tied_from_their_state():
    cpu, kind = torch.device("cpu"), LayerKind(3, 2, False)
    sums = {name: LayerSums.zero(kind, cpu) for name in ("gate", "up", "alone")}
    first = {"gate": "gate", "up": "gate", "alone": "alone"}
    tie_again(sums, first)
    assert tied_inputs(sums) == first
    sums["up"].add_inputs(torch.ones(4, 3))
    state = state_of(sums)
    assert state["shared"] == first
    assert ["inputs" in layer["moments"] for layer in state["sums"].values()] == [True, False, True]
    loaded = sums_from(state, lambda _, kind, device: LayerSums.zero(kind, device))
    assert tied_inputs(loaded) == first
    assert torch.equal(loaded["up"].inputs.mean(), torch.ones(3, 3))
    assert (loaded["gate"].inputs.count, loaded["alone"].inputs.count) == (4, 0)


TIED, APART = {"gate": "gate", "up": "gate", "down": "down"}, {"gate": "gate", "up": "up"}


@pytest.mark.parametrize(
    ("by_rank", "are_tied"),
    [([TIED, TIED], True), ([TIED, APART], False), ([TIED, {"gate": "gate"}], False)],
    ids=["tied by both", "apart on one", "not seen by one"],
)
def test_layers_are_tied_if_all_processes_have_tied_them(by_rank, are_tied):
    ranks = SimpleNamespace(gather=lambda _: by_rank)
    groups = tied_by_all(ranks, by_rank[0])
    assert set(groups) == {"gate", "up", "down"}
    assert (groups["gate"] == groups["up"]) == are_tied
    assert groups["down"] != groups["gate"]
