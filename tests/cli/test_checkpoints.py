"""The commands edit, inspect, revert and apply."""

import argparse

import peft
import pytest
import torch
from torch import nn

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
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


def test_the_folder_of_an_adapter(tmp_path, capsys):
    """Named by the factors of its base."""
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)),
        peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    A, G = torch.diag(torch.arange(4.0) + 1), torch.diag(torch.arange(6.0) + 1)
    KroneckerFactors({"0": LayerFactors(A=A, G=G, num_inputs=99, num_gradients=99)}).save(tmp_path / "f.safetensors")
    edit = ("edit", "--checkpoint", tmp_path / "adapter", "--factors", tmp_path / "f.safetensors")
    edit = (*edit, "--out", tmp_path / "out")
    run(*edit, "--budget", 0.1, "--soft", "--dry-run")
    assert "0 -> base_model.model.0.lora_A.weight, base_model.model.0.lora_B.weight" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    run(*edit, "--energy", 0.6)
    assert "Edited updates since 'base'" in capsys.readouterr().out
    run("inspect", tmp_path / "out")
    assert "since 'base'" in capsys.readouterr().out
    loaded = peft.PeftModel.from_pretrained(
        nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)), tmp_path / "out"
    )
    CurvatureEditor(0.6).edit(model, KroneckerFactors.load(tmp_path / "f.safetensors"))
    for name in ("lora_A", "lora_B"):
        key = f"base_model.model.0.{name}.default.weight"
        assert torch.equal(loaded.get_parameter(key), model.get_parameter(key))
    for arguments, message in [
        (("--reference", tmp_path / "adapter"), "is an adapter, and an adapter is the update since its base"),
        (("--perplexity", 1.1, "--corpus", tmp_path / "f.safetensors"), "run a whole model"),
        (("--layers", "mlp"), r"presets need a model folder \(--model\)"),
        (("--to-hf", tmp_path / "adapter"), r"is no file of torch.save"),
    ]:
        with pytest.raises(SystemExit, match=message):
            run(*edit, *arguments, "--overwrite")
