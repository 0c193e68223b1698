"""What sits where in the spectrum of a layer's curvature: pure functions on factors, weights, activations and models.

Most return a small dataclass whose ``plot`` draws it.
"""

from lightning_curvature.analysis.bands import BANDS, BandComparison, band_strengths, compare_bands
from lightning_curvature.analysis.curvature import Gathering, Products, gather, top_curvature
from lightning_curvature.analysis.detection import Detection, activation_norms, auroc, detect, flat_shares
from lightning_curvature.analysis.directions import DirectionUse, direction_use
from lightning_curvature.analysis.inputs import layer_activations
from lightning_curvature.analysis.interplay import Interplay, interplay
from lightning_curvature.analysis.layers import rank_layers
from lightning_curvature.analysis.order import CurvatureOrder, curvature_order
from lightning_curvature.analysis.skills import SkillRetention, rank_correlation, skill_retention

__all__ = [
    "BANDS",
    "BandComparison",
    "CurvatureOrder",
    "Detection",
    "DirectionUse",
    "Gathering",
    "Interplay",
    "Products",
    "SkillRetention",
    "activation_norms",
    "auroc",
    "band_strengths",
    "compare_bands",
    "curvature_order",
    "detect",
    "direction_use",
    "flat_shares",
    "gather",
    "interplay",
    "layer_activations",
    "rank_correlation",
    "rank_layers",
    "skill_retention",
    "top_curvature",
]
