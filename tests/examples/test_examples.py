"""The examples run, on tiny inputs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from tests.support import language

EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIONS = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny language model with its tokenizer, and two texts."""
    path = tmp_path_factory.mktemp("examples")
    language.model("llama").save_pretrained(path / "model")
    language.tokenizer().save_pretrained(path / "model")
    for seed, name in enumerate(("train", "val")):
        rows = language.tokens(96, 16) if seed == 0 else language.tokens(64, 16).flip(0)
        (path / f"{name}.txt").write_text("\n".join(language.words(row) for row in rows.tolist()))
    return path


def test_examples_are_short():
    assert all(len(path.read_text().splitlines()) <= 70 for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh"))


@pytest.mark.filterwarnings("ignore:The edited copies are the checkpoints", "ignore:Not edited")
def test_noisy_labels(tmp_path):
    noisy_labels = example("noisy_labels")
    images, labels = torch.randn(192, 3, 8, 8), torch.arange(192) % 10
    data = TensorDataset(images, labels)
    wrong = [int(noisy_labels.WrongLabels(data)[index][1]) != int(labels[index]) for index in range(192)]
    assert sum(wrong) == sum(wrong[:19]) == 19
    module = noisy_labels.Classifier(image_size=8, patch=4, layers=1, width=16)
    callback = noisy_labels.main(data, data, module, max_epochs=2, default_root_dir=tmp_path, **OPTIONS)
    assert callback.report is not None
    assert list(tmp_path.rglob("*-edited.ckpt"))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.filterwarnings(
    "ignore:Not edited", "ignore:The edited copies are", "ignore:This edit is likely", "ignore:`is_gradient"
)
def test_finetune(lora, folder, tmp_path):
    main = example("finetune").main
    texts = (folder / "train.txt", folder / "val.txt")
    options = {"max_epochs": 2, "default_root_dir": tmp_path / "runs", **OPTIONS}
    callback = main(str(folder / "model"), *texts, tmp_path / "out", lora, length=16, **options)
    assert callback.report is not None
    saved = load_file(tmp_path / "out" / ("adapter_model.safetensors" if lora else "model.safetensors"))
    if lora:
        base = language.model("llama")
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out")
        assert any("lora_A" in name for name in dict(loaded.named_parameters()))
    assert saved


def test_edit_folder(folder, tmp_path):
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    arguments = [folder / "model", folder / "train.txt", folder / "val.txt", tmp_path / "edited"]
    done = subprocess.run(
        ["bash", EXAMPLES / "edit_folder.sh", *arguments],
        env={**os.environ, **path, "PRICE": "1.5"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "edited" / "model.safetensors").exists()
