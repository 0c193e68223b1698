"""Checkpoints whose tensors have other names, other owners or other entries than the layers of the factors."""

import json
import shutil

import lightning.pytorch as pl
import omegaconf
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.checkpoints import opening as formats
from lightning_curvature.checkpoints.deltas import apply_delta
from lightning_curvature.collect.passes import collect
from lightning_curvature.layers.selection import choose_layers
from lightning_curvature.storage.hashes import content_hash, tensor_hashes
from tests.support import language, models

EDITOR = CurvatureEditor(0.8)
ROWS = language.tokens(16, 12)


def language_factors(module, layers="mlp"):
    return collect(module, [ROWS], lambda batch: module(input_ids=batch, labels=batch).loss, layers=layers)


# From Lightning to Hugging Face ---------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    """A Lightning checkpoint, its factors with the module's names, and the folder of the model that it began with."""
    module = language.LitLM("olmo2")
    base = language.model("olmo2", seed=5)
    base.save_pretrained(tmp_path / "base")
    language.tokenizer().save_pretrained(tmp_path / "base")
    trainer = models.trainer(tmp_path, logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    step = lambda batch: module.net(input_ids=batch, labels=batch).loss  # noqa: E731
    factors = collect(module, [ROWS], step, layers="mlp")
    return module, factors


def test_a_lightning_checkpoint_becomes_a_folder(trained, tmp_path):
    module, factors = trained
    assert all(name.startswith("net.") for name in factors)
    out, delta = tmp_path / "out", tmp_path / "d.safetensors"
    report = EDITOR.edit_checkpoint(tmp_path / "a.ckpt", factors, out, to_hf=tmp_path / "base", delta=delta)
    assert report.layers["net.model.layers.0.mlp.up_proj"].tensor == "model.layers.0.mlp.up_proj.weight"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    with EDITOR.applied(module, factors):
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, module.net.state_dict()[key])
    assert len(transformers.AutoTokenizer.from_pretrained(out)) == 40
    assert "Edited weights" in (out / "README.md").read_text()
    checkpoint = formats.open_checkpoint(tmp_path / "a.ckpt")
    source = content_hash(tensor_hashes(checkpoint.shapes(), checkpoint.read))
    assert formats.open_checkpoint(out).edit_facts["source"] == source
    trained = torch.load(tmp_path / "a.ckpt", weights_only=True)
    trained["state_dict"] = {key: 2 * value for key, value in trained["state_dict"].items()}
    torch.save(trained, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"6 of 6 layers of .*x.ckpt have other weights .* furthest is 1 of its norm"):
        EDITOR.edit_checkpoint(tmp_path / "x.ckpt", factors, tmp_path / "y", to_hf=tmp_path / "base")
    (tmp_path / "x.ckpt").unlink()
    apply_delta(out, delta, tmp_path / "back", revert=True)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert all(torch.equal(value, module.net.state_dict()[key]) for key, value in back.state_dict().items())
    assert not (tmp_path / "back" / "README.md").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt", "back", "base", "d.safetensors", "out"]


def test_what_does_not_become_a_folder(trained, tmp_path):
    _, factors = trained
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["architectures"] = ["MyModel"]
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    for source, template, message in [
        ("base", "base", "is no file of torch.save"),
        ("a.ckpt", "nothing", "has no config.json"),
        ("a.ckpt", "other", r"architectures \['MyModel'\], none of transformers'"),
    ]:
        with pytest.raises(ValueError, match=message):
            EDITOR.edit_checkpoint(tmp_path / source, factors, tmp_path / "out", to_hf=tmp_path / template)
    language.model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="holds no weights of a GPT2LMHeadModel"):
        EDITOR.edit_checkpoint(tmp_path / "a.ckpt", factors, tmp_path / "out", to_hf=tmp_path / "gpt2")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


# Names ----------------------------------------------------------------------------------------------------------------


def test_names_that_transformers_gives_when_it_loads(tmp_path):
    """A ViT's files say encoder.layer.1.output.dense, its module layers.1.mlp.fc2."""
    model = transformers.ViTForImageClassification(models.hf_vit_config()).eval()
    images, labels = models.images(64).tensors
    factors = collect(model, [0], lambda _: model(pixel_values=images[:, None], labels=labels).loss, layers="mlp")
    model.save_pretrained(tmp_path / "vit")
    stored = formats.open_checkpoint(tmp_path / "vit").shapes()
    assert not any(f"{name}.weight" in stored for name in factors)
    report = EDITOR.edit_checkpoint(tmp_path / "vit", factors, tmp_path / "out")
    assert report.layers["vit.layers.1.mlp.fc2"].tensor == "vit.encoder.layer.1.output.dense.weight"
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
    EDITOR.edit(model, factors)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    lost = KroneckerFactors({"vit.layers.1.mlp.fc3": factors["vit.layers.1.mlp.fc2"]})
    with pytest.raises(ValueError, match=r"1 of 1 layers .*\n  'vit.layers.1.mlp.fc3'. Did you mean .*fc2.weight'"):
        EDITOR.edit_checkpoint(tmp_path / "vit", lost, tmp_path / "x")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    (tmp_path / "vit" / "config.json").write_text(json.dumps({**config, "architectures": ["MyModel"]}))
    with pytest.raises(ValueError, match="4 of 4 layers"):
        EDITOR.edit_checkpoint(tmp_path / "vit", factors, tmp_path / "x")


