"""K-FAC factors of the layers of one model, and their file format."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lightning_curvature._checks import check_weights, did_you_mean
from lightning_curvature.factors.files import TIED_TO, VERSIONS, FactorFile, read_paper_factors
from lightning_curvature.factors.fingerprints import Fingerprint
from lightning_curvature.factors.layer import LayerFactors
from lightning_curvature.factors.means import merged_layer, weighted_mean
from lightning_curvature.storage.atomic import replacing
from lightning_curvature.storage.outputs import FACTORS, check_safetensors_name
from lightning_curvature.storage.tree import take_apart

_STATE = "state"


class KroneckerFactors(Mapping[str, LayerFactors]):
    """K-FAC factors by module name, such as ``"blocks.0.mlp.fc1"`` (without ``.weight``).

    Args:
        layers: Factors of each layer.
        provenance: JSON-serializable facts about where they come from (Fisher kind, step, ...).

    Example:
        >>> import torch
        >>> eye = torch.eye(2)
        >>> factors = KroneckerFactors({"fc": LayerFactors(A=eye, G=eye, num_inputs=8, num_gradients=8)})
        >>> factors.merge(factors)["fc"].num_inputs
        16
    """

    def __init__(
        self, layers: Mapping[str, LayerFactors] | None = None, provenance: Mapping[str, Any] | None = None
    ) -> None:
        self._layers: Mapping[str, LayerFactors] = dict(layers or {})
        for name, layer in self._layers.items():
            if not isinstance(layer, LayerFactors):
                raise TypeError(f"Layer {name!r}: expected LayerFactors, found {type(layer).__name__}.")
        self.provenance = dict(provenance or {})

    def __getitem__(self, name: str) -> LayerFactors:
        try:
            return self._layers[name]
        except KeyError:
            raise KeyError(f"No factors of layer {name!r}.{did_you_mean(name, self._layers)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __contains__(self, name: object) -> bool:
        return name in self._layers

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name!r}: {list(layer.shape)}" for name, layer in self.items())
        return f"{type(self).__name__}({{{shapes}}})"

    owners: Mapping[str, int] | None = None
    """Which process holds a layer, where the layers are spread over several; None if all are here."""

    def counts(self) -> dict[str, int]:
        """Return the positions behind the inputs' factor of each layer."""
        if isinstance(self._layers, FactorFile):
            return {name: numbers["num_inputs"] for name, numbers in self._layers.layers.items()}
        return {name: layer.num_inputs for name, layer in self.items()}

    def fingerprints(self) -> dict[str, Fingerprint]:
        """Return which weight each layer was collected on, where that is known."""
        if isinstance(self._layers, FactorFile):
            return {name: facts["weight"] for name, facts in self._layers.layers.items() if "weight" in facts}
        return {name: layer.weight for name, layer in self.items() if layer.weight is not None}

    def tied_inputs(self) -> dict[str, str]:
        """Return, for each layer, the first layer with the same A, since both read the same tensor.

        A layer that has its A alone, or is the first with it, is returned for itself. The header of an opened file
        tells (:meth:`open`), without reading a tensor. In memory, the A of tied layers is one tensor.
        """
        if isinstance(self._layers, FactorFile):
            return self._layers.tied_inputs()
        layers, first = dict(self.items()), dict[int, str]()  # keeps the tensors alive while their ids are compared
        return {name: first.setdefault(id(layer.A), name) for name, layer in layers.items()}

    def gathered(self) -> "KroneckerFactors":
        """Return these factors on one process, the first one. A collective if they are spread over several."""
        return self

    def digest(self) -> str:
        """Return a SHA-256 over names, counts and factors of the layers: with one digest, two sets are equal."""
        return digest_of({name: layer.digest() for name, layer in self.items()})

    def merge(self, *others: "KroneckerFactors", weights: Sequence[float] | None = None) -> "KroneckerFactors":
        """Return the factors of several streams of positions together, counts summed.

        Eigenvalues and margins belong to one set of factors, and are left out. Layers with tied inputs stay tied.

        Args:
            *others: Factors of the same layers over other streams.
            weights: What each stream counts, this one first, whatever its positions; by default each counts with its
                positions.

        Raises:
            ValueError: If they do not have the same layers, of the same shapes; or if there is not one positive weight
                for each stream, or one with a weight rests on no position.
        """
        sources = [self, *others]
        if weights is not None:
            weights = check_weights(weights, len(sources), "weights")
            weights = [weight / max(weights) for weight in weights]  # so that no sum is infinite
        for other in others:
            if set(self) != set(other):
                raise ValueError(
                    f"Cannot merge factors of other layers: only in one are {sorted(set(self) ^ set(other))}."
                )
        merged, means = {}, dict[tuple[tuple[str, float], ...], Tensor]()
        ties = [source.tied_inputs() for source in sources]
        for name in self:
            layers = [source[name] for source in sources]
            _check_mergeable(name, layers, weights is not None)
            counts = [layer.num_inputs for layer in layers] if weights is None else weights
            key = tuple((tied[name], count) for tied, count in zip(ties, counts, strict=True))
            if key not in means:
                means[key] = weighted_mean([layer.A for layer in layers], counts)
            merged[name] = merged_layer(layers, weights, means[key])
        return KroneckerFactors(merged, self.provenance)

    def save(self, path: str | os.PathLike[str], state: Mapping[str, Any] | None = None) -> None:
        """Write one safetensors file, atomically: tensors ``<layer>.A`` and ``<layer>.G``, the rest as JSON.

        The A of layers with tied inputs is written once, under the name of the first of them.

        Args:
            path: File.
            state: State of a collection that is going on, tensors and primitives; :func:`load_state` reads it.

        Raises:
            ValueError: If the name is one of another format.
            OSError: If it cannot be written; what was there before stays.
        """
        check_safetensors_name(path, "a factor file")
        tensors: dict[str, Tensor] = {}
        layers: dict[str, dict[str, Any]] = {}
        tied = self.tied_inputs()
        for name, layer in self.items():
            layers[name] = layer.facts
            if tied[name] != name:
                layers[name][TIED_TO] = tied[name]
            for factor, tensor in layer.tensors.items():
                if factor != "A" or tied[name] == name:
                    tensors[f"{name}.{factor}"] = tensor.cpu().contiguous().clone()
        version = VERSIONS[any(first != name for name, first in tied.items())]
        header = {"version": version, "layers": layers, "provenance": self.provenance}
        if state is not None:
            header["state"] = take_apart(dict(state), tensors, _STATE)
        with replacing(path) as temporary:
            try:
                save_file(tensors, temporary, metadata={FACTORS: json.dumps(header)})
            except SafetensorError as error:  # a full disk, as safetensors says it
                raise OSError(f"{path} could not be written: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], names: str | None = None) -> "KroneckerFactors":
        """Read a file written by :meth:`save`, or by the code of arXiv:2510.24256.

        Args:
            path: File.
            names: For a file of that code, ``torch.save`` of ``{"blk23.gate": {"A", "G", "n_tokens"}, ...}``: how its
                names become module names, for example ``"model.layers.{block}.mlp.{projection}_proj"``.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a complete factor file of a version that this package reads.
        """
        if names is not None:
            return cls(read_paper_factors(path, names), {"imported": Path(path).name})
        file = FactorFile(path)
        return cls(dict(file.items()), file.provenance)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "KroneckerFactors":
        """Return the factors of a file that are read layer by layer: each access reads one anew, and none is kept.

        Args:
            path: File written by :meth:`save`.

        Raises:
            FileNotFoundError: As :meth:`load`.
            ValueError: As :meth:`load`.
        """
        factors = cls()
        factors._layers = file = FactorFile(path)
        factors.provenance = file.provenance
        return factors


def digest_of(layers: Mapping[str, str]) -> str:
    """Return the digest of a set of factors, given those of its layers by name."""
    return hashlib.sha256("\0".join(f"{name}\0{digest}" for name, digest in layers.items()).encode()).hexdigest()


def _check_mergeable(name: str, layers: Sequence[LayerFactors], weighted: bool) -> None:
    """Raise ``ValueError`` if the factors of a layer over several streams have no mean."""
    first = layers[0]
    for layer in layers[1:]:
        if first.shape != layer.shape or first.transposed != layer.transposed:
            raise ValueError(f"Layer {name!r}: cannot merge factors of a {first.shape} and a {layer.shape} weight.")
    if weighted and not all(min(layer.num_inputs, layer.num_gradients) for layer in layers):
        raise ValueError(
            f"Layer {name!r}: factors that rest on no position cannot count with a weight. Merge them without weights."
        )
