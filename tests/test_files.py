"""Saved checkpoints: edited, reverted and inspected, in every format."""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.checkpoints import archive, names
from lightning_curvature.checkpoints import opening as formats
from lightning_curvature.checkpoints.deltas import apply_delta
from lightning_curvature.checkpoints.facts import ENTRY
from lightning_curvature.checkpoints.loading import read_weights
from lightning_curvature.checkpoints.opening import open_checkpoint
from lightning_curvature.cli.parser import main
from lightning_curvature.collect.passes import collect
from lightning_curvature.editing import streaming as files
from lightning_curvature.editing.file_layers import StreamedFactors
from lightning_curvature.report.inspection import describe, description
from lightning_curvature.storage import atomic
from tests import language, processes

FORMATS = ("ckpt", "pt", "safetensors", "folder", "sharded")
EDITOR = CurvatureEditor(0.8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One model in every format, with its factors."""
    root = tmp_path_factory.mktemp("saved")
    module = language.LitLM("llama")
    module.net = module.net.bfloat16()
    rows = language.tokens(16, 12)
    step = lambda batch: module.net(input_ids=batch, labels=batch).loss  # noqa: E731
    collect(module.net, [rows], step, layers="mlp").save(root / "factors.safetensors")
    state = module.net.state_dict()
    checkpoint = {
        "state_dict": {f"net.{key}": value for key, value in state.items()},
        "epoch": 3,
        "optimizer_states": [{"x": torch.ones(3)}],
        "hyper_parameters": {"family": "llama"},
        "pytorch-lightning_version": "2.6.6",
    }
    torch.save(checkpoint, root / "model.ckpt")
    torch.save(state, root / "model.pt")
    kept = {key: value.clone() for key, value in state.items() if key != "lm_head.weight"}
    save_file(kept, root / "model.safetensors", metadata={"format": "pt", "note": "mine"})
    for name, size in (("folder", "5GB"), ("sharded", "6KB")):
        module.net.save_pretrained(root / name, max_shard_size=size)
        language.tokenizer().save_pretrained(root / name)
        (root / name / "README.md").write_text("card")
    return root


def source(saved, kind):
    return saved / (kind if kind in ("folder", "sharded") else f"model.{kind}")


def target(tmp_path, kind):
    return tmp_path / (f"out.{kind}" if kind in ("ckpt", "pt", "safetensors") else "out")


def weights(path):
    """Every tensor of a checkpoint by its plain name."""
    found = formats.open_checkpoint(path)
    return {name.removeprefix("net."): found.read(name) for name in found.shapes()}


def content_hash(path):
    found = formats.open_checkpoint(path)
    return formats.content_hash(formats.tensor_hashes(found.shapes(), found.read))


def hashes(path):
    paths = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {p.name if path.is_dir() else "": hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def factors(saved):
    return KroneckerFactors.load(saved / "factors.safetensors")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gets_the_edit_of_the_model_in_memory(saved, tmp_path, kind):
    before = weights(source(saved, kind))
    model = transformers.AutoModelForCausalLM.from_pretrained(saved / "folder", dtype="auto")
    expected = EDITOR.edit(model, factors(saved))
    out = target(tmp_path, kind)
    report = EDITOR.edit_checkpoint(source(saved, kind), factors(saved), out)
    assert {name: edit.kept for name, edit in report.layers.items()} == {n: e.kept for n, e in expected.layers.items()}
    after = weights(out)
    assert list(after) == list(before)
    for name, value in after.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, model.state_dict()[name])
        assert torch.equal(value, before[name]) == (name.removesuffix(".weight") not in report.layers)
    assert not [path for path in tmp_path.iterdir() if path != out]
    again = formats.open_checkpoint(out).provenance
    assert again["source"] == content_hash(source(saved, kind))
    assert again["factors"] == factors(saved).digest()
    assert again["layers"]["model.layers.1.mlp.up_proj"]["energy"] == 0.8
    assert again["provenance"]["fisher"] == "sketched"


def test_the_usual_loaders_load_them(saved, tmp_path):
    for kind in FORMATS:
        EDITOR.edit_checkpoint(source(saved, kind), factors(saved), target(tmp_path / kind, kind))
    state = torch.load(tmp_path / "pt" / "out.pt", weights_only=True)
    net = language.model("llama").bfloat16()
    net.load_state_dict(state)
    assert list(state) == list(torch.load(saved / "model.pt", weights_only=True))
    checkpoint = torch.load(tmp_path / "ckpt" / "out.ckpt", weights_only=True)
    original = torch.load(saved / "model.ckpt", weights_only=True)
    assert set(checkpoint) == {*original, ENTRY}
    assert checkpoint["epoch"] == 3
    assert torch.equal(checkpoint["optimizer_states"][0]["x"], torch.ones(3))
    tied = checkpoint["state_dict"]
    assert tied["net.lm_head.weight"].data_ptr() == tied["net.model.embed_tokens.weight"].data_ptr()
    module = language.LitLM.load_from_checkpoint(tmp_path / "ckpt" / "out.ckpt", weights_only=True, strict=True)
    for kind in ("folder", "sharded"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind / "out", dtype="auto")
        for key, value in net.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)
            assert torch.equal(module.net.state_dict()[key].bfloat16(), value)
        card = (tmp_path / kind / "out" / "README.md").read_text()
        assert card.startswith("card\n\n<!-- lightning_curvature: begin -->\n## Edited weights\n")
        assert "| model.layers.1.mlp.up_proj" in card
        assert factors(saved).digest() in card
        assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / kind / "out")) == 40
    assert (
        load_file(tmp_path / "safetensors" / "out.safetensors").keys() == load_file(saved / "model.safetensors").keys()
    )
    with safe_open(tmp_path / "safetensors" / "out.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert file.metadata()["note"] == "mine"
    index = "model.safetensors.index.json"
    assert (tmp_path / "sharded" / "out" / index).read_text() == (saved / "sharded" / index).read_text()
    unedited = [f for f, h in hashes(saved / "sharded").items() if hashes(tmp_path / "sharded" / "out").get(f) == h]
    assert {"config.json", "tokenizer.json", index} <= set(unedited)


@pytest.mark.parametrize("kind", FORMATS)
def test_revert_gives_the_original_back(saved, tmp_path, kind):
    out, delta, back = target(tmp_path, kind), tmp_path / "delta.safetensors", target(tmp_path / "back", kind)
    EDITOR.edit_checkpoint(source(saved, kind), factors(saved), out, delta=delta)
    apply_delta(out, delta, back, revert=True)
    if kind in ("ckpt", "pt"):  # their archives hold their own names
        one, two = (torch.load(path, weights_only=True) for path in (source(saved, kind), back))
        assert one.keys() == two.keys()
        assert content_hash(back) == content_hash(source(saved, kind))
        assert formats.open_checkpoint(back).provenance is None
    else:
        assert hashes(back) == hashes(source(saved, kind))
    again = target(tmp_path / "again", kind)
    apply_delta(source(saved, kind), delta, again, revert=False)
    assert all(torch.equal(value, weights(out)[name]) for name, value in weights(again).items())
    with pytest.raises(ValueError, match=r"is not the edited tensor that .* Is it the checkpoint before the edit"):
        apply_delta(source(saved, kind), delta, target(tmp_path / "x", kind), revert=True)
    with pytest.raises(ValueError, match=r"is not the original tensor that .* Is it another model"):
        apply_delta(out, delta, target(tmp_path / "x", kind), revert=False)


def test_a_file_of_another_writer_comes_back_byte_for_byte(saved, tmp_path):
    """Its header has another order, other spaces and no metadata."""
    plain = formats.open_checkpoint(saved / "model.safetensors")
    header = json.dumps(dict(reversed(plain.header.items())), indent=1).encode()
    data = (saved / "model.safetensors").read_bytes()[plain.start :]
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    EDITOR.edit_checkpoint(path, factors(saved), tmp_path / "b.safetensors", delta=tmp_path / "d.safetensors")
    apply_delta(tmp_path / "b.safetensors", tmp_path / "d.safetensors", tmp_path / "c.safetensors", revert=True)
    assert (tmp_path / "c.safetensors").read_bytes() == path.read_bytes()
    assert not torch.equal(
        weights(tmp_path / "b.safetensors")["model.layers.0.mlp.up_proj.weight"],
        weights(path)["model.layers.0.mlp.up_proj.weight"],
    )


def test_a_damaged_delta_is_refused(saved, tmp_path):
    delta = tmp_path / "d.safetensors"
    EDITOR.edit_checkpoint(saved / "model.pt", factors(saved), tmp_path / "o.pt", delta=delta)
    with safe_open(delta, framework="pt") as file:
        metadata = file.metadata()
    flipped = {name: bits ^ 1 for name, bits in load_file(delta).items()}
    save_file(flipped, delta, metadata=metadata)
    with pytest.raises(ValueError, match="is damaged"):
        apply_delta(tmp_path / "o.pt", delta, tmp_path / "b.pt", revert=True)
    with pytest.raises(ValueError, match="is no delta"):
        apply_delta(tmp_path / "o.pt", saved / "model.safetensors", tmp_path / "b.pt", revert=True)
    assert not (tmp_path / "b.pt").exists()


def rewritten(path, out, change=lambda tensors: tensors):
    """The same tensors, written by another program."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(change(load_file(path)), out, metadata=metadata)


def test_revert_of_a_file_with_another_layout(saved, tmp_path):
    """Its tensors lie elsewhere; the header of the original does not describe them."""
    delta, out, other = tmp_path / "d.safetensors", tmp_path / "o.safetensors", tmp_path / "p.safetensors"
    EDITOR.edit_checkpoint(saved / "model.safetensors", factors(saved), out, delta=delta)
    plain = formats.open_checkpoint(out)
    data, header, offset = b"", {"__metadata__": plain.metadata}, 0
    for name in reversed(list(plain.header)):
        content = bytes(plain.read(name).view(torch.uint8).numpy().tobytes())
        header[name] = {**plain.header[name], "data_offsets": [offset, offset + len(content)]}
        data, offset = data + content, offset + len(content)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    other.write_bytes(len(text).to_bytes(8, "little") + text + data)
    apply_delta(other, delta, tmp_path / "back.safetensors", revert=True)
    back = weights(tmp_path / "back.safetensors")
    assert all(torch.equal(value, back[name]) for name, value in weights(saved / "model.safetensors").items())
    rewritten(out, other, lambda tensors: {**tensors, "extra": torch.ones(2)})
    with pytest.raises(ValueError, match="also in tensors that the edit left alone"):
        apply_delta(other, delta, tmp_path / "x.safetensors", revert=True)


def test_deltas_work_across_formats(saved, tmp_path):
    """Names carry another prefix there, and tied weights stand once or twice."""
    delta = tmp_path / "d.safetensors"
    EDITOR.edit_checkpoint(saved / "model.ckpt", factors(saved), tmp_path / "o.ckpt", delta=delta)
    for kind in ("safetensors", "folder", "sharded", "pt"):
        out, back = target(tmp_path / "a", kind), target(tmp_path / "b", kind)
        apply_delta(source(saved, kind), delta, out, revert=False, overwrite=True)
        apply_delta(out, delta, back, revert=True, overwrite=True)
        assert all(torch.equal(value, weights(back)[name]) for name, value in weights(source(saved, kind)).items())
        if kind in ("folder", "sharded"):
            assert (back / "README.md").read_text() == "card"


def test_edits_are_taken_back_in_their_order(saved, tmp_path):
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    first = CurvatureEditor(0.8, ["*.0.mlp.up_proj"])
    first.edit_checkpoint(saved / "model.pt", factors(saved), one.with_suffix(".pt"), delta=one)
    with pytest.warns(UserWarning, match="edited already"):
        CurvatureEditor(0.8, ["*.1.mlp.up_proj"]).edit_checkpoint(
            one.with_suffix(".pt"), factors(saved), two.with_suffix(".pt"), delta=two
        )
    before = formats.open_checkpoint(two.with_suffix(".pt")).provenance["before"]
    assert list(before["layers"]) == ["model.layers.0.mlp.up_proj"]
    with pytest.raises(ValueError, match="Take back the later edit first"):
        apply_delta(two.with_suffix(".pt"), one, tmp_path / "x.pt", revert=True)
    apply_delta(two.with_suffix(".pt"), two, tmp_path / "y.pt", revert=True)
    apply_delta(tmp_path / "y.pt", one, tmp_path / "z.pt", revert=True)
    assert content_hash(tmp_path / "z.pt") == content_hash(saved / "model.pt")
    found = describe(one)
    assert found["tensors"] == ["model.layers.0.mlp.up_proj.weight"]
    assert "a delta of 1 tensors" in description(found)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_targets(saved, tmp_path):
    out = tmp_path / "o.pt"
    with pytest.raises(FileExistsError, match="is the source itself"):
        EDITOR.edit_checkpoint(
            saved / "model.pt", factors(saved), saved / "sharded" / ".." / "model.pt", overwrite=True
        )
    EDITOR.edit_checkpoint(saved / "model.pt", factors(saved), out)
    with pytest.raises(FileExistsError, match=r"o.pt exists. Choose another path, or --overwrite it"):
        EDITOR.edit_checkpoint(saved / "model.pt", factors(saved), out)
    with pytest.warns(UserWarning, match=r"o.pt is edited already \(kfac, layers .* and 3 more\)"):
        EDITOR.edit_checkpoint(out, factors(saved), tmp_path / "p.pt")
    with pytest.raises(
        ValueError, match=r"would change nothing.* Choose a smaller energy, or allow more \(--perplexity\)"
    ):
        CurvatureEditor(1.0).edit_checkpoint(saved / "model.pt", factors(saved), tmp_path / "q.pt")
    folder = tmp_path / "folder"
    shutil.copytree(saved / "folder", folder)
    (folder / "old").write_text("x")
    EDITOR.edit_checkpoint(saved / "sharded", factors(saved), folder, overwrite=True)
    assert not (folder / "old").exists()
    assert torch.equal(weights(folder)["model.norm.weight"], weights(saved / "sharded")["model.norm.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "o.pt", "p.pt"]


@pytest.mark.parametrize("held", [["thesis.tex"], ["config.json"], ["config.json/x"], ["model.safetensors"], ["a/b"]])
@pytest.mark.parametrize("what", ["edit", "revert", "apply"])
def test_only_a_model_or_nothing_is_replaced_as_a_folder(saved, tmp_path, what, held):
    out, delta = tmp_path / "out", tmp_path / "d.safetensors"
    EDITOR.edit_checkpoint(saved / "folder", factors(saved), tmp_path / "edited", delta=delta)

    def write():
        if what == "edit":
            EDITOR.edit_checkpoint(saved / "folder", factors(saved), out, overwrite=True)
        else:
            apply_delta(
                tmp_path / "edited" if what == "revert" else saved / "folder",
                delta,
                out,
                revert=what == "revert",
                overwrite=True,
            )

    for name in held:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("precious")
    with pytest.raises(FileExistsError, match=r"out holds other things than a model, .* Name a new folder"):
        write()
    assert [(out / name).read_text() for name in held] == ["precious"] * len(held)
    shutil.rmtree(out)
    out.mkdir()
    write()
    write()  # a model is replaced, edited or not
    assert (out / "config.json").is_file()


def test_outputs_never_replace_what_is_read(saved, tmp_path):
    folder = tmp_path / "runs" / "model"
    shutil.copytree(saved / "folder", folder)
    old = hashes(folder)
    for out, delta, message in [
        (tmp_path / "runs", None, "lie one inside the other"),
        (folder / "edited", None, "lie one inside the other"),
        (tmp_path / "o", folder, "is the source itself"),
        (tmp_path / "o", tmp_path / "o", "is named twice"),
        (tmp_path / "o", tmp_path / "o" / "d.safetensors", "lies inside of a folder that is written as a whole"),
        (tmp_path / "o", folder / "d.safetensors", "lie one inside the other"),
    ]:
        with pytest.raises(FileExistsError, match=message):
            EDITOR.edit_checkpoint(folder, factors(saved), out, delta=delta, overwrite=True)
    delta = tmp_path / "d.safetensors"
    delta.write_text("precious")
    with pytest.raises(FileExistsError, match=r"d.safetensors exists"):
        EDITOR.edit_checkpoint(folder, factors(saved), tmp_path / "o", delta=delta)
    assert delta.read_text() == "precious"
    assert hashes(folder) == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.safetensors", "runs"]


def test_there_is_no_edited_copy_without_its_delta(saved, tmp_path, monkeypatch):
    """The delta is written first, and taken back if the copy fails."""
    out, delta = tmp_path / "o.pt", tmp_path / "d.safetensors"
    monkeypatch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        EDITOR.edit_checkpoint(saved / "model.pt", factors(saved), out, delta=delta)
    assert not list(tmp_path.iterdir())


def test_two_models_in_one_folder_are_refused(saved, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(saved / "sharded", folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.warns(UserWarning, match="'pytorch_model.bin': weights in other formats, which are not edited"):
        EDITOR.edit_checkpoint(folder, factors(saved), tmp_path / "o")
    shutil.copy(saved / "folder" / "model.safetensors", folder)
    with pytest.raises(ValueError, match=r"holds both model.safetensors and model.safetensors.index.json: two models"):
        EDITOR.edit_checkpoint(folder, factors(saved), tmp_path / "p")


def test_other_nestings_and_old_files(saved, tmp_path):
    state = torch.load(saved / "model.pt", weights_only=True)
    torch.save({"model_state_dict": state, "epoch": 1}, tmp_path / "a.pt")
    torch.save(dict(state), tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "b.pt"):
        EDITOR.edit_checkpoint(tmp_path / name, factors(saved), tmp_path / f"o{name}")
    edited = torch.load(tmp_path / "oa.pt", weights_only=True)
    assert edited["epoch"] == 1
    other = torch.load(tmp_path / "ob.pt", weights_only=True)
    assert all(torch.equal(value, other[key]) for key, value in edited["model_state_dict"].items())
    numbers = {"state_dict": state, "lr": np.float64(0.1)}
    torch.save(numbers, tmp_path / "n.ckpt")
    allowed = []
    for _ in range(3):  # torch names one after the other
        try:
            EDITOR.edit_checkpoint(tmp_path / "n.ckpt", factors(saved), tmp_path / "on.ckpt", allow_globals=allowed)
        except ValueError as error:
            allowed += str(error).partition("--allow-global ")[2].partition(" (")[0].split()
    assert (tmp_path / "on.ckpt").exists()


def test_ties_that_an_edit_cannot_keep_are_refused(saved, tmp_path):
    state = torch.load(saved / "model.pt", weights_only=True)
    name = "model.layers.0.mlp.up_proj.weight"
    torch.save({**state, "transposed": state[name].t()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"'transposed' shares a part of its memory \(tied weights\)"):
        EDITOR.edit_checkpoint(tmp_path / "a.pt", factors(saved), tmp_path / "o.pt")
    gate = "model.layers.0.mlp.gate_proj.weight"
    torch.save({**state, gate: state[name]}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"is the same tensor \(tied weights\)"):
        EDITOR.edit_checkpoint(tmp_path / "b.pt", factors(saved), tmp_path / "o.pt")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", ["pt", "ckpt"])
def test_a_malicious_file_is_refused_and_does_not_run(saved, tmp_path, suffix):
    path, trace = tmp_path / f"evil.{suffix}", tmp_path / "trace"
    state = torch.load(saved / "model.pt", weights_only=True)
    torch.save({"state_dict": state, "x": Payload(trace)} if suffix == "ckpt" else {**state, "x": Payload(trace)}, path)
    with pytest.raises(ValueError, match=r"calls (posix|nt).mkdir when it is unpickled.*Do not trust this file"):
        EDITOR.edit_checkpoint(path, factors(saved), tmp_path / "out.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_harmless_classes_can_be_allowed(saved, tmp_path):
    state = torch.load(saved / "model.pt", weights_only=True)
    torch.save({"state_dict": state, "hyper_parameters": argparse.Namespace(lr=0.1)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"objects of argparse.Namespace, .* --allow-global argparse.Namespace"):
        EDITOR.edit_checkpoint(tmp_path / "a.ckpt", factors(saved), tmp_path / "b.ckpt")
    allowed = ["argparse.Namespace"]
    EDITOR.edit_checkpoint(tmp_path / "a.ckpt", factors(saved), tmp_path / "b.ckpt", allow_globals=allowed)
    assert archive.read_archive(tmp_path / "b.ckpt", allowed)["hyper_parameters"].lr == 0.1
    with pytest.raises(ValueError, match=r"there is no class 'argparse.Nothing'"):
        archive.read_archive(tmp_path / "a.ckpt", ["argparse.Nothing"])


def test_a_snapshot_of_the_hugging_face_cache_is_read(saved, tmp_path):
    """Its files are links to the blobs of its repository; the copy holds files."""
    repository = tmp_path / "models--some--model"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((saved / "sharded").iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:040x}"))
    old, linked = hashes(blobs), tmp_path / "link"
    linked.symlink_to(snapshot)
    for number, source in enumerate((snapshot, linked)):
        out, delta, back = (tmp_path / f"{name}{number}" for name in ("out", "delta", "back"))
        EDITOR.edit_checkpoint(source, factors(saved), out, delta=delta)
        assert describe(source)["edit"] is None
        assert not any(path.is_symlink() for path in out.iterdir())
        assert describe(out)["edit"]["method"] == "kfac"
        apply_delta(out, delta, back, revert=True)
        assert hashes(back) == hashes(saved / "sharded")
        with pytest.raises(FileExistsError, match="is the source itself, or another file that is read"):
            EDITOR.edit_checkpoint(source, factors(saved), out, delta=blobs / f"{0:040x}", overwrite=True)
    assert hashes(blobs) == old
    stranger = tmp_path / "models--another" / "blobs" / "secret"
    stranger.parent.mkdir(parents=True)
    stranger.write_text("secret")
    for target in (stranger, tmp_path / "out0" / "config.json", repository / "snapshots"):
        (snapshot / "extra").symlink_to(target)
        with pytest.raises(ValueError, match="'extra' leads out of the folder"):
            EDITOR.edit_checkpoint(snapshot, factors(saved), tmp_path / "no")
        (snapshot / "extra").unlink()
    moved = tmp_path / "other" / "0123abc"  # beside blobs, and yet no snapshot
    shutil.copytree(snapshot, moved, symlinks=True)
    shutil.copytree(blobs, tmp_path / "blobs")
    with pytest.raises(ValueError, match=r"leads out of the folder|no such file"):
        EDITOR.edit_checkpoint(moved, factors(saved), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_folders_that_lead_out_are_refused(saved, tmp_path):
    outside = tmp_path / "outside.safetensors"
    shutil.copy(saved / "model.safetensors", outside)
    folder = tmp_path / "folder"
    shutil.copytree(saved / "sharded", folder)
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    for bad in ("../outside.safetensors", str(outside)):
        content = json.loads(good)
        content["weight_map"]["model.norm.weight"] = bad
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="leads out of the folder"):
            EDITOR.edit_checkpoint(folder, factors(saved), tmp_path / "out")
    index.write_text(good)
    (folder / "link.json").symlink_to(outside)
    with pytest.raises(ValueError, match=r"'link.json' leads out of the folder"):
        EDITOR.edit_checkpoint(folder, factors(saved), tmp_path / "out")
    (folder / "link.json").unlink()
    content = json.loads(good)
    content["weight_map"]["model.norm.weight"] = "gone.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="named in the index, but there is no such file"):
        EDITOR.edit_checkpoint(folder, factors(saved), tmp_path / "out")
    content["weight_map"]["model.norm.weight"] = content["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    index.write_text(json.dumps(content))
    if content["weight_map"] != json.loads(good)["weight_map"]:
        with pytest.raises(ValueError, match=r"it does not. The folder is not complete"):
            EDITOR.edit_checkpoint(folder, factors(saved), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "outside.safetensors"]


def test_what_is_no_checkpoint(saved, tmp_path):
    (tmp_path / "a.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-10])
    (tmp_path / "a.pt").write_bytes((saved / "model.pt").read_bytes()[:2000])
    (tmp_path / "b.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "c.pt")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("a.safetensors", "not a complete safetensors file"),
        ("a.pt", "not a file of torch.save"),
        ("b.pt", "not a file of torch.save"),
        ("c.pt", "expected a state dict"),
        ("empty", "holds neither model.safetensors"),
    ]:
        with pytest.raises(ValueError, match=message):
            EDITOR.edit_checkpoint(tmp_path / name, factors(saved), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        EDITOR.edit_checkpoint(tmp_path / "none", factors(saved), tmp_path / "out")


# Names ---------------------------------------------------------------------------------------------------------------


OTHERS = {
    "an empty file": b"",
    "text": b"Not found\n",
    "JSON": b'\xef\xbb\xbf {"error": "none"}',
    "a web page .HTML.": b"\n<!DOCTYPE html><html>" + "\u00fc".encode() * 900,
    "a compressed file .gzip.": b"\x1f\x8b\x08\x00" * 9,
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
}


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("kind", OTHERS)
def test_files_that_are_something_else_are_called_so(tmp_path, kind, suffix):
    path = tmp_path / f"m{suffix}"
    path.write_bytes(OTHERS[kind])
    what = "complete safetensors file" if suffix == ".safetensors" else "file of torch.save"
    for read in (open_checkpoint, read_weights):
        with pytest.raises(ValueError, match=rf"m{suffix}: not a {what}, but {kind}.*\. \w.*\.$") as error:
            read(path)
        assert "pop from" not in str(error.value)
    with pytest.raises(ValueError, match=rf"not a complete factor file, but {kind}|torch.save|no safetensors"):
        KroneckerFactors.open(path)


def test_archives_that_were_cut_off(saved, tmp_path):
    whole = (saved / "model.pt").read_bytes()
    for name, start in {"cut.pt": whole[: len(whole) // 2], "cut.safetensors": whole[:900]}.items():
        (tmp_path / name).write_bytes(start)
        with pytest.raises(ValueError, match=r"but an archive that was cut off\. Copy or download the file again"):
            open_checkpoint(tmp_path / name)
    torch.save({"w.weight": torch.ones(9, 9)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "old.pt").write_bytes((tmp_path / "old.pt").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"old.pt: not a file of torch.save, or a broken one \(.+: .+\)\. Copy"):
        open_checkpoint(tmp_path / "old.pt")


def test_names_match_by_rule():
    layers = ["layers.0.fc", "layers.1.fc"]
    for prefix in ("", "model.", "module._orig_mod.", "net.model."):
        keys = [f"{prefix}{layer}.weight" for layer in layers] + ["other.weight"]
        assert list(names.match_layers(layers, keys).values()) == keys[:2]
        prefixed, plain = [key.removesuffix(".weight") for key in keys[:2]], [f"{layer}.weight" for layer in layers]
        assert list(names.match_layers(prefixed, plain).values()) == plain
    both = [f"{who}.{layer}.weight" for who in ("student", "teacher") for layer in layers]
    with pytest.raises(ValueError, match=r"may be any of 'student.layers.0.fc.weight', 'teacher.layers.0.fc.weight'"):
        names.match_layers(layers, both)
    assert list(names.match_layers(layers, [*both, *(f"{layer}.weight" for layer in layers)]).values()) == [
        "layers.0.fc.weight",
        "layers.1.fc.weight",
    ]
    with pytest.raises(ValueError, match=r"1 of 2 layers .*\n  'layers.1.fc'. Did you mean .*'layers.1.fd.weight'"):
        names.match_layers(layers, ["layers.0.fc.weight", "layers.1.fd.weight"])
    with pytest.raises(ValueError, match="2 of 2 layers of the factors have no weight"):
        names.match_layers(layers, ["x.bias"])
    packed = ["layers.0.fc.weight", "layers.1.fc.qweight"]
    with pytest.raises(ValueError, match=r"'layers.1.fc'. Its weight is packed \(quantized\): 'layers.1.fc.qweight'"):
        names.match_layers(layers, packed)


def test_names_never_lead_to_another_layer():
    """Exact names first, no other block, no tensor twice."""
    exact = ["net.base_layer.fc.weight", "net.fc.weight"]
    assert names.match_layers(["net.base_layer.fc"], exact) == {"net.base_layer.fc": exact[0]}
    assert names.match_layers(["net.base_layer.fc", "net.fc"], exact)["net.fc"] == exact[1]
    for layer, tensor in (("model.layers.15.mlp.down_proj", "down_proj.weight"), ("fc", "layers.3.fc.weight")):
        with pytest.raises(ValueError, match="1 of 1 layers"):
            names.match_layers([layer], [tensor])
    with pytest.raises(ValueError, match=r"may be any of 'm.a._orig_mod.fc.weight', 'm.a.base_layer.fc.weight'"):
        names.match_layers(["a.fc"], ["m.a._orig_mod.fc.weight", "m.a.base_layer.fc.weight"])
    with pytest.raises(ValueError, match="would be one tensor"):
        names.match_layers(["a._orig_mod.fc", "a.fc"], ["m.a.fc.weight"])


# Crashes -------------------------------------------------------------------------------------------------------------


def edit_until_killed(source, factors, target, when):
    """Edit a file, and die at the when-th operation on files."""
    loaded, count = KroneckerFactors.load(factors), 0

    def audit(event, args):
        nonlocal count
        if event in ("open", "os.rename", "shutil.copyfile", "os.mkdir", "os.remove", "os.rmdir"):
            count += 1
            if count == when:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    CurvatureEditor(0.8).edit_checkpoint(source, loaded, target, overwrite=True)


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "ckpt"])
def test_a_killed_process_leaves_the_old_or_the_new(saved, tmp_path, kind):
    """At many points; and the next run succeeds."""
    out = target(tmp_path, kind)
    if kind == "sharded":
        shutil.copytree(saved / "sharded", out)
    else:
        shutil.copy(source(saved, kind), out)
    # The archive of a .ckpt holds the random name of its temporary file.
    state = content_hash if kind == "ckpt" else hashes
    old = state(out)
    done = target(tmp_path / "done", kind)
    EDITOR.edit_checkpoint(source(saved, kind), factors(saved), done)
    new, outcomes = state(done), []
    for when in (3, 8, 14, 20, 28, 36, 60):
        given = (source(saved, kind), saved / "factors.safetensors", out, when)
        code = processes.exit_code(edit_until_killed, *given)
        assert state(out) in (old, new)
        outcomes.append(code)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    EDITOR.edit_checkpoint(source(saved, kind), factors(saved), out, overwrite=True)
    assert state(out) == new
    assert outcomes.count(-signal.SIGKILL) >= 2


def test_a_full_disk_leaves_nothing(saved, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "sync", full)
    monkeypatch.setattr("lightning_curvature.checkpoints.huggingface.sync", full)
    for kind in FORMATS:
        with pytest.raises(OSError, match="No space left"):
            EDITOR.edit_checkpoint(source(saved, kind), factors(saved), target(tmp_path, kind))
    assert not list(tmp_path.iterdir())


def test_folders_are_replaced_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda one, two: False)
    new, old = tmp_path / "new", tmp_path / "target"
    for folder in (new, old):
        folder.mkdir()
        (folder / "x").write_text(folder.name)
    atomic.replace_folder(new, old)
    assert (old / "x").read_text() == "new"


@pytest.mark.parametrize("lost", [False, True])
def test_an_old_folder_is_put_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch, lost):
    """Also what cannot be put back is not deleted."""
    monkeypatch.setattr(atomic, "_exchange", lambda one, two: False)
    old, rename = tmp_path / "target", Path.rename
    old.mkdir()
    (old / "x").write_text("old")

    def failing(self, to):
        if self.name == "new" or (lost and self.name == "new.old"):
            raise OSError(28, "No space left on device")
        return rename(self, to)

    def write():
        with atomic.replacing_folder(old) as new:
            new.mkdir()

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="No space left"):
        write()
    (kept,) = tmp_path.rglob("x")
    assert kept.read_text() == "old"
    assert (kept.parent == old) == (not lost)
    assert lost or list(tmp_path.iterdir()) == [old]


# Commands ------------------------------------------------------------------------------------------------------------


def run(*args):
    main([str(arg) for arg in args])


def test_commands(saved, tmp_path, capsys):
    out, delta, back = tmp_path / "out", tmp_path / "d.safetensors", tmp_path / "back"
    edit = ("edit", "--checkpoint", saved / "sharded", "--factors", saved / "factors.safetensors", "--out", out)
    run(*edit, "--energy", 0.6, "--layers", "model.layers.1.mlp.*", "--dry-run")
    shown = capsys.readouterr().out
    assert "model.layers.1.mlp.up_proj -> model.layers.1.mlp.up_proj.weight" in shown
    assert "memory for the largest layer" in shown
    assert not out.exists()
    run(*edit, "--energy", 0.6, "--layers", "model.layers.1.mlp.*", "--save-delta", delta)
    shown = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in shown
    assert "model.layers.0" not in shown
    run("inspect", out)
    assert "model.layers.1.mlp.down_proj  0.6 " in capsys.readouterr().out
    run("revert", "--checkpoint", out, "--delta", delta, "--out", back)
    assert hashes(back) == hashes(saved / "sharded")
    run("apply", "--checkpoint", back, "--delta", delta, "--out", tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(out)
    run("inspect", back)
    assert "not edited by this package" in capsys.readouterr().out
    run("inspect", saved / "factors.safetensors")
    assert "model.layers.0.mlp.gate_proj" in capsys.readouterr().out
    torch.save({**torch.load(saved / "model.pt", weights_only=True), "x": argparse.Namespace()}, tmp_path / "ns.pt")
    with pytest.raises(SystemExit, match=r"--allow-global argparse.Namespace"):
        run("inspect", tmp_path / "ns.pt")
    run("inspect", tmp_path / "ns.pt", "--allow-global", "argparse.Namespace")
    for arguments, message in [
        (edit, "exists. Choose another path"),
        (("inspect", tmp_path / "none"), "no such file"),
        (("revert", "--checkpoint", back, "--delta", delta, "--out", tmp_path / "x"), "is not the edited tensor"),
    ]:
        with pytest.raises(SystemExit, match=message):
            run(*arguments)


def test_the_device_of_an_edit(saved, tmp_path, monkeypatch):
    """Factors of the layer in turn go to the device that is meant, the optional ones, too; what cannot edit is told."""
    assert files.edit_device("auto") == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for device in ("meta", "gpu", "cuda:99"):
        with pytest.raises(ValueError, match=rf"device='{device}' cannot edit, which takes float64; use auto, cpu or"):
            EDITOR.edit_checkpoint(saved / "model.pt", factors(saved), tmp_path / "out.pt", device=device)
    assert not (tmp_path / "out.pt").exists()
    layers = factors(saved)
    name = next(iter(layers))
    full = dataclasses.replace(layers[name], margins=torch.zeros(layers[name].shape))
    moved = StreamedFactors(KroneckerFactors({name: full}), torch.device("meta")).on_device(name)
    assert list(moved.tensors) == ["A", "G", "margins"]
    assert {tensor.device.type for tensor in moved.tensors.values()} == {"meta"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert files.edit_device("auto") == torch.device("cuda")


def test_a_layer_that_does_not_fit_on_the_gpu(saved, tmp_path, monkeypatch):
    def project(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CurvatureEditor, "project", project)
    with pytest.raises(RuntimeError, match=r"Layer '.*': editing it takes about .* Edit on the CPU \(device='cpu'"):
        EDITOR.edit_checkpoint(saved / "model.pt", factors(saved), tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
