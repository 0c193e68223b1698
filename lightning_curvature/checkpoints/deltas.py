"""Delta files: they hold the bits in which an edited checkpoint differs from its original, to revert or redo the edit.

For each edited tensor, a delta holds the XOR of the old bits and the new bits. XOR of this difference with one of the
two tensors gives the other one. Hashes tell whether a checkpoint is the original or the edited one.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_curvature.checkpoints.base import Checkpoint
from lightning_curvature.checkpoints.facts import check_facts
from lightning_curvature.checkpoints.model_card import AS_IT_IS, CARD
from lightning_curvature.checkpoints.names import match_layers
from lightning_curvature.checkpoints.opening import open_weights
from lightning_curvature.checkpoints.safetensors import SafetensorsFile, check_header, join_files
from lightning_curvature.storage.atomic import replacing
from lightning_curvature.storage.hashes import tensor_hash, values_hash
from lightning_curvature.storage.outputs import DELTA, NOTE, check_name, check_outputs
from lightning_curvature.storage.scratch import Scratch
from lightning_curvature.storage.sniff import looks_like_safetensors
from lightning_curvature.storage.tree import COPY_AGAIN, is_text, parse_json

_VERSION = 1
_OLD = "old"  # scratch file with the delta that was at the path before; restored if the new delta is not kept


class DeltaRecord(AbstractContextManager["DeltaRecord"]):
    """Collects a delta, with one tensor in memory at a time.

    The delta is written before the edited checkpoint. If the edited checkpoint then fails, the delta is useless: unless
    ``keep`` is set, it is removed when the context ends, and the file that it replaced comes back.

    Args:
        path: File to write.
        checkpoint: The original.
        hashes: Hashes of all tensors of the original.

    Attributes:
        keep: Whether the file stays when the context ends.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint, hashes: Mapping[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.checkpoint = path, checkpoint
        self.scratch = tempfile.TemporaryDirectory(prefix=".delta.", dir=path.parent)
        self.original_hashes, self.edited_hashes = dict(hashes), dict(hashes)
        self.names: list[str] = []
        self.written = self.keep = False

    def add(self, name: str, old: Tensor, new: Tensor) -> None:
        """Add the bits in which an edited tensor differs from the original tensor."""
        save_file({"delta": _bits(old) ^ _bits(new)}, Path(self.scratch.name, str(len(self.names))))
        self.names.append(name)
        self.edited_hashes[name] = tensor_hash(new)

    def write(self, facts: Mapping[str, Any]) -> None:
        """Write the file, atomically.

        Args:
            facts: What the edited copy says about itself.
        """
        parts = {name: Path(self.scratch.name, str(i)) for i, name in enumerate(self.names)}
        header = {
            "version": _VERSION,
            "tensors": {
                name: {"original": self.original_hashes[name], "edited": self.edited_hashes[name]}
                for name in self.names
            },
            "values": {"original": values_hash(self.original_hashes), "edited": values_hash(self.edited_hashes)},
            "edit": facts,
            "before": self.checkpoint.edit_facts,
            "headers": self.checkpoint.headers(),
        }
        if self.path.exists():
            shutil.copy2(self.path, Path(self.scratch.name, _OLD))
        with replacing(self.path) as temporary:
            join_files(parts, temporary, {DELTA: json.dumps(header)})
        self.written = True

    def __exit__(self, *exception: object) -> None:
        """Remove a delta that is not kept, and put back the file that it replaced."""
        if self.written and not self.keep:
            old = Path(self.scratch.name, _OLD)
            if old.exists():
                old.replace(self.path)
            else:
                self.path.unlink()
        self.scratch.cleanup()


def apply_delta(
    source: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    revert: bool,
    overwrite: bool = False,
    allow_globals: Sequence[str] = (),
) -> None:
    """Write the original of an edited checkpoint (``revert``), or the edited copy of an original.

    The hash of every edited tensor is checked, in the source and in the result.

    Args:
        source: Checkpoint, of any format.
        delta: File written by :func:`lightning_curvature.editing.streaming.edit_checkpoint`.
        target: File or folder to write, atomically.
        revert: Take the edit back, rather than make it.
        overwrite: Whether ``target`` may exist.
        allow_globals: Classes that a file of ``torch.save`` may hold.

    Raises:
        FileExistsError: If the target is the source, or exists.
        ValueError: If the delta belongs to another checkpoint, or is damaged.
    """
    check_outputs([target], [source, delta], overwrite)
    header, file = open_delta(delta)
    checkpoint = open_weights(source, allow_globals)
    check_name(target, checkpoint.format)
    names = _matched(header["tensors"], checkpoint, source, delta)
    checkpoint.check_ties(names.values())
    _check_source(checkpoint.hashes(), names, header, source, delta, revert)
    after = "original" if revert else "edited"
    with Scratch(Path(target)) as scratch:
        edits = {}
        for recorded, name in names.items():
            new = _flipped(checkpoint.read(name), file.read(recorded))
            if new is None or tensor_hash(new) != header["tensors"][recorded][after]:
                layer = recorded.removesuffix(".weight")
                raise ValueError(f"{delta} is damaged: {layer!r} does not become the {after} tensor. {COPY_AGAIN}")
            edits[name] = scratch.keep(new)
        if revert:
            checkpoint.copy(target, edits, header["before"], header["headers"])
        else:
            checkpoint.copy(target, edits, header["edit"])


def _matched(
    recorded: Iterable[str], checkpoint: Checkpoint, source: str | os.PathLike[str], delta: str | os.PathLike[str]
) -> dict[str, str]:
    """Return the tensor of a checkpoint for each tensor of a delta.

    Raises:
        ValueError: If one is missing.
    """
    shapes = checkpoint.shapes()
    weights = [name for name in recorded if name.endswith(".weight")]
    try:
        matched = match_layers([name.removesuffix(".weight") for name in weights], shapes, checkpoint.module_names)
    except ValueError as error:
        raise ValueError(f"{source} has other tensors than the checkpoint that {delta} belongs to. {error}") from error
    names = {f"{layer}.weight": name for layer, name in matched.items()}
    for name in sorted(set(recorded) - set(weights)):
        if name not in shapes:
            raise ValueError(f"{source} has no tensor {name!r}, which {delta} changes.")
        names[name] = name
    return names


def _check_source(
    hashes: Mapping[str, str],
    names: Mapping[str, str],
    header: Mapping[str, Any],
    source: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    revert: bool,
) -> None:
    """Raise ``ValueError`` if a checkpoint is not the one that a delta applies to.

    Tensors that the edit left alone are checked, too.

    Args:
        hashes: Hashes of all tensors of the checkpoint.
        names: The tensor of the checkpoint for each one of the delta.
        header: The header of the delta.
        source: The checkpoint, for errors.
        delta: The delta, for errors.
        revert: Whether the checkpoint must be the edited one, rather than the original.
    """
    before, after = ("edited", "original") if revert else ("original", "edited")
    tensors = header["tensors"]
    for recorded, name in names.items():
        if hashes[name] != tensors[recorded][before]:
            raise ValueError(
                f"{name!r} in {source} is not the {before} tensor that {delta} belongs to. "
                f"{'Is this the original checkpoint, or was it edited again?' if revert else 'Is it another model?'}"
            )
    after_by_before = {pair[before]: pair[after] for pair in tensors.values()}
    hashes_after = {name: after_by_before.get(value, value) for name, value in hashes.items()}
    if values_hash(hashes_after) != header["values"][after]:
        raise ValueError(
            f"{source} differs from the {before} checkpoint that {delta} belongs to, in tensors that the edit left "
            "alone. " + ("Was it edited again? Then revert the later edit first." if revert else "Is it another model?")
        )


def _flipped(tensor: Tensor, difference: Tensor) -> Tensor | None:
    """Return ``tensor`` with the bits of ``difference`` flipped; None if they do not have the same number of bytes."""
    bits = _bits(tensor)
    if difference.shape != bits.shape or difference.dtype != bits.dtype:
        return None
    return (bits ^ difference).view(tensor.dtype).view(tensor.shape)


def open_delta(path: str | os.PathLike[str]) -> tuple[dict[str, Any], SafetensorsFile]:
    """Return the header of a delta, and its file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the path is no delta; the message says what it is instead, if that is known.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file. To write a delta, run edit with --save-delta.")
    if not looks_like_safetensors(path):
        kind = "it is a folder" if Path(path).is_dir() else "it is no safetensors file"
        raise ValueError(f"{path} is no delta ({kind}). To write a delta, run edit with --save-delta.")
    file = SafetensorsFile(path)
    return read_header(file), file


def read_header(file: SafetensorsFile) -> dict[str, Any]:
    """Return the header of a delta.

    Args:
        file: The delta.

    Raises:
        ValueError: If the file is no delta, is damaged, or has a version that this package does not read.
    """
    if DELTA not in file.metadata:
        raise ValueError(f"{file.path} is no delta. To write a delta, run edit with --save-delta.")
    header = parse_json(file.metadata[DELTA], f"{file.path}: the metadata entry {DELTA!r}")
    version = header.get("version")
    if version != _VERSION:
        raise ValueError(
            f"{file.path}: the delta has version {version!r:.60}, this package reads version {_VERSION}. Update the "
            "package."
        )
    try:
        _check_header(header, set(file.shapes()))
    except ValueError as error:
        raise ValueError(f"{file.path} is damaged: {error}") from error
    return header


def _check_header(header: Mapping[str, Any], names: set[str]) -> None:
    """Raise ``ValueError`` if a header lacks what :func:`apply_delta` reads; ``names`` are the tensors of the delta."""
    tensors, headers = header.get("tensors"), header.get("headers")
    if not isinstance(tensors, dict) or tensors.keys() != names:
        raise ValueError(f"its header names other tensors than the file holds. {COPY_AGAIN}")
    for hashes in (*tensors.values(), header.get("values")):
        if not isinstance(hashes, dict) or not all(is_text(hashes.get(key)) for key in ("original", "edited")):
            raise ValueError(f"its header lacks hashes of the original and the edited checkpoint. {COPY_AGAIN}")
    check_facts(header.get("edit"), "its header entry 'edit'")
    if header.get("before", {}) is not None:
        check_facts(header.get("before"), "its header entry 'before'")
    if not isinstance(headers, dict) or not all(isinstance(text, str) for text in headers.values()):
        raise ValueError(f"its header lacks the headers of the original. {COPY_AGAIN}")
    for file, text in headers.items():
        what = f"its copy of {file or 'the header of the original'}"
        if file == NOTE:
            check_facts(parse_json(text, what), what)
        elif file == CARD:
            text.encode(*AS_IT_IS)
        else:
            check_header(text, what)


def _bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, uint8, one-dimensional."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
