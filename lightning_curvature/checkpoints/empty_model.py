"""The transformers model that a folder describes, without memory for its weights."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_curvature.storage.tree import COPY_AGAIN, parse_json

_DEPTHS = ("layer", "layers")
"""Endings of the entries of a configuration that say how many layers are built: num_hidden_layers, encoder_layers."""
_MOST_TIED_LAYERS = 100
"""How many layers a model may have that hold no tensor of their own, since they are tied: ALBERT has one for all."""


def model_class(config: Any) -> type[Any] | None:
    """Return the class of transformers that a configuration names first; None if it names none."""
    import transformers

    named = getattr(transformers, (config.architectures or [""])[0], None)
    return named if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel) else None


def empty_model(folder: Path, num_tensors: int | None = None) -> Any:
    """Return the model that a folder's configuration describes, on the meta device: its weights take no memory.

    Args:
        folder: Folder with a ``config.json``.
        num_tensors: How many tensors the folder holds, if that is known. It bounds how many layers are built.

    Returns:
        None if there is no configuration, or none of a model of transformers (which must be installed).

    Raises:
        ValueError: If the configuration is broken.
    """
    file = folder / "config.json"
    if not file.is_file():
        return None
    import transformers

    config = parse_json(file.read_bytes(), f"{file}")
    if num_tensors is not None:
        _check_depth(config, num_tensors, file)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind = model_class(config)
        if kind is None:
            return None
        with torch.device("meta"):
            return kind(config)
    except (ValueError, OSError):  # of a model that transformers does not know
        return None
    except Exception as error:  # transformers builds what it is told, and fails wherever that makes no sense
        raise ValueError(
            f"{file} describes no model that transformers can build ({type(error).__name__}: {error}). {COPY_AGAIN}"
        ) from error


def _check_depth(config: dict[str, Any], num_tensors: int, file: Path) -> None:
    """Raise ``ValueError`` if a configuration names many more layers than there are tensors.

    It is a guard against damaged configurations. transformers builds as many layers as it is told, and a layer takes
    memory and time without weights, too: a billion of them end the process. The guard goes by the endings of names
    (:data:`_DEPTHS`), since each class of models has a name of its own for its depth.
    """
    depths = [depth for key, depth in config.items() if key.endswith(_DEPTHS) and isinstance(depth, int)]
    if any(depth > num_tensors + _MOST_TIED_LAYERS for depth in depths):
        raise ValueError(f"{file} names more layers than there are tensors. {COPY_AGAIN}")


def fill(module: nn.Module) -> None:
    """Give the weights of a model on the meta device values that take no memory, so that its layers can be chosen."""
    filled: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            if weight not in filled:
                filled[weight] = nn.Parameter(torch.zeros((), dtype=weight.dtype).expand(weight.shape))
            setattr(part, name, filled[weight])
