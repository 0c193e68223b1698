"""Which files may be written."""

import os
from collections.abc import Sequence
from pathlib import Path


def check_outputs(
    outputs: Sequence[str | os.PathLike[str]], inputs: Sequence[str | os.PathLike[str]], overwrite: bool
) -> None:
    """Raise ``FileExistsError`` if an output would replace or contain an input, another output, or an existing file.

    Args:
        outputs: Files and folders to write.
        inputs: Files and folders that are read.
        overwrite: Whether outputs may exist.
    """
    resolved = [Path(path).resolve() for path in outputs]
    for output, path in zip(outputs, resolved, strict=True):
        for other in inputs:
            own = Path(other).resolve()
            if path == own:
                raise FileExistsError(
                    f"{output} is the source itself, or another file that is read. Write to another path; the original "
                    "is what you can go back to."
                )
            if path.is_relative_to(own) or own.is_relative_to(path):
                raise FileExistsError(f"{output} and {other} lie one inside the other. Write to another path.")
        if resolved.count(path) > 1:
            raise FileExistsError(f"{output} is named twice among the files to write.")
        if path.exists() and not overwrite:
            raise FileExistsError(f"{output} exists. Choose another path, or --overwrite it.")
