"""Eigenbases that are worked out once: kept as long as the factor that they belong to, and in files if wanted.

Layers with tied inputs have the factor A in common (a transformer's gate and up projection, or query, key and value),
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

from lightning_curvature.factors.basis import CurvatureBasis
from lightning_curvature.factors.decomposition import decompose
from lightning_curvature.storage.atomic import replacing
from lightning_curvature.storage.hashes import tensor_hash


class _Version(NamedTuple):
    """A factor, and which entries of it are meant: they may be changed in place afterwards."""

    factor: Tensor
    number: int | str


class _Kept(NamedTuple):
    """Eigenvectors and eigenvalues of a factor, and the version that they belong to."""

    version: int | str
    vectors: Tensor
    values: Tensor


class BasisFolder(NamedTuple):
    """A folder with eigenbases in files, and whether new ones are written there."""

    path: Path
    write: bool

    def decompose(self, factor: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """Return eigenvectors and eigenvalues of a factor from its file, which is written if it is not there."""
        path = self.path / f"{hashlib.sha256(tensor_hash(factor).encode()).hexdigest()}.safetensors"
        if path.exists():
            try:
                with safe_open(path, "pt") as file:
                    saved = [file.get_tensor(name) for name in ("vectors", "values")]
                    if (file.metadata() or {}).get("sha256") == _hash(saved):
                        return saved[0].to(factor.device), saved[1].to(factor.device)
            except (SafetensorError, KeyError):
                pass  # a damaged file is written anew
        vectors, values = decompose(factor, what)
        if self.write:
            tensors = {"vectors": vectors.cpu().contiguous(), "values": values.cpu().contiguous()}
            with replacing(path) as temporary:
                save_file(tensors, temporary, metadata={"sha256": _hash(tensors.values())})
        return vectors, values


class BasisCache:
    """Eigenbases of factors, each kept as long as its factor lives; a factor that is changed gets a new one.

    A factor may be copied to another device. The basis of the copy is kept with the copy, and also with the factor, so
    that the next copy need not be decomposed.

    Attributes:
        folders: Where bases are looked for before a factor is decomposed: in the last one, see :func:`bases_in`.
    """

    def __init__(self) -> None:
        self._kept = WeakIdKeyDictionary()  # by factor: the tensor object, not its entries
        self._copies = WeakIdKeyDictionary()  # by copy: the version of the factor that it was copied from
        self.folders: list[BasisFolder] = []

    def __len__(self) -> int:
        """Return of how many factors a basis is kept."""
        return len(self._kept)

    def basis(self, A: Tensor, G: Tensor) -> CurvatureBasis:
        """Return the curvature basis of a layer, as :func:`~.basis.curvature_basis` does, worked out once.

        Args:
            A: ``[d_in, d_in]``.
            G: ``[d_out, d_out]``.

        Raises:
            FaultyLayerError: If a factor cannot be decomposed.
        """
        return CurvatureBasis(*self._decomposed(G, "Factor G"), *self._decomposed(A, "Factor A"))

    def eigenvalues(self, factor: Tensor, what: str) -> Tensor:
        """Return the eigenvalues of a factor, descending, worked out once.

        Args:
            factor: ``[d, d]``.
            what: Name for errors, such as ``"Factor A"``.

        Raises:
            FaultyLayerError: If the factor cannot be decomposed.
        """
        return self._decomposed(factor, what)[1]

    def add_copy(self, copy: Tensor, factor: Tensor) -> None:
        """Remember that a tensor is a copy of a factor, as it is at this moment, on another device."""
        if copy is not factor:
            self._copies[copy] = _version(factor)

    def _decomposed(self, factor: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """Return eigenvectors and eigenvalues of a factor, or of a copy of one, on its device."""
        version: _Version = self._copies.get(factor) or _version(factor)  # type: ignore[no-untyped-call]
        pair = self._look_up(factor, version)
        if pair is not None:
            return pair
        pair = self._look_up(version.factor, version)
        if pair is None:
            pair = self.folders[-1].decompose(factor, what) if self.folders else decompose(factor, what)
            self._keep(version.factor, version, pair)
        return self._keep(factor, version, pair)

    def _look_up(self, tensor: Tensor, version: _Version) -> tuple[Tensor, Tensor] | None:
        """Return the eigenvectors and eigenvalues that are kept for a tensor, if they belong to some version."""
        kept: _Kept | None = self._kept.get(tensor)  # type: ignore[no-untyped-call]
        return None if kept is None or kept.version != version.number else (kept.vectors, kept.values)

    def _keep(self, tensor: Tensor, version: _Version, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keep eigenvectors and eigenvalues for a tensor, on its device; return them."""
        vectors, values = (part.to(tensor.device) for part in pair)
        self._kept[tensor] = _Kept(version.number, vectors, values)
        return vectors, values


BASES = BasisCache()
"""The bases of all factors of this process."""


@contextmanager
def bases_in(folder: str | PathLike[str] | None, write: bool = True) -> Iterator[None]:
    """Keep eigenbases in a folder for the time of a ``with`` block, and take those that it holds already.

    A file there is named by the SHA-256 of its factor's entries, so that a basis of other factors is never taken. Each
    takes 8 bytes for each entry of the factor.

    Args:
        folder: Made if it is not there. None keeps nothing.
        write: Whether new bases are written. Otherwise only those that are there are taken, and the folder is not made.

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
    BASES.folders.append(BasisFolder(Path(folder), write))
    try:
        yield
    finally:
        BASES.folders.pop()


def _version(factor: Tensor) -> _Version:
    """Return the present version of a factor. One made in inference mode has no version but its entries."""
    return _Version(factor, tensor_hash(factor) if factor.is_inference() else factor._version)


def _hash(tensors: Iterable[Tensor]) -> str:
    return hashlib.sha256(" ".join(map(tensor_hash, tensors)).encode()).hexdigest()
