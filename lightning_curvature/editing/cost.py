r"""What an edit costs, told from the factors alone: the rise of the loss, to second order.

A change ``D = W' - W`` of a layer's weight, at one of its positions alone, raises the loss by ``1/2 tr(D^T G D A)``. In
the curvature basis that is ``1/2 sum_ij lam_i mu_j D_ij^2``: each pair of eigenvectors has a price of its own. Where T
positions of the layer serve one loss position (the patches of an image), its loss rises by T^2 times as much if they
add up coherently, as equal positions do, which is a careful estimate. For a language model T is about 1.

On a quadratic model whose curvature is the factors this is exact. A network is not quadratic, and what several layers
do together is not in it: docs/method.md says how far it is off.

Source: LeCun et al. 1989, Optimal Brain Damage; Martens and Grosse 2015, arXiv:1503.05671 (the curvature).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curvature.factors.basis import coefficients
from lightning_curvature.factors.decomposition import moderate
from lightning_curvature.factors.layer import LayerFactors


@dataclass(frozen=True)
class PairCost:
    """What the change of one coefficient costs.

    Args:
        row: Place of the eigenvector of ``G``; 0 has the largest eigenvalue.
        column: Place of the eigenvector of ``A``.
        nats: Its part of the cost, in nats per loss position.
    """

    row: int
    column: int
    nats: float


@dataclass(frozen=True)
class LayerCost:
    """What the change of a weight costs.

    Args:
        nats: Predicted rise of the loss, in nats per loss position.
        pair: The coefficient whose change costs most; None if the basis was not looked at, or nothing changed.
    """

    nats: float
    pair: PairCost | None


def price(change: Tensor, factors: LayerFactors, in_basis: bool = True, exponent: int = 0) -> LayerCost:
    """Return what a change of a weight costs, to second order.

    Args:
        change: ``W' - W``, ``[d_out, d_in]``, any floating dtype, times ``2**exponent``.
        factors: Factors of the layer. All positions that serve one loss position are taken to add up coherently, see
            :attr:`~lightning_curvature.factors.layer.LayerFactors.positions_per_loss`.
        in_basis: Look at single coefficients, which takes the eigendecomposition of the factors.
        exponent: The power of two by which ``change`` was scaled.

    Returns:
        The cost. It is infinite or NaN where the factors are, or where it is too large for a float64.

    Raises:
        FaultyLayerError: If ``in_basis`` and the factors cannot be decomposed.

    Example:
        >>> A, G = torch.diag(torch.tensor([4.0, 1.0])), torch.diag(torch.tensor([2.0, 1.0]))
        >>> factors = LayerFactors(A=A, G=G, num_inputs=100, num_gradients=100)
        >>> price(torch.tensor([[0.0, 0.0], [0.5, 2.0]]), factors)
        LayerCost(nats=2.5, pair=PairCost(row=1, column=1, nats=2.0))
    """
    change, of_change = moderate(change.to(factors.A.device, torch.float64))
    exponent += of_change
    if in_basis:
        return price_pairs(coefficients(change, factors.basis), factors, exponent)
    (A, of_A), (G, of_G) = (moderate(factor.double()) for factor in (factors.A, factors.G))
    change = change * factors.positions_per_loss
    product = float(torch.sum((G @ change) * (change @ A)))
    return LayerCost(_unscaled(product, 2 * exponent + of_A + of_G), None)


def price_pairs(change: Tensor, factors: LayerFactors, exponent: int = 0) -> LayerCost:
    """Return what :func:`price` returns, given the change of each coefficient, float64 ``[d_out, d_in]``."""
    change, of_change = moderate(change)
    basis = factors.basis
    (lam, of_G), (mu, of_A) = moderate(basis.lam), moderate(basis.mu)
    scale = 2 * (exponent + of_change) + of_A + of_G
    products = (change * factors.positions_per_loss).square_().mul_(lam[:, None]).mul_(mu)
    index = int(products.argmax())
    largest = _unscaled(float(products.flatten()[index]), scale)
    pair = PairCost(*divmod(index, products.shape[1]), largest) if largest > 0.0 else None
    return LayerCost(_unscaled(float(products.sum()), scale), pair)


def pair_losses(C: Tensor, factors: LayerFactors) -> Tensor:
    """Return what it costs to drop each coefficient, ``1/2 T^2 lam_i mu_j C_ij^2``, nats per loss position.

    Args:
        C: Coefficients, float64 ``[d_out, d_in]``.
        factors: Factors of the layer.
    """
    basis = factors.basis
    return 0.5 * (C * factors.positions_per_loss).square() * basis.lam[:, None] * basis.mu


def _unscaled(product: float, exponent: int) -> float:
    """Return half of ``product / 2**exponent``, not below zero; infinite if that is too large."""
    try:
        return max(math.ldexp(product, -exponent - 1), 0.0)
    except OverflowError:
        return math.inf
