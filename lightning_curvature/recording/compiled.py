"""Modules whose forward pass runs code that was compiled or captured before hooks were there, and never calls them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

_uncompiling: list[object] = []  # tokens of the recorders that are open
_stance = ExitStack()


@contextmanager
def uncompiled(token: object) -> Iterator[None]:
    """Run compiled code uncompiled: hooks are no part of what was compiled before they were there.

    Recorders may be closed in any order, and the stance of torch is that of the process: the last one puts it back.
    """
    if not _uncompiling:
        _stance.enter_context(torch.compiler.set_stance("force_eager"))
    _uncompiling.append(token)
    try:
        yield
    finally:
        _uncompiling.remove(token)
        if not _uncompiling:
            _stance.close()


def is_compiled(root: nn.Module) -> bool:
    """Tell whether a network, or a part of it, is run by ``torch.compile``."""
    return getattr(root, "_compiler_ctx", None) is not None or any(
        module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in root.modules()
    )


def check_graphed(root: nn.Module) -> None:
    """Raise ``RuntimeError`` if a part of a network was captured in a CUDA graph, whose replay calls no hook."""
    for name, module in root.named_modules():
        forward = vars(module).get("forward")
        if "make_graphed_callables" in getattr(forward, "__qualname__", ""):
            raise RuntimeError(
                f"Module {name!r} was captured in a CUDA graph (torch.cuda.make_graphed_callables): a replay runs no "
                "Python, so its layers cannot be watched. Collect on the module as it was before the capture, or over "
                "the trained model afterwards (lightning-curvature collect)."
            )
