"""Which windows of text look memorized, by scores from one forward pass that need no labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.analysis.detection import flat_shares, layer_scores
from lightning_curvature.analysis.inputs import check_layer, chosen_layer, layer_activations
from lightning_curvature.editing.origin import check_loaded
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.metrics.functional import min_k_scores
from lightning_curvature.metrics.functional.margins import logit_margins
from lightning_curvature.text.evaluation import next_token_logits
from lightning_curvature.text.saved import SavedModel
from lightning_curvature.text.sequences import read_sequences

WINDOW = 64
"""Tokens of a window of a corpus, where the model takes as many."""


def distinct_inputs(factors: KroneckerFactors) -> list[str]:
    """Return the layers that read different tensors: of layers with tied inputs, the first."""
    return [name for name, first in factors.tied_inputs().items() if name == first]


def likelihood_scores(model: Any, windows: Tensor, start: int = 0, batch_size: int = 32) -> dict[str, Tensor]:
    """Return what the predictions of a model say of each window, each ``[n]``, higher where it looks memorized.

    Args:
        model: A transformers causal LM in eval mode.
        windows: Token ids, int64 ``[n, T]``.
        start: The first position whose prediction counts. The token before the first token of the text predicts the
            text, the tokens before that do not.
        batch_size: Windows per forward pass.

    Returns:
        ``likelihood``: the negative mean loss, nats per token. ``margin``: the mean of the true token's logit minus the
        largest other logit. ``min-k``: the mean log-probability of the least likely fifth of the tokens (Shi et al.
        2024, arXiv:2310.16789).
    """
    batches = []
    for all_logits, all_targets in next_token_logits(model, windows, batch_size):
        logits, target = all_logits[:, start:].float().cpu(), all_targets[:, start:].cpu()
        true = logits.gather(2, target[..., None]).squeeze(2)
        batches.append(
            {
                "likelihood": (true - logits.logsumexp(2)).mean(1),
                "margin": logit_margins(logits, target).mean(1),
                "min-k": min_k_scores(logits, target),
            }
        )
    return {name: torch.cat([scores[name] for scores in batches]) for name in batches[0]}


def window_activations(
    model: Any, windows: Tensor, layers: Sequence[str], start: int = 0, batch_size: int = 32
) -> dict[str, Tensor]:
    """Return what some layers read of windows, at all positions but the last.

    Args:
        model: A transformers causal LM in eval mode.
        windows: Token ids, int64 ``[n, T]``.
        layers: Names of the layers.
        start: The first position to keep.
        batch_size: Windows per forward pass.

    Returns:
        By layer, ``[n, T - 1 - start, d_in]``, float32, on the CPU.
    """
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
        factors: Factors by the names that the model gives to its layers.
        windows: Token ids, int64 ``[n, T]``.
        start: The first position that counts.
        batch_size: Windows per forward pass.

    Returns:
        The scores of :func:`lightning_curvature.analysis.detection.layer_scores` for each layer of
        :func:`distinct_inputs`, and the scores of :func:`likelihood_scores`.
    """
    layers = distinct_inputs(factors)
    inputs = window_activations(model, windows, layers, start, batch_size)
    return layer_scores(factors, inputs) | likelihood_scores(model, windows, start, batch_size)


def rank_windows(
    folder: Path,
    checkpoint: Path | None,
    factors: KroneckerFactors,
    *,
    sequences: Path | None,
    corpus: Path | None,
    layer: str | None,
    tokens: int,
    context: int | None,
    batch_size: int,
    force: bool = False,
    allow_globals: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return windows of text, the window that looks most memorized first; arguments as the command ``detect``.

    Tokens in front of a text do not count: neither what a layer reads there, nor how likely they are.

    Returns:
        For each window ``rank``, ``score`` (:func:`lightning_curvature.analysis.flat_shares`), the scores of
        :func:`likelihood_scores`, ``window`` (its number in the data), and ``text``.

    Raises:
        ValueError: If neither or both of ``sequences`` and ``corpus`` are given, sequences differ in length, or there
            is no such layer among the factors.
    """
    if (sequences is None) == (corpus is None):
        raise ValueError("Give what to rank: either --sequences or --corpus.")
    saved = SavedModel(folder, checkpoint, allow_globals)
    num_leading, chosen = len(saved.leading), check_layer(factors, layer)
    if sequences is not None:
        windows = _sequence_windows(saved, sequences)
    else:
        windows = saved.windows(str(corpus), tokens, context, WINDOW)
    if windows.shape[1] < num_leading + 2:
        raise ValueError(
            f"Windows of {windows.shape[1] - num_leading} token of text say nothing: a score is about what a layer "
            "reads before the last one. Use longer ones."
        )
    model = saved.load()
    name, layer_factors = chosen_layer(factors, chosen, model)
    check_loaded(model, {chosen: name}, factors, saved.source, force=force, allow_globals=allow_globals)
    inputs = window_activations(model, windows, [name], num_leading, batch_size)[name]
    scores = {
        "score": flat_shares(layer_factors, inputs),
        **likelihood_scores(model, windows, max(num_leading - 1, 0), batch_size),
    }
    order = scores["score"].argsort(descending=True, stable=True).tolist()
    return [
        {
            "rank": rank,
            **{key: float(values[index]) for key, values in scores.items()},
            "window": index,
            "text": saved.tokenizer.decode(windows[index, num_leading:].tolist()),
        }
        for rank, index in enumerate(order, 1)
    ]


def _sequence_windows(saved: SavedModel, path: Path) -> Tensor:
    """Return the sequences of a file, prefix and suffix, as windows, int64 ``[n, T]``."""
    asked = read_sequences(path, leading=saved.leading)
    saved.check_fit(asked)
    lengths = {len(sequence.ids) for sequence in asked}
    if len(lengths) > 1:
        raise ValueError(
            f"{path}: sequences of {min(lengths)} to {max(lengths)} tokens cannot be compared; rank those of one "
            "length at a time."
        )
    return torch.tensor([sequence.ids for sequence in asked])
