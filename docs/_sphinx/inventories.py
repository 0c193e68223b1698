"""Where names of other libraries are documented: those that our pages use, kept beside them."""

import tempfile
import zlib
from pathlib import Path

_FILE = Path(__file__).with_name("inventories.txt")
_FOLDER = Path(tempfile.gettempdir()) / "lightning_curvature-inventories"


def local_inventories() -> dict[str, tuple[str, str]]:
    """Write an inventory of each library for Sphinx, and return them for ``intersphinx_mapping``.

    ``inventories.txt`` has a line ``[library] address`` for each, and below it lines ``name role page``; a page that
    ends with ``$`` is followed by the name.
    """
    libraries: dict[str, tuple[str, list[str]]] = {}
    for line in _FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            library, address = line[1:].split("] ")
            libraries[library] = (address, [])
        elif line:
            name, role, page = line.split()
            libraries[library][1].append(f"{name} py:{role} 1 {page} -\n")
    _FOLDER.mkdir(exist_ok=True)
    mapping = {}
    for library, (address, lines) in libraries.items():
        head = (
            f"# Sphinx inventory version 2\n# Project: {library}\n# Version: \n# The remainder is compressed by zlib.\n"
        )
        path = _FOLDER / f"{library}.inv"
        path.write_bytes(head.encode() + zlib.compress("".join(lines).encode()))
        mapping[library] = (address, str(path))
    return mapping
