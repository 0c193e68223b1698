"""A factor is decomposed once, and its basis goes with it."""

import gc

import pytest
import torch

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.editing import curvature as editor
from lightning_curvature.factors import basis_cache as bases
from lightning_curvature.factors.basis import coefficients
from lightning_curvature.factors.basis_cache import bases_in
from tests.support.gated import PROJECTIONS, Gated, batches, gathered, separately


@pytest.fixture
def decomposed(monkeypatch):
    """The names of the factors that are decomposed."""
    done, decompose = [], bases.decompose
    monkeypatch.setattr(bases, "decompose", lambda factor, what: done.append(what) or decompose(factor, what))
    return done


def test_a_shared_factor_is_decomposed_once(decomposed, tmp_path):
    model = Gated()
    collected = gathered(model, batches())
    new, _ = CurvatureEditor(0.8).edited_weights(model, collected)
    assert sorted(decomposed) == ["Factor A"] * 2 + ["Factor G"] * 3
    for energy in (0.5, 0.7):
        CurvatureEditor(energy).edited_weights(model, collected)
    assert len(decomposed) == 5
    alone, _ = CurvatureEditor(0.8).edited_weights(model, KroneckerFactors(separately(model, batches())))
    for name, weight in new.items():
        torch.testing.assert_close(weight, alone[name])

    torch.save({"state_dict": model.state_dict()}, tmp_path / "m.ckpt")
    collected.save(tmp_path / "f.safetensors")
    for factors in (collected, KroneckerFactors.open(tmp_path / "f.safetensors")):
        decomposed.clear()
        gc.collect()
        kept = len(bases.BASES)
        CurvatureEditor(0.8).edit_checkpoint(tmp_path / "m.ckpt", factors, tmp_path / "out.ckpt", overwrite=True)
        assert sorted(decomposed) == ["Factor A"] * 2 + ["Factor G"] * 3
        gc.collect()
        assert len(bases.BASES) == kept  # bases of a file's edit go with it
        edited = torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(edited[f"{name}.weight"], weight) for name, weight in new.items())


def test_a_basis_goes_with_its_factor(decomposed):
    factor = torch.diag(torch.tensor([3.0, 1.0]))
    layer = LayerFactors(A=factor, G=torch.eye(2), num_inputs=9, num_gradients=9)
    gc.collect()
    kept = len(bases.BASES)
    assert layer.basis.mu.tolist() == [3.0, 1.0]
    assert layer.basis.U_A is layer.basis.U_A
    factor[1, 1] = 2.0  # whoever changes a factor gets its new basis
    assert layer.basis.mu.tolist() == [3.0, 2.0]
    del layer, factor
    gc.collect()
    assert len(bases.BASES) == kept


def test_copies_on_another_device_share_what_was_worked_out(decomposed, monkeypatch):
    """What only a GPU does: "cpu:0" is another device than "cpu" by name, and a copy there is a copy."""
    model, elsewhere = Gated(), torch.device("cpu:0")
    collected = gathered(model, batches())
    expected = [CurvatureEditor(energy).edited_weights(model, collected)[0] for energy in (0.8, 0.5)]
    collected = gathered(model, batches())  # of which nothing is worked out yet
    decomposed.clear()
    monkeypatch.setattr("lightning_curvature.editing.projection.place_edit", lambda weight, factors, shape: elsewhere)
    products = []
    monkeypatch.setattr(editor, "coefficients", lambda *args: products.append(1) or coefficients(*args))
    trial = CurvatureEditor().at(1.0)
    for energy, weights in zip((0.8, 0.5), expected, strict=True):
        new, _ = trial.at(energy).edited_weights(model, collected)
        assert all(torch.equal(new[name], weights[name]) for name in PROJECTIONS)
    assert sorted(decomposed) == ["Factor A"] * 2 + ["Factor G"] * 3
    assert len(products) == 3
    copied = collected["gate"].to(elsewhere)
    assert copied.A is not collected["gate"].A
    assert copied.original is collected["gate"]
    assert copied.to(torch.device("cpu")) is copied
    before = copied.basis.lam[0]
    collected["gate"].G[0, 0] = 7.0  # the next copy gets its new basis
    assert collected["gate"].to(elsewhere).basis.lam[0] > before
    fresh = gathered(model, batches())["up"]
    copied = fresh.to(elsewhere)
    fresh.G[0, 0] = 7.0
    decomposed.clear()
    assert copied.basis.lam[0] < fresh.basis.lam[0]
    assert decomposed == ["Factor G", "Factor A", "Factor G"]  # the first is of what was there before


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
        assert all(torch.equal(tensor, expected) for tensor, expected in zip(basis, plain, strict=True))
    doubled = LayerFactors(A=layer().A, G=2 * layer().G, num_inputs=50, num_gradients=50)
    with bases_in(tmp_path / "bases"):
        torch.testing.assert_close(doubled.basis.lam, 2 * plain.lam)
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
        basis = layer().basis
        assert len(decomposed) == 2
        assert all(torch.equal(tensor, expected) for tensor, expected in zip(basis, want, strict=True))
        layer().basis  # noqa: B018
        assert len(decomposed) == 2
