"""Folders of transformers: one model each, and links that lead nowhere else."""

import json
import shutil
from pathlib import Path

import pytest

from lightning_curvature.checkpoints.deltas import apply_delta
from lightning_curvature.report.inspection import describe
from tests.support.saved import EDITOR, factors, hashes


def test_two_models_in_one_folder_are_refused(saved_model, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(saved_model / "sharded", folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.warns(UserWarning, match="'pytorch_model.bin': weights in other formats, which are not edited"):
        EDITOR.edit_checkpoint(folder, factors(saved_model), tmp_path / "o")
    shutil.copy(saved_model / "folder" / "model.safetensors", folder)
    with pytest.raises(ValueError, match=r"holds both model.safetensors and model.safetensors.index.json: two models"):
        EDITOR.edit_checkpoint(folder, factors(saved_model), tmp_path / "p")


def test_a_snapshot_of_the_hugging_face_cache_is_read(saved_model, tmp_path):
    """Its files are links to the blobs of its repository; the copy holds files."""
    repository = tmp_path / "models--some--model"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((saved_model / "sharded").iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:040x}"))
    old, linked = hashes(blobs), tmp_path / "link"
    linked.symlink_to(snapshot)
    for number, source in enumerate((snapshot, linked)):
        out, delta, back = (tmp_path / f"{name}{number}" for name in ("out", "delta", "back"))
        EDITOR.edit_checkpoint(source, factors(saved_model), out, delta=delta)
        assert describe(source)["edit"] is None
        assert not any(path.is_symlink() for path in out.iterdir())
        assert describe(out)["edit"]["method"] == "kfac"
        apply_delta(out, delta, back, revert=True)
        assert hashes(back) == hashes(saved_model / "sharded")
        with pytest.raises(FileExistsError, match="is the source itself, or another file that is read"):
            EDITOR.edit_checkpoint(source, factors(saved_model), out, delta=blobs / f"{0:040x}", overwrite=True)
    assert hashes(blobs) == old
    stranger = tmp_path / "models--another" / "blobs" / "secret"
    stranger.parent.mkdir(parents=True)
    stranger.write_text("secret")
    for target in (stranger, tmp_path / "out0" / "config.json", repository / "snapshots"):
        (snapshot / "extra").symlink_to(target)
        with pytest.raises(ValueError, match="'extra' leads out of the folder"):
            EDITOR.edit_checkpoint(snapshot, factors(saved_model), tmp_path / "no")
        (snapshot / "extra").unlink()
    moved = tmp_path / "other" / "0123abc"  # beside blobs, and yet no snapshot
    shutil.copytree(snapshot, moved, symlinks=True)
    shutil.copytree(blobs, tmp_path / "blobs")
    with pytest.raises(ValueError, match=r"leads out of the folder|no such file"):
        EDITOR.edit_checkpoint(moved, factors(saved_model), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_folders_that_lead_out_are_refused(saved_model, tmp_path):
    outside = tmp_path / "outside.safetensors"
    shutil.copy(saved_model / "model.safetensors", outside)
    folder = tmp_path / "folder"
    shutil.copytree(saved_model / "sharded", folder)
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    for bad in ("../outside.safetensors", str(outside)):
        content = json.loads(good)
        content["weight_map"]["model.norm.weight"] = bad
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="leads out of the folder"):
            EDITOR.edit_checkpoint(folder, factors(saved_model), tmp_path / "out")
    index.write_text(good)
    (folder / "link.json").symlink_to(outside)
    with pytest.raises(ValueError, match=r"'link.json' leads out of the folder"):
        EDITOR.edit_checkpoint(folder, factors(saved_model), tmp_path / "out")
    (folder / "link.json").unlink()
    content = json.loads(good)
    content["weight_map"]["model.norm.weight"] = "gone.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="named in the index or is a link, but there is no such file"):
        EDITOR.edit_checkpoint(folder, factors(saved_model), tmp_path / "out")
    content["weight_map"]["model.norm.weight"] = content["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    index.write_text(json.dumps(content))
    if content["weight_map"] != json.loads(good)["weight_map"]:
        with pytest.raises(ValueError, match=r"it does not. The folder is not complete"):
            EDITOR.edit_checkpoint(folder, factors(saved_model), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "outside.safetensors"]
