"""Outputs of an edit never replace what is read, nor what is no model."""

import shutil

import pytest
import torch

from lightning_curvature import CurvatureEditor
from lightning_curvature.checkpoints.deltas import apply_delta
from tests.support.saved import EDITOR, factors, hashes, weights


def test_targets(saved_model, tmp_path):
    out = tmp_path / "o.pt"
    with pytest.raises(FileExistsError, match="is the source itself"):
        EDITOR.edit_checkpoint(
            saved_model / "model.pt", factors(saved_model), saved_model / "sharded" / ".." / "model.pt", overwrite=True
        )
    EDITOR.edit_checkpoint(saved_model / "model.pt", factors(saved_model), out)
    with pytest.raises(FileExistsError, match=r"o.pt exists. Choose another path, or --overwrite it"):
        EDITOR.edit_checkpoint(saved_model / "model.pt", factors(saved_model), out)
    with pytest.warns(UserWarning, match=r"o.pt is edited already \(kfac, layers .* and 3 more\)"):
        EDITOR.edit_checkpoint(out, factors(saved_model), tmp_path / "p.pt")
    with pytest.raises(
        ValueError, match=r"would change nothing.* Choose a smaller energy, or allow more \(--perplexity\)"
    ):
        CurvatureEditor(1.0).edit_checkpoint(saved_model / "model.pt", factors(saved_model), tmp_path / "q.pt")
    folder = tmp_path / "folder"
    shutil.copytree(saved_model / "folder", folder)
    (folder / "old").write_text("x")
    EDITOR.edit_checkpoint(saved_model / "sharded", factors(saved_model), folder, overwrite=True)
    assert not (folder / "old").exists()
    assert torch.equal(weights(folder)["model.norm.weight"], weights(saved_model / "sharded")["model.norm.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "o.pt", "p.pt"]


@pytest.mark.parametrize("held", [["thesis.tex"], ["config.json"], ["config.json/x"], ["model.safetensors"], ["a/b"]])
@pytest.mark.parametrize("what", ["edit", "revert", "apply"])
def test_only_a_model_or_nothing_is_replaced_as_a_folder(saved_model, tmp_path, what, held):
    out, delta = tmp_path / "out", tmp_path / "d.safetensors"
    EDITOR.edit_checkpoint(saved_model / "folder", factors(saved_model), tmp_path / "edited", delta=delta)

    def write():
        if what == "edit":
            EDITOR.edit_checkpoint(saved_model / "folder", factors(saved_model), out, overwrite=True)
        else:
            apply_delta(
                tmp_path / "edited" if what == "revert" else saved_model / "folder",
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


def test_outputs_never_replace_what_is_read(saved_model, tmp_path):
    folder = tmp_path / "runs" / "model"
    shutil.copytree(saved_model / "folder", folder)
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
            EDITOR.edit_checkpoint(folder, factors(saved_model), out, delta=delta, overwrite=True)
    delta = tmp_path / "d.safetensors"
    delta.write_text("precious")
    with pytest.raises(FileExistsError, match=r"d.safetensors exists"):
        EDITOR.edit_checkpoint(folder, factors(saved_model), tmp_path / "o", delta=delta)
    assert delta.read_text() == "precious"
    assert hashes(folder) == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.safetensors", "runs"]


def test_there_is_no_edited_copy_without_its_delta(saved_model, tmp_path, monkeypatch):
    """The delta is written first, and taken back if the copy fails."""
    out, delta = tmp_path / "o.pt", tmp_path / "d.safetensors"
    monkeypatch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        EDITOR.edit_checkpoint(saved_model / "model.pt", factors(saved_model), out, delta=delta)
    assert not list(tmp_path.iterdir())
