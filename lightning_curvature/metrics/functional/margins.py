"""Margins: by how much a target leads in the logits."""

import torch
from torch import Tensor


def logit_margins(logits: Tensor, target: Tensor) -> Tensor:
    """Return the logit of each target minus the largest other one, in the dtype of the logits, with its graph.

    Args:
        logits: Scores of at least two classes or tokens, ``[..., V]``, floating.
        target: Class or token ids, int64 ``[...]``.

    Returns:
        Margins ``[...]``; negative where another class has the largest logit.

    Example:
        >>> logit_margins(torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]]), torch.tensor([0, 1]))
        tensor([ 1., -2.])
    """
    index = target.unsqueeze(-1)
    others = logits.scatter(-1, index, -torch.inf).amax(-1)
    return logits.gather(-1, index).squeeze(-1) - others
