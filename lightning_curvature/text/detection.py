"""Which windows of text look memorized, by scores from one forward pass that need no labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.analysis.detection import layer_scores
from lightning_curvature.analysis.inputs import layer_activations
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.metrics.functional import min_k_scores
from lightning_curvature.metrics.functional.margins import logit_margins
from lightning_curvature.text.evaluation import next_token_logits

LIKELIHOODS = ("likelihood", "margin", "min-k")


def distinct_inputs(factors: KroneckerFactors) -> list[str]:
    """Return the layers of some factors, of those that share A (they read the same tensor) the first alone."""
    return [name for name, first in factors.tied_inputs().items() if name == first]


def likelihood_scores(model: Any, windows: Tensor, start: int = 0, batch_size: int = 32) -> dict[str, Tensor]:
    """Return what the model's own predictions say of each window, each ``[n]``, higher where it looks memorized.

    Args:
        model: A transformers causal LM in eval mode.
        windows: Token ids, int64 ``[n, T]``.
        start: The first position whose prediction counts: that before the first token of the text, at least.
        batch_size: Windows per forward pass.

    Returns:
        ``likelihood``: the negative mean loss, nats per token; ``margin``: the mean of the true token's logit minus the
        largest other one; ``min-k``: the mean log-probability of the least likely fifth of the tokens (Shi et al. 2024,
        arXiv:2310.16789).
    """
    found: dict[str, list[Tensor]] = {name: [] for name in LIKELIHOODS}
    for logits, target in next_token_logits(model, windows, batch_size):
        logits, target = logits[:, start:].float().cpu(), target[:, start:].cpu()
        true = logits.gather(2, target[..., None]).squeeze(2)
        found["likelihood"].append((true - logits.logsumexp(2)).mean(1))
        found["margin"].append(logit_margins(logits, target).mean(1))
        found["min-k"].append(min_k_scores(logits, target))
    return {name: torch.cat(parts) for name, parts in found.items()}


def window_activations(
    model: Any, windows: Tensor, layers: Sequence[str], start: int = 0, batch_size: int = 32
) -> dict[str, Tensor]:
    """Return what some layers read at the positions from ``start`` on but the last, by layer ``[n, p, d_in]``."""
    device = next(model.parameters()).device
    return layer_activations(
        model,
        torch.split(windows, batch_size),
        lambda ids: model(input_ids=ids[:, :-1].to(device), use_cache=False),
        layers,
        slice(start, None),
    )


def window_scores(
    model: Any, factors: KroneckerFactors, windows: Tensor, start: int = 0, batch_size: int = 32
) -> dict[str, Tensor]:
    """Return all scores of windows, with controls, each ``[n]``, higher where a window looks memorized.

    Args:
        model: A transformers causal LM in eval mode.
        factors: Factors by the model's own names.
        windows: Token ids, int64 ``[n, T]``.
        start: The first position that counts.
        batch_size: Windows per forward pass.

    Returns:
        Those of :func:`lightning_curvature.analysis.detection.layer_scores`, of each layer of distinct inputs, and
        those of :func:`likelihood_scores`.
    """
    layers = distinct_inputs(factors)
    inputs = window_activations(model, windows, layers, start, batch_size)
    return layer_scores(factors, inputs) | likelihood_scores(model, windows, start, batch_size)
