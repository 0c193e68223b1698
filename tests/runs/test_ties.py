"""Weights that share memory: two of them are never edited as if they were two, and the report names the others."""

import copy

import pytest
import torch
from torch import nn

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.baselines import GradientAscent, RandomBasisEditor, SVDEditor
from lightning_curvature.distributed import Ranks
from lightning_curvature.search.sweep import sweep
from tests import reference


def moment(d, seed):
    x = torch.randn(60, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 0.7 ** torch.arange(d)
    return x.T @ x / 60


def layer(d_out=6, d_in=6, seed=0, **options):
    return LayerFactors(A=moment(d_in, seed), G=moment(d_out, seed + 1), num_inputs=60, num_gradients=60, **options)


def linear(weight):
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    return made


def tied(kind):
    """Two layers whose weights share all or a part of their memory."""
    torch.manual_seed(0)
    first = nn.Linear(6, 6, bias=False)
    second = {
        "one parameter": lambda: linear(first.weight),
        "one memory": lambda: linear(first.weight.detach()),
        "one module": lambda: first,
        "turned": lambda: linear(first.weight.detach().T),
        "rows": lambda: linear(first.weight.detach()[2:5]),
        "columns": lambda: linear(first.weight.detach()[:, 3:]),
        "another shape": lambda: linear(first.weight.detach().view(4, 9)),
    }[kind]()
    return nn.ModuleDict({"one": first, "two": second, "three": nn.Linear(6, 6)})


KINDS = ["one parameter", "one memory", "one module", "turned", "rows", "columns", "another shape"]


def factors_of(module, names=("one", "two", "three")):
    return KroneckerFactors({name: layer(*module[name].weight.shape, seed=10 * i) for i, name in enumerate(names)})


def applied(editor, module, factors):
    with editor.applied(module, factors):
        raise AssertionError("edited")


WAYS = {
    "edit": lambda editor, module, factors: editor.edit(module, factors),
    "applied": applied,
    "state dict": lambda editor, module, factors: editor.edit_state_dict(module.state_dict(), factors),
    "layers": lambda editor, module, factors: editor.edit_layers(
        {name: part.weight for name, part in module.items()}, factors
    ),
    "sweep": lambda editor, module, factors: sweep(module, factors, dict, {"e": editor}, [0.5]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_two_layers_of_one_weight_are_an_error_that_names_both(kind, way):
    module = tied(kind)
    before = copy.deepcopy(module.state_dict())
    message = r"Layers 'one' and 'two' have one weight \(tied weights\).* Leave one of them out of layers=\."
    with pytest.raises(ValueError, match=message):
        WAYS[way](CurvatureEditor(0.7), module, factors_of(module))
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize(
    "editor",
    [
        CurvatureEditor({"one": 1.0, "*": 0.5}),
        CurvatureEditor(0.5, soft=True),
        SVDEditor(0.5),
        RandomBasisEditor(0.5),
        GradientAscent([torch.ones(1, 6)], [torch.ones(1, 6)], lambda module, x: module["one"](x).sum(1)),
    ],
)
def test_every_method_tells_ties(editor):
    module = tied("one parameter")
    with pytest.raises(ValueError, match="Layers 'one' and 'two' have one weight"):
        editor.edit(module, factors_of(module))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chosen", ["one", "two"])
def test_one_of_them_is_edited_and_the_other_follows(kind, chosen):
    module = tied(kind)
    follower = {"one": "two", "two": "one"}[chosen]
    weight = module[chosen].weight.detach().clone()
    factors = factors_of(module)
    edited, on_paper = CurvatureEditor(0.7, layers=[chosen, "three"]).edit_state_dict(module.state_dict(), factors)
    before = copy.deepcopy(module.state_dict())
    report = CurvatureEditor(0.7, layers=[chosen, "three"]).edit(module, factors)
    expected = reference.edit(weight.double(), factors[chosen].A, factors[chosen].G, 0.7)
    torch.testing.assert_close(module[chosen].weight.double(), expected, rtol=1e-5, atol=1e-6)
    after = module.state_dict()
    assert edited.keys() == after.keys()
    for key, value in after.items():
        assert torch.equal(edited[key], value), key
    assert not torch.equal(after[f"{follower}.weight"], before[f"{follower}.weight"])
    for told in (report, on_paper):
        assert told.layers[chosen].also == (f"{follower}.weight",)
        assert told.layers["three"].also == ()
        assert f"The weight of layer '{chosen}' is that of '{follower}.weight', too" in str(told)
        assert "layer 'three' is" not in str(told)


@pytest.mark.parametrize("kind", ["turned", "rows", "columns"])
def test_an_edit_of_a_state_dict_leaves_the_memory_of_tied_weights_as_it_is(kind):
    module = tied(kind)
    state = module.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    edited, _ = CurvatureEditor(0.7, layers=["one"]).edit_state_dict(state, factors_of(module))
    assert all(torch.equal(before[key], value) for key, value in state.items())
    assert edited["three.bias"] is state["three.bias"]
    edited["one.weight"].zero_()
    assert all(torch.equal(before[key], value) for key, value in state.items())


def test_columns_of_one_matrix_are_two_weights():
    fused = torch.randn(6, 12)
    module = nn.ModuleDict({"one": linear(fused[:, :6]), "two": linear(fused[:, 6:])})
    factors = factors_of(module, ["one", "two"])
    expected = {
        name: reference.edit(part.weight.detach().double(), factors[name].A, factors[name].G, 0.7)
        for name, part in module.items()
    }
    report = CurvatureEditor(0.7).edit(module, factors)
    for name, part in module.items():
        torch.testing.assert_close(part.weight.double(), expected[name], rtol=1e-5, atol=1e-6)
        assert report.layers[name].also == ()


def test_an_embedding_that_is_tied_to_the_head_is_named():
    module = nn.ModuleDict({"embed": nn.Embedding(6, 6), "head": nn.Linear(6, 6), "free": nn.Linear(6, 6)})
    module["head"].weight = module["embed"].weight
    factors = KroneckerFactors({"head": layer(), "free": layer(seed=5)})
    batch = torch.ones(1, 6)
    # What is to be forgotten is to be retained: no weight changes.
    ascent = GradientAscent([batch], [batch], lambda module, x: module["free"](module["head"](x)).sum(1))
    for editor in (CurvatureEditor(0.7), SVDEditor(0.7), ascent):
        report = editor.edit(module, factors)
        assert report.layers["head"].also == ("embed.weight",)
        assert report.layers["free"].also == ()
        words = "The weight of layer 'head' is that of 'embed.weight', too, which is edited with it."
        assert (words in str(report)) == (report.layers["head"].changed > 0) == (editor is not ascent)
    module.register_buffer("copy", module["head"].weight.detach())
    assert CurvatureEditor(0.9).edit(module, factors).layers["head"].also == ("embed.weight", "copy")


def test_a_weight_without_entries_is_named():
    with pytest.raises(ValueError, match="Layer 'one': its weight is on the meta device and has no entries"):
        CurvatureEditor(0.7).edit_layers({"one": torch.empty(6, 6, device="meta")}, KroneckerFactors({"one": layer()}))


def test_a_tie_that_another_process_sees_stops_all_of_them():
    class Other(Ranks):
        def gather(self, value):
            return [value, ("a", "b")]

    editor = CurvatureEditor(0.7)
    editor.ranks = Other()
    with pytest.raises(ValueError, match="Layers 'a' and 'b' have one weight"):
        editor.edit_layers({"one": torch.randn(6, 6)}, KroneckerFactors({"one": layer()}))
