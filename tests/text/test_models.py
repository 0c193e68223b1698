"""Saved language models: loading, and what cannot be loaded."""

import io
import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_curvature.text import models as text_models
from lightning_curvature.text.inner_model import find_language_model
from tests.support import language


def test_weights_of_every_kind_of_checkpoint(folder, edited, tmp_path):
    net = language.model("llama", seed=3)
    state = net.state_dict()
    save_file(
        {key: value.clone() for key, value in state.items() if key != "lm_head.weight"}, tmp_path / "a.safetensors"
    )
    torch.save(state, tmp_path / "a.pt")
    for path in (edited, tmp_path / "a.safetensors", tmp_path / "a.pt"):
        loaded = text_models.load_model(folder / "model", path)
        assert not loaded.training
        assert all(torch.equal(value.cpu(), state[key]) for key, value in loaded.state_dict().items())


def other_state():
    return language.model("llama", seed=3).state_dict()


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_of_tied_weights_a_file_may_hold_either_one(folder, tmp_path, kept):
    state = other_state()
    dropped = ({"lm_head.weight", "model.embed_tokens.weight"} - {kept}).pop()
    save_file({key: value.clone() for key, value in state.items() if key != dropped}, tmp_path / "a.safetensors")
    loaded = text_models.load_model(folder / "model", tmp_path / "a.safetensors")
    assert all(torch.equal(value.cpu(), state[key]) for key, value in loaded.state_dict().items())


def test_of_several_models_the_edited_one_is_probed():
    module = torch.nn.Module()
    module.reference, module.policy = language.model(), language.model("gpt2")
    assert find_language_model(module, ["policy.transformer.h.1.mlp.c_proj"]) is module.policy
    with pytest.raises(ValueError, match="holds several language models, 'reference', 'policy'; only one"):
        find_language_model(module)
    assert find_language_model(module.policy) is module.policy


def test_what_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="none is no folder; expected one written by save_pretrained"):
        text_models.load_model(tmp_path / "none")
    torch.save({"state_dict": {"x": torch.ones(1)}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="holds no weights of a LlamaForCausalLM: none of its names ends with"):
        text_models.load_model(folder / "model", tmp_path / "x.ckpt")
    state = language.model("llama").state_dict()
    del state["model.norm.weight"]
    torch.save(state | {"model.extra": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"missing 'model.norm.weight', unexpected 'model.extra'"):
        text_models.load_model(folder / "model", tmp_path / "x.pt")
    state = {f"{who}.{key}": value for who in ("student", "teacher") for key, value in other_state().items()}
    torch.save(state, tmp_path / "two.pt")
    with pytest.raises(
        ValueError,
        match=r"holds several models that fit, under 'student.', 'teacher.'. Save only the one that you want",
    ):
        text_models.load_model(folder / "model", tmp_path / "two.pt")
    torch.save({"state_dict": other_state(), "path": tmp_path}, tmp_path / "path.ckpt")
    with pytest.raises(ValueError, match=r"path.ckpt holds objects of pathlib.*, and unpickling"):
        text_models.load_model(folder / "model", tmp_path / "path.ckpt")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json; expected a folder written by"):
        text_models.load_model(folder / "model", tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"is no file; a checkpoint is a \.ckpt, .pt or .safetensors file, or a"
    ):
        text_models.load_model(folder / "model", tmp_path / "none.ckpt")
    torch.save([1], tmp_path / "y.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        text_models.load_model(folder / "model", tmp_path / "y.pt")
    with pytest.raises(
        ValueError, match=r"The tokenizer has 50 tokens, the model's vocabulary 40: it belongs to another"
    ):
        text_models.check_vocabulary(language.model(), language.tokenizer(50))
    with pytest.raises(ValueError, match="Linear holds no transformers model that can generate"):
        find_language_model(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("load", [text_models.read_config, text_models.load_model, text_models.load_tokenizer])
def test_the_code_of_a_folder_is_not_run(load, tmp_path, monkeypatch):
    """Not even if somebody, or a pipe, would answer yes."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = {"model_type": "evil", "architectures": ["Evil"], "tokenizer_class": "Evil"}
    classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"auto_map": classes}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    with pytest.raises(ValueError, match=r"custom code|no tokenizer"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()
