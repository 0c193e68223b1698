r"""Scores of the coefficients of a weight in the curvature basis; an edit keeps the coefficients of highest score.

================  =============================================================  ======================================
score             of the pair (i, j)                                             needs
================  =============================================================  ======================================
``"kfac"``        ``lam_i mu_j``                                                 the factors
``"ekfac"``       ``E[(u_i^T g)^2 (v_j^T a)^2]``                                 a second pass over the data
``"coupled"``     ``d_i e_j / sum(d)``, ``d_i = u_i^T E[|a|^2 g g^T] u_i``,      ``collect(coupled=True)``, one pass
                  ``e_j = v_j^T E[|g|^2 a a^T] v_j``
``"saliency"``    ``lam_i mu_j C_ij^2``: what the loss loses with the            the factors
                  coefficient, to second order
``"activations"`` ``mu_j``, as if ``G = I``                                      the factors
================  =============================================================  ======================================

The coupled score has the row and column sums of EK-FAC's eigenvalues.

Sources: arXiv:2510.24256, section 3 (K-FAC); George et al. 2018, arXiv:1806.03884 (EK-FAC); LeCun et al. 1989, Optimal
Brain Damage (saliency).
"""

import torch
from torch import Tensor

from lightning_curvature.factors.decomposition import moderate
from lightning_curvature.factors.layer import LayerFactors

SCORES = ("kfac", "ekfac", "coupled", "saliency", "activations")


def score_coefficients(score: str, coefficients: Tensor, factors: LayerFactors) -> Tensor:
    """Return the score of each coefficient, float64 ``[d_out, d_in]``, none negative, up to a common power of two.

    Args:
        score: One of ``SCORES``.
        coefficients: ``C = U_G^T W U_A``, ``[d_out, d_in]``.
        factors: Factors of the layer.

    Raises:
        ValueError: If the factors lack what the score needs.
    """
    U_G, lam, U_A, mu = factors.basis
    lam, mu = moderate(lam)[0], moderate(mu)[0]
    if score == "ekfac":
        if factors.eigenvalues is None:
            raise ValueError(
                "score='ekfac' needs corrected eigenvalues, which the factors do not hold. Add them with "
                "lightning_curvature.collect.correct_eigenvalues, a second pass over the data."
            )
        return factors.eigenvalues.to(coefficients)
    if score == "coupled":
        if factors.A_coupled is None or factors.G_coupled is None:
            raise ValueError(
                "score='coupled' needs norm-weighted moments, which the factors do not hold. Collect with coupled=True."
            )
        rows = moderate(_diagonal(U_G, factors.G_coupled))[0]
        columns = moderate(_diagonal(U_A, factors.A_coupled))[0]
        return torch.outer(rows, columns) / rows.sum()
    if score == "activations":
        return mu.expand(len(lam), -1)
    mass = torch.outer(lam, mu)
    return mass * coefficients.square() if score == "saliency" else mass


def _diagonal(basis: Tensor, moment: Tensor) -> Tensor:
    """Return the diagonal of a moment in a basis, up to a power of two, without negative entries."""
    return (basis * (moderate(moment.to(basis))[0] @ basis)).sum(0).clamp(min=0)
