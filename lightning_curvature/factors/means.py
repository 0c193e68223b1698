"""The factors of one layer over several streams of positions together: weighted means."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_curvature.factors.layer import LayerFactors


def weighted_mean(moments: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean of moments, in the widest of their dtypes, on the device of the first."""
    mean = _weighted_sum(moments, weights) / (sum(weights) or 1)
    return mean.to(functools.reduce(torch.promote_types, [moment.dtype for moment in moments]))


def merged_layer(layers: Sequence[LayerFactors], weights: Sequence[float] | None, A: Tensor) -> LayerFactors:
    """Return the factors of a layer over several streams together; counts are the sums over the streams.

    Eigenvalues and margins belong to one set of factors, and are left out.

    Args:
        layers: The factors of the layer over each stream, of one shape.
        weights: What each stream counts; by default its positions.
        A: The mean of the inputs' factors, of which tied layers have one.
    """
    first = layers[0]
    inputs = [layer.num_inputs for layer in layers] if weights is None else weights
    gradients = [layer.num_gradients for layer in layers] if weights is None else weights
    return LayerFactors(
        A=A,
        G=weighted_mean([layer.G for layer in layers], gradients),
        num_inputs=sum(layer.num_inputs for layer in layers),
        num_gradients=sum(layer.num_gradients for layer in layers),
        num_seen=sum(layer.num_seen for layer in layers),
        num_losses=sum(layer.num_losses for layer in layers),
        transposed=first.transposed,
        A_coupled=_mean_of_all([layer.A_coupled for layer in layers], inputs),
        G_coupled=_mean_of_all([layer.G_coupled for layer in layers], inputs),
        A_error=_merged_error([layer.A for layer in layers], inputs, [layer.A_error for layer in layers]),
        G_error=_merged_error([layer.G for layer in layers], gradients, [layer.G_error for layer in layers]),
        weight=first.weight if all(layer.weight == first.weight for layer in layers) else None,
    )


def _mean_of_all(moments: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor | None:
    """Return the weighted mean; None if a moment is missing."""
    there = [moment for moment in moments if moment is not None]
    return weighted_mean(there, weights) if len(there) == len(moments) else None


def _merged_error(moments: Sequence[Tensor], weights: Sequence[float], errors: Sequence[float | None]) -> float | None:
    """Return the relative error of the weighted mean of independent moments; None if one of theirs is not known.

    The squares of independent absolute errors add up: the error of ``sum w M`` is ``sqrt(sum (w e |M|)**2)``, with the
    Frobenius norm ``|M|``. The sum of the weights divides both the error and the mean.
    """
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return None
    norms = [float(torch.linalg.matrix_norm(moment.double())) for moment in moments]
    absolute = math.hypot(*(weight * error * norm for weight, error, norm in zip(weights, known, norms, strict=True)))
    return absolute / max(float(torch.linalg.matrix_norm(_weighted_sum(moments, weights))), math.ulp(0.0))


def _weighted_sum(moments: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the sum of the moments times their weights, float64, on the device of the first."""
    total = moments[0].double() * weights[0]
    for moment, weight in zip(moments[1:], weights[1:], strict=True):
        total += moment.to(total.device).double() * weight
    return total
