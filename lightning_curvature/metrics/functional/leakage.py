"""How much of a text a model gives away under teacher forcing."""

import torch
from torch import Tensor

from lightning_curvature._checks import check_share
from lightning_curvature.metrics.functional._shared import (
    agreeing_prefix,
    check_token_pairs,
    compute_mean,
    target_log_probs,
)


def _extraction_strength_update(preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the strengths and the number of sequences."""
    check_token_pairs(preds, target)
    suffixes = agreeing_prefix(preds.flip(1), target.flip(1))
    return suffixes.sum().double() / preds.shape[1], torch.tensor(len(suffixes), device=preds.device)


def extraction_strength(preds: Tensor, target: Tensor) -> Tensor:
    r"""Return the mean share of a text that a model completes from the rest of it.

    .. math:: (L - k) / L \quad \text{with the smallest } k \text{ such that } preds_{k:} = target_{k:}

    A sequence whose last token is wrong has strength 0 (some implementations give it 1 / L). Source: Carlini et al.
    2021, computed under teacher forcing as in Wang et al. 2024, arXiv:2406.09179.

    Args:
        preds: Most likely token at each target position given the *true* tokens before it, int64 ``[n, L]``.
        target: Token ids of the text, int64 ``[n, L]``. Score texts of different lengths in separate calls.

    Returns:
        A mean in [0, 1], float64 scalar; NaN without a sequence.

    Raises:
        ValueError: If the shapes or dtypes do not fit.

    Example:
        >>> extraction_strength(torch.tensor([[1, 9, 3, 4]]), torch.tensor([[1, 2, 3, 4]]))
        tensor(0.5000, dtype=torch.float64)
    """
    return compute_mean(*_extraction_strength_update(preds, target))


def min_k_scores(logits: Tensor, target: Tensor, k: float = 0.2, ignore_index: int = -100) -> Tensor:
    r"""Return the mean log-probability of the least likely tokens of each sequence.

    Of :math:`c` counted tokens, the :math:`\lceil k c \rceil` least likely ones enter. Source: Shi et al. 2024,
    arXiv:2310.16789.

    Args:
        logits: Scores of all tokens, ``[n, L, V]``, any floating dtype. Row ``i`` predicts ``target[:, i]``: shift the
            labels first.
        target: Token ids, int64 ``[n, L]``.
        k: Share of the counted tokens that enters the mean, in (0, 1]; at least one token does.
        ignore_index: Id of the positions that do not count, for example padding.

    Returns:
        Scores of at most 0, float64 ``[n]``; NaN for a sequence without a counted position.

    Raises:
        ValueError: If ``k`` or a token id is out of range, or shapes or dtypes do not fit.

    Example:
        >>> logits = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]]).log()
        >>> min_k_scores(logits, torch.tensor([[0, 1, 1]]), k=0.5).exp()
        tensor([0.2236], dtype=torch.float64)
    """
    check_share(k, "k")
    if logits.dim() != 3:
        raise ValueError(f"Expected logits [n, L, V], found {list(logits.shape)}. A single text has n = 1.")
    log_probs, counted = target_log_probs(logits, target, ignore_index)
    counts = counted.sum(1)
    taken = (k * counts.double() - 1e-9).ceil().clamp(min=1).minimum(counts.double())  # 0.07 * 100 > 7 in floats
    ascending = log_probs.masked_fill(~counted, torch.inf).sort(1).values
    enters = torch.arange(target.shape[1], device=target.device) < taken.unsqueeze(1)
    scores = ascending.masked_fill(~enters, 0.0).sum(1) / taken
    return scores.masked_fill(log_probs.isnan().any(1), torch.nan)  # a sort puts NaN last, where it would be lost


def _min_k_probability_update(logits: Tensor, target: Tensor, k: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return the sum of the scores and the number of sequences with a counted position."""
    scores = min_k_scores(logits, target, k, ignore_index)
    scored = (target != ignore_index).any(1)
    return scores[scored].sum(), scored.sum()


def min_k_probability(logits: Tensor, target: Tensor, k: float = 0.2, ignore_index: int = -100) -> Tensor:
    """Return the mean of :func:`min_k_scores` over the sequences with at least one counted position.

    A text that was trained on has few very unlikely tokens, so a higher value looks more memorized. Source: Shi et al.
    2024, arXiv:2310.16789.

    Arguments as :func:`min_k_scores`.

    Returns:
        A mean log-probability of at most 0, float64 scalar; NaN without such a sequence.

    Raises:
        ValueError: If ``k`` or a token id is out of range, or shapes or dtypes do not fit.

    Example:
        >>> logits = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]]).log()
        >>> min_k_probability(logits, torch.tensor([[0, 1, 1]])).exp()
        tensor(0.1000, dtype=torch.float64)
    """
    return compute_mean(*_min_k_probability_update(logits, target, k, ignore_index))
