"""Remove memorized training data from a network by editing its weights in the K-FAC eigenbasis."""

from lightning_curvature.callback import KFACEditCallback
from lightning_curvature.editor import CurvatureEditor, EditReport
from lightning_curvature.factors import KroneckerFactors, LayerFactors

__version__ = "0.1.0"
__all__ = ["CurvatureEditor", "EditReport", "KFACEditCallback", "KroneckerFactors", "LayerFactors"]
