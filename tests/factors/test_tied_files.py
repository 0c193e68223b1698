"""A file holds the A of layers that read one tensor once, and each layer gets its own factors from it."""

import json

import pytest
import torch
from safetensors import safe_open

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.text.detection import distinct_inputs
from tests.support.gated import Gated, batches, gathered, same


def test_a_file_holds_a_shared_factor_once(tmp_path):
    factors = gathered(Gated(), batches())
    path = tmp_path / "f.safetensors"
    factors.save(path)
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["down.A", "down.G", "gate.A", "gate.G", "up.G"]
        header = json.loads(file.metadata()["lightning_curvature.factors"])
    assert header["version"] == 2
    assert header["layers"]["up"]["shares_A_with"] == "gate"
    loaded = KroneckerFactors.load(path)
    assert loaded["gate"].A is loaded["up"].A
    assert loaded.digest() == factors.digest()
    opened = KroneckerFactors.open(path)
    gate, up = opened["gate"], opened["up"]
    assert gate.A is up.A
    assert torch.equal(opened["up"].A, factors["up"].A)
    assert loaded["up"].A_error == factors["up"].A_error
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    separate = KroneckerFactors({"up": factors["up"], "down": factors["down"]})
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
        for written in (again, merged):
            assert written.tied_inputs() == tied
            assert written["last"].A is written["blocks.0.fc"].A
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
    first, second, both = (
        gathered(Gated(), data, fisher="empirical")
        for data in (batches(), batches(seed=5), batches() + batches(seed=5))
    )
    merged = first.merge(second)
    assert merged["gate"].A is merged["up"].A
    same(merged, both)
    assert 0.5 < merged["gate"].A_error / both["gate"].A_error < 2
    alone = LayerFactors(A=torch.eye(2), G=torch.eye(2), num_inputs=1, num_gradients=1)
    assert KroneckerFactors({"x": alone}).merge(KroneckerFactors({"x": alone}))["x"].A_error is None


def test_an_opened_file_tells_tied_inputs_by_its_header(tmp_path, monkeypatch):
    factors = many_layers(3)
    factors.save(tmp_path / "f.safetensors")
    opened = KroneckerFactors.open(tmp_path / "f.safetensors")
    monkeypatch.setattr(KroneckerFactors, "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    assert opened.tied_inputs() == {name: name for name in opened} | {"last": "blocks.0.fc"}
    assert set(opened.counts().values()) == {9}
