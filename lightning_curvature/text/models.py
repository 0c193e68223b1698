"""Loading a saved Hugging Face causal LM and its tokenizer, with errors that say what does not fit."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin

from lightning_curvature._checks import listing
from lightning_curvature.checkpoints.weights import load_weights, read_weights


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """Load the tokenizer of a model folder."""
    return AutoTokenizer.from_pretrained(_existing(folder))


def load_model(
    folder: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
    allow_globals: Sequence[str] = (),
) -> Any:
    """Load a causal LM in eval mode, on a GPU where there is one.

    Args:
        folder: What ``save_pretrained`` wrote.
        checkpoint: Take the weights from this file instead: a Lightning ``.ckpt`` whose module holds the model as a
            submodule, or a state dict (``.pt``, ``.safetensors``).
        allow_globals: Classes that this file may hold beside tensors and primitives.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If the checkpoint does not hold exactly this model's weights.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(_existing(folder), dtype="auto")
    if checkpoint is not None:
        load_weights(model, read_weights(Path(checkpoint), allow_globals), checkpoint)
    model.eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raise if a tokenizer makes ids that a model does not know.

    Raises:
        ValueError: If the tokenizer has more tokens than the model's embedding has rows.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, the model's vocabulary {rows}: it belongs to another model. "
            "Save the model's own tokenizer into its folder (tokenizer.save_pretrained)."
        )


def find_language_model(module: nn.Module, layers: Collection[str] = ()) -> Any:
    """Return the transformers causal LM inside a module.

    Args:
        module: The module, or the model itself.
        layers: Names of layers, relative to the module; of several models the one that holds one of them is meant.

    Raises:
        ValueError: If there is none, or more than one is left.
    """
    found = {name: submodule for name, submodule in module.named_modules() if isinstance(submodule, GenerationMixin)}
    found = {name: model for name, model in found.items()
             if not any(other != name and (not other or name.startswith(f"{other}.")) for other in found)}  # fmt: skip
    if len(found) > 1:
        found = {
            name: model for name, model in found.items() if any(layer.startswith(f"{name}.") for layer in layers)
        } or found
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise ValueError(
            f"{type(module).__name__} holds several language models, {listing(found)}; only one can be probed."
        )
    raise ValueError(
        f"{type(module).__name__} holds no transformers model that can generate; probes of recitation, recall and "
        "perplexity need one as a submodule."
    )


def next_tokens(module: nn.Module, batch: Mapping[str, Tensor], layers: Collection[str] = ()) -> tuple[Tensor, Tensor]:
    """Return logits ``[n, T - 1, V]`` and the tokens that follow, ``[n, T - 1]``, -100 where none counts.

    Args:
        module: Holds a transformers causal LM.
        batch: ``input_ids`` ``[n, T]``; optionally ``labels``, ``attention_mask`` and ``position_ids``.
        layers: As in :func:`find_language_model`.
    """
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    return find_language_model(module, layers)(**inputs).logits[:, :-1], labels[:, 1:]


def _existing(folder: str | os.PathLike[str]) -> str:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is no folder; expected one written by save_pretrained.")
    return os.fspath(folder)
