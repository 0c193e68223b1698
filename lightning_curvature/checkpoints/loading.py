"""Weights of a checkpoint, put into a transformers model."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_curvature._checks import listing
from lightning_curvature.storage.archive import read_archive
from lightning_curvature.storage.outputs import SAFETENSORS, ending
from lightning_curvature.storage.sniff import sniff


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], checkpoint: str | os.PathLike[str], assign: bool = False
) -> None:
    """Put a checkpoint's weights into a model. In the checkpoint their names may carry a prefix, such as ``model.``.

    Args:
        model: A transformers model.
        weights: Tensors by name.
        checkpoint: Where they come from, for errors.
        assign: Put the tensors themselves into the model, with their dtype, instead of copying them.

    Raises:
        ValueError: If the file does not hold exactly this model's weights.
    """
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    expected = set(model.state_dict())
    # A checkpoint may hold only one of two tied tensors. So the prefix is found from a tensor that is not tied.
    anchor = next(key for key in model.state_dict() if key not in {*ties, *ties.values()})
    prefixes = sorted(key.removesuffix(anchor) for key in weights if key == anchor or key.endswith(f".{anchor}"))
    if not prefixes:
        raise ValueError(
            f"{checkpoint} holds no weights of a {type(model).__name__}: none of its names ends with {anchor!r}; it "
            f"has {listing(weights, 4)}."
        )
    mismatches = {}  # by prefix: names that are missing, and names that are not expected
    for prefix in prefixes:
        names = {key.removeprefix(prefix) for key in weights if key.startswith(prefix)}
        # A missing name does no harm if the name that it is tied to is there.
        with_ties = names | {tied for pair in ties.items() for tied, name in (pair, pair[::-1]) if name in names}
        mismatches[prefix] = (sorted(expected - with_ties), sorted(names - expected))
    fitting = [prefix for prefix, (missing, unexpected) in mismatches.items() if not missing and not unexpected]
    if len(fitting) > 1:
        raise ValueError(
            f"{checkpoint} holds several models that fit, under {listing(fitting)}. Save only the one that you want, "
            "in a file of its own."
        )
    if not fitting:
        missing, unexpected = min(mismatches.values(), key=lambda names: len(names[0]) + len(names[1]))
        raise ValueError(
            f"{checkpoint} does not fit a {type(model).__name__}: missing {listing(missing) or 'nothing'}, "
            f"unexpected {listing(unexpected) or 'nothing'}."
        )
    prefix = fitting[0]
    model.load_state_dict(
        {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)},
        strict=False,
        assign=assign,
    )


def read_weights(path: Path, allow_globals: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the tensors of a state dict, or of a Lightning checkpoint; they stay on the disk until they are used.

    Args:
        path: File.
        allow_globals: Names of classes that the file may hold besides tensors and primitives.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds classes that are not allowed, or is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; a checkpoint is a .ckpt, .pt or .safetensors file.")
    if ending(path) == SAFETENSORS:
        try:
            return load_file(path)
        except (SafetensorError, AttributeError) as error:
            if kind_and_remedy := sniff(path):
                kind, remedy = kind_and_remedy
                raise ValueError(f"{path}: not a complete safetensors file, but {kind}. {remedy}") from error
            raise ValueError(f"{path}: not a complete safetensors file ({error}). Copy it again.") from error
    content = read_archive(path, allow_globals)
    weights = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {key: value for key, value in weights.items() if isinstance(value, Tensor)}
