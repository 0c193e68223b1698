import functools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_curvature import CurvatureEditor, EditReport, KroneckerFactors, LayerFactors
from lightning_curvature.baselines import RandomBasisEditor, SVDEditor
from tests import reference
from tests.support.gated import Gated, batches, gathered

ActivationEditor = functools.partial(CurvatureEditor, score="activations")
EDITORS = [CurvatureEditor, ActivationEditor, SVDEditor, RandomBasisEditor]


def spd(d, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * d, d, dtype=torch.float64, generator=generator) * 0.7 ** torch.arange(d)
    return x.T @ x / (4 * d)


def layer(d_out, d_in, **extra):
    return LayerFactors(A=spd(d_in, d_in), G=spd(d_out, d_out), num_inputs=100, num_gradients=100, **extra)


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.ModuleDict({"fc": nn.Linear(6, 5), "conv": nn.Conv2d(2, 4, 3), "t": Conv1D(5, 7), "sq": Conv1D(4, 4)}).to(
        dtype
    )


def all_factors():
    return KroneckerFactors(
        {"fc": layer(5, 6), "conv": layer(4, 18), "t": layer(5, 7, transposed=True), "sq": layer(4, 4, transposed=True)}
    )


def same_bits(state, expected):
    return (
        all(torch.equal(state[key].view(torch.uint8), expected[key].view(torch.uint8)) for key in expected)
        and state.keys() == expected.keys()
    )


def snapshot(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_edit_equals_brute_force_in_every_layout(dtype):
    net, factors = model(dtype), all_factors()
    before = snapshot(net)
    report = CurvatureEditor(energy=0.8).edit(net, factors)
    for name in ("fc", "conv", "t", "sq"):
        old, new = before[f"{name}.weight"], net[name].weight
        turn = (lambda w: w.T) if name in ("t", "sq") else (lambda w: w.flatten(1))
        expected = reference.edit(turn(old).double(), factors[name].A, factors[name].G, 0.8)
        assert new.dtype == dtype
        torch.testing.assert_close(
            turn(new.data).double(),
            expected.to(dtype).double(),
            rtol=1e-2 if dtype.itemsize == 2 else 1e-5,
            atol=1e-5 if dtype.itemsize < 8 else 1e-12,
        )
        edit = report.layers[name]
        change = (turn(new.data).double() - turn(old).double()).norm() / old.double().norm()
        assert edit.relative_change == pytest.approx(float(change), rel=1e-2)
        assert edit.total == old.numel()
        assert edit.energy == 0.8 <= edit.energy_kept
    for key in before:
        if "bias" in key:
            assert torch.equal(before[key], net.state_dict()[key])


@pytest.mark.parametrize("editor", EDITORS)
def test_full_energy_is_the_identity_bit_for_bit(editor):
    net = model()
    before = snapshot(net)
    report = editor(1.0).edit(net, all_factors())
    assert same_bits(net.state_dict(), before)
    assert all(edit.kept == edit.total and edit.relative_change == 0 for edit in report.layers.values())


@pytest.mark.parametrize("editor", [CurvatureEditor, ActivationEditor, RandomBasisEditor])
def test_an_edit_is_idempotent(editor):
    net, factors = model(torch.float64), all_factors()
    editor(0.7).edit(net, factors)
    once = snapshot(net)
    report = editor(0.7).edit(net, factors)
    for key, value in once.items():
        torch.testing.assert_close(net.state_dict()[key], value)
    assert max(edit.relative_change for edit in report.layers.values()) < 1e-12


@pytest.mark.parametrize("editor", EDITORS)
def test_applied_restores_every_bit_also_after_an_exception(editor):
    net, factors = model(), all_factors()
    before = snapshot(net)
    with editor(0.5).applied(net, factors) as report:
        assert isinstance(report, EditReport)
        assert not torch.equal(net["fc"].weight, before["fc.weight"])
    assert same_bits(net.state_dict(), before)

    def fail():
        with editor(0.5).applied(net, factors):
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fail()
    assert same_bits(net.state_dict(), before)


def test_state_dict_edit_is_pure_and_equals_the_module_edit():
    net, factors = model(), all_factors()
    state = net.state_dict()
    before = snapshot(net)
    edited, report = CurvatureEditor(0.6).edit_state_dict(state, factors)
    assert same_bits(state, before)
    assert edited["fc.bias"] is state["fc.bias"]
    same = CurvatureEditor(0.6).edit(net, factors)
    assert same_bits(net.state_dict(), edited)
    assert same.layers == report.layers


def test_tied_keys_of_a_state_dict_are_edited_together():
    weight = torch.randn(5, 6)
    state = {"fc.weight": weight, "alias.weight": weight.view(5, 6), "other.weight": weight.clone()}
    edited, _ = CurvatureEditor(0.6).edit_state_dict(state, KroneckerFactors({"fc": layer(5, 6)}))
    assert edited["alias.weight"] is edited["fc.weight"]
    assert edited["other.weight"] is state["other.weight"]


def test_energy_and_layers_by_pattern():
    net, factors = model(), all_factors()
    report = CurvatureEditor(energy={"f*": 0.5, "fc": 0.9, "conv": 0.8}).edit(net, factors)
    assert {name: edit.energy for name, edit in report.layers.items()} == {"fc": 0.5, "conv": 0.8}
    assert list(CurvatureEditor(0.5, layers=["t", "c*"]).edit(net, factors).layers) == ["conv", "t"]
    with pytest.raises(
        ValueError, match=r"Pattern 'fc1' matches no layer of the factors. Did you mean 'fc'\? They hold"
    ):
        CurvatureEditor(0.5, layers=["fc1"]).edit(net, factors)
    with pytest.raises(ValueError, match="have no layer in common"):
        CurvatureEditor({"fc": 0.5}, layers=["conv"]).edit(net, factors)


def test_the_report_is_a_table():
    factors = KroneckerFactors(all_factors(), {"fisher": "sketched"})
    text = str(CurvatureEditor(0.6).edit(model(), factors))
    assert "fisher=sketched" in text
    assert [line.split()[0] for line in text.splitlines()[3:-1]] == ["fc", "conv", "t", "sq"]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0.0, ValueError, r"must be in \(0, 1\], found 0.0"),
        (1.1, ValueError, "found 1.1"),
        (float("nan"), ValueError, "nan"),
        ("0.5", TypeError, "must be a number"),
        (True, TypeError, "found True"),
        ({"fc": 2.0}, ValueError, r"energy\['fc'\]"),
    ],
)
def test_bad_energy(value, error, message):
    with pytest.raises(error, match=message):
        CurvatureEditor(value)


