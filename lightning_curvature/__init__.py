"""Remove memorized training data from a network by editing its weights in the K-FAC eigenbasis."""

from lightning_curvature._version import __version__
from lightning_curvature.callback import KFACEditCallback
from lightning_curvature.editor import CurvatureEditor
from lightning_curvature.factors import KroneckerFactors, LayerFactors
from lightning_curvature.report import EditReport

__all__ = ["CurvatureEditor", "EditReport", "KFACEditCallback", "KroneckerFactors", "LayerFactors", "__version__"]