def test_a_compiled_and_wrapped_module(tmp_path):
    module = torch.compile(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3)))
    torch.save({f"model.{key}": value for key, value in module.state_dict().items()}, tmp_path / "a.pt")
    A, G = torch.diag(torch.arange(8.0) + 1), torch.eye(4)
    factors = KroneckerFactors({"0": LayerFactors(A=A, G=G, num_inputs=9, num_gradients=9)})
    report = EDITOR.edit_checkpoint(tmp_path / "a.pt", factors, tmp_path / "b.pt")
    assert report.layers["0"].tensor == "model._orig_mod.0.weight"
    assert report.layers["0"].changed == 12


def test_a_folder_with_code_of_its_own_never_runs_it(tmp_path, monkeypatch):
    folder, trace = tmp_path / "remote", tmp_path / "trace"
    language.model("llama").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n")
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    A, G = torch.eye(16), torch.eye(24)
    factors = KroneckerFactors({"nothing.fc": LayerFactors(A=A, G=G, num_inputs=9, num_gradients=9)})
    with pytest.raises(ValueError, match="1 of 1 layers of the factors have no weight"):
        EDITOR.edit_checkpoint(folder, factors, tmp_path / "out")
    assert not trace.exists()


# LoRA and quantized weights -------------------------------------------------------------------------------------------


def adapted():
    model = language.model("llama")
    config = peft.LoraConfig(r=2, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_base_under_an_adapter_is_edited_if_the_adapter_is_off(tmp_path):
    model = adapted()
    mlp = choose_layers(model, "mlp").modules
    assert len(mlp) == 6
    assert not any("lora" in name for name in mlp)
    assert not any("lora" in name for name in choose_layers(model, ["attention", "linear"]).modules)
    assert len(choose_layers(model, "*.lora_A.default").modules) == 4
    factors = language_factors(model)
    name = "base_model.model.model.layers.1.mlp.up_proj.base_layer"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(model.state_dict(), tmp_path / "a.pt")
    with model.disable_adapter():
        EDITOR.edit(model, factors)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{layer}.weight" for layer in factors}
    assert f"{name}.weight" in changed
    # A file does not tell the scaling of its adapters.
    plain = language_factors(language.model("llama"))
    for made in (factors, plain):
        with pytest.raises(ValueError, match=r"up_proj.base_layer' is the base under a LoRA adapter.*save_pretrained"):
            EDITOR.edit_checkpoint(tmp_path / "a.pt", made, tmp_path / "b.pt")
    # Factors of the model with its adapter find the base of the plain model.
    language.model("llama").save_pretrained(tmp_path / "plain")
    report = EDITOR.edit_checkpoint(tmp_path / "plain", factors, tmp_path / "d")
    assert report.layers[name].tensor == "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_packed_weights_are_refused(dtype, tmp_path):
    model = language.model("llama")
    factors = language_factors(model)
    layer = model.model.layers[1].mlp.up_proj
    shape = (
        (layer.weight.numel() // 2, 1) if dtype == torch.uint8 else layer.weight.shape
    )  # as bitsandbytes packs 4 bits
    layer.weight = nn.Parameter(torch.zeros(shape).to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=r"'mlp' would leave out layers whose weights are packed .*1.mlp.up_proj'"):
        choose_layers(model, "mlp")
    assert len(choose_layers(model, "attention").modules) == 8
    with pytest.raises(ValueError, match=r"its weight is packed or quantized"):
        choose_layers(model, "*.up_proj")
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj' cannot be edited: its weight is packed"):
        EDITOR.edit(model, factors)
    weights = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"packed or quantized \(torch.*Edit the model in full precision"):
        EDITOR.edit_checkpoint(tmp_path / "a.safetensors", factors, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
    others = CurvatureEditor(0.8, layers=["*.down_proj"])
    others.edit_checkpoint(tmp_path / "a.safetensors", factors, tmp_path / "b.safetensors")
    assert torch.equal(
        load_file(tmp_path / "b.safetensors")["model.layers.1.mlp.up_proj.weight"].view(torch.uint8),
        layer.weight.view(torch.uint8),
    )


def test_an_edit_that_rounds_away_is_an_error(tmp_path):
    """In bfloat16 a tiny change of a weight is none."""
    A, G = torch.diag(torch.tensor([1.0, 1e-3])), torch.eye(2)
    factors = KroneckerFactors({"0": LayerFactors(A=A, G=G, num_inputs=9, num_gradients=9)})
    save_file({"0.weight": torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="would change nothing: every weight, rounded to its dtype"):
        CurvatureEditor(0.99).edit_checkpoint(tmp_path / "a.safetensors", factors, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


# Foreign classes ------------------------------------------------------------------------------------------------------


def test_hyperparameters_of_omegaconf_can_be_allowed(tmp_path):
    """All the classes that it needs are named at once."""

    class Configured(pl.LightningModule):
        def __init__(self, config):
            super().__init__()
            self.save_hyperparameters()
            self.net = models.mlp()

    module = Configured(omegaconf.OmegaConf.create({"lr": 0.1, "sizes": [1, 2]}))
    trainer = models.trainer(tmp_path, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    images, labels = models.images(64).tensors
    loss = nn.functional.cross_entropy
    factors = collect(module, [0], lambda _: loss(module.net(images), labels))
    with pytest.raises(ValueError, match=r"omegaconf.dictconfig.DictConfig.*If you trust the file") as error:
        EDITOR.edit_checkpoint(tmp_path / "a.ckpt", factors, tmp_path / "b.ckpt")
    allowed = str(error.value).partition("--allow-global ")[2].partition(" (")[0].split()
    assert len(allowed) > 3
    EDITOR.edit_checkpoint(tmp_path / "a.ckpt", factors, tmp_path / "b.ckpt", allow_globals=allowed)
    loaded = torch.load(tmp_path / "b.ckpt", weights_only=False)
    assert loaded["hyper_parameters"]["config"].sizes == [1, 2]
