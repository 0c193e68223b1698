"""Remove memorized training data from a network by editing its weights in the K-FAC eigenbasis."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_curvature._version import __version__

if TYPE_CHECKING:
    from lightning_curvature.editing.curvature import CurvatureEditor
    from lightning_curvature.editing.report import EditReport
    from lightning_curvature.factors.kronecker import KroneckerFactors
    from lightning_curvature.factors.layer import LayerFactors
    from lightning_curvature.trainer.callback import KFACEditCallback

__all__ = ["CurvatureEditor", "EditReport", "KFACEditCallback", "KroneckerFactors", "LayerFactors", "__version__"]

# Imported when they are first asked for: help and usage errors of the command line need none of them.
_MODULES = {
    "CurvatureEditor": "editing.curvature",
    "EditReport": "editing.report",
    "KFACEditCallback": "trainer.callback",
    "KroneckerFactors": "factors.kronecker",
    "LayerFactors": "factors.layer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
