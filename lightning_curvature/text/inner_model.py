"""The language model inside a module, and what it predicts of a batch."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin

from lightning_curvature._checks import listing


def find_language_model(module: nn.Module, layers: Collection[str] = ()) -> Any:
    """Return the transformers causal LM inside a module.

    Args:
        module: The module, or the model itself.
        layers: Names of layers, relative to the module. Where the module holds several models, the model that holds
            one of these layers is meant.

    Raises:
        ValueError: If there is no model, or more than one is left.
    """
    models = {name: submodule for name, submodule in module.named_modules() if isinstance(submodule, GenerationMixin)}
    outermost = {
        name: model
        for name, model in models.items()
        if not any(outer != name and (not outer or name.startswith(f"{outer}.")) for outer in models)
    }
    named = {name: model for name, model in outermost.items() if any(layer.startswith(f"{name}.") for layer in layers)}
    candidates = named or outermost
    if len(candidates) > 1:
        raise ValueError(
            f"{type(module).__name__} holds several language models, {listing(candidates)}; only one can be probed."
        )
    if not candidates:
        raise ValueError(
            f"{type(module).__name__} holds no transformers model that can generate; probes of recitation, recall and "
            "perplexity need one as a submodule."
        )
    return next(iter(candidates.values()))


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
