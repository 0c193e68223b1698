"""Losses that are sums over single outputs, with a sigmoid or a squared error: what one call says about its outputs."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_curvature.recording.losses import OutputLoss, reduction_of

ENTRY_LOSSES: dict[Callable[..., Any], str] = {F.binary_cross_entropy_with_logits: "binary", F.mse_loss: "squared"}
"""Losses that are sums over single outputs; torchvision's ``sigmoid_focal_loss`` calls the first one."""
_SIGNATURES = {function: inspect.signature(function) for function in ENTRY_LOSSES}


class EntryFacts(NamedTuple):
    """What a call of a loss that is a sum over single outputs compares.

    Args:
        logits: What the model returned, ``[n]`` as ``[n, 1]``.
        target: What it is compared with, of the same shape.
        class_dim: Dimension of the outputs that belong to one position: 1 of images, otherwise the last one.
        entries: Which outputs count, bool, this dimension last.
        given: All arguments by name, defaults among them.
    """

    logits: Tensor
    target: Tensor
    class_dim: int
    entries: Tensor
    given: dict[str, Any]


def entry_facts(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> EntryFacts | None:
    """Return what one call of a loss of ``ENTRY_LOSSES`` compares; None if that cannot be told.

    It cannot where both sides need a gradient, or one side stands for several outputs of the other (broadcast).
    """
    bound = _SIGNATURES[function].bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    logits, target = given["input"], given["target"]
    if function is F.mse_loss and target.requires_grad and not logits.requires_grad:
        logits, target = target, logits
    if target.requires_grad or logits.shape != target.shape:
        return None
    weight = torch.ones((), device=logits.device) if given.get("weight") is None else given["weight"]
    if given.get("pos_weight") is not None:
        weight = weight * (1 - target + target * given["pos_weight"])
    entries = (weight != 0).expand(logits.shape)
    if logits.dim() < 2:
        logits, target, entries = (part.reshape(-1, 1) for part in (logits, target, entries))
    class_dim = 1 if logits.dim() > 3 else logits.dim() - 1
    return EntryFacts(logits, target, class_dim, entries.movedim(class_dim, -1), given)


def read_entry_loss(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> OutputLoss | None:
    """Return what one call of a loss of ``ENTRY_LOSSES`` says about its logits; None if that cannot be told.

    Arguments as of :func:`read_loss`.
    """
    facts = entry_facts(function, args, kwargs)
    if facts is None or not facts.logits.requires_grad:
        return None
    count = facts.logits.numel() if reduction_of(facts.given) == "mean" else 1
    # Squares count half: that is the negative log-likelihood of a normal distribution of variance 1.
    denominator = count / 2 if function is F.mse_loss else float(count)
    return OutputLoss(
        facts.logits,
        facts.class_dim,
        facts.entries.any(-1),
        ENTRY_LOSSES[function],
        facts.entries,
        torch.tensor(denominator, dtype=torch.float64, device=facts.logits.device),
        output,
        edge=get_gradient_edge(output),
        version=facts.logits._version,
    )
