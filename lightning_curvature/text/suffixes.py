"""What a language model makes of the suffixes of sequences, with gradients: what supervised methods learn from."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.metrics.functional.margins import logit_margins
from lightning_curvature.text.decoding import context_length, vocabulary_size
from lightning_curvature.text.sequences import PromptedSequence, batches, check_fit


class Suffixes(NamedTuple):
    """A batch of token rows ``[n, T]``; those from ``start`` on are what the model says, the others its prompt."""

    ids: Tensor
    start: int


def suffix_batches(model: nn.Module, sequences: Sequence[PromptedSequence], batch_size: int = 32) -> Iterator[Suffixes]:
    """Yield sequences of equal lengths as batches on the model's device.

    Raises:
        ValueError: If a sequence does not fit the model.
    """
    check_fit(sequences, vocabulary_size(model), context_length(model))
    device = next(model.parameters()).device
    for indices in batches(sequences, batch_size):
        ids = torch.tensor([sequences[index].ids for index in indices], device=device)
        yield Suffixes(ids, len(sequences[indices[0]].prefix_ids))


def suffix_logits(model: nn.Module, batch: Suffixes) -> tuple[Tensor, Tensor]:
    """Return teacher-forced logits ``[n, L, V]``, float32, and the suffixes ``[n, L]``."""
    logits = model(input_ids=batch.ids[:, :-1], use_cache=False).logits[:, batch.start - 1 :]
    return logits.float(), batch.ids[:, batch.start :]


def suffix_nll(model: nn.Module, batch: Suffixes) -> Tensor:
    """Return the negative log-likelihood of each suffix, in nats, ``[n]``: the mean over its tokens."""
    logits, target = suffix_logits(model, batch)
    return F.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1)


def suffix_margins(model: nn.Module, batch: Suffixes) -> Tensor:
    """Return, for each token of the suffixes, its logit minus the largest other logit, ``[n, L]``."""
    return logit_margins(*suffix_logits(model, batch))
