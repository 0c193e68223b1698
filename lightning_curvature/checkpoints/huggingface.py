"""Hugging Face folders: safetensors files, one or several with an index, and everything beside them."""

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from lightning_curvature._checks import listing
from lightning_curvature.checkpoints.atomic import replace_folder, sync
from lightning_curvature.checkpoints.safetensors import Edits, SafetensorsFile

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NOTE = "curvature_edit.json"
"""File of a folder that says what was edited."""
CARD = "README.md"
_OTHER_WEIGHTS = ("pytorch_model*.bin", "*.gguf", "consolidated*", "*.h5", "*.msgpack")
_AS_IT_IS = ("utf-8", "surrogateescape")  # bytes that are no UTF-8 survive
_BEGIN, _END = "<!-- lightning_curvature: begin -->", "<!-- lightning_curvature: end -->"
_SECTION = re.compile(rf"\n\n{_BEGIN}.*?{_END}\n", re.DOTALL)


def card_section(provenance: Mapping[str, Any]) -> str:
    """Return the section of a model card that says what was edited, as Markdown."""
    facts = provenance["provenance"]
    rows = [[name, layer["energy"], layer["positions"]] for name, layer in provenance["layers"].items()]
    table = tabulate(rows, ["layer", "energy", "positions"], tablefmt="github", disable_numparse=True)
    return (
        f"\n\n{_BEGIN}\n## Edited weights\n\n"
        f"Weights of this model were edited with {provenance['package']} (method {provenance['method']}, "
        "arXiv:2510.24256), so that it recites less of its training data. Facts that it knows by heart can suffer, "
        "too.\n\n"
        f"{table}\n\n"
        f"- Fisher: {facts.get('fisher', 'not known')}\n"
        f"- SHA-256 of the unedited weights: `{provenance['source']}`\n"
        f"- SHA-256 of the K-FAC factors: `{provenance['factors']}`\n{_END}\n"
    )


