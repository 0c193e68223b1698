"""From a Lightning checkpoint to a Hugging Face folder."""

import os
import shutil
from pathlib import Path

import torch
import transformers

from lightning_curvature.checkpoints.archive import ArchiveFile
from lightning_curvature.checkpoints.empty_model import model_class
from lightning_curvature.checkpoints.huggingface import HuggingFaceFolder
from lightning_curvature.checkpoints.loading import load_weights

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "config.json")


def to_folder(checkpoint: ArchiveFile, template: str | os.PathLike[str], out: Path) -> HuggingFaceFolder:
    """Write the Hugging Face model inside a Lightning checkpoint as a folder, with the dtypes of the checkpoint.

    Args:
        checkpoint: A file of ``torch.save``; the model's names carry one prefix, such as ``model.``.
        template: Folder with the model's ``config.json``; everything else in it but weights is copied, too.
        out: Folder to write.

    Raises:
        ValueError: If the configuration names no model of transformers, or the checkpoint does not hold exactly this
            model's weights.
    """
    config = transformers.AutoConfig.from_pretrained(template, trust_remote_code=False)
    kind = model_class(config)
    if kind is None:
        raise ValueError(
            f"{template}/config.json names the architectures {config.architectures}, none of transformers'."
        )
    with torch.device("meta"):
        model = kind(config)
    weights = {name: value for name, value in checkpoint.state_dict.items() if isinstance(value, torch.Tensor)}
    load_weights(model, weights, checkpoint.path, assign=True)
    model.tie_weights()
    model.save_pretrained(out)
    at_the_top = shutil.ignore_patterns(*_WEIGHTS)

    def ignored(folder: str, names: list[str]) -> set[str]:
        return at_the_top(folder, names) if Path(folder) == Path(template) else set()

    shutil.copytree(template, out, ignore=ignored, dirs_exist_ok=True)
    return HuggingFaceFolder(out)
