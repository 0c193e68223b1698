"""K-FAC factors: of a layer, of a network, in files, and the curvature basis that they span."""

from lightning_curvature.factors.basis import CurvatureBasis, coefficients, project_weight, select_staircase
from lightning_curvature.factors.basis_cache import bases_in
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.factors.layer import LayerFactors

__all__ = [
    "CurvatureBasis",
    "KroneckerFactors",
    "LayerFactors",
    "bases_in",
    "coefficients",
    "project_weight",
    "select_staircase",
]
