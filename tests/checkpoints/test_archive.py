"""Files of torch.save: nestings, ties, classes, and code that is not run."""

import argparse
import os

import numpy as np
import pytest
import torch

from lightning_curvature.checkpoints import archive
from tests.support.saved import EDITOR, factors


def test_other_nestings_and_old_files(saved_model, tmp_path):
    state = torch.load(saved_model / "model.pt", weights_only=True)
    torch.save({"model_state_dict": state, "epoch": 1}, tmp_path / "a.pt")
    torch.save(dict(state), tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "b.pt"):
        EDITOR.edit_checkpoint(tmp_path / name, factors(saved_model), tmp_path / f"o{name}")
    edited = torch.load(tmp_path / "oa.pt", weights_only=True)
    assert edited["epoch"] == 1
    old_format = torch.load(tmp_path / "ob.pt", weights_only=True)
    assert all(torch.equal(value, old_format[key]) for key, value in edited["model_state_dict"].items())
    numbers = {"state_dict": state, "lr": np.float64(0.1)}
    torch.save(numbers, tmp_path / "n.ckpt")
    allowed = []
    for _ in range(3):  # torch names one after the other
        try:
            EDITOR.edit_checkpoint(
                tmp_path / "n.ckpt", factors(saved_model), tmp_path / "on.ckpt", allow_globals=allowed
            )
        except ValueError as error:
            allowed += str(error).partition("--allow-global ")[2].partition(" (")[0].split()
    assert (tmp_path / "on.ckpt").exists()


def test_ties_that_an_edit_cannot_keep_are_refused(saved_model, tmp_path):
    state = torch.load(saved_model / "model.pt", weights_only=True)
    name = "model.layers.0.mlp.up_proj.weight"
    torch.save({**state, "transposed": state[name].t()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"'transposed' shares a part of its memory \(tied weights\)"):
        EDITOR.edit_checkpoint(tmp_path / "a.pt", factors(saved_model), tmp_path / "o.pt")
    gate = "model.layers.0.mlp.gate_proj.weight"
    torch.save({**state, gate: state[name]}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"is the same tensor \(tied weights\)"):
        EDITOR.edit_checkpoint(tmp_path / "b.pt", factors(saved_model), tmp_path / "o.pt")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", ["pt", "ckpt"])
def test_a_malicious_file_is_refused_and_does_not_run(saved_model, tmp_path, suffix):
    path, trace = tmp_path / f"evil.{suffix}", tmp_path / "trace"
    state = torch.load(saved_model / "model.pt", weights_only=True)
    torch.save({"state_dict": state, "x": Payload(trace)} if suffix == "ckpt" else {**state, "x": Payload(trace)}, path)
    with pytest.raises(ValueError, match=r"calls (posix|nt).mkdir when it is unpickled.*Do not trust this file"):
        EDITOR.edit_checkpoint(path, factors(saved_model), tmp_path / "out.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_harmless_classes_can_be_allowed(saved_model, tmp_path):
    state = torch.load(saved_model / "model.pt", weights_only=True)
    torch.save({"state_dict": state, "hyper_parameters": argparse.Namespace(lr=0.1)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"objects of argparse.Namespace, .* --allow-global argparse.Namespace"):
        EDITOR.edit_checkpoint(tmp_path / "a.ckpt", factors(saved_model), tmp_path / "b.ckpt")
    allowed = ["argparse.Namespace"]
    EDITOR.edit_checkpoint(tmp_path / "a.ckpt", factors(saved_model), tmp_path / "b.ckpt", allow_globals=allowed)
    assert archive.read_archive(tmp_path / "b.ckpt", allowed)["hyper_parameters"].lr == 0.1
    with pytest.raises(ValueError, match=r"there is no class 'argparse.Nothing'"):
        archive.read_archive(tmp_path / "a.ckpt", ["argparse.Nothing"])
