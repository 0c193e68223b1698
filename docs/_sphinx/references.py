"""References to our own names: the public place of a public one, and plain code for what is internal.

Autodoc writes a class by the module that defines it, and docstrings name helpers that have no page. Both are looked up
among the names that exist: what does not exist stays an error of the build.
"""

import sys
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

PACKAGE = "lightning_curvature"


def find(name: str) -> Any:
    """Return what a dotted name stands for; None if there is no such thing.

    A name without its module is looked up in all modules of the package, as docstrings write exceptions.
    """
    if not name.startswith(PACKAGE):
        modules = [module for key, module in sorted(sys.modules.items()) if key.startswith(PACKAGE)]
        last = name.rpartition(".")[2]
        return next((getattr(module, last) for module in modules if hasattr(module, last)), None)
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for part in parts[split:]:
            found = getattr(found, part, None) or getattr(found, "__dataclass_fields__", {}).get(part)
            if found is None:
                return None
        return found
    return None


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element) -> nodes.Element | None:
    """Resolve a reference that Sphinx has not found; None if the name does not exist."""
    if node.get("refdomain") != "py":
        return None
    target = str(node["reftarget"]).lstrip(".")
    found = find(target)
    if found is None or not str(getattr(found, "__module__", getattr(found, "__name__", PACKAGE))).startswith(PACKAGE):
        return None
    domain = env.domains.python_domain
    for documented, entry in domain.objects.items():
        if documented.rpartition(".")[2] == target.rpartition(".")[2] and find(documented) is found:
            location = app.builder.get_relative_uri(str(node["refdoc"]), entry.docname)
            reference = nodes.reference("", "", internal=True, refuri=f"{location}#{entry.node_id}")
            reference += contnode
            return reference
    return contnode


def setup(app: Sphinx) -> dict[str, bool]:
    """Resolve what is missing."""
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
