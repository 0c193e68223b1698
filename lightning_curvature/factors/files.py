"""Reading files of factors."""

import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_curvature.factors.fingerprints import is_fingerprint
from lightning_curvature.factors.layer import COUNTS, ERRORS, OPTIONAL, LayerFactors
from lightning_curvature.storage.archive import check_tensors, read_archive
from lightning_curvature.storage.outputs import FACTORS
from lightning_curvature.storage.sniff import sniff
from lightning_curvature.storage.tree import parse_json, put_together

TIED_TO = "shares_A_with"
"""Entry of a layer in the header: the layer under whose name the A of both is written."""
VERSIONS = (1, 2)
"""Of files without tied inputs, and of files with them."""
_FIELDS = {*COUNTS, "transposed", *ERRORS, "weight", TIED_TO}
_MAKE = "Factors of a model are made by lightning-curvature collect."
_FOLDER = "it is a folder"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FactorFile(Mapping[str, LayerFactors]):
    """The layers of a factor file; each access reads one anew.

    Args:
        path: File.

    Attributes:
        layers: What the header says of each layer: counts, errors, the weight, and the layer with the same A.
        provenance: As in :class:`~.kronecker.KroneckerFactors`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a complete factor file of a version that this package reads.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        with _opened(path) as file:
            header = _read_header(file)
            self._tensors = set(file.keys())
            self.layers: dict[str, dict[str, Any]] = header["layers"]
            self.provenance: dict[str, Any] = header["provenance"]
        # As long as an A is in use, the layers that are tied to it get the same tensor.
        self._inputs: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    def __getitem__(self, name: str) -> LayerFactors:
        numbers = dict(self.layers[name])
        first = numbers.pop(TIED_TO, name)
        with _opened(self.path) as file:
            kinds = [kind for kind in ("G", *OPTIONAL) if f"{name}.{kind}" in self._tensors]
            tensors = {kind: file.get_tensor(f"{name}.{kind}") for kind in kinds}
            A = self._inputs.get(first)
            self._inputs[first] = tensors["A"] = file.get_tensor(f"{first}.A") if A is None else A
            return _layer_factors(f"layer {name!r}", tensors, numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def tied_inputs(self) -> dict[str, str]:
        """Return, for each layer, the first one that has the same A; itself if there is none."""
        first: dict[str, str] = {}
        return {name: first.setdefault(numbers.get(TIED_TO, name), name) for name, numbers in self.layers.items()}


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a factor file; what is wrong with it becomes an error that names it."""
    _check_kind(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError, RecursionError) as error:
        if isinstance(error, SafetensorError) and (told := sniff(path)):
            raise ValueError(
                f"{path}: not a complete factor file, but {told[0]}. Factor files are written by lightning-curvature "
                "collect and KroneckerFactors.save."
            ) from error
        raise ValueError(
            f"{path}: not a complete factor file ({error}). Factor files are written by KroneckerFactors.save."
        ) from error


