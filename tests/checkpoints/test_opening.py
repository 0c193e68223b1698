"""Files that are no checkpoints are called what they are."""

import pytest
import torch

from lightning_curvature import KroneckerFactors
from lightning_curvature.checkpoints.base import Checkpoint
from lightning_curvature.checkpoints.loading import read_weights
from lightning_curvature.checkpoints.opening import open_checkpoint
from lightning_curvature.storage.hashes import tensor_hashes
from tests.support.saved import EDITOR, FORMATS, factors, source


def test_what_is_no_checkpoint(saved_model, tmp_path):
    (tmp_path / "a.safetensors").write_bytes((saved_model / "model.safetensors").read_bytes()[:-10])
    (tmp_path / "a.pt").write_bytes((saved_model / "model.pt").read_bytes()[:2000])
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
            EDITOR.edit_checkpoint(tmp_path / name, factors(saved_model), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        EDITOR.edit_checkpoint(tmp_path / "none", factors(saved_model), tmp_path / "out")


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


def test_archives_that_were_cut_off(saved_model, tmp_path):
    whole = (saved_model / "model.pt").read_bytes()
    for name, start in {"cut.pt": whole[: len(whole) // 2], "cut.safetensors": whole[:900]}.items():
        (tmp_path / name).write_bytes(start)
        with pytest.raises(ValueError, match=r"but an archive that was cut off\. Copy or download the file again"):
            open_checkpoint(tmp_path / name)
    torch.save({"w.weight": torch.ones(9, 9)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "old.pt").write_bytes((tmp_path / "old.pt").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"old.pt: not a file of torch.save, or a broken one \(.+: .+\)\. Copy"):
        open_checkpoint(tmp_path / "old.pt")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_a_checkpoint(saved_model, kind):
    checkpoint = open_checkpoint(source(saved_model, kind))
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.path == source(saved_model, kind)
    assert checkpoint.hashes() == tensor_hashes(checkpoint.shapes(), checkpoint.read)
    assert checkpoint.edit_facts is None
    assert set(checkpoint.module_names().values()) <= set(checkpoint.shapes())
    assert checkpoint.check_ties(["model.layers.0.mlp.up_proj.weight"] if kind != "ckpt" else []) is None
