"""Logits, losses and margins of the suffixes of sequences, with gradients, for methods that learn from them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.metrics.functional.margins import logit_margins
from lightning_curvature.text.decoding import token_batches
from lightning_curvature.text.sequences import PromptedSequence


class Suffixes(NamedTuple):
    """A batch of sequences.

    Args:
        ids: Token ids, int64 ``[n, T]``.
        start: The position at which the suffixes start; the tokens before it are prompts.
    """

    ids: Tensor
    start: int


def suffix_batches(model: nn.Module, sequences: Sequence[PromptedSequence], batch_size: int = 32) -> Iterator[Suffixes]:
    """Yield batches of sequences of equal lengths, on the device of the model.

    Raises:
        ValueError: If a sequence does not fit the model.
    """
    for _, ids, start in token_batches(model, sequences, batch_size):
        yield Suffixes(ids, start)


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
