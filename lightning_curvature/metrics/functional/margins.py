"""Logit margins."""

import torch
from torch import Tensor


def label_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logit of each label minus the largest logit of another class; gradients flow through both.

    Args:
        logits: Logits ``[..., V]``, any floating dtype.
        labels: Labels, int64 ``[...]``.

    Returns:
        Margins ``[...]``, in the dtype of the logits.

    Example:
        >>> label_margins(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([2]))
        tensor([-1.])
    """
    labelled = logits.gather(-1, labels[..., None])
    rivals = logits.scatter(-1, labels[..., None], -torch.inf)
    return (labelled - rivals.amax(-1, keepdim=True)).squeeze(-1)
