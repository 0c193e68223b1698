"""Agreement of two models' next-token rankings."""

import torch
from torch import Tensor

from lightning_curvature._checks import check_count
from lightning_curvature.metrics.functional._shared import compute_mean


def _baseline_ids(logits: Tensor, baseline: Tensor, k: int) -> Tensor:
    """Return the baseline's ``k`` best tokens, best first, int64 ``[..., k]``."""
    if baseline.is_floating_point():
        if baseline.shape != logits.shape:
            raise ValueError(
                f"Expected baseline logits of the shape of logits, {list(logits.shape)}, found {list(baseline.shape)}."
            )
        return baseline.topk(k).indices
    if baseline.dtype != torch.int64:
        raise ValueError(f"Expected baseline as floating logits or int64 token ids, found {baseline.dtype}.")
    if baseline.dim() != logits.dim() or baseline.shape[:-1] != logits.shape[:-1] or baseline.shape[-1] < k:
        raise ValueError(
            f"Expected baseline token ids {[*logits.shape[:-1], f'>= {k}']}, found {list(baseline.shape)}. "
            "Keep at least k tokens of each position, best first: logits.topk(k).indices."
        )
    ids = baseline[..., :k]
    ascending = ids.sort(-1).values
    if ((ids < 0) | (ids >= logits.shape[-1])).any() or (ascending[..., 1:] == ascending[..., :-1]).any():
        raise ValueError(
            f"Expected {k} distinct baseline token ids in [0, {logits.shape[-1]}) at each position, found others. "
            "Are they of another vocabulary, or padded?"
        )
    return ids


def _ranking_overlap_update(logits: Tensor, baseline: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the sum of nDCG@k and the number of positions."""
    check_count(k, "k")
    if not logits.is_floating_point() or logits.dim() == 0:
        raise ValueError(f"Expected floating logits [..., V], found {logits.dtype} {list(logits.shape)}.")
    if logits.shape[-1] < k:
        raise ValueError(
            f"Expected logits of at least k={k} tokens, found {list(logits.shape)}. Choose k of at most "
            f"{logits.shape[-1]}."
        )
    ideal = _baseline_ids(logits, baseline, k)
    hits = logits.topk(k).indices.unsqueeze(-1) == ideal.unsqueeze(-2)
    gains = torch.arange(k, 0, -1, dtype=torch.float64, device=logits.device)
    discounts = 1.0 / torch.arange(2, k + 2, dtype=torch.float64, device=logits.device).log2()
    scores = (hits.double() @ gains @ discounts / (gains @ discounts)).clamp(max=1.0)
    return scores.sum(), torch.tensor(scores.numel(), device=scores.device)


def ranking_overlap(logits: Tensor, baseline: Tensor, k: int = 10) -> Tensor:
    r"""Return the mean nDCG@k of next-token rankings against those of a baseline model.

    The baseline's ``k`` best tokens have relevance :math:`k, k - 1, \ldots, 1`, all others 0. With the relevances
    :math:`r_i` of the edited model's ``k`` best tokens, best first,

    .. math:: \mathrm{nDCG} = \frac{\sum_{i=1}^k r_i / \log_2(i + 1)}{\sum_{i=1}^k (k + 1 - i) / \log_2(i + 1)}

    Equal logits rank in the order of :meth:`torch.Tensor.topk`, so stored ids should come from logits of the same
    dtype and from the same ``k``. Source: arXiv:2510.24256, appendix C.

    Args:
        logits: Scores of the edited model, ``[..., V]`` with ``V >= k``, any floating dtype.
        baseline: Scores of the baseline, ``[..., V]``, floating, or its best token ids, best first,
            int64 ``[..., >= k]``.
        k: Length of the rankings.

    Returns:
        A mean over positions in [0, 1], float64 scalar; 1 for identical rankings, NaN without a position.

    Raises:
        ValueError: If ``k`` exceeds the vocabulary, token ids are out of range or repeat, or shapes or dtypes do not
            fit.

    Example:
        >>> ranking_overlap(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[1, 0]]), k=2)
        tensor(0.8597, dtype=torch.float64)
    """
    return compute_mean(*_ranking_overlap_update(logits, baseline, k))
