"""Properties: whatever the layer, and however its data are cut into batches and processes, the factors are the same."""

import tempfile

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from torch import nn

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.sums import LayerSums
from lightning_curvature.distributed import Ranks
from lightning_curvature.recording.options import CollectorOptions

_HOME = tempfile.TemporaryDirectory()  # removed when the tests end
set_hypothesis_home_dir(_HOME.name)
settings.register_profile(
    "cases",
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("cases")

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""And how far factors may differ when products are taken of other batches."""


def rank_of(index, size):
    """Return one of several processes that talk to nobody."""
    ranks = Ranks()
    ranks.rank = ranks.data = index
    ranks.size = ranks.num_data = size
    return ranks


@st.composite
def streams(draw):
    """A network with a hidden layer, data of low or full rank, and the process and the batch of each example."""
    d_in, d_hidden, n = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(list(DTYPES)))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    net = nn.Sequential(nn.Linear(d_in, d_hidden), nn.Tanh(), nn.Linear(d_hidden, 3)).to(dtype)
    rank = draw(st.integers(1, d_in))
    x = (torch.randn(n, rank) @ torch.randn(rank, d_in)).to(dtype)
    y = torch.randint(3, (n,))
    size = draw(st.integers(1, 5))
    places = draw(st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, 3)), min_size=n, max_size=n))
    return net, x, y, size, places


def collected(net, x, y, batches, fisher, coupled):
    collector = Collector(net, CollectorOptions(layers=["0"], fisher=fisher, coupled=coupled, positions="all"))
    for batch in batches:
        recording = collector.step()
        recording.open()
        recording.backward(F.cross_entropy(net(x[batch]), y[batch]))
        recording.close()
    return collector.sums.get("0")


def near(tensor, expected, tolerance):
    return float((tensor - expected).norm()) <= tolerance * max(float(expected.norm()), 1e-30)


@given(streams(), st.sampled_from(["exact", "empirical"]), st.booleans())
def test_factors_and_edit_do_not_depend_on_processes_and_batches(stream, fisher, coupled):
    net, x, y, size, places = stream
    tolerance = DTYPES[x.dtype]
    whole = collected(net, x, y, [list(range(len(y)))], fisher, coupled).factors()
    total = None
    for process in range(size):
        batches = [[i for i, place in enumerate(places) if place == (process, batch)] for batch in range(4)]
        sums = collected(net, x, y, [batch for batch in batches if batch], fisher, coupled)
        if sums is not None and total is not None:
            total.merge_(sums)
        total = total or sums
    merged = total.factors()
    assert merged.numbers == whole.numbers
    for key, tensor in whole.tensors.items():
        assert near(merged.tensors[key], tensor, tolerance), key
    if x.dtype == torch.float64 and bool(whole.A.any()) and bool(whole.G.any()):
        weight = net[0].weight.detach()
        edited, expected = (
            CurvatureEditor(0.7, min_positions=0)
            .edit_layers({"0": weight}, KroneckerFactors({"0": layer}))[1]
            .layers["0"]
            for layer in (whole, merged)
        )
        assert abs(edited.energy_kept - expected.energy_kept) < 1e-6 or edited.kept != expected.kept
        assert abs(edited.relative_change - expected.relative_change) < 1e-4 or edited.kept != expected.kept


@given(streams(), st.integers(1, 6))
def test_parts_of_saved_sums_add_up_to_them(stream, size):
    net, x, y, _, _ = stream
    sums = collected(net, x, y, [list(range(len(y)))], "empirical", coupled=True)
    parts = [LayerSums.from_state_dict(sums.state_dict()).part(rank_of(index, size)) for index in range(size)]
    counts = [part.inputs.count for part in parts]
    total = parts[0]
    for part in parts[1:]:
        total.merge_(part)
    assert total.factors().numbers == sums.factors().numbers
    assert max(counts) - min(counts) <= 1
    for key, tensor in sums.factors().tensors.items():
        assert near(total.factors().tensors[key], tensor, 1e-6)
    again = LayerSums.of(sums.factors()).factors()
    assert again.numbers == sums.factors().numbers
    for key, tensor in sums.factors().tensors.items():
        assert near(again.tensors[key], tensor, 1e-6)


@given(st.dictionaries(st.text(min_size=1, max_size=4), st.integers(1, 1000), max_size=12), st.integers(1, 5))
def test_work_is_spread_evenly(sizes, size):
    owners = rank_of(0, size).owners({name: float(work) for name, work in sizes.items()})
    assert owners.keys() == sizes.keys()
    load = [sum(work for name, work in sizes.items() if owners[name] == rank) for rank in range(size)]
    assert max(load) <= sum(sizes.values()) / size + max(sizes.values(), default=0)
