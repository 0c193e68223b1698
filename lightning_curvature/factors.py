"""K-FAC factors of the layers of one model, and their file format."""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_curvature._checks import did_you_mean
from lightning_curvature.bases import known_basis
from lightning_curvature.basis import CurvatureBasis
from lightning_curvature.checkpoints.archive import check_tensors, read_archive
from lightning_curvature.checkpoints.atomic import replacing
from lightning_curvature.checkpoints.tree import parse_json, put_together, take_apart

_HEADER = "lightning_curvature.factors"
_STATE = "state"
_OPTIONAL = ("A_coupled", "G_coupled", "eigenvalues", "margins")
_COUNTS = ("num_inputs", "num_gradients", "num_seen")
_ERRORS = ("A_error", "G_error")
_SHARES = "shares_A_with"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_VERSIONS = (1, 2)
"""Of files: those whose layers have each an A of their own, and those in which layers share one."""


@dataclasses.dataclass(frozen=True, eq=False)
class LayerFactors:
    """K-FAC factors of one layer: normalised second moments and the counts behind them.

    Args:
        A: ``E[a a^T]`` of the layer's inputs, ``[d_in, d_in]``, floating.
        G: ``E[g g^T]`` of the gradients of the summed loss with respect to its outputs, ``[d_out, d_out]``, floating.
        num_inputs: Positions behind ``A``.
        num_gradients: Positions behind ``G`` (positions, not draws).
        num_seen: Positions that went through the layer, counted or not; by default ``num_inputs``.
        transposed: Whether the layer stores its weight as ``[d_in, d_out]`` (transformers ``Conv1D``).
        A_coupled: ``E[|g|^2 a a^T]``, ``[d_in, d_in]``, for the score ``"coupled"``.
        G_coupled: ``E[|a|^2 g g^T]``, ``[d_out, d_out]``, for the score ``"coupled"``.
        eigenvalues: ``E[(u_i^T g)^2 (v_j^T a)^2]`` in the curvature basis, ``[d_out, d_in]``, for ``"ekfac"``.
        margins: Gradient of the summed logit margins of recited sequences with respect to the weight,
            ``[d_out, d_in]``, for :class:`lightning_curvature.bulk.BulkStepEditor`.
        A_error: Standard error of ``A``, relative to its Frobenius norm, from the spread of the batches; None if it is
            not known.
        G_error: The same of ``G``.

    Raises:
        ValueError: If a factor is not a square floating matrix, an optional one does not have its shape, or a count is
            negative.
    """

    A: Tensor
    G: Tensor
    num_inputs: int
    num_gradients: int
    num_seen: int = -1
    transposed: bool = False
    A_coupled: Tensor | None = None
    G_coupled: Tensor | None = None
    eigenvalues: Tensor | None = None
    margins: Tensor | None = None
    A_error: float | None = None
    G_error: float | None = None

    def __post_init__(self) -> None:
        for name, factor in (("A", self.A), ("G", self.G)):
            if factor.dim() != 2 or factor.shape[0] != factor.shape[1] or not factor.is_floating_point():
                raise ValueError(
                    f"Factor {name} must be a square floating matrix, found {list(factor.shape)} {factor.dtype}."
                )
        if self.num_inputs < 0 or self.num_gradients < 0:
            raise ValueError(f"Counts must not be negative, found {self.num_inputs} and {self.num_gradients}.")
        shapes = {
            "A_coupled": self.A.shape,
            "G_coupled": self.G.shape,
            "eigenvalues": self.shape,
            "margins": self.shape,
        }
        for name, shape in shapes.items():
            extra = getattr(self, name)
            if extra is not None and tuple(extra.shape) != tuple(shape):
                raise ValueError(f"{name} must have the shape {list(shape)}, found {list(extra.shape)}.")
        if self.num_seen < 0:
            object.__setattr__(self, "num_seen", self.num_inputs)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(d_out, d_in)`` of the weight matrix that these factors describe."""
        return self.G.shape[0], self.A.shape[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are there, by name."""
        found = {name: getattr(self, name) for name in ("A", "G", *_OPTIONAL)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def numbers(self) -> dict[str, int]:
        """Everything but tensors and errors, by name."""
        return {name: getattr(self, name) for name in (*_COUNTS, "transposed")}

    @property
    def errors(self) -> dict[str, float]:
        """The standard errors that are known, by name."""
        return {name: error for name in _ERRORS if (error := getattr(self, name)) is not None}

    def digest(self) -> str:
        """Return a SHA-256 over counts and tensors."""
        digest = hashlib.sha256(f"{self.num_inputs}\0{self.num_gradients}\0{self.shape}\0".encode())
        for name, tensor in self.tensors.items():
            digest.update(f"{name}\0".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def basis(self) -> CurvatureBasis:
        """The curvature basis; each factor is decomposed once, and its eigenvectors are kept as long as it is."""
        return known_basis(self.A, self.G)


class KroneckerFactors(Mapping[str, LayerFactors]):
    """K-FAC factors by module name, such as ``"blocks.0.mlp.fc1"`` (without ``.weight``).

    Args:
        layers: Factors of each layer.
        provenance: JSON-serializable facts about where they come from (Fisher kind, step, ...).

    Example:
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
        return {name: layer.num_inputs for name, layer in self.items()}

    def gathered(self) -> "KroneckerFactors":
        """Return these factors on one process, the first one. A collective if they are spread over several."""
        return self

    def digest(self) -> str:
        """Return a SHA-256 over names, counts and factors of the layers: with one digest, two sets are equal."""
        return digest_of({name: layer.digest() for name, layer in self.items()})

    def merge(self, other: "KroneckerFactors") -> "KroneckerFactors":
        """Return the factors of both streams of positions together, weighted by their counts.

        Eigenvalues and margins belong to one set of factors, and are left out.

        Raises:
            ValueError: If the two do not have the same layers, of the same shapes.
        """
        if set(self) != set(other):
            raise ValueError(f"Cannot merge factors of other layers: only in one are {sorted(set(self) ^ set(other))}.")
        merged, means = {}, dict[tuple[int, ...], Tensor]()
        for name, one in self.items():
            two = other[name]
            if one.shape != two.shape or one.transposed != two.transposed:
                raise ValueError(f"Layer {name!r}: cannot merge factors of a {one.shape} and a {two.shape} weight.")
            A = _weighted_mean(one.A, one.num_inputs, two.A, two.num_inputs)
            shared = (id(one.A), one.num_inputs, id(two.A), two.num_inputs)
            merged[name] = LayerFactors(
                A=means.setdefault(shared, A),
                G=_weighted_mean(one.G, one.num_gradients, two.G, two.num_gradients),
                num_inputs=one.num_inputs + two.num_inputs,
                num_gradients=one.num_gradients + two.num_gradients,
                num_seen=one.num_seen + two.num_seen,
                transposed=one.transposed,
                A_coupled=_merged_mean(one.A_coupled, one.num_inputs, two.A_coupled, two.num_inputs),
                G_coupled=_merged_mean(one.G_coupled, one.num_inputs, two.G_coupled, two.num_inputs),
                A_error=_merged_error(one.A, one.num_inputs, one.A_error, two.A, two.num_inputs, two.A_error),
                G_error=_merged_error(one.G, one.num_gradients, one.G_error, two.G, two.num_gradients, two.G_error),
            )
        return KroneckerFactors(merged, self.provenance)

    def save(self, path: str | os.PathLike[str], state: Mapping[str, Any] | None = None) -> None:
        """Write one safetensors file, atomically: tensors ``<layer>.A`` and ``<layer>.G``, the rest as JSON.

        Where layers share A (the same tensor), it is written once, under the first one's name.

        Args:
            path: File.
            state: State of a collection that is going on, tensors and primitives; :func:`load_state` reads it.

        Raises:
            OSError: If it cannot be written; what was there before stays.
        """
        tensors: dict[str, Tensor] = {}
        layers: dict[str, dict[str, Any]] = {}
        owners: dict[int, str] = {}
        for name, layer in self.items():
            layers[name] = {**layer.numbers, **layer.errors}
            owner = owners.setdefault(id(layer.A), name)
            if owner != name:
                layers[name][_SHARES] = owner
            for factor, tensor in layer.tensors.items():
                if factor != "A" or owner == name:
                    tensors[f"{name}.{factor}"] = tensor.cpu().contiguous().clone()
        version = _VERSIONS[len(owners) < len(layers)]
        header = {"version": version, "layers": layers, "provenance": self.provenance}
        if state is not None:
            header["state"] = take_apart(dict(state), tensors, _STATE)
        with replacing(path) as temporary:
            try:
                save_file(tensors, temporary, metadata={_HEADER: json.dumps(header)})
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
            return cls(_read_paper_factors(path, names), {"imported": Path(path).name})
        file = _FactorFile(path)
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
        factors._layers = file = _FactorFile(path)
        factors.provenance = file.provenance
        return factors


def digest_of(layers: Mapping[str, str]) -> str:
    """Return the digest of a set of factors, given those of its layers by name."""
    return hashlib.sha256("\0".join(f"{name}\0{digest}" for name, digest in layers.items()).encode()).hexdigest()


class _FactorFile(Mapping[str, LayerFactors]):
    """The layers of a factor file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        with _opened(path) as file:
            header = _read_header(file)
            self.tensors = set(file.keys())
            self.layers: dict[str, dict[str, Any]] = header["layers"]
            self.provenance: dict[str, Any] = header["provenance"]
        # As long as a shared A is in use, the other layers get the same tensor.
        self.inputs: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    def __getitem__(self, name: str) -> LayerFactors:
        numbers = dict(self.layers[name])
        owner = numbers.pop(_SHARES, name)
        with _opened(self.path) as file:
            kinds = [kind for kind in ("G", *_OPTIONAL) if f"{name}.{kind}" in self.tensors]
            tensors = {kind: file.get_tensor(f"{name}.{kind}") for kind in kinds}
            A = self.inputs.get(owner)
            self.inputs[owner] = tensors["A"] = file.get_tensor(f"{owner}.A") if A is None else A
            return _layer_factors(f"layer {name!r}", tensors, numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a factor file; what is wrong with it becomes an error that names it."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: not a complete factor file (it is a folder). Name the file in it.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a complete factor file ({error}). Factor files are written by KroneckerFactors.save."
        ) from error


def _read_header(file: Any) -> dict[str, Any]:
    """Return the header of an open factor file; the only place where it is checked."""
    header = parse_json((file.metadata() or {}).get(_HEADER, ""), f"the metadata entry {_HEADER!r}")
    if header.get("version") not in _VERSIONS:
        raise ValueError(
            f"it has version {header.get('version')!r:.60}, this package reads those up to {_VERSIONS[-1]}: update it"
        )
    layers, provenance = header.get("layers"), header.get("provenance")
    if not isinstance(layers, dict) or not isinstance(provenance, dict):
        raise ValueError("its header has no layers, or no provenance")
    json.dumps(provenance, ensure_ascii=False).encode()  # so that it can be shown
    for name, counts in layers.items():
        if not isinstance(counts, dict) or not {*_COUNTS[:2]} <= counts.keys() <= {*_COUNTS, "transposed", *_ERRORS,
                                                                                   _SHARES}:  # fmt: skip
            raise ValueError(f"layer {name!r} must have {', '.join(_COUNTS)} and transposed")
        for key, value in counts.items():
            if key == _SHARES:
                fits = isinstance(value, str) and value in layers
            elif key in _ERRORS:
                fits = type(value) in (int, float) and 0 <= value < float("inf")
            else:  # up to 2**53 a count is exact in float64, in which factors are merged
                fits = isinstance(value, bool) if key == "transposed" else type(value) is int and 0 <= value <= 2**53
            if not fits:
                raise ValueError(f"layer {name!r} cannot have {key} {value!r:.60}")
    needed = {f"{counts.get(_SHARES, name)}.A" for name, counts in layers.items()} | {f"{name}.G" for name in layers}
    missing = needed - set(file.keys())
    if missing:
        raise ValueError(f"it lacks the tensor {min(missing)!r}")
    return header


def _layer_factors(where: str, tensors: Mapping[str, Any], counts: Mapping[str, Any]) -> LayerFactors:
    """Return the factors that were read of one layer; errors begin with ``where``."""
    try:
        layer = LayerFactors(**tensors, **counts)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    for kind, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or not tensor.numel():
            raise ValueError(f"{where}: {kind} must hold floating numbers, found {[*tensor.shape]} {tensor.dtype}.")
    return layer


def _read_paper_factors(path: str | os.PathLike[str], names: str) -> dict[str, LayerFactors]:
    content = read_archive(path)
    layers = {}
    content = content if isinstance(content, dict) else {"": content}
    for key, entry in content.items():
        found = re.fullmatch(r"blk(\d+)\.(\w+)", str(key))
        if found is None or not isinstance(entry, dict) or not {"A", "G", "n_tokens"} <= entry.keys():
            raise ValueError(f"{path}: expected entries 'blk23.gate' with A, G and n_tokens, found {str(key)!r:.60}.")
        tensors = {kind: entry[kind] for kind in "AG"}
        tokens = entry["n_tokens"]
        check_tensors(tensors | ({"n_tokens": tokens} if isinstance(tokens, Tensor) else {}), path)
        tokens = tokens.item() if isinstance(tokens, Tensor) and tokens.numel() == 1 else tokens
        if isinstance(tokens, bool) or not isinstance(tokens, int | float) or not 0 <= tokens <= 2**53:
            raise ValueError(f"{path}: n_tokens of {key!r} must be a number of positions, found {type(tokens)}.")
        counts = dict.fromkeys(_COUNTS[:2], int(tokens))
        layers[names.format(block=found[1], projection=found[2])] = _layer_factors(f"{path}: {key!r}", tensors, counts)
    if not layers or len(layers) < len(content):
        raise ValueError(
            f"{path}: {len(content)} entries become {len(layers)} layers by names={names!r}. Use both places, for "
            "example 'model.layers.{block}.mlp.{projection}_proj'."
        )
    return layers


def load_state(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the ``state`` with which a factor file was saved, or None; tensors are on the CPU.

    Raises:
        FileNotFoundError: As :meth:`KroneckerFactors.load`.
        ValueError: As :meth:`KroneckerFactors.load`.
    """
    with _opened(path) as file:
        state = _read_header(file).get("state")
        if not isinstance(state, dict | None):
            raise ValueError(f"its state is a {type(state).__name__}, not an object")
        return None if state is None else dict(put_together(state, file.get_tensor))


def is_factor_file(path: str | os.PathLike[str]) -> bool:
    """Tell whether a safetensors file was written by :meth:`KroneckerFactors.save`."""
    if Path(path).is_dir():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return _HEADER in (file.metadata() or {})
    except SafetensorError:
        return False


def _merged_mean(one: Tensor | None, count_one: int, two: Tensor | None, count_two: int) -> Tensor | None:
    return None if one is None or two is None else _weighted_mean(one, count_one, two, count_two)


def _merged_error(
    one: Tensor, count_one: int, error_one: float | None, two: Tensor, count_two: int, error_two: float | None
) -> float | None:
    """Return the relative error of a weighted mean of two independent ones."""
    if error_one is None or error_two is None:
        return None
    norm_one, norm_two = (float(torch.linalg.matrix_norm(tensor.double())) for tensor in (one, two))
    both = one.double() * count_one + two.to(one.device).double() * count_two
    error = math.hypot(count_one * error_one * norm_one, count_two * error_two * norm_two)
    return error / max(float(torch.linalg.matrix_norm(both)), math.ulp(0.0))


def _weighted_mean(one: Tensor, count_one: int, two: Tensor, count_two: int) -> Tensor:
    total = max(count_one + count_two, 1)
    mean = (one.double() * count_one + two.to(one.device).double() * count_two) / total
    return mean.to(torch.promote_types(one.dtype, two.dtype))
