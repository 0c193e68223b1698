"""Which files may be written, and under which names."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning_curvature._checks import listing

Format = Literal["folder", "safetensors", "archive"]
"""What a checkpoint is: a Hugging Face folder, a safetensors file, or a file of ``torch.save``."""

SAFETENSORS = ".safetensors"
ARCHIVES = (".pt", ".pth", ".ckpt", ".bin", ".th", ".tar", ".pkl", ".pickle")
_OTHERS = (".json", ".jsonl", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".npy", ".txt", ".yaml", ".csv", ".png")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
NOTE = "curvature_edit.json"
"""File of a Hugging Face folder that says what was edited."""
ADAPTER = "adapter_config.json"
"""File of a folder with an adapter that says of which kind it is."""
DELTA = "lightning_curvature.delta"
"""Metadata entry of a delta file, JSON."""
FACTORS = "lightning_curvature.factors"
"""Metadata entry of a factor file, JSON."""
_WRITTEN = {
    "folder": "a Hugging Face folder is written; name a folder",
    "safetensors": "a safetensors file is written; name it NAME.safetensors",
    "archive": "a file of torch.save is written; name it NAME.ckpt or NAME.pt",
}


def ending(path: str | os.PathLike[str]) -> str:
    """Return what stands behind the last dot of a file's name, with the dot, in small letters.

    >>> ending("runs/v1.2/Model.SafeTensors"), ending("model"), ending(".pt")
    ('.safetensors', '', '.pt')
    """
    _, dot, last = Path(path).name.lower().rpartition(".")
    return dot + last if dot else ""


def check_name(output: str | os.PathLike[str], format_: Format) -> None:
    """Raise if a checkpoint of some format cannot be written under a name, since readers tell formats by names.

    A name without a known ending, such as ``edited``, is allowed for every format.

    Args:
        output: File or folder to write.
        format_: What is written.

    Raises:
        ValueError: If the name is one of another format.
        FileExistsError: If there is a file where a folder is to be written, or a folder where a file is to be written,
            or a folder that holds other things than a model: it would be replaced as a whole.
    """
    end = ending(output)
    fits = {
        "folder": end not in (SAFETENSORS, *ARCHIVES, *_OTHERS),
        "safetensors": end not in (*ARCHIVES, *_OTHERS),
        "archive": end not in (SAFETENSORS, *_OTHERS),
    }
    if not fits[format_]:
        raise ValueError(f"{output}: the format follows the source, and {_WRITTEN[format_]}.")
    if Path(output).exists() and Path(output).is_dir() != (format_ == "folder"):
        there = "a folder" if Path(output).is_dir() else "a file"
        raise FileExistsError(f"{output} is {there}, and {_WRITTEN[format_]}.")
    if format_ == "folder" and Path(output).is_dir() and not _replaceable(Path(output)):
        names = listing(sorted(path.name for path in Path(output).iterdir()), 3)
        raise FileExistsError(
            f"{output} holds other things than a model, {names}, and would be replaced as a whole. Name a new folder, "
            "such as one in it."
        )


def _replaceable(folder: Path) -> bool:
    """Tell whether a folder is empty, or holds a model: its configuration with weights, or the note of an edit."""
    if not any(folder.iterdir()) or (folder / NOTE).is_file():
        return True
    weights = any(path.is_file() for pattern in _WEIGHTS for path in folder.glob(pattern))
    return weights and any((folder / name).is_file() for name in ("config.json", ADAPTER))


def check_safetensors_name(output: str | os.PathLike[str], what: str) -> None:
    """Raise if a safetensors file that is no checkpoint is to be written under the name of another format.

    Args:
        output: File to write.
        what: What it is, for the error.

    Raises:
        ValueError: If the name is one of another format.
        FileExistsError: If it is a folder.
    """
    if ending(output) in (*ARCHIVES, *_OTHERS):
        raise ValueError(f"{output}: {what} is a safetensors file; name it NAME.safetensors.")
    if Path(output).is_dir():
        raise FileExistsError(f"{output} is a folder; {what} is one file. Name a file in it.")


def check_outputs(
    outputs: Sequence[str | os.PathLike[str]], inputs: Sequence[str | os.PathLike[str]], overwrite: bool
) -> None:
    """Raise ``FileExistsError`` if an output would replace or contain an input, another output, or an existing file.

    Args:
        outputs: Files and folders to write.
        inputs: Files and folders that are read. The targets of the links in a folder are read, too.
        overwrite: Whether outputs may exist.
    """
    inputs = [*inputs, *(link for path in inputs for link in _links(Path(path)))]
    resolved = [Path(path).resolve() for path in outputs]
    for output, path in zip(outputs, resolved, strict=True):
        for source in inputs:
            source_path = Path(source).resolve()
            if path == source_path:
                raise FileExistsError(
                    f"{output} is the source itself, or another file that is read. Write to another path; the original "
                    "is what you can go back to."
                )
            if path.is_relative_to(source_path) or source_path.is_relative_to(path):
                raise FileExistsError(f"{output} and {source} lie one inside the other. Write to another path.")
        if resolved.count(path) > 1:
            raise FileExistsError(f"{output} is named twice among the files to write.")
        if any(path != folder and path.is_relative_to(folder) for folder in resolved):
            raise FileExistsError(f"{output} lies inside of a folder that is written as a whole. Put it beside that.")
        if path.exists() and not overwrite:
            raise FileExistsError(f"{output} exists. Choose another path, or --overwrite it.")
        nearest = next(parent for parent in path.parents if parent.exists())
        if not nearest.is_dir():
            raise FileExistsError(f"{output} cannot be written: {nearest} is a file, not a folder.")


def _links(folder: Path) -> list[Path]:
    """Return the links in a folder, such as those of the Hugging Face cache; none of a file."""
    return [path for path in folder.iterdir() if path.is_symlink()] if folder.is_dir() else []
