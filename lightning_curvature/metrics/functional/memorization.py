"""How much of a memorized continuation a model still writes."""

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from lightning_curvature._checks import check_share
from lightning_curvature.metrics.functional._shared import (
    agreeing_prefix,
    check_token_pairs,
    compute_mean,
)

_ROUNDING = 1e-9  # far below the step 1 / L of a similarity


def _edit_distances(preds: Tensor, target: Tensor) -> Tensor:
    """Return the Levenshtein distance of each pair of rows, int64 ``[n]`` on the CPU."""
    check_token_pairs(preds, target)
    pairs = zip(preds.tolist(), target.tolist(), strict=True)
    return torch.tensor([Levenshtein.distance(written, true) for written, true in pairs], dtype=torch.int64)


def _strict_memorization_update(preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of equal sequences and of all sequences."""
    check_token_pairs(preds, target)
    equal = (preds == target).all(1)
    return equal.sum(), torch.tensor(len(equal), device=equal.device)


def strict_memorization(preds: Tensor, target: Tensor) -> Tensor:
    """Return the share of sequences that are written exactly.

    Source: arXiv:2510.24256, sections 4 and 5 (strict match).

    Args:
        preds: Token ids that the model wrote, int64 ``[n, L]``. Fill shorter outputs with an id that is no token, for
            example -1.
        target: Token ids of the memorized continuation, int64 ``[n, L]``.

    Returns:
        A fraction in [0, 1], float32 scalar; NaN without a sequence.

    Raises:
        ValueError: If the shapes or dtypes do not fit.

    Example:
        >>> target = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> strict_memorization(torch.tensor([[1, 2, 3], [4, 5, -1]]), target)
        tensor(0.5000)
    """
    return compute_mean(*_strict_memorization_update(preds, target))


def _loose_memorization_update(preds: Tensor, target: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the number of similar sequences and of all sequences."""
    check_share(threshold, "threshold")
    distances = _edit_distances(preds, target)
    similar = 1.0 - distances.double() / preds.shape[1] >= threshold - _ROUNDING
    return similar.sum(), torch.tensor(len(similar), device=similar.device)


def loose_memorization(preds: Tensor, target: Tensor, threshold: float = 0.75) -> Tensor:
    r"""Return the share of sequences that are written almost exactly.

    The similarity of a sequence is :math:`1 - d / L` with the Levenshtein distance :math:`d` of the token ids. One
    that equals the threshold counts, whatever the rounding. Source: arXiv:2510.24256, sections 4 and 5 (loose match).

    Args:
        preds: Token ids that the model wrote, int64 ``[n, L]``. Fill shorter outputs with an id that is no token, for
            example -1.
        target: Token ids of the memorized continuation, int64 ``[n, L]``.
        threshold: Least similarity that counts, in (0, 1].

    Returns:
        A fraction in [0, 1], float32 scalar; NaN without a sequence.

    Raises:
        ValueError: If the threshold is out of range, or shapes or dtypes do not fit.

    Example:
        >>> target = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
        >>> loose_memorization(torch.tensor([[2, 3, 4, 9], [5, 6, 7, 9]]), target)
        tensor(0.5000)
    """
    return compute_mean(*_loose_memorization_update(preds, target, threshold))


def _normalized_edit_distance_update(preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the normalized distances and the number of sequences."""
    distances = _edit_distances(preds, target)
    return distances.double().sum() / preds.shape[1], torch.tensor(len(distances), device=distances.device)


def normalized_edit_distance(preds: Tensor, target: Tensor) -> Tensor:
    """Return the mean Levenshtein distance of the token ids, divided by the length.

    Source: arXiv:2510.24256, sections 4 and 5.

    Args:
        preds: Token ids that the model wrote, int64 ``[n, L]``. Fill shorter outputs with an id that is no token, for
            example -1.
        target: Token ids of the memorized continuation, int64 ``[n, L]``.

    Returns:
        A mean in [0, 1], float64 scalar; NaN without a sequence.

    Raises:
        ValueError: If the shapes or dtypes do not fit.

    Example:
        >>> normalized_edit_distance(torch.tensor([[2, 3, 4, 9]]), torch.tensor([[1, 2, 3, 4]]))
        tensor(0.5000, dtype=torch.float64)
    """
    return compute_mean(*_normalized_edit_distance_update(preds, target))


def longest_exact_prefix(preds: Tensor, target: Tensor) -> Tensor:
    """Return how many tokens of each sequence are written exactly before the first wrong one.

    Source: arXiv:2510.24256, appendix G (positional stress test).

    Args:
        preds: Token ids that the model wrote, int64 ``[n, L]``. Fill shorter outputs with an id that is no token, for
            example -1.
        target: Token ids of the memorized continuation, int64 ``[n, L]``.

    Returns:
        Tokens in [0, L] of each sequence, int64 ``[n]``;
        :class:`~lightning_curvature.metrics.LongestExactPrefix` gives their mean.

    Raises:
        ValueError: If the shapes or dtypes do not fit.

    Example:
        >>> longest_exact_prefix(torch.tensor([[1, 2, 9, 4], [9, 6, 7, 8]]), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]))
        tensor([2, 0])
    """
    check_token_pairs(preds, target)
    return agreeing_prefix(preds, target)