@pytest.mark.parametrize("layers", ["fc", [1]])
def test_bad_layers_argument(layers):
    with pytest.raises(TypeError, match="layers must be a list of name patterns or None"):
        CurvatureEditor(0.5, layers)


def test_factors_that_do_not_fit_edit_nothing():
    net = model()
    before = snapshot(net)
    good = all_factors()
    wrong = {
        r"Layer 'fc': factors are for a \[5, 7\] weight, the module has \[5, 6\]. Were they collected": {
            "fc": layer(5, 7)
        },
        r"Layer 'convv': the module has no such layer. Did you mean 'conv'": {"convv": layer(4, 18)},
        r"Layer 'sq': Factor A is zero": {"sq": LayerFactors(torch.zeros(4, 4), torch.eye(4), 1, 1)},
        "There are no factors": None,
    }
    for message, bad in wrong.items():
        factors = KroneckerFactors() if bad is None else KroneckerFactors({"conv": good["conv"]} | bad)
        with pytest.raises(ValueError, match=message):
            CurvatureEditor(0.5).edit(net, factors)
        assert same_bits(net.state_dict(), before)
    with pytest.raises(ValueError, match=r"the state dict has no 'fd.weight'\. Did you mean 'fc.weight'"):
        CurvatureEditor(0.5).edit_state_dict(net.state_dict(), KroneckerFactors({"fd": layer(5, 6)}))
    odd = nn.ModuleDict({"fc": nn.LayerNorm(3), "g": nn.Conv2d(2, 2, 1, groups=2)})
    for name, reason in (("fc", "it is a LayerNorm"), ("g", "grouped")):
        with pytest.raises(ValueError, match=f"Layer '{name}' cannot be edited: .*{reason}"):
            CurvatureEditor(0.5).edit(odd, KroneckerFactors({name: layer(2, 2)}))


# Controls -----------------------------------------------------------------------------------------------------------


def test_activation_edit_projects_the_inputs():
    factors, weight = layer(5, 6), torch.randn(5, 6, dtype=torch.float64)
    result = ActivationEditor(0.9).project(weight, factors, 0.9)
    mu, U = torch.linalg.eigh(factors.A)
    kept = next(k for k in range(1, 7) if mu.flip(0)[:k].sum() >= 0.9 * mu.sum())
    U = U.flip(1)[:, :kept]
    torch.testing.assert_close(result.weight, weight @ U @ U.T)
    assert result.kept == 5 * kept


def test_svd_keeps_the_best_rank():
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    result = SVDEditor(0.9).project(weight, layer(3, 3), 0.9)
    torch.testing.assert_close(result.weight, torch.diag(torch.tensor([3.0, 2.0, 0.0])))
    assert result.energy_kept == pytest.approx(13 / 14)
    assert result.kept == 2 * (3 + 3 - 2)


def test_random_basis_keeps_the_asked_share_and_leaves_the_random_state_alone():
    weight = torch.randn(40, 50, dtype=torch.float64)
    state = torch.get_rng_state()
    result = RandomBasisEditor(0.3, seed=1).project(weight, layer(3, 3), 0.3)
    assert torch.equal(state, torch.get_rng_state())
    assert result.kept == 600
    assert (result.weight.norm() / weight.norm()) ** 2 == pytest.approx(0.3, abs=0.05)
    with_another_seed = RandomBasisEditor(0.3, seed=2).project(weight, layer(3, 3), 0.3)
    assert not torch.equal(result.weight, with_another_seed.weight)


def test_a_layer_that_does_not_fit_on_the_gpu_is_edited_where_its_factors_are(monkeypatch):
    model = Gated()
    collected = gathered(model, batches())
    expected, _ = CurvatureEditor().edited_weights(model, collected)
    project, places = CurvatureEditor.project, []

    def small(self, weight, factors, energy):
        places.append(factors.original is factors)
        if factors.original is not factors:
            raise torch.cuda.OutOfMemoryError
        return project(self, weight, factors, energy)

    monkeypatch.setattr("lightning_curvature.editing.projection.place_edit", lambda *_: torch.device("cpu:0"))
    monkeypatch.setattr(CurvatureEditor, "project", small)
    with pytest.warns(UserWarning, match="Layer '(gate|up|down)' does not fit on cpu:0, so it is edited on the CPU"):
        new, _ = CurvatureEditor().edited_weights(model, collected)
    assert places == [False, True] * 3
    assert all(torch.equal(new[name], weight) for name, weight in expected.items())
