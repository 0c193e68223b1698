"""What commands check before they load anything: files to read, files to write, numbers."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_curvature._checks import check_count
from lightning_curvature.storage.outputs import SAFETENSORS, check_outputs, ending

if TYPE_CHECKING:
    from lightning_curvature.factors.kronecker import KroneckerFactors


def check_files(
    outputs: Mapping[str, Path | None],
    inputs: Mapping[str, Path | list[Path] | None],
    overwrite: bool,
    folders: bool = False,
    models: Sequence[Path | None] = (),
) -> None:
    """Raise if an input is missing, or an output would replace something that it must not.

    Args:
        outputs: Files to write, by option.
        inputs: Files to read, by option; a list where an option takes several.
        overwrite: Whether outputs may exist.
        folders: Whether the outputs are folders; an empty folder may be written to.
        models: Folders or files of models that are read. No output may lie in one of them. That they exist is not
            checked: whoever loads a model does that.
    """
    given = [(option, path) for option, paths in inputs.items() for path in _listed(paths)]
    for option, source in given:
        if source.is_dir():
            raise IsADirectoryError(f"{option} {source} is a folder; it names a file.")
        if not source.is_file():
            raise FileNotFoundError(f"No such file: {source} ({option}).")
    written: list[Path] = []
    empty: list[Path] = []
    for option, path in outputs.items():
        if path is None:
            continue
        place = next(parent for parent in path.absolute().parents if parent.exists())
        if place.is_dir() and not os.access(place, os.W_OK):
            raise PermissionError(f"{option} {path} cannot be written: {place} is not yours to write to.")
        if path.exists() and path.is_dir() != folders:
            present, wanted = ("a file", "a folder") if folders else ("a folder", "a file")
            raise FileExistsError(f"{option} {path} is {present}; it names {wanted} to write.")
        (empty if folders and path.is_dir() and not any(path.iterdir()) else written).append(path)
    read = [*(path for _, path in given), *(path for path in models if path is not None)]
    check_outputs(written, read, overwrite)
    check_outputs(empty, read, overwrite=True)


def _listed(paths: Path | list[Path] | None) -> list[Path]:
    return paths if isinstance(paths, list) else [] if paths is None else [paths]


def unless_folder(path: Path | None) -> Path | None:
    """Return a path for :func:`check_files` to look for a file there, or None if a folder is there."""
    return None if path is None or path.is_dir() else path


def check_bases(bases: Path | None, models: Sequence[Path | None]) -> None:
    """Raise ``FileExistsError`` if the folder of eigenbases is a file, or lies in a model that is read.

    Args:
        bases: The folder, if there is one.
        models: Folders or files of models.
    """
    if bases is None:
        return
    if bases.exists() and not bases.is_dir():
        raise FileExistsError(f"--bases {bases} is a file; it names a folder.")
    for model in models:
        if model is not None and bases.resolve().is_relative_to(model.resolve()):
            raise FileExistsError(f"--bases {bases} is or lies in {model}, which is read. Name another folder.")


def check_allowed(allow_global: list[str] | None, checkpoint: Path | None) -> list[str]:
    """Return the classes that a checkpoint may hold.

    Raises:
        ValueError: If classes are given, and there is no checkpoint that could hold them.
    """
    if allow_global and (checkpoint is None or checkpoint.is_dir() or ending(checkpoint) == SAFETENSORS):
        reason = "there is no --checkpoint" if checkpoint is None else f"{checkpoint} is none"
        raise ValueError(f"--allow-global is for files of torch.save; {reason}.")
    return allow_global or []


def check_counts(**counts: int | None) -> None:
    """Raise ``ValueError`` if a number is given that is not an integer of at least one."""
    for name, value in counts.items():
        if value is not None:
            check_count(value, f"--{name.replace('_', '-')}")


def check_unused(reason: str, **options: Any) -> None:
    """Raise ``ValueError`` if an option is given that a command would not look at.

    Args:
        reason: What the option needs, or what it does not go with.
        **options: Values by name of the option; None and False mean that it is not given.
    """
    given = [
        f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None and value is not False
    ]
    if given:
        raise ValueError(f"{', '.join(given)} would be ignored: {reason}.")


def read_factors(path: Path) -> "KroneckerFactors":
    """Load a factor file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else; says what.
    """
    from lightning_curvature.checkpoints.opening import open_checkpoint
    from lightning_curvature.factors.files import is_factor_file
    from lightning_curvature.factors.kronecker import KroneckerFactors

    if not path.exists():
        raise FileNotFoundError(f"No such file: {path} (--factors).")
    if path.is_dir() or path.suffix != ".safetensors" or not is_factor_file(path):
        try:
            holds = f"weights ({len(open_checkpoint(path).shapes())} tensors), not factors"
        except (ValueError, OSError, RuntimeError):
            holds = "no factors"
        if path.is_dir() or "weights" in holds:
            raise ValueError(
                f"--factors {path} holds {holds}. lightning-curvature collect makes factors, and so does a run with "
                "KFACEditCallback."
            )
    return KroneckerFactors.load(path)
