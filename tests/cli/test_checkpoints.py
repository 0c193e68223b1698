"""The commands edit, inspect, revert and apply."""

import argparse

import pytest
import torch

from tests.support.saved import hashes, run


def test_commands(saved_model, tmp_path, capsys):
    out, delta, back = tmp_path / "out", tmp_path / "d.safetensors", tmp_path / "back"
    edit = (
        "edit",
        "--checkpoint",
        saved_model / "sharded",
        "--factors",
        saved_model / "factors.safetensors",
        "--out",
        out,
    )
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
    assert hashes(back) == hashes(saved_model / "sharded")
    run("apply", "--checkpoint", back, "--delta", delta, "--out", tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(out)
    run("inspect", back)
    assert "not edited by this package" in capsys.readouterr().out
    run("inspect", saved_model / "factors.safetensors")
    assert "model.layers.0.mlp.gate_proj" in capsys.readouterr().out
    torch.save(
        {**torch.load(saved_model / "model.pt", weights_only=True), "x": argparse.Namespace()}, tmp_path / "ns.pt"
    )
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
