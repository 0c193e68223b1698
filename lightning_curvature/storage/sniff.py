"""The kind of a file that is not what its name says, told by its first bytes."""

import os
import zipfile
from pathlib import Path

_START = 1024
_MAGIC = {
    b"\x1f\x8b": ("a compressed file (gzip)", "Unpack it first."),
    b"BZh": ("a compressed file (bzip2)", "Unpack it first."),
    b"\xfd7zXZ": ("a compressed file (xz)", "Unpack it first."),
    b"\x28\xb5\x2f\xfd": ("a compressed file (zstd)", "Unpack it first."),
    b"version https://git-lfs": ("a pointer of Git LFS, which stands for the file", "Fetch it with git lfs pull."),
    b"GGUF": ("a GGUF file", "Save the model with save_pretrained, which writes safetensors."),
    b"\x89HDF": ("an HDF5 file", "Save the model with save_pretrained, which writes safetensors."),
}
_DOWNLOAD_AGAIN = "Copy or download the file again."


def sniff(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Return the kind of a file that is no checkpoint, and what to do with it; None if the kind cannot be told.

    >>> import tempfile
    >>> page = Path(tempfile.mkdtemp(), "model.pt")
    >>> page.write_text("<!DOCTYPE html>") > 0
    True
    >>> sniff(page)[0]
    'a web page (HTML)'
    """
    if not Path(path).is_file():
        return None
    with Path(path).open("rb") as file:
        start = file.read(_START)
    if not start:
        return "an empty file", _DOWNLOAD_AGAIN
    for magic, told in _MAGIC.items():
        if start.startswith(magic):
            return told
    if start.startswith(b"PK"):
        try:
            return None if zipfile.is_zipfile(path) else ("an archive that was cut off", _DOWNLOAD_AGAIN)
        except zipfile.BadZipFile:  # damaged in another way, as its reader will tell
            return None
    try:
        text = start.decode("utf-8-sig").strip().lower()
    except UnicodeDecodeError as error:
        # A character of up to four bytes may be cut in two where reading ended. Elsewhere the bytes are no text.
        if len(start) < _START or error.start < _START - 3:
            return None
        text = start[: error.start].decode("utf-8-sig").strip().lower()
    if not all(character.isprintable() or character.isspace() for character in text):
        return None
    if text.startswith(("<!doctype html", "<html")):
        return "a web page (HTML)", "Was the download refused? Download the file itself."
    return ("JSON" if text.startswith(("{", "[")) else "text"), "Name the file that holds the weights."


def looks_like_safetensors(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file begins as a safetensors file does, whatever its name is."""
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= Path(path).stat().st_size
