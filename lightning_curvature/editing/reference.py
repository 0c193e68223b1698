"""The weights that a model was fine-tuned from: an edit with such a reference edits the update alone.

What a fine-tune memorized lies in its update ``W - W0``. With a reference, an editor keeps ``W0`` as it is, and applies
its method to the update: ``W' = W0 + P(W - W0)``. All other weights that fine-tuning moved, such as embeddings, norms
and biases, go back, too: by less than the layers do on the average, since recitation hardly depends on them.
"""

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from lightning_curvature.checkpoints.base import Checkpoint
from lightning_curvature.checkpoints.names import match_layers, plain
from lightning_curvature.checkpoints.opening import open_checkpoint
from lightning_curvature.distributed import whole
from lightning_curvature.layers.ties import named_tensors
from lightning_curvature.storage.hashes import content_hash

ReferenceLike = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]
"""What can be a reference: a module, a state dict, or a saved checkpoint of any format."""


class Reference:
    """Weights to hold an edit to, read one tensor at a time.

    Args:
        source: A module, a state dict, or a Hugging Face folder, ``.safetensors`` file, Lightning checkpoint or state
            dict of ``torch.save``.
        name: What reports call it; by default the name of the file, or "start".
        allow_globals: Classes that a file of ``torch.save`` may hold.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint.
        TypeError: If it is something else.
    """

    def __init__(self, source: ReferenceLike, name: str | None = None, allow_globals: Sequence[str] = ()) -> None:
        self._checkpoint: Checkpoint | None = None
        self._tensors: Mapping[str, Tensor] = {}
        if isinstance(source, (str, os.PathLike)):
            self._checkpoint, self.name = open_checkpoint(source, allow_globals), name or Path(source).name
            self._shapes = self._checkpoint.shapes()
        else:
            self.name = name or "start"
            self._tensors = named_tensors(source) if isinstance(source, nn.Module) else _tensors(source)
            self._shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor by its name in the reference."""
        if self._checkpoint is not None:
            return self._checkpoint.read(name)
        return whole(self._tensors[name].detach())

    def facts(self) -> dict[str, str]:
        """Return what an edited file says of its reference: its name and, of a file, the hash of its weights."""
        if self._checkpoint is None:
            return {"name": self.name}
        return {"name": self.name, "source": content_hash(self._checkpoint.hashes())}

    def matched(self, tensors: Mapping[str, str]) -> "MatchedReference":
        """Return the reference with its tensors under the names of the model to edit.

        Args:
            tensors: Name of the weight of each layer in the model to edit.

        Raises:
            ValueError: If the reference lacks a layer.
        """
        renamed = self._checkpoint.module_names if self._checkpoint is not None else dict
        try:
            own = match_layers(tensors, self._shapes, renamed)
        except ValueError as error:
            raise ValueError(f"The reference {self.name!r} is no model that this one started from: {error}") from error
        return MatchedReference(self, self._shapes, tensors, own)


class MatchedReference:
    """A reference whose tensors are found by the names of the model to edit.

    Args:
        reference: The reference.
        shapes: Shapes of its tensors.
        tensors: Name of the weight of each layer in the model to edit.
        own: The same in the reference.
    """

    def __init__(
        self,
        reference: Reference,
        shapes: Mapping[str, tuple[int, ...]],
        tensors: Mapping[str, str],
        own: Mapping[str, str],
    ) -> None:
        self._reference, self._shapes, self._own = reference, shapes, dict(own)
        self._names = {plain(name): name for name in shapes}
        self._prefixes = _prefixes(tensors, own)

    def layer(self, layer: str) -> Tensor:
        """Return the weight of a layer, as it is stored."""
        return self._reference.read(self._own[layer])

    def counterpart(self, name: str, shape: Iterable[int]) -> Callable[[], Tensor] | None:
        """Return what reads the counterpart of a tensor of the model to edit; None if there is none of its shape."""
        ours, theirs = self._prefixes
        name = plain(name)
        candidates = [theirs + name.removeprefix(ours)] if name.startswith(ours) else []
        for candidate in [*candidates, name]:
            own = self._names.get(candidate)
            if own is not None and self._shapes[own] == tuple(shape):
                return functools.partial(self._reference.read, own)
        return None


def _prefixes(tensors: Mapping[str, str], own: Mapping[str, str]) -> tuple[str, str]:
    """Return what stands before the common part of two names of one tensor, in the model to edit and the reference."""
    layer = next(iter(tensors))
    ours, theirs = plain(tensors[layer]).split("."), plain(own[layer]).split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return ".".join([*ours, ""]) if ours else "", ".".join([*theirs, ""]) if theirs else ""


def _tensors(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(source, Mapping):
        raise TypeError(f"A reference is a module, a state dict, a file or a folder; found {type(source).__name__}.")
    return {name: tensor for name, tensor in source.items() if isinstance(tensor, Tensor)}


BASE = Reference({}, "base")
"""The reference of LoRA adapters, which are updates of their base already: nothing is read from it."""
