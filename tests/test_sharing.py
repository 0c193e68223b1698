"""Layers that read the same positions of the same tensor share A: in the sums, in files, and in the decomposition."""

import copy
import gc
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import distributed as dist
from torch import nn
from transformers import ViTForImageClassification

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.collect.accumulator import owners_of
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.passes import collect
from lightning_curvature.collect.sums import LayerKind
from lightning_curvature.distributed import Ranks
from lightning_curvature.editing import curvature as editor
from lightning_curvature.factors import basis_cache as bases
from lightning_curvature.factors.basis import coefficients
from lightning_curvature.factors.basis_cache import bases_in
from lightning_curvature.text.detection import distinct_inputs
from tests import language, models, processes

PROJECTIONS = ["gate", "up", "down"]


class Gated(nn.Module):
    """A gated MLP whose projections may be told to read another tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 5)
        self.head = nn.Linear(5, 3)
        self.apart = False

    def forward(self, x):
        return self.head(self.down(F.silu(self.gate(x)) * self.up(x + 0.5 if self.apart else x)))


def batches(count=4, seed=1):
    torch.manual_seed(seed)
    return [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(count)]


def add(collector, batch):
    collector.open()
    collector.backward(F.cross_entropy(collector.module(batch[0]), batch[1]))
    collector.close()


def gathered(model, data, **options):
    return collect(model, data, lambda b: F.cross_entropy(model(b[0]), b[1]), **({"layers": PROJECTIONS} | options))


def same(one, two):
    assert list(one) == list(two)
    for name, layer in one.items():
        assert layer.numbers == two[name].numbers
        torch.testing.assert_close(layer.A, two[name].A)
        torch.testing.assert_close(layer.G, two[name].G)


def separately(model, data, names=PROJECTIONS, **options):
    """Collected one layer at a time, so that nothing can be shared."""
    found = {}
    for name in names:
        found |= gathered(model, data, layers=[name], **options)
    return found


@pytest.mark.parametrize("fisher", ["sketched", "sampled", "exact", "empirical"])
def test_gate_and_up_share(fisher):
    model, data = Gated(), batches()
    found = gathered(model, data, fisher=fisher)
    assert found["gate"].A is found["up"].A
    assert found["gate"].A is not found["down"].A
    same(found, separately(model, data, fisher=fisher))


def test_presets_of_language_models_share():
    net, ids = language.model(), language.tokens(4, 8)
    found = collect(net, [ids], lambda b: net(input_ids=b, labels=b).loss, layers=["mlp", "attention"])
    for block in (0, 1):
        mlp, attention = f"model.layers.{block}.mlp.", f"model.layers.{block}.self_attn."
        assert found[mlp + "gate_proj"].A is found[mlp + "up_proj"].A
        q, k, v = (found[f"{attention}{name}_proj"].A for name in "qkv")
        assert k is v  # also the last position is seen by its own key and value alone
        assert (q is k) == (found[attention + "q_proj"].num_inputs == found[attention + "k_proj"].num_inputs)


def test_other_positions_are_not_shared():
    """In a ViT's last block the query counts the class token, key and value count everything."""
    torch.manual_seed(0)
    model = ViTForImageClassification(models.hf_vit_config()).eval()
    x, y = models.images(6).tensors
    step = lambda _: F.cross_entropy(model(x[:, None]).logits, y)  # noqa: E731
    found = collect(model, [None], step, layers=["attention"])
    names = [name for name in found if name.endswith(("query", "key", "value", "q_proj", "k_proj", "v_proj"))]
    first, last = names[:3], names[-3:]
    assert len({id(found[name].A) for name in first}) == 1
    q, k, v = (next(name for name in last if name.split(".")[-1][0] == letter) for letter in "qkv")
    assert found[k].A is found[v].A
    assert found[q].A is not found[k].A
    assert found[q].num_inputs < found[k].num_inputs
    everything = collect(model, [None], step, layers=["attention"], positions="all")
    assert len({id(everything[name].A) for name in last}) == 1


