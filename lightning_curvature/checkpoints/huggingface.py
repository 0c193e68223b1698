"""Hugging Face folders: one safetensors file, or several with an index, and all other files of the folder."""

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
_COPY_INDEX_AGAIN = f"Copy {INDEX} again, and all files that it names."


class HuggingFaceFolder(Checkpoint):
    """A folder written by ``save_pretrained`` with safetensors weights.

    Args:
        path: Folder.

    Attributes:
        shards: The safetensors files by name.
        file_of: By tensor name, the name of the file that holds it.

    Raises:
        ValueError: If the folder holds no safetensors weights, or two models, or if its index does not fit its files.
    """

    format: ClassVar[Format] = "folder"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        index = self.path / INDEX
        if index.exists() and (self.path / SINGLE).exists():
            raise ValueError(
                f"{path} holds both {SINGLE} and {INDEX}: two models. Remove the one that you do not want "
                f"(transformers loads {SINGLE})."
            )
        others = [file.name for pattern in _OTHER_WEIGHTS for file in self.path.glob(pattern)]
        if others:
            warnings.warn(
                f"{path} also holds {listing(sorted(others), 3)}: weights in other formats, which are not edited. "
                "Remove them before you pass the model on.",
                stacklevel=2,
            )
        if index.exists():
            self.file_of = _read_index(index)
        elif (self.path / SINGLE).exists():
            self.file_of = dict.fromkeys(SafetensorsFile(self.path / SINGLE).header, SINGLE)
        else:
            raise ValueError(
                f"{path} holds neither {SINGLE} nor {INDEX}. Save the model again with save_pretrained, which writes "
                "safetensors."
            )
        files = sorted(set(self.file_of.values()))
        for file in files:
            if not self._check_inside(file).is_file():
                raise ValueError(f"{index} says that {file!r} holds weights, but it is no file. {_COPY_INDEX_AGAIN}")
        self.shards = {file: SafetensorsFile(self.path / file) for file in files}
        for name, file in self.file_of.items():
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
        return {name: shapes[file][name] for name, file in self.file_of.items()}

    def module_names(self) -> dict[str, str]:
        """Return the names of tensors in this folder, by the names that transformers gives them when it loads them.

        Raises:
            ValueError: If the folder's configuration is broken.
        """
        try:
            from transformers.core_model_loading import revert_weight_conversion
        except ImportError:  # transformers is missing, or too old to tell how it renames tensors
            return {}
        model = empty_model(self.path, len(self.file_of))
        if model is None:
            return {}
        names = {}
        for loaded_name, parameter in model.named_parameters():
            saved = revert_weight_conversion(model, {loaded_name: parameter})
            # Skip what is saved as several tensors, or in another shape: it is not the stored weight of one layer.
            if len(saved) == 1:
                ((name, tensor),) = saved.items()
                if name in self.file_of and tensor.shape == parameter.shape:
                    names[loaded_name] = name
        return names

    def num_bytes(self, name: str) -> int:
        """Return the bytes of a tensor."""
        return self.shards[self.file_of[name]].num_bytes(name)

    def hash(self, name: str) -> str:
        """Return the hash of a tensor."""
        return self.shards[self.file_of[name]].hash(name)

    def read(self, name: str) -> Tensor:
        """Return a copy of a tensor."""
        return self.shards[self.file_of[name]].read(name)

    def headers(self) -> dict[str, str]:
        """Return, by file name, the header of every shard and the content of the note and the model card, unchanged."""
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
            headers = None  # they are headers of a checkpoint in another format
        with replacing_folder(target) as new:
            shutil.copytree(self.path, new, ignore=self._not_copied)
            self._write_notes(new, facts, headers)
            for file, shard in self.shards.items():
                edits_here = {name: edit for name, edit in edits.items() if self.file_of[name] == file}
                if edits_here:
                    shard.copy(new / file, edits_here, facts, None if headers is None else {"": headers[file]})
                else:
                    _copy_and_sync(shard.path, new / file)

    def _write_notes(self, new: Path, facts: Mapping[str, Any] | None, headers: Mapping[str, str] | None) -> None:
        """Write the note for programs and the section of the model card for people, which describe the edit.

        With ``headers``, restore both as they are there, and write nothing new.
        """
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
        """Return the files that ``shutil.copytree`` must skip; raise if any file lies outside the folder."""
        for name in names:
            self._check_inside(Path(folder, name).relative_to(self.path).as_posix())
        if Path(folder) != self.path:
            return set()
        return {name for name in names if name in self.shards or name in (NOTE, CARD)}

    def _check_inside(self, file: str) -> Path:
        """Return the resolved path of a file; raise ``ValueError`` if it lies outside the folder, or does not exist.

        In the Hugging Face cache, the files of a snapshot are links to the ``blobs`` of its repository. These are read.
        """
        try:
            resolved = (self.path / file).resolve()
            exists = resolved.exists()
        except (OSError, ValueError, RuntimeError) as error:  # a name too long or not valid, or links in a circle
            raise ValueError(
                f"{self.path}: {file!a:.60} cannot be a file name ({error!a}). {_COPY_INDEX_AGAIN}"
            ) from error
        folder = self.path.resolve()
        inside = resolved.is_relative_to(folder)
        if not inside and folder.parent.name == "snapshots" and ".." not in Path(file).parts:
            inside = resolved.is_relative_to(folder.parent.parent / "blobs")
        if Path(file).is_absolute() or not inside:
            raise ValueError(
                f"{self.path}: {file!r} leads out of the folder, to {resolved}. Such a folder is not read."
            )
        if not exists:
            raise ValueError(
                f"{self.path}: {file!r} is named in the index or is a link, but there is no such file. "
                f"{_COPY_INDEX_AGAIN}"
            )
        return resolved


def _read_index(index: Path) -> dict[str, str]:
    """Return the file of each tensor."""
    file_of = parse_json(index.read_bytes(), f"{index}").get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise ValueError(f"{index} has no weight_map with the file of each tensor. {_COPY_INDEX_AGAIN}")
    return file_of


def _copy_and_sync(source: Path, target: Path) -> None:
    shutil.copy2(source, target)
    sync(target)
