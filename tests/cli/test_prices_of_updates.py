"""The strongest edit of updates within a perplexity, by the command and by its parts."""

import json

import pytest
import torch
import transformers

from lightning_curvature import CurvatureEditor, KroneckerFactors
from tests.support import language
from tests.support.commands import run


@pytest.fixture
def tuned(folder, tmp_path):
    """A model whose every weight moved a little since the one that has the factors."""
    net = language.model("llama")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    net.save_pretrained(tmp_path / "tuned")
    language.tokenizer().save_pretrained(tmp_path / "tuned")
    return net


def edit(folder, tmp_path, *options):
    arguments = ["--checkpoint", tmp_path / "tuned", "--reference", folder / "model", "--force", "--json"]
    arguments += ["--factors", folder / "f.safetensors", "--corpus", folder / "c.jsonl", "--context", 16]
    run("edit", *arguments, "--out", tmp_path / "edited", "--overwrite", *options)


@pytest.mark.filterwarnings("ignore:.* have other weights than those")
@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_soft_edit_of_updates_has_one_strength_for_all_layers(folder, tmp_path, tuned, capsys, scale):
    edit(folder, tmp_path, "--perplexity", "1.02", *([] if scale is None else ["--scale", scale]))
    done = json.loads(capsys.readouterr().out)
    target = done["target"]
    assert target["perplexity"] <= 1.02
    edited = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    start = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    factors = KroneckerFactors.load(folder / "f.safetensors")
    assert target["budget"] > 0
    assert target["scale"] == (scale or 0.4)  # the start is the better model here: nothing speaks against the smallest
    assert f"Budget {target['budget']:.4g}, scale {target['scale']}: " in target["text"]
    CurvatureEditor(budget=target["budget"], soft=True).based_on(start, target["scale"]).edit(tuned, factors)
    for name, tensor in tuned.state_dict().items():
        torch.testing.assert_close(edited.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.* have other weights than those")
def test_a_price_that_no_edit_of_updates_meets(folder, tmp_path, tuned, monkeypatch):
    def rising(*_, **__):
        return torch.full((4,), float(next(counts)))

    counts = iter(range(1, 1000))
    monkeypatch.setattr("lightning_curvature.text.choosing.window_nll", rising)
    with pytest.raises(SystemExit, match=r"No edit of these layers stays within 1\.02 times the perplexity"):
        edit(folder, tmp_path, "--perplexity", "1.02")
    assert not (tmp_path / "edited").exists()