def test_layers_that_read_the_same_at_first_go_their_own_ways():
    model, data = Gated(), batches()
    collector = Collector(model, PROJECTIONS, seed=3)
    for number, batch in enumerate(data):
        model.apart = number >= 2
        add(collector, batch)
        assert (collector.sums["gate"].inputs is collector.sums["up"].inputs) == (number < 2)
    found = collector.finish()
    model.apart = False
    gate = separately(model, data, ["gate"])["gate"]
    torch.testing.assert_close(found["gate"].A, gate.A)
    rows = torch.cat([x + 0.5 * (number >= 2) for number, (x, _) in enumerate(data)])
    torch.testing.assert_close(found["up"].A, rows.T @ rows / len(rows))


def test_layers_that_first_read_apart_never_share():
    model, data = Gated(), batches()
    collector = Collector(model, PROJECTIONS)
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
    collector = Collector(model, PROJECTIONS)
    with pytest.warns(UserWarning, match="'up' did not run in the first collected batch"):
        add(collector, data[0])
    model.apart = True
    for batch in data[1:]:
        add(collector, batch)
    found = collector.factors()
    assert (found["gate"].num_inputs, found["up"].num_inputs) == (24, 18)
    rows = torch.cat([x for x, _ in data[1:]])
    torch.testing.assert_close(found["up"].A, rows.T @ rows / 18)


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
    found = collect(model, [None], step, layers=names)
    assert found["one"].A is found["two"].A
    assert len({id(layer.A) for layer in found.values()}) == 3
    same(found, {name: collect(model, [None], step, layers=[name])[name] for name in names})


def test_shared_weights_of_a_layer_called_twice():
    class Twice(Gated):
        def forward(self, x):
            twice = F.silu(self.gate(x)) * self.up(x)
            return self.head(self.down(twice + F.silu(self.gate(x + 1)) * self.up(x)))

    model, data = Twice(), batches()
    found = gathered(model, data)
    assert found["gate"].A is not found["up"].A
    same(found, separately(model, data))


def test_a_resumed_collection_shares_as_before():
    model, data = Gated(), batches()
    whole, first, second = (Collector(model, PROJECTIONS) for _ in range(3))
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
    one, two = whole.factors(), second.factors()
    assert one.digest() == two.digest()
    assert two["gate"].A is two["up"].A
    assert two["gate"].A_error == one["gate"].A_error > 0


def test_a_state_is_loaded_into_a_collector_that_was_used():
    """What shared in its own batches says nothing of the sums that it goes on with."""
    model, (first, second, *_) = Gated(), batches()
    together, used, fresh = (Collector(model, PROJECTIONS, fisher="exact") for _ in range(3))
    add(together, first)
    model.apart = True
    add(used, first)
    for collector in (used, fresh):
        collector.load_state_dict(copy.deepcopy(together.state_dict()))
        add(collector, second)
    found = used.factors()
    assert found["gate"].A is not found["up"].A
    same(found, fresh.factors())


def on_two_processes(apart, shard):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ranks = Ranks.of_run(rank, 2, torch.device("cpu"))
    model, data = Gated(), batches(seed=rank)
    collector = Collector(model, PROJECTIONS, ranks=ranks, shard=shard)
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
    (found, in_state, in_factors), _ = processes.run(2, on_two_processes, apart, shard)
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
        torch.testing.assert_close(found[name][0], want.T @ want / 48)
        assert found[name][1] == 48


def test_the_standard_error_after_several_processes():
    (found, _, _), _ = processes.run(2, on_two_processes, False, False)
    one, two = (gathered(Gated(), batches(seed=rank)) for rank in (0, 1))
    for name, layer in one.merge(two).items():
        assert found[name][2] == pytest.approx(layer.A_error, rel=1e-5)
    # Where sums are spread, each batch of each process is a group.
    (found, _, _), _ = processes.run(2, on_two_processes, False, True)
    own = torch.stack([x.T @ x for rank in (0, 1) for x, _ in batches(seed=rank)])
    spread = (own - own.mean(0)).square().sum((1, 2)).sum() * 8 / 7
    assert found["gate"][2] == pytest.approx(float(spread.sqrt() / own.sum(0).norm()), rel=1e-4)


