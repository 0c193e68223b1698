"""Hugging Face folders: safetensors files, one or several with an index, and everything beside them."""

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lightning_curvature._checks import listing
from lightning_curvature.checkpoints.base import Checkpoint, Edits
from lightning_curvature.checkpoints.empty_model import empty_model
from lightning_curvature.checkpoints.facts import read_note
from lightning_curvature.checkpoints.model_card import AS_IT_IS, CARD, card_section, without_section
from lightning_curvature.checkpoints.safetensors import SafetensorsFile
from lightning_curvature.storage.atomic import replacing_folder, sync
from lightning_curvature.storage.outputs import NOTE, Format
from lightning_curvature.storage.tree import parse_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHER_WEIGHTS = ("pytorch_model*.bin", "*.gguf", "consolidated*", "*.h5", "*.msgpack")
_AGAIN = f"Copy {INDEX} and the files that it names again."


class HuggingFaceFolder(Checkpoint):
    """A folder written by ``save_pretrained`` with safetensors weights.

    Args:
        path: Folder.

    Attributes:
        shards: The safetensors files by name.
        where: The name of the file that holds each tensor.

    Raises:
        ValueError: If it holds no such weights, or its index names a file outside of it, or a file that is not there.
    """

    format: ClassVar[Format] = "folder"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        index = self.path / INDEX
        if index.exists() and (self.path / SINGLE).exists():
            raise ValueError(
                f"{path} holds both {SINGLE} and {INDEX}: two models. Remove the one that is not meant (transformers "
                f"loads {SINGLE})."
            )
        others = [file.name for pattern in _OTHER_WEIGHTS for file in self.path.glob(pattern)]
        if others:
            warnings.warn(
                f"{path} also holds {listing(sorted(others), 3)}: weights in other formats, which are not edited. "
                "Remove them before you pass the model on.",
                stacklevel=2,
            )
        if index.exists():
            self.where = _read_index(index)
        elif (self.path / SINGLE).exists():
            self.where = dict.fromkeys(SafetensorsFile(self.path / SINGLE).header, SINGLE)
        else:
            raise ValueError(
                f"{path} holds neither {SINGLE} nor {INDEX}. Save the model again with save_pretrained, which writes "
                "safetensors."
            )
        files = sorted(set(self.where.values()))
        for file in files:
            if not self._check_inside(file).is_file():
                raise ValueError(f"{index} says that {file!r} holds weights; it is no file. {_AGAIN}")
        self.shards = {file: SafetensorsFile(self.path / file) for file in files}
        for name, file in self.where.items():
            if name not in self.shards[file].header:
                raise ValueError(f"{index} says that {file} holds {name!r}; it does not. The folder is not complete.")

    @property
    def edit_facts(self) -> dict[str, Any] | None:
        """What an earlier edit wrote about itself, or None."""
        note = read_note(self.path)
        if note is not None:
            return note
        return next((shard.edit_facts for shard in self.shards.values() if shard.edit_facts is not None), None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor."""
        shapes = {file: shard.shapes() for file, shard in self.shards.items()}
        return {name: shapes[file][name] for name, file in self.where.items()}

    def module_names(self) -> dict[str, str]:
        """Return the tensor of each weight by the name that transformers loads it under.

        Raises:
            ValueError: If the folder's configuration is broken.
        """
        try:
            from transformers.core_model_loading import revert_weight_conversion
        except ImportError:  # there are no such names without transformers, or in old releases of it
            return {}
        model = empty_model(self.path, len(self.where))
        if model is None:
            return {}
        names = {}
        for loaded_name, parameter in model.named_parameters():
            saved = revert_weight_conversion(model, {loaded_name: parameter})
            # A parameter that is saved in several parts, or turned, is not the tensor of one layer's weight.
            if len(saved) == 1:
                ((name, tensor),) = saved.items()
                if name in self.where and tensor.shape == parameter.shape:
                    names[loaded_name] = name
        return names

    def num_bytes(self, name: str) -> int:
        """Return the bytes of a tensor."""
        return self.shards[self.where[name]].num_bytes(name)

    def hash(self, name: str) -> str:
        """Return the hash of a tensor."""
        return self.shards[self.where[name]].hash(name)

    def read(self, name: str) -> Tensor:
        """Return a copy of a tensor."""
        return self.shards[self.where[name]].read(name)

    def headers(self) -> dict[str, str]:
        """Return the header of every shard, and the files in which an edit is described, as they stand."""
        notes = {file: (self.path / file).read_bytes() for file in (NOTE, CARD) if (self.path / file).exists()}
        return {file: shard.raw_header.decode() for file, shard in self.shards.items()} | {
            file: content.decode(*AS_IT_IS) for file, content in notes.items()
        }

    def copy(
        self,
        target: str | os.PathLike[str],
        edits: Edits,
        facts: Mapping[str, Any] | None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Write a copy of the folder with some tensors replaced, as the base class says.

        The facts go into a note, into the model card, and into the metadata of each file that is edited.
        """
        if headers is not None and not self.shards.keys() <= headers.keys():
            headers = None  # of another format
        with replacing_folder(target) as new:
            shutil.copytree(self.path, new, ignore=self._not_copied)
            self._write_notes(new, facts, headers)
            for file, shard in self.shards.items():
                edits_here = {name: edit for name, edit in edits.items() if self.where[name] == file}
                if edits_here:
                    shard.copy(new / file, edits_here, facts, None if headers is None else {"": headers[file]})
                else:
                    _copy_and_sync(shard.path, new / file)

    def _write_notes(self, new: Path, facts: Mapping[str, Any] | None, headers: Mapping[str, str] | None) -> None:
        """Write what the folder says about its edit: a note for programs, a section of the model card for people."""
        if headers is not None:
            for file in (NOTE, CARD):
                if file in headers:
                    (new / file).write_bytes(headers[file].encode(*AS_IT_IS))
            return
        card = self.path / CARD
        if card.exists() or facts is not None:
            section = b"" if facts is None else card_section(facts)
            (new / CARD).write_bytes(without_section(card.read_bytes() if card.exists() else b"") + section)
        if facts is not None:
            (new / NOTE).write_text(json.dumps(facts, indent=2), encoding="utf-8")

    def _not_copied(self, folder: str, names: list[str]) -> set[str]:
        for name in names:
            self._check_inside(Path(folder, name).relative_to(self.path).as_posix())
        if Path(folder) != self.path:
            return set()
        return {name for name in names if name in self.shards or name in (NOTE, CARD)}

    def _check_inside(self, file: str) -> Path:
        """Return where a file lies; raise if that is outside the folder, by its name or through a link.

        The files of a snapshot in the Hugging Face cache are links to the ``blobs`` of the same repository.
        """
        try:
            resolved = (self.path / file).resolve()
            exists = resolved.exists()
        except (OSError, ValueError, RuntimeError) as error:  # too long, no text, or links in a circle
            raise ValueError(f"{self.path}: {file!a:.60} can be no file ({error!a}). {_AGAIN}") from error
        folder = self.path.resolve()
        inside = resolved.is_relative_to(folder)
        if not inside and folder.parent.name == "snapshots" and ".." not in Path(file).parts:
            inside = resolved.is_relative_to(folder.parent.parent / "blobs")
        if Path(file).is_absolute() or not inside:
            raise ValueError(
                f"{self.path}: {file!r} leads out of the folder, to {resolved}. Such a folder is not read."
            )
        if not exists:
            raise ValueError(f"{self.path}: {file!r} is named in the index, but there is no such file. {_AGAIN}")
        return resolved


def _read_index(index: Path) -> dict[str, str]:
    """Return the file of each tensor."""
    names = parse_json(index.read_bytes(), f"{index}").get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ValueError(f"{index} has no weight_map with the file of each tensor. {_AGAIN}")
    return names


def _copy_and_sync(source: Path, target: Path) -> None:
    shutil.copy2(source, target)
    sync(target)
