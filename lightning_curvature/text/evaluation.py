"""What a language model recites, and how well it still models text."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.metrics import (
    ExtractionStrength,
    LooseMemorization,
    MinKProbability,
    NormalizedEditDistance,
    Perplexity,
    RankingOverlap,
    StrictMemorization,
)
from lightning_curvature.text.decoding import context_length, continuations
from lightning_curvature.text.sequences import PromptedSequence

WINDOW = 128
"""Tokens of a window for perplexity, where the model takes as many."""


def evaluate_sequences(
    model: nn.Module, sequences: Sequence[PromptedSequence], batch_size: int = 32
) -> dict[str, float]:
    """Measure how much of some sequences a model recites.

    Args:
        model: A transformers causal LM in eval mode.
        sequences: Prefixes and true suffixes.
        batch_size: Sequences per forward pass.

    Returns:
        ``strict``, ``loose`` and ``edit_distance`` of the greedy continuations; ``extraction_strength`` and ``min_k``
        (log-probability, nats per token) of teacher-forced passes.
    """
    strict, loose, distance = StrictMemorization(), LooseMemorization(), NormalizedEditDistance()
    strength, min_k = ExtractionStrength(), MinKProbability()
    for said in continuations(model, sequences, batch_size):
        target = said.target.cpu()
        for metric in (strict, loose, distance):
            metric.update(said.greedy.cpu(), target)
        strength.update(said.forced.cpu(), target)
        min_k.update(said.logits.cpu(), target)
    return {
        "strict": float(strict.compute()),
        "loose": float(loose.compute()),
        "edit_distance": float(distance.compute()),
        "extraction_strength": float(strength.compute()),
        "min_k": float(min_k.compute()),
    }


def strict_rate(model: nn.Module, sequences: Sequence[PromptedSequence], batch_size: int = 32) -> float:
    """Return the fraction of sequences that a model recites exactly: one forward pass, almost no generation."""
    strict = StrictMemorization()
    for said in continuations(model, sequences, batch_size, strict_only=True):
        strict.update(said.greedy.cpu(), said.target.cpu())
    return float(strict.compute())


def recited(
    model: nn.Module,
    sequences: Sequence[PromptedSequence],
    batch_size: int = 32,
    done: Callable[[int], object] = lambda _: None,
) -> list[PromptedSequence]:
    """Return the sequences that a model recites exactly: one forward pass, almost no generation.

    Args:
        model: A transformers causal LM in eval mode.
        sequences: Prefixes and true suffixes.
        batch_size: Sequences per forward pass.
        done: Called after each batch with its number of sequences.
    """
    places: list[int] = []
    for said in continuations(model, sequences, batch_size, strict_only=True):
        matches = (said.greedy == said.target).all(1).tolist()
        places += [place for place, match in zip(said.indices, matches, strict=True) if match]
        done(len(matches))
    return [sequences[place] for place in sorted(places)]


def next_token_logits(
    model: nn.Module, windows: Tensor, batch_size: int = 16, num_leading: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, batch by batch, logits ``[n, T - 1, V]`` and the tokens ``[n, T - 1]``, int64, that they predict.

    Args:
        model: A transformers causal LM in eval mode.
        windows: Text, int64 ``[N, T]``.
        batch_size: Windows per forward pass.
        num_leading: Tokens in front of each window that are no text, and are not predicted: ``T - num_leading`` tokens
            are, or ``T - 1`` if there are none.

    Raises:
        ValueError: If a window is longer than the model's context.
    """
    if windows.shape[1] - 1 > context_length(model):
        raise ValueError(
            f"Windows of {windows.shape[1]} tokens are longer than the model's context, {context_length(model)}. "
            "Use shorter ones (--context)."
        )
    device = next(model.parameters()).device
    start = max(num_leading - 1, 0)
    for batch in torch.split(windows, batch_size):
        ids = batch.to(device)
        with torch.no_grad():
            yield model(input_ids=ids[:, :-1], use_cache=False).logits[:, start:], ids[:, 1 + start :]


def perplexity(model: nn.Module, windows: Tensor, batch_size: int = 16, num_leading: int = 0) -> float:
    """Return the token-weighted perplexity on windows of text, int64 ``[N, T]``; the first token is context.

    Arguments as :func:`next_token_logits`.
    """
    metric = Perplexity()
    for logits, target in next_token_logits(model, windows, batch_size, num_leading):
        metric.update(logits.cpu(), target.cpu())
    return float(metric.compute())


def window_nll(model: nn.Module, windows: Tensor, batch_size: int = 16, num_leading: int = 0) -> Tensor:
    """Return the negative log-likelihood of each window of ``[N, T]``, float64 ``[N]``: nats per predicted token.

    Arguments as :func:`next_token_logits`.
    """
    batches = [
        F.cross_entropy(logits.transpose(1, 2).float(), target, reduction="none").double().mean(1).cpu()
        for logits, target in next_token_logits(model, windows, batch_size, num_leading)
    ]
    return torch.cat(batches)


class Baseline:
    """The next-token rankings of an unedited model, to compare an edited model with.

    Args:
        model: The unedited model.
        windows: Text, int64 ``[N, T]``.
        k: Tokens of highest rank that count.
        num_leading: Tokens in front of each window that are no text.
    """

    def __init__(self, model: nn.Module, windows: Tensor, k: int = 10, num_leading: int = 0) -> None:
        self.windows = windows
        self.k = k
        self.num_leading = num_leading
        self.top = [logits.topk(k, dim=-1).indices.cpu() for logits, _ in self._logits(model)]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return ``perplexity`` and ``ranking_overlap`` of a model on the same text, in one pass."""
        overlap, ppl = RankingOverlap(self.k), Perplexity()
        for (logits, target), top in zip(self._logits(model), self.top, strict=True):
            overlap.update(logits.cpu(), top)
            ppl.update(logits.cpu(), target.cpu())
        return {"perplexity": float(ppl.compute()), "ranking_overlap": float(overlap.compute())}

    def _logits(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        return next_token_logits(model, self.windows, num_leading=self.num_leading)