class HuggingFaceFolder:
    """A folder written by ``save_pretrained`` with safetensors weights.

    Args:
        path: Folder.

    Raises:
        ValueError: If it holds no such weights, or its index names a file outside of it, or a file that is not there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        index = self.path / INDEX
        if index.exists() and (self.path / SINGLE).exists():
            raise ValueError(
                f"{path} holds both {SINGLE} and {INDEX}: two models. Remove the one that is not meant (transformers "
                f"loads {SINGLE})."
            )
        others = [found.name for pattern in _OTHER_WEIGHTS for found in self.path.glob(pattern)]
        if others:
            warnings.warn(
                f"{path} also holds {listing(sorted(others), 3)}: weights in other formats, which are not edited. "
                "Remove them before you pass the model on.",
                stacklevel=2,
            )
        if index.exists():
            names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif (self.path / SINGLE).exists():
            names = dict.fromkeys(SafetensorsFile(self.path / SINGLE).header, SINGLE)
        else:
            raise ValueError(
                f"{path} holds neither {SINGLE} nor {INDEX}. Save the model again with save_pretrained, which writes "
                "safetensors."
            )
        for file in set(names.values()):
            self._check_inside(file)
        self.shards = {file: SafetensorsFile(self.path / file) for file in sorted(set(names.values()))}
        for name, file in names.items():
            if name not in self.shards[file].header:
                raise ValueError(f"{index} says that {file} holds {name!r}; it does not. The folder is not complete.")
        self.where = names

    @property
    def provenance(self) -> dict[str, Any] | None:
        """What an earlier edit wrote, or None."""
        note = self.path / NOTE
        if note.exists():
            found: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
            return found
        return next((shard.provenance for shard in self.shards.values() if shard.provenance is not None), None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor."""
        shapes = {file: shard.shapes() for file, shard in self.shards.items()}
        return {name: shapes[file][name] for name, file in self.where.items()}

    def module_names(self) -> dict[str, str]:
        """Return the tensor of each module's weight where transformers loads it under another name."""
        try:
            import transformers
            from transformers.core_model_loading import revert_weight_conversion
        except ImportError:  # there are no such names without transformers, or in old releases of it
            return {}
        try:
            config = transformers.AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        except (ValueError, OSError):  # no configuration, or of a model that transformers does not know
            return {}
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        if kind is None:
            return {}
        with torch.device("meta"):
            model = kind(config)
        stored = {}
        for name, parameter in model.named_parameters():
            found = revert_weight_conversion(model, {name: parameter})
            if len(found) == 1 and next(iter(found.values())).shape == parameter.shape:
                stored[name] = next(iter(found))
        return {name: file_name for name, file_name in stored.items() if file_name in self.where}

    def num_bytes(self, name: str) -> int:
        """Return the bytes of a tensor."""
        return self.shards[self.where[name]].num_bytes(name)

    def read(self, name: str) -> Tensor:
        """Return a copy of one tensor."""
        return self.shards[self.where[name]].read(name)

    def headers(self) -> dict[str, str]:
        """Return the header of every shard, and the files in which an edit is described, as they stand."""
        notes = {file: (self.path / file).read_bytes() for file in (NOTE, CARD) if (self.path / file).exists()}
        return {file: shard.raw_header.decode() for file, shard in self.shards.items()} | {
            file: content.decode(*_AS_IT_IS) for file, content in notes.items()
        }

    def copy(
        self,
        target: str | os.PathLike[str],
        edits: Edits,
        provenance: Mapping[str, Any] | None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Write a copy of the folder with some tensors replaced; it appears as a whole, or not at all.

        Args:
            target: Folder to write; if it exists, it is replaced.
            edits: New tensors, of the shape and dtype of the old ones.
            provenance: What to write into the note; None leaves the note out.
            headers: What :meth:`headers` of the original returned: headers to write as they are.
        """
        target = Path(target)
        if headers is not None and not self.shards.keys() <= headers.keys():
            headers = None  # of another format
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        try:
            new = scratch / "new"
            shutil.copytree(self.path, new, ignore=self._not_copied)
            self._write_notes(new, provenance, headers)
            own = {file: {name: edit for name, edit in edits.items() if self.where[name] == file}
                   for file in self.shards}  # fmt: skip
            with ThreadPoolExecutor(1) as thread:  # the disk is busy while edits are computed
                copies = [thread.submit(_copy_and_sync, shard.path, new / file)
                          for file, shard in self.shards.items() if not own[file]]  # fmt: skip
                for file, shard in self.shards.items():
                    if own[file]:
                        shard.copy(new / file, own[file], provenance, None if headers is None else {"": headers[file]})
                for copied in copies:
                    copied.result()
            for path in new.rglob("*"):
                if path.is_file() and path.name not in self.shards:
                    sync(path)
            replace_folder(new, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _write_notes(self, new: Path, provenance: Mapping[str, Any] | None, headers: Mapping[str, str] | None) -> None:
        """Write what the folder says about its edit: a note for programs, a section of the model card for people."""
        if headers is not None:
            for file in (NOTE, CARD):
                if file in headers:
                    (new / file).write_bytes(headers[file].encode(*_AS_IT_IS))
        elif provenance is not None:
            card = self.path / CARD
            before = _SECTION.sub("", card.read_bytes().decode(*_AS_IT_IS)) if card.exists() else ""
            (new / CARD).write_bytes((before + card_section(provenance)).encode(*_AS_IT_IS))
            (new / NOTE).write_text(json.dumps(provenance, indent=2), encoding="utf-8")
        elif (self.path / CARD).exists():
            text = (self.path / CARD).read_bytes().decode(*_AS_IT_IS)
            (new / CARD).write_bytes(_SECTION.sub("", text).encode(*_AS_IT_IS))

    def _not_copied(self, folder: str, names: list[str]) -> set[str]:
        for name in names:
            self._check_inside(Path(folder, name).relative_to(self.path).as_posix())
        if Path(folder) != self.path:
            return set()
        return {name for name in names if name in self.shards or name in (NOTE, CARD)}

    def _check_inside(self, file: str) -> None:
        """Raise if a file lies outside the folder, by its name or through a link."""
        resolved = (self.path / file).resolve()
        if Path(file).is_absolute() or not resolved.is_relative_to(self.path.resolve()):
            raise ValueError(
                f"{self.path}: {file!r} leads out of the folder, to {resolved}. Such a folder is not read."
            )
        if not resolved.exists():
            raise ValueError(f"{self.path}: {file!r} is named in the index, but there is no such file.")


def _copy_and_sync(source: Path, target: Path) -> None:
    shutil.copy2(source, target)
    sync(target)
