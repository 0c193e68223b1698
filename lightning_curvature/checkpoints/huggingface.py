"""Hugging Face folders: safetensors files, one or several with an index, and everything beside them."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from lightning_curvature._checks import listing
from lightning_curvature.checkpoints.base import Edits
from lightning_curvature.checkpoints.facts import check_facts
from lightning_curvature.checkpoints.safetensors import SafetensorsFile
from lightning_curvature.storage.atomic import replacing_folder, sync
from lightning_curvature.storage.outputs import NOTE, Format
from lightning_curvature.storage.tree import COPY_AGAIN, parse_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CARD = "README.md"
_SHARED_LAYERS = 100  # so many more layers than tensors may a model have (ALBERT has one for all of them)
_OTHER_WEIGHTS = ("pytorch_model*.bin", "*.gguf", "consolidated*", "*.h5", "*.msgpack")
_AGAIN = f"Copy {INDEX} and the files that it names again."
AS_IT_IS = ("utf-8", "surrogateescape")  # bytes that are no UTF-8 survive
_BEGIN, _END = "<!-- lightning_curvature: begin -->", "<!-- lightning_curvature: end -->"
_SECTION = re.compile(rf"\n\n{_BEGIN}.*?{_END}\n", re.DOTALL)


def card_section(provenance: Mapping[str, Any]) -> str:
    """Return the section of a model card that says what was edited, as Markdown."""
    unknown = "not known"
    rows = [
        [name, *(layer.get(key, unknown) for key in ("energy", "positions"))]
        for name, layer in provenance.get("layers", {}).items()
    ]
    table = tabulate(rows, ["layer", "energy", "positions"], tablefmt="github", disable_numparse=True)
    return (
        f"\n\n{_BEGIN}\n## Edited weights\n\n"
        f"Weights of this model were edited with {provenance.get('package', unknown)} (method "
        f"{provenance.get('method', unknown)}, "
        "arXiv:2510.24256), so that it recites less of its training data. Facts that it knows by heart can suffer, "
        "too.\n\n"
        f"{table}\n\n"
        f"- Fisher: {provenance.get('provenance', {}).get('fisher', unknown)}\n"
        f"- SHA-256 of the unedited weights: `{provenance.get('source', unknown)}`\n"
        f"- SHA-256 of the K-FAC factors: `{provenance.get('factors', unknown)}`\n{_END}\n"
    )


def edited_note(folder: str | os.PathLike[str]) -> str | None:
    """Return a sentence that says what was edited in a folder, for those who load a model from it; None if nothing was.

    Raises:
        ValueError: If what it says of its edit is damaged.
    """
    note = Path(folder) / NOTE
    if not note.is_file():
        return None
    facts = check_facts(parse_json(note.read_bytes(), f"{note}"), f"{note}")
    layers = listing(facts.get("layers", {}), 3)
    return f"The model in {folder} is an edited copy (method {facts.get('method')}, layers {layers})."


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
            names = _read_index(index)
        elif (self.path / SINGLE).exists():
            names = dict.fromkeys(SafetensorsFile(self.path / SINGLE).header, SINGLE)
        else:
            raise ValueError(
                f"{path} holds neither {SINGLE} nor {INDEX}. Save the model again with save_pretrained, which writes "
                "safetensors."
            )
        for file in set(names.values()):
            if not self._check_inside(file).is_file():
                raise ValueError(f"{index} says that {file!r} holds weights; it is no file. {_AGAIN}")
        self.shards = {file: SafetensorsFile(self.path / file) for file in sorted(set(names.values()))}
        for name, file in names.items():
            if name not in self.shards[file].header:
                raise ValueError(f"{index} says that {file} holds {name!r}; it does not. The folder is not complete.")
        self.where = names

    format: Format = "folder"

    @property
    def provenance(self) -> dict[str, Any] | None:
        """What an earlier edit wrote, or None."""
        note = self.path / NOTE
        if note.exists():
            return check_facts(parse_json(note.read_bytes(), f"{note}"), f"{note}")
        return next((shard.provenance for shard in self.shards.values() if shard.provenance is not None), None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor."""
        shapes = {file: shard.shapes() for file, shard in self.shards.items()}
        return {name: shapes[file][name] for name, file in self.where.items()}

    def module_names(self) -> dict[str, str]:
        """Return the tensor of each module's weight where transformers loads it under another name."""
        try:
            from transformers.core_model_loading import revert_weight_conversion
        except ImportError:  # there are no such names without transformers, or in old releases of it
            return {}
        model = empty_model(self.path, len(self.where))
        if model is None:
            return {}
        stored = {}
        for name, parameter in model.named_parameters():
            found = revert_weight_conversion(model, {name: parameter})
            if len(found) == 1 and next(iter(found.values())).shape == parameter.shape:
                stored[name] = next(iter(found))
        return {name: file_name for name, file_name in stored.items() if file_name in self.where}

    def num_bytes(self, name: str) -> int:
        """Return the bytes of a tensor."""
        return self.shards[self.where[name]].num_bytes(name)

    def check_ties(self, names: Iterable[str]) -> None:
        """Do nothing: tensors of these files share no memory."""

    def hash(self, name: str) -> str:
        """Return what :func:`lightning_curvature.storage.hashes.tensor_hash` does of one tensor."""
        return self.shards[self.where[name]].hash(name)

    def read(self, name: str) -> Tensor:
        """Return a copy of one tensor."""
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
        if headers is not None and not self.shards.keys() <= headers.keys():
            headers = None  # of another format
        with replacing_folder(target) as new:
            shutil.copytree(self.path, new, ignore=self._not_copied)
            self._write_notes(new, provenance, headers)
            own = {
                file: {name: edit for name, edit in edits.items() if self.where[name] == file} for file in self.shards
            }
            for file, shard in self.shards.items():
                if own[file]:
                    shard.copy(new / file, own[file], provenance, None if headers is None else {"": headers[file]})
                else:
                    _copy_and_sync(shard.path, new / file)

    def _write_notes(self, new: Path, provenance: Mapping[str, Any] | None, headers: Mapping[str, str] | None) -> None:
        """Write what the folder says about its edit: a note for programs, a section of the model card for people."""
        if headers is not None:
            for file in (NOTE, CARD):
                if file in headers:
                    (new / file).write_bytes(headers[file].encode(*AS_IT_IS))
        elif provenance is not None:
            card = self.path / CARD
            before = _SECTION.sub("", card.read_bytes().decode(*AS_IT_IS)) if card.exists() else ""
            (new / CARD).write_bytes((before + card_section(provenance)).encode(*AS_IT_IS))
            (new / NOTE).write_text(json.dumps(provenance, indent=2), encoding="utf-8")
        elif (self.path / CARD).exists():
            text = (self.path / CARD).read_bytes().decode(*AS_IT_IS)
            (new / CARD).write_bytes(_SECTION.sub("", text).encode(*AS_IT_IS))

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


