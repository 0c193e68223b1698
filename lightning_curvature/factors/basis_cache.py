"""Eigenbases that are worked out once: kept as long as the factor that they belong to, and in files if wanted.

Layers that read the same tensor share the factor A (a transformer's gate and up projection, or query, key and value),
and therefore its eigenbasis.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lightning_curvature.factors.basis import CurvatureBasis, decompose
from lightning_curvature.storage.atomic import replacing
from lightning_curvature.storage.hashes import tensor_hash


class Original(NamedTuple):
    """A factor of which there is a copy on another device, and its version when the copy was made."""

    factor: Tensor
    version: int | str

    @classmethod
    def now(cls, factor: Tensor) -> "Original":
        """Return a factor with the version that it has now; one made in inference mode has none but its entries."""
        return cls(factor, tensor_hash(factor) if factor.is_inference() else factor._version)


class _Kept(NamedTuple):
    version: int | str
    vectors: Tensor
    values: Tensor


_kept = WeakIdKeyDictionary()
_folders: list[tuple[Path, bool]] = []  # and whether new ones are written there


@contextmanager
def bases_in(folder: str | PathLike[str] | None, write: bool = True) -> Iterator[None]:
    """Keep eigenbases in a folder for the time of a ``with`` block, and take those that it holds already.

    A file there is named by the SHA-256 of its factor's entries, so that a basis of other factors is never taken. Each
    takes 8 bytes for each entry of the factor.

    Args:
        folder: Made if it is not there. None keeps nothing.
        write: Whether to; otherwise those that are there are taken, and nothing is made.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from lightning_curvature import LayerFactors
        >>> layer = LayerFactors(A=torch.eye(3), G=torch.diag(torch.tensor([2.0, 1.0])), num_inputs=9, num_gradients=9)
        >>> with tempfile.TemporaryDirectory() as folder, bases_in(folder):
        ...     print(layer.basis.lam, len(list(Path(folder).iterdir())))
        tensor([2., 1.], dtype=torch.float64) 2
    """
    if folder is None:
        yield
        return
    if write:
        Path(folder).mkdir(parents=True, exist_ok=True)
    _folders.append((Path(folder), write))
    try:
        yield
    finally:
        _folders.pop()


def known_basis(A: Tensor, G: Tensor, of: tuple[Original, Original] | None = None) -> CurvatureBasis:
    """Return the curvature basis of a layer, as :func:`~.basis.curvature_basis` does, worked out once.

    Args:
        A: ``[d_in, d_in]``.
        G: ``[d_out, d_out]``.
        of: The A and the G that these are copies of, if they are: the basis is kept with those, where they are.

    Raises:
        FaultyLayerError: If a factor cannot be decomposed.
    """
    first_A, first_G = (Original.now(A), Original.now(G)) if of is None else of
    return CurvatureBasis(*_known(G, first_G, "Factor G"), *_known(A, first_A, "Factor A"))


def known_values(factor: Tensor, what: str, of: Original | None = None) -> Tensor:
    """Return the eigenvalues of a factor, descending, worked out once; arguments as :func:`known_basis`."""
    return _known(factor, Original.now(factor) if of is None else of, what)[1]


def _known(factor: Tensor, first: Original, what: str) -> tuple[Tensor, Tensor]:
    """Return eigenvectors and eigenvalues of a factor, kept with the one that it is a copy of."""
    found: _Kept | None = _kept.get(first.factor)  # type: ignore[no-untyped-call]
    if found is not None and found.version == first.version:
        return found.vectors.to(factor.device), found.values.to(factor.device)
    made = _on_disk(factor, what, *_folders[-1]) if _folders else decompose(factor, what)
    _kept[first.factor] = _Kept(first.version, *(part.to(first.factor.device) for part in made))
    return made


def _on_disk(factor: Tensor, what: str, folder: Path, write: bool) -> tuple[Tensor, Tensor]:
    path = folder / f"{hashlib.sha256(tensor_hash(factor).encode()).hexdigest()}.safetensors"
    if path.exists():
        try:
            with safe_open(path, "pt") as file:
                saved = [file.get_tensor(name) for name in ("vectors", "values")]
                if (file.metadata() or {}).get("sha256") == _hash(saved):
                    return saved[0].to(factor.device), saved[1].to(factor.device)
        except (SafetensorError, KeyError):
            pass  # a damaged file is written anew
    vectors, values = decompose(factor, what)
    if not write:
        return vectors, values
    tensors = {"vectors": vectors.cpu().contiguous(), "values": values.cpu().contiguous()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"sha256": _hash(tensors.values())})
    return vectors, values


def _hash(tensors: Iterable[Tensor]) -> str:
    return hashlib.sha256(" ".join(map(tensor_hash, tensors)).encode()).hexdigest()
