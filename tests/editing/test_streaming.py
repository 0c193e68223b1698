"""Saved checkpoints of every format get the edit of the model in memory."""

import dataclasses

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.checkpoints import opening as formats
from lightning_curvature.checkpoints.facts import ENTRY
from lightning_curvature.editing import streaming as files
from lightning_curvature.editing.file_layers import StreamedFactors
from tests.support import language
from tests.support.saved import EDITOR, FORMATS, factors, hashes, saved_hash, source, target, weights


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gets_the_edit_of_the_model_in_memory(saved_model, tmp_path, kind):
    before = weights(source(saved_model, kind))
    model = transformers.AutoModelForCausalLM.from_pretrained(saved_model / "folder", dtype="auto")
    expected = EDITOR.edit(model, factors(saved_model))
    out = target(tmp_path, kind)
    report = EDITOR.edit_checkpoint(source(saved_model, kind), factors(saved_model), out)
    assert {name: edit.kept for name, edit in report.layers.items()} == {n: e.kept for n, e in expected.layers.items()}
    after = weights(out)
    assert list(after) == list(before)
    for name, value in after.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, model.state_dict()[name])
        assert torch.equal(value, before[name]) == (name.removesuffix(".weight") not in report.layers)
    assert not [path for path in tmp_path.iterdir() if path != out]
    again = formats.open_checkpoint(out).edit_facts
    assert again["source"] == saved_hash(source(saved_model, kind))
    assert again["factors"] == factors(saved_model).digest()
    assert again["layers"]["model.layers.1.mlp.up_proj"]["energy"] == 0.8
    assert again["provenance"]["fisher"] == "sketched"


def test_the_usual_loaders_load_them(saved_model, tmp_path):
    for kind in FORMATS:
        EDITOR.edit_checkpoint(source(saved_model, kind), factors(saved_model), target(tmp_path / kind, kind))
    state = torch.load(tmp_path / "pt" / "out.pt", weights_only=True)
    net = language.model("llama").bfloat16()
    net.load_state_dict(state)
    assert list(state) == list(torch.load(saved_model / "model.pt", weights_only=True))
    checkpoint = torch.load(tmp_path / "ckpt" / "out.ckpt", weights_only=True)
    original = torch.load(saved_model / "model.ckpt", weights_only=True)
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
        assert factors(saved_model).digest() in card
        assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / kind / "out")) == 40
    assert (
        load_file(tmp_path / "safetensors" / "out.safetensors").keys()
        == load_file(saved_model / "model.safetensors").keys()
    )
    with safe_open(tmp_path / "safetensors" / "out.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert file.metadata()["note"] == "mine"
    index = "model.safetensors.index.json"
    assert (tmp_path / "sharded" / "out" / index).read_text() == (saved_model / "sharded" / index).read_text()
    unedited = [
        f for f, h in hashes(saved_model / "sharded").items() if hashes(tmp_path / "sharded" / "out").get(f) == h
    ]
    assert {"config.json", "tokenizer.json", index} <= set(unedited)


def test_the_device_of_an_edit(saved_model, tmp_path, monkeypatch):
    """Factors of the layer in turn go to the device that is meant, the optional ones, too; what cannot edit is told."""
    assert files.edit_device("auto") == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for device in ("meta", "gpu", "cuda:99"):
        with pytest.raises(ValueError, match=rf"device='{device}' cannot edit, which takes float64; use auto, cpu or"):
            EDITOR.edit_checkpoint(saved_model / "model.pt", factors(saved_model), tmp_path / "out.pt", device=device)
    assert not (tmp_path / "out.pt").exists()
    layers = factors(saved_model)
    name = next(iter(layers))
    full = dataclasses.replace(layers[name], margins=torch.zeros(layers[name].shape))
    moved = StreamedFactors(KroneckerFactors({name: full}), torch.device("meta")).on_device(name)
    assert list(moved.tensors) == ["A", "G", "margins"]
    assert {tensor.device.type for tensor in moved.tensors.values()} == {"meta"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert files.edit_device("auto") == torch.device("cuda")


def test_a_layer_that_does_not_fit_on_the_gpu(saved_model, tmp_path, monkeypatch):
    def project(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CurvatureEditor, "project", project)
    with pytest.raises(RuntimeError, match=r"Layer '.*': editing it takes about .* Edit on the CPU \(device='cpu'"):
        EDITOR.edit_checkpoint(saved_model / "model.pt", factors(saved_model), tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