def empty_model(folder: Path, num_tensors: int | None = None) -> Any:
    """Return the model that a folder's configuration describes, without memory for its weights (on the meta device).

    Args:
        folder: Folder with a ``config.json``.
        num_tensors: How many tensors it has, if that is known.

    Returns:
        None if there is no configuration, or none of a model of transformers (which must be installed).

    Raises:
        ValueError: If the configuration is broken.
    """
    file = folder / "config.json"
    if not file.is_file():
        return None
    import transformers

    depths = [n for key, n in parse_json(file.read_bytes(), f"{file}").items() if key.endswith(("layer", "layers"))]
    if num_tensors is not None and any(isinstance(n, int) and n > _SHARED_LAYERS + num_tensors for n in depths):
        raise ValueError(f"{file} names more layers than there are tensors. {COPY_AGAIN}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
            return None
        with torch.device("meta"):
            return kind(config)
    except (ValueError, OSError):  # of a model that transformers does not know
        return None
    except Exception as error:  # transformers builds what it is told, and fails wherever that makes no sense
        raise ValueError(
            f"{file} describes no model that transformers can build ({type(error).__name__}: {error}). {COPY_AGAIN}"
        ) from error


def _read_index(index: Path) -> dict[str, str]:
    """Return the file of each tensor."""
    names = parse_json(index.read_bytes(), f"{index}").get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ValueError(f"{index} has no weight_map with the file of each tensor. {_AGAIN}")
    return names


def _copy_and_sync(source: Path, target: Path) -> None:
    shutil.copy2(source, target)
    sync(target)


def fill(module: nn.Module) -> None:
    """Give the weights of a model on the meta device values that take no memory: what has none cannot be chosen."""
    filled: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            if weight not in filled:
                filled[weight] = nn.Parameter(torch.zeros((), dtype=weight.dtype).expand(weight.shape))
            setattr(part, name, filled[weight])