def _check_kind(path: str | os.PathLike[str]) -> None:
    """Raise if something else was named than a safetensors file."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file. {_MAKE}")
    holds = "it holds weights, not factors"
    if Path(path).is_dir():
        model = any(Path(path).glob("*.safetensors")) and (Path(path) / "config.json").exists()
        kind, remedy = (f"it is a folder of a model: {holds}", _MAKE) if model else (_FOLDER, "Name the file in it.")
        raise ValueError(f"{path}: not a complete factor file ({kind}). {remedy}")
    if zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: not a complete factor file (it is a file of torch.save: {holds}). {_MAKE} Factors of the code of "
            "arXiv:2510.24256 are read by KroneckerFactors.load(path, names=...)."
        )


def _read_header(file: Any) -> dict[str, Any]:
    """Return the header of an open factor file; the only place where it is checked."""
    metadata = file.metadata() or {}
    if FACTORS not in metadata:
        raise ValueError("it holds weights, not factors; lightning-curvature collect makes factors of a model")
    header = parse_json(metadata[FACTORS], f"the metadata entry {FACTORS!r}")
    if header.get("version") not in VERSIONS:
        raise ValueError(
            f"it has version {header.get('version')!r:.60}, this package reads those up to {VERSIONS[-1]}: update it"
        )
    layers, provenance = header.get("layers"), header.get("provenance")
    if not isinstance(layers, dict) or not isinstance(provenance, dict):
        raise ValueError("its header has no layers, or no provenance")
    json.dumps(provenance, ensure_ascii=False).encode()  # so that it can be shown
    for name, counts in layers.items():
        if not isinstance(counts, dict) or not {*COUNTS[:2]} <= counts.keys() <= _FIELDS:
            raise ValueError(f"layer {name!r} must have {', '.join(COUNTS)} and transposed")
        for key, value in counts.items():
            if key == TIED_TO:
                fits = isinstance(value, str) and value in layers
            elif key == "weight":
                fits = is_fingerprint(value)
            elif key in ERRORS:
                fits = type(value) in (int, float) and 0 <= value < float("inf")
            else:  # up to 2**53 a count is exact in float64, in which factors are merged
                fits = isinstance(value, bool) if key == "transposed" else type(value) is int and 0 <= value <= 2**53
            if not fits:
                raise ValueError(f"layer {name!r} cannot have {key} {value!r:.60}")
    needed = {f"{counts.get(TIED_TO, name)}.A" for name, counts in layers.items()} | {f"{name}.G" for name in layers}
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


def read_paper_factors(path: str | os.PathLike[str], names: str) -> dict[str, LayerFactors]:
    """Read a file of the code of arXiv:2510.24256; arguments and errors as those of the method ``load``."""
    content = read_archive(path)
    layers = {}
    content = content if isinstance(content, dict) else {"": content}
    for key, entry in content.items():
        match = re.fullmatch(r"blk(\d+)\.(\w+)", str(key))
        if match is None or not isinstance(entry, dict) or not {"A", "G", "n_tokens"} <= entry.keys():
            raise ValueError(f"{path}: expected entries 'blk23.gate' with A, G and n_tokens, found {str(key)!r:.60}.")
        tensors = {kind: entry[kind] for kind in "AG"}
        tokens = entry["n_tokens"]
        check_tensors(tensors | ({"n_tokens": tokens} if isinstance(tokens, Tensor) else {}), path)
        tokens = tokens.item() if isinstance(tokens, Tensor) and tokens.numel() == 1 else tokens
        if isinstance(tokens, bool) or not isinstance(tokens, int | float) or not 0 <= tokens <= 2**53:
            raise ValueError(f"{path}: n_tokens of {key!r} must be a number of positions, found {type(tokens)}.")
        counts = dict.fromkeys(COUNTS[:2], int(tokens))
        layers[names.format(block=match[1], projection=match[2])] = _layer_factors(f"{path}: {key!r}", tensors, counts)
    if not layers or len(layers) < len(content):
        raise ValueError(
            f"{path}: {len(content)} entries become {len(layers)} layers by names={names!r}. Use both places, for "
            "example 'model.layers.{block}.mlp.{projection}_proj'."
        )
    return layers


def load_state(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the ``state`` with which a factor file was saved, or None; tensors are on the CPU.

    Raises:
        FileNotFoundError: As :meth:`lightning_curvature.KroneckerFactors.load`.
        ValueError: As :meth:`lightning_curvature.KroneckerFactors.load`.
    """
    with _opened(path) as file:
        state = _read_header(file).get("state")
        if not isinstance(state, dict | None):
            raise ValueError(f"its state is a {type(state).__name__}, not an object")
        return None if state is None else dict(put_together(state, file.get_tensor))


def is_factor_file(path: str | os.PathLike[str]) -> bool:
    """Tell whether a safetensors file was written by :meth:`lightning_curvature.KroneckerFactors.save`."""
    if not Path(path).is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return FACTORS in (file.metadata() or {})
    except SafetensorError:
        return False
