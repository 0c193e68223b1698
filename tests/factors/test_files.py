"""Files of factors, whole, opened, damaged, and of the paper's own code."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_curvature import KroneckerFactors, LayerFactors
from tests.support.factors import layer


def test_round_trip(tmp_path):
    factors = KroneckerFactors(
        {"a.b": layer(num_seen=20, num_losses=4), "c": layer(1, transposed=True)}, {"fisher": "sketched"}
    )
    factors.save(tmp_path / "new" / "f.safetensors")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["f.safetensors"]
    loaded = KroneckerFactors.load(tmp_path / "new" / "f.safetensors")
    assert list(loaded) == ["a.b", "c"]
    assert loaded.provenance == {"fisher": "sketched"}
    for name, layer_factors in factors.items():
        loaded_layer = loaded[name]
        assert torch.equal(layer_factors.A, loaded_layer.A)
        assert torch.equal(layer_factors.G, loaded_layer.G)
        assert layer_factors.numbers == loaded_layer.numbers
    assert loaded["a.b"].numbers == {
        "num_inputs": 10,
        "num_gradients": 10,
        "num_seen": 20,
        "num_losses": 4,
        "transposed": False,
    }
    assert loaded.digest() == KroneckerFactors({"a.b": layer(), "c": layer(1)}).digest()  # of positions and tensors
    with safe_open(tmp_path / "new" / "f.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"a.b.A", "a.b.G", "c.A", "c.G"}


def test_files_that_are_no_factor_files(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    KroneckerFactors({"fc": layer()}).save(good)
    whole = good.read_bytes()
    for size in (0, 4, 50, len(whole) - 1):
        bad.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a complete factor file"):
            KroneckerFactors.load(bad)
    save_file({"x": torch.ones(1)}, bad)
    with pytest.raises(ValueError, match="not a complete factor file"):
        KroneckerFactors.load(bad)
    save_file({"x": torch.ones(1)}, bad, {"lightning_curvature.factors": json.dumps({"version": 99})})
    with pytest.raises(ValueError, match="version 99, this package reads those up to 2"):
        KroneckerFactors.load(bad)
    with pytest.raises(FileNotFoundError):
        KroneckerFactors.load(tmp_path / "nowhere")


def test_factors_of_the_papers_own_code(tmp_path):
    A, G = torch.eye(3) * 2, torch.eye(2)
    places = [(block, name) for block in (3, 10) for name in ("up", "gate")]
    entries = {f"blk{block}.{name}": {"A": A, "G": G * block, "n_tokens": 7} for block, name in places}
    torch.save(entries, tmp_path / "f.pt")
    factors = KroneckerFactors.load(tmp_path / "f.pt", names="model.layers.{block}.mlp.{projection}_proj")
    assert set(factors) == {f"model.layers.{block}.mlp.{name}_proj" for block in (3, 10) for name in ("up", "gate")}
    layer = factors["model.layers.10.mlp.gate_proj"]
    assert torch.equal(layer.A, A)
    assert torch.equal(layer.G, 10 * G)
    assert layer.num_inputs == layer.num_gradients == 7
    with pytest.raises(ValueError, match=r"4 entries become 1 layers by names='fc'"):
        KroneckerFactors.load(tmp_path / "f.pt", names="fc")
    torch.save({"x": 1}, tmp_path / "g.pt")
    with pytest.raises(ValueError, match=r"expected entries 'blk23.gate' with A, G and n_tokens, found 'x'"):
        KroneckerFactors.load(tmp_path / "g.pt", names="fc")


def test_an_opened_file_is_read_layer_by_layer(tmp_path):
    """None is kept, and all of it is as in a loaded one."""
    eye = torch.eye(3)
    layers = {n: LayerFactors(A=i * eye, G=eye, num_inputs=5, num_gradients=5) for i, n in enumerate(("a", "b"), 1)}
    KroneckerFactors(layers, {"fisher": "exact"}).save(tmp_path / "f.safetensors")
    opened, loaded = (
        KroneckerFactors.open(tmp_path / "f.safetensors"),
        KroneckerFactors.load(tmp_path / "f.safetensors"),
    )
    assert opened.digest() == loaded.digest()
    assert opened.provenance == {"fisher": "exact"}
    assert list(opened) == ["a", "b"]
    assert opened["a"] is not opened["a"]
    assert loaded["a"] is loaded["a"]
    assert torch.equal(opened.merge(loaded)["b"].A, 2 * eye)
    with pytest.raises(KeyError, match="No factors of layer 'c'"):
        opened["c"]
    (tmp_path / "g.safetensors").write_bytes((tmp_path / "f.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a complete factor file"):
        KroneckerFactors.open(tmp_path / "g.safetensors")
