"""Checks and sums that several text metrics need."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def check_ignore_index(value: Any) -> int:
    """Return ``value`` if it is an integer.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"ignore_index must be an integer, found {value!r}. Keep -100 if every target counts.")
    return value


def check_token_pairs(preds: Tensor, target: Tensor) -> None:
    """Check that both are int64 ``[n, L]`` with at least one position.

    Raises:
        ValueError: If they are not; names both shapes or dtypes.
    """
    if preds.dim() != 2 or preds.shape != target.shape or preds.shape[1] == 0:
        raise ValueError(
            f"Expected preds and target of one shape [n, L] with L >= 1, found {list(preds.shape)} and "
            f"{list(target.shape)}. Fill shorter sequences with an id that is no token, for example -1."
        )
    if preds.dtype != torch.int64 or target.dtype != torch.int64:
        raise ValueError(
            f"Expected token ids, int64, found {preds.dtype} and {target.dtype}. Take the argmax of logits first."
        )


def agreeing_prefix(preds: Tensor, target: Tensor) -> Tensor:
    """Return the number of leading positions that agree, int64 ``[n]``."""
    return (preds == target).long().cumprod(1).sum(1)


def target_log_probs(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return the log-probability of every target and which targets count.

    The softmax runs in float32, or float64 for float64 logits, whatever the dtype of the logits.

    Args:
        logits: Scores of all tokens, ``[..., V]``, floating.
        target: Token ids, int64 ``[...]``.
        ignore_index: Id of the positions that do not count.

    Returns:
        Log-probabilities, float64 ``[...]``, zero where a position does not count, and the mask, bool ``[...]``.

    Raises:
        ValueError: If a shape, a dtype or a token id does not fit.
    """
    check_ignore_index(ignore_index)
    if logits.dim() == 0 or logits.shape[:-1] != target.shape:
        raise ValueError(
            f"Expected logits [..., V] and target [...], found {list(logits.shape)} and {list(target.shape)}. "
            "There must be one target for each row of logits."
        )
    if not logits.is_floating_point() or target.dtype != torch.int64:
        raise ValueError(f"Expected floating logits and int64 target, found {logits.dtype} and {target.dtype}.")
    counted = target != ignore_index
    ids = target.masked_fill(~counted, 0)
    outside = (ids < 0) | (ids >= logits.shape[-1])
    if outside.any():
        raise ValueError(
            f"Expected target ids in [0, {logits.shape[-1]}), found {int(ids[outside][0])}. "
            f"Positions that do not count carry ignore_index, here {ignore_index}."
        )
    log_probs = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    picked = log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return picked.double().masked_fill(~counted, 0.0), counted


def compute_mean(total: Tensor, count: Tensor) -> Tensor:
    """Return ``total / count``, float32 for integer totals, whatever the default dtype; NaN if nothing was counted."""
    mean = total.double() / count
    return mean if total.is_floating_point() else mean.float()