def only_some(order):
    """Collect where one process sees a layer later than the other, and ends earlier; gate and up are together."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ranks, model = Ranks.of_run(rank, 2, torch.device("cpu")), Gated()
    collector = Collector(model, PROJECTIONS, ranks=ranks, shard=True)
    for number, batch in enumerate(batches(seed=rank)[: 4 - rank]):
        model.apart = number in order.get(rank, ())
        add(collector, batch)
    collector.accumulator.drain()
    owners, own = collector.accumulator.owners, collector.sums
    shares = "up" in own and own["up"].inputs is own["gate"].inputs
    means = {name: (sums.inputs.mean(), sums.inputs.count, sums.gradients.count) for name, sums in own.items()}
    state = [collector.state_dict()]
    dist.broadcast_object_list(state)
    again = Collector(model, PROJECTIONS, ranks=ranks, shard=True)
    again.load_state_dict(state[0])
    assert list(again.sums) == list(own)
    assert shares == ("up" in own and again.sums["up"].inputs is again.sums["gate"].inputs)
    return owners, shares, means


@pytest.mark.parametrize(("order", "shares"), [({}, True), ({0: (3,)}, False), ({0: (0,), 1: (0,)}, False)])
def test_sums_that_are_spread_over_processes_share(order, shares):
    (owners, found, means), (_, _, others) = processes.run(2, only_some, order)
    assert (owners, found) == ({"gate": 0, "up": 0, "down": 1}, shares)
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


def test_layers_are_kept_together_unless_that_takes_more_of_a_process():
    kinds = {"gate": LayerKind(2, 8, False), "up": LayerKind(2, 8, False), "down": LayerKind(8, 2, False)}
    ranks = Ranks()
    ranks.size = 2
    assert owners_of(kinds, ranks) == {"gate": 0, "up": 0, "down": 1}
    ranks.size = 3
    assert sorted(owners_of(kinds, ranks).values()) == [0, 1, 2]


# Files --------------------------------------------------------------------------------------------------------------


def test_a_file_holds_a_shared_factor_once(tmp_path):
    found = gathered(Gated(), batches())
    path = tmp_path / "f.safetensors"
    found.save(path)
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["down.A", "down.G", "gate.A", "gate.G", "up.G"]
        header = json.loads(file.metadata()["lightning_curvature.factors"])
    assert header["version"] == 2
    assert header["layers"]["up"]["shares_A_with"] == "gate"
    loaded = KroneckerFactors.load(path)
    assert loaded["gate"].A is loaded["up"].A
    assert loaded.digest() == found.digest()
    opened = KroneckerFactors.open(path)
    gate, up = opened["gate"], opened["up"]
    assert gate.A is up.A
    assert torch.equal(opened["up"].A, found["up"].A)
    assert loaded["up"].A_error == found["up"].A_error
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    separate = KroneckerFactors({"up": found["up"], "down": found["down"]})
    separate.save(tmp_path / "one.safetensors")
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lightning_curvature.factors"])["version"] == 1  # as earlier versions read


def many_layers(count=26, dim=64):
    """Each with an A of its own, but the last, which reads what the first does."""
    torch.manual_seed(0)
    squares = [torch.randn(dim, dim) for _ in range(count)]
    layers = {
        f"blocks.{i}.fc": LayerFactors(A=x @ x.T, G=torch.eye(2), num_inputs=9, num_gradients=9)
        for i, x in enumerate(squares)
    }
    layers["last"] = LayerFactors(A=layers["blocks.0.fc"].A, G=torch.eye(2), num_inputs=9, num_gradients=9)
    return KroneckerFactors(layers)


def test_an_opened_file_never_takes_one_layer_for_another(tmp_path):
    """Each access makes new tensors, at addresses where those of other layers were; the memory of freed ones is."""
    factors = many_layers()
    factors.save(tmp_path / "f.safetensors")
    tied = {name: name for name in factors} | {"last": "blocks.0.fc"}
    assert factors.tied_inputs() == tied
    for _ in range(5):
        opened = KroneckerFactors.open(tmp_path / "f.safetensors")
        assert opened.tied_inputs() == tied
        assert opened.counts() == dict.fromkeys(factors, 9)
        assert distinct_inputs(opened) == distinct_inputs(factors) == list(factors)[:-1]
        opened.save(tmp_path / "again.safetensors")
        again = KroneckerFactors.load(tmp_path / "again.safetensors")
        merged = opened.merge(KroneckerFactors.open(tmp_path / "f.safetensors"))
        for name, layer in factors.items():
            assert torch.equal(again[name].A, layer.A)
            torch.testing.assert_close(merged[name].A, layer.A)
        for found in (again, merged):
            assert found.tied_inputs() == tied
            assert found["last"].A is found["blocks.0.fc"].A
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "f.safetensors").read_bytes()


def test_an_edit_with_an_opened_file_takes_the_factors_of_each_layer(tmp_path):
    factors = many_layers(dim=16)
    factors.save(tmp_path / "f.safetensors")
    torch.manual_seed(1)
    state = {f"{name}.weight": torch.randn(2, 16) for name in factors}
    torch.save(state, tmp_path / "m.pt")
    expected, _ = CurvatureEditor(0.7).edit_state_dict(state, many_layers(dim=16))
    for _ in range(3):
        opened = KroneckerFactors.open(tmp_path / "f.safetensors")
        CurvatureEditor(0.7).edit_checkpoint(tmp_path / "m.pt", opened, tmp_path / "o.pt", overwrite=True)
        edited = torch.load(tmp_path / "o.pt", weights_only=True)
        assert all(torch.equal(edited[key], value) for key, value in expected.items())


def test_merged_factors_share():
    one, two, both = (
        gathered(Gated(), data, fisher="empirical")
        for data in (batches(), batches(seed=5), batches() + batches(seed=5))
    )
    merged = one.merge(two)
    assert merged["gate"].A is merged["up"].A
    same(merged, both)
    assert 0.5 < merged["gate"].A_error / both["gate"].A_error < 2
    alone = LayerFactors(A=torch.eye(2), G=torch.eye(2), num_inputs=1, num_gradients=1)
    assert KroneckerFactors({"x": alone}).merge(KroneckerFactors({"x": alone}))["x"].A_error is None


# Decomposition ------------------------------------------------------------------------------------------------------


@pytest.fixture
def decomposed(monkeypatch):
    """The names of the factors that are decomposed."""
    done, decompose = [], bases.decompose
    monkeypatch.setattr(bases, "decompose", lambda factor, what: done.append(what) or decompose(factor, what))
    return done


def test_a_shared_factor_is_decomposed_once(decomposed, tmp_path):
    model = Gated()
    found = gathered(model, batches())
    new, _ = CurvatureEditor(0.8).edited_weights(model, found)
    assert sorted(decomposed) == ["Factor A"] * 2 + ["Factor G"] * 3
    for energy in (0.5, 0.7):
        CurvatureEditor(energy).edited_weights(model, found)
    assert len(decomposed) == 5
    alone, _ = CurvatureEditor(0.8).edited_weights(model, KroneckerFactors(separately(model, batches())))
    for name, weight in new.items():
        torch.testing.assert_close(weight, alone[name])

    torch.save({"state_dict": model.state_dict()}, tmp_path / "m.ckpt")
    found.save(tmp_path / "f.safetensors")
    for factors in (found, KroneckerFactors.open(tmp_path / "f.safetensors")):
        decomposed.clear()
        gc.collect()
        kept = len(bases._kept)
        CurvatureEditor(0.8).edit_checkpoint(tmp_path / "m.ckpt", factors, tmp_path / "out.ckpt", overwrite=True)
        assert sorted(decomposed) == ["Factor A"] * 2 + ["Factor G"] * 3
        gc.collect()
        assert len(bases._kept) == kept  # bases of a file's edit go with it
        edited = torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(edited[f"{name}.weight"], weight) for name, weight in new.items())


def test_a_basis_goes_with_its_factor(decomposed):
    factor = torch.diag(torch.tensor([3.0, 1.0]))
    layer = LayerFactors(A=factor, G=torch.eye(2), num_inputs=9, num_gradients=9)
    gc.collect()
    kept = len(bases._kept)
    assert layer.basis.mu.tolist() == [3.0, 1.0]
    assert layer.basis.U_A is layer.basis.U_A
    factor[1, 1] = 2.0  # whoever changes a factor gets its new basis
    assert layer.basis.mu.tolist() == [3.0, 2.0]
    del layer, factor
    gc.collect()
    assert len(bases._kept) == kept


def test_copies_on_another_device_share_what_was_worked_out(decomposed, monkeypatch):
    """What only a GPU does: "cpu:0" is another device than "cpu" by name, and a copy there is a copy."""
    model, elsewhere = Gated(), torch.device("cpu:0")
    found = gathered(model, batches())
    expected = [CurvatureEditor(energy).edited_weights(model, found)[0] for energy in (0.8, 0.5)]
    found = gathered(model, batches())  # of which nothing is worked out yet
    decomposed.clear()
    monkeypatch.setattr("lightning_curvature.editing.projection.place_edit", lambda weight, factors, shape: elsewhere)
    products = []
    monkeypatch.setattr(editor, "coefficients", lambda *args: products.append(1) or coefficients(*args))
    trial = CurvatureEditor().at(1.0)
    for energy, weights in zip((0.8, 0.5), expected, strict=True):
        new, _ = trial.at(energy).edited_weights(model, found)
        assert all(torch.equal(new[name], weights[name]) for name in PROJECTIONS)
    assert sorted(decomposed) == ["Factor A"] * 2 + ["Factor G"] * 3
    assert len(products) == 3
    copied = found["gate"].to(elsewhere)
    assert copied.A is not found["gate"].A
    assert copied.original is found["gate"]
    assert copied.to(torch.device("cpu")) is copied
    before = copied.basis.lam[0]
    found["gate"].G[0, 0] = 7.0  # the next copy gets its new basis
    assert found["gate"].to(elsewhere).basis.lam[0] > before
    fresh = gathered(model, batches())["up"]
    copied = fresh.to(elsewhere)
    fresh.G[0, 0] = 7.0
    decomposed.clear()
    assert copied.basis.lam[0] < fresh.basis.lam[0]
    assert decomposed == ["Factor G", "Factor A", "Factor G"]  # the first is of what was there before


def test_a_layer_that_does_not_fit_on_the_gpu_is_edited_where_its_factors_are(monkeypatch):
    model = Gated()
    found = gathered(model, batches())
    expected, _ = CurvatureEditor().edited_weights(model, found)
    project, places = CurvatureEditor.project, []

    def small(self, weight, factors, energy):
        places.append(factors.original is factors)
        if factors.original is not factors:
            raise torch.cuda.OutOfMemoryError
        return project(self, weight, factors, energy)

    monkeypatch.setattr("lightning_curvature.editing.projection.place_edit", lambda *_: torch.device("cpu:0"))
    monkeypatch.setattr(CurvatureEditor, "project", small)
    with pytest.warns(UserWarning, match="Layer '(gate|up|down)' does not fit on cpu:0, so it is edited on the CPU"):
        new, _ = CurvatureEditor().edited_weights(model, found)
    assert places == [False, True] * 3
    assert all(torch.equal(new[name], weight) for name, weight in expected.items())


def test_bases_are_kept_in_a_folder(decomposed, tmp_path):
    def layer():
        torch.manual_seed(0)
        x, g = torch.randn(50, 6), torch.randn(50, 4)
        return LayerFactors(A=x.T @ x / 50, G=g.T @ g / 50, num_inputs=50, num_gradients=50)

    plain = layer().basis
    decomposed.clear()
    with bases_in(tmp_path / "bases"):
        first, second = layer().basis, layer().basis
    assert len(decomposed) == 2
    files = sorted((tmp_path / "bases").iterdir())
    assert len(files) == 2
    for basis in (first, second):
        assert all(torch.equal(one, two) for one, two in zip(basis, plain, strict=True))
    other = LayerFactors(A=layer().A, G=2 * layer().G, num_inputs=50, num_gradients=50)
    with bases_in(tmp_path / "bases"):
        torch.testing.assert_close(other.basis.lam, 2 * plain.lam)
    assert len(decomposed) == 3
    assert len(list((tmp_path / "bases").iterdir())) == 3
    layer().basis  # noqa: B018
    assert len(decomposed) == 5  # outside of the block nothing is read


def damaged(content):
    return [content[:40], b"", content[:-16] + bytes(16), content.replace(b"vectors", b"victors")]


@pytest.mark.parametrize("index", range(4))
def test_a_damaged_basis_is_worked_out_anew(index, decomposed, tmp_path):
    layer = lambda: LayerFactors(A=torch.eye(3) + 1, G=torch.eye(2) + 1, num_inputs=9, num_gradients=9)  # noqa: E731
    with bases_in(tmp_path):
        want = layer().basis
        for path in tmp_path.iterdir():
            path.write_bytes(damaged(path.read_bytes())[index])
        decomposed.clear()
        found = layer().basis
        assert len(decomposed) == 2
        assert all(torch.equal(one, two) for one, two in zip(found, want, strict=True))
        layer().basis  # noqa: B018
        assert len(decomposed) == 2
