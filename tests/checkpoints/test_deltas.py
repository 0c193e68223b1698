"""Deltas: edits are taken back and made again, exactly."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_curvature import CurvatureEditor
from lightning_curvature.checkpoints import opening as formats
from lightning_curvature.checkpoints.deltas import apply_delta
from lightning_curvature.report.inspection import describe, description
from tests.support.saved import EDITOR, FORMATS, factors, hashes, saved_hash, source, target, weights


@pytest.mark.parametrize("kind", FORMATS)
def test_revert_gives_the_original_back(saved_model, tmp_path, kind):
    out, delta, back = target(tmp_path, kind), tmp_path / "delta.safetensors", target(tmp_path / "back", kind)
    EDITOR.edit_checkpoint(source(saved_model, kind), factors(saved_model), out, delta=delta)
    apply_delta(out, delta, back, revert=True)
    if kind in ("ckpt", "pt"):  # their archives hold their own names
        original, reverted = (torch.load(path, weights_only=True) for path in (source(saved_model, kind), back))
        assert original.keys() == reverted.keys()
        assert saved_hash(back) == saved_hash(source(saved_model, kind))
        assert formats.open_checkpoint(back).edit_facts is None
    else:
        assert hashes(back) == hashes(source(saved_model, kind))
    again = target(tmp_path / "again", kind)
    apply_delta(source(saved_model, kind), delta, again, revert=False)
    assert all(torch.equal(value, weights(out)[name]) for name, value in weights(again).items())
    with pytest.raises(ValueError, match=r"is not the edited tensor that .* Is this the original checkpoint"):
        apply_delta(source(saved_model, kind), delta, target(tmp_path / "x", kind), revert=True)
    with pytest.raises(ValueError, match=r"is not the original tensor that .* Is it another model"):
        apply_delta(out, delta, target(tmp_path / "x", kind), revert=False)


def test_a_file_of_another_writer_comes_back_byte_for_byte(saved_model, tmp_path):
    """Its header has another order, other spaces and no metadata."""
    plain = formats.open_checkpoint(saved_model / "model.safetensors")
    header = json.dumps(dict(reversed(plain.header.items())), indent=1).encode()
    data = (saved_model / "model.safetensors").read_bytes()[plain.start :]
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    EDITOR.edit_checkpoint(path, factors(saved_model), tmp_path / "b.safetensors", delta=tmp_path / "d.safetensors")
    apply_delta(tmp_path / "b.safetensors", tmp_path / "d.safetensors", tmp_path / "c.safetensors", revert=True)
    assert (tmp_path / "c.safetensors").read_bytes() == path.read_bytes()
    assert not torch.equal(
        weights(tmp_path / "b.safetensors")["model.layers.0.mlp.up_proj.weight"],
        weights(path)["model.layers.0.mlp.up_proj.weight"],
    )


def test_a_damaged_delta_is_refused(saved_model, tmp_path):
    delta = tmp_path / "d.safetensors"
    EDITOR.edit_checkpoint(saved_model / "model.pt", factors(saved_model), tmp_path / "o.pt", delta=delta)
    with safe_open(delta, framework="pt") as file:
        metadata = file.metadata()
    flipped = {name: bits ^ 1 for name, bits in load_file(delta).items()}
    save_file(flipped, delta, metadata=metadata)
    with pytest.raises(ValueError, match="is damaged"):
        apply_delta(tmp_path / "o.pt", delta, tmp_path / "b.pt", revert=True)
    with pytest.raises(ValueError, match="is no delta"):
        apply_delta(tmp_path / "o.pt", saved_model / "model.safetensors", tmp_path / "b.pt", revert=True)
    assert not (tmp_path / "b.pt").exists()


def rewritten(path, out, change=lambda tensors: tensors):
    """The same tensors, written by another program."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(change(load_file(path)), out, metadata=metadata)


def test_revert_of_a_file_with_another_layout(saved_model, tmp_path):
    """Its tensors lie elsewhere; the header of the original does not describe them."""
    delta, out, rearranged = tmp_path / "d.safetensors", tmp_path / "o.safetensors", tmp_path / "p.safetensors"
    EDITOR.edit_checkpoint(saved_model / "model.safetensors", factors(saved_model), out, delta=delta)
    plain = formats.open_checkpoint(out)
    data, header, offset = b"", {"__metadata__": plain.metadata}, 0
    for name in reversed(list(plain.header)):
        content = bytes(plain.read(name).view(torch.uint8).numpy().tobytes())
        header[name] = {**plain.header[name], "data_offsets": [offset, offset + len(content)]}
        data, offset = data + content, offset + len(content)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rearranged.write_bytes(len(text).to_bytes(8, "little") + text + data)
    apply_delta(rearranged, delta, tmp_path / "back.safetensors", revert=True)
    back = weights(tmp_path / "back.safetensors")
    assert all(torch.equal(value, back[name]) for name, value in weights(saved_model / "model.safetensors").items())
    rewritten(out, rearranged, lambda tensors: {**tensors, "extra": torch.ones(2)})
    with pytest.raises(ValueError, match="in tensors that the edit left alone"):
        apply_delta(rearranged, delta, tmp_path / "x.safetensors", revert=True)


@pytest.mark.parametrize("kind", ["safetensors", "folder", "sharded", "pt"])
def test_deltas_work_across_formats(kind, saved_model, tmp_path):
    """Names carry another prefix there, and tied weights stand once or twice."""
    delta = tmp_path / "d.safetensors"
    EDITOR.edit_checkpoint(saved_model / "model.ckpt", factors(saved_model), tmp_path / "o.ckpt", delta=delta)
    out, back = target(tmp_path / "a", kind), target(tmp_path / "b", kind)
    apply_delta(source(saved_model, kind), delta, out, revert=False, overwrite=True)
    apply_delta(out, delta, back, revert=True, overwrite=True)
    assert all(torch.equal(value, weights(back)[name]) for name, value in weights(source(saved_model, kind)).items())
    if kind in ("folder", "sharded"):
        assert (back / "README.md").read_text() == "card"


def test_edits_are_taken_back_in_their_order(saved_model, tmp_path):
    first_delta, second_delta = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    first = CurvatureEditor(0.8, ["*.0.mlp.up_proj"])
    first.edit_checkpoint(
        saved_model / "model.pt", factors(saved_model), first_delta.with_suffix(".pt"), delta=first_delta
    )
    with pytest.warns(UserWarning, match="edited already"):
        CurvatureEditor(0.8, ["*.1.mlp.up_proj"]).edit_checkpoint(
            first_delta.with_suffix(".pt"), factors(saved_model), second_delta.with_suffix(".pt"), delta=second_delta
        )
    before = formats.open_checkpoint(second_delta.with_suffix(".pt")).edit_facts["before"]
    assert list(before["layers"]) == ["model.layers.0.mlp.up_proj"]
    with pytest.raises(ValueError, match="Then revert the later edit first"):
        apply_delta(second_delta.with_suffix(".pt"), first_delta, tmp_path / "x.pt", revert=True)
    apply_delta(second_delta.with_suffix(".pt"), second_delta, tmp_path / "y.pt", revert=True)
    apply_delta(tmp_path / "y.pt", first_delta, tmp_path / "z.pt", revert=True)
    assert saved_hash(tmp_path / "z.pt") == saved_hash(saved_model / "model.pt")
    facts = describe(first_delta)
    assert facts["tensors"] == ["model.layers.0.mlp.up_proj.weight"]
    assert "a delta of 1 tensors" in description(facts)
