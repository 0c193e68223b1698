"""Factors of a saved language model over a text file, in passes that survive an interruption."""

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_curvature._checks import check_count, check_option
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.passes import check_collected, check_not_empty, collect_batch
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.recording.options import CollectorOptions
from lightning_curvature.recording.positions import POSITIONS
from lightning_curvature.text.corpus import token_windows
from lightning_curvature.text.decoding import context_length
from lightning_curvature.text.leading import leading_tokens, next_token_loss
from lightning_curvature.text.models import check_vocabulary
from lightning_curvature.text.progress import Progress, run_key

WINDOW = 512
"""Tokens of a window, where the model takes as many."""


def collect_text(
    model: Any,
    tokenizer: Any,
    corpus: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokens: int | None = None,
    context: int | None = None,
    batch_size: int = 4,
    passes: int = 1,
    save_every: int = 50,
    **options: Any,
) -> KroneckerFactors:
    """Collect factors over a text file and save them; an interrupted run goes on where it last saved.

    This is the setting of arXiv:2510.24256: one streaming pass over a frozen model, for each group of layers. Progress
    is kept in files beside ``out`` and removed at the end (:mod:`lightning_curvature.text.progress`). An interrupted
    run gives the result of an uninterrupted run, bit for bit.

    Args:
        model: A transformers causal LM in eval mode.
        tokenizer: Its tokenizer.
        corpus: Text or JSON lines, see :mod:`lightning_curvature.text.corpus`.
        out: Factor file to write.
        tokens: Tokens to read at most.
        context: Tokens of a window, the tokens in front of the text among them; by default 512, or what the model
            takes if that is less.
        batch_size: Windows per forward pass.
        passes: Groups of layers, each with a pass of its own; more than one where the factors of all layers do not fit
            into memory at once.
        save_every: Batches between two saves of the progress.
        **options: Arguments of :class:`~lightning_curvature.recording.options.CollectorOptions`: layers, fisher,
            draws, positions, seed, accumulate_on.

    Returns:
        The factors.

    Raises:
        ValueError: If the text is shorter than a window, the window is longer than the model's context, the tokenizer
            belongs to another model, or the progress to a run with other arguments.
        RuntimeError: If the factors do not fit into memory, or a chosen layer never ran.
    """
    for name, value in (("passes", passes), ("batch_size", batch_size), ("save_every", save_every)):
        check_count(value, name)
    check_vocabulary(model, tokenizer)
    leading = leading_tokens(tokenizer)
    context = _check_context(model, context, len(leading))
    if "positions" in options:
        check_option(options["positions"], POSITIONS, "positions")  # there are no masks in a text
    settings = {"tokens": tokens, "context": context, "batch_size": batch_size, "passes": passes, **options}
    run = run_key(model, tokenizer, corpus, **settings, **({"leading": leading} if leading else {}))
    windows = _Windows(corpus, tokenizer, context, tokens, batch_size)
    saved = Progress(out, run, passes)
    _collect_passes(model, windows, saved, save_every, len(leading), options)
    return saved.finish()


def _check_context(model: Any, context: int | None, num_leading: int) -> int:
    """Return the tokens of a window: those that are asked for, or 512, or as many as the model takes."""
    limit = context_length(model)
    context = min(WINDOW, limit) if context is None else check_count(context, "context")
    if context <= max(num_leading, 1):
        raise ValueError(f"context={context}: in a window of so many tokens there is nothing to predict.")
    if context > limit:
        raise ValueError(f"context={context} is longer than the model's, {limit} tokens.")
    return context


@dataclass(frozen=True)
class _Windows:
    """The windows of a text, read anew in each pass; arguments as :func:`collect_text`."""

    corpus: str | os.PathLike[str]
    tokenizer: Any
    context: int
    tokens: int | None
    batch_size: int

    @property
    def total(self) -> int | None:
        """Tokens of all windows, where they are limited."""
        return None if self.tokens is None else self.tokens // self.context * self.context

    def batches(self, device: torch.device) -> Iterator[Tensor]:
        """Yield batches of windows, int64 ``[n, context]``."""
        windows = token_windows(self.corpus, self.tokenizer, self.context, self.tokens)
        while rows := list(itertools.islice(windows, self.batch_size)):
            yield torch.tensor(rows, device=device)


def _collect_passes(
    model: Any, windows: _Windows, saved: Progress, save_every: int, num_leading: int, options: Mapping[str, Any]
) -> None:
    """Collect the groups of layers that are not finished yet, each in a pass of its own."""
    state = saved.load()
    device = next(model.parameters()).device
    passes = saved.passes
    for index in range(state["pass"], passes):
        collector = Collector(model, CollectorOptions(**options), group=(index, passes))
        if state["collector"] is not None:
            collector.load_state_dict(state["collector"])
        with tqdm(
            total=windows.total, unit="token", desc=f"Collecting, pass {index + 1} of {passes}", disable=None
        ) as progress:
            seen = 0
            for number, batch in enumerate(windows.batches(device), 1):
                seen += batch.numel()
                if number > state["batches"]:
                    _step(model, collector, batch, num_leading)
                    if number % save_every == 0:
                        saved.save(index, number, collector.state_dict())
                progress.update(batch.numel())
        check_collected(collector)
        collector.provenance |= {"corpus": Path(windows.corpus).name, "tokens": seen}
        factors = collector.finish()
        check_not_empty(factors)
        saved.finish_pass(index, factors)
        state = {"pass": index + 1, "batches": 0, "collector": None}


def _step(model: Any, collector: Collector, batch: Tensor, num_leading: int) -> None:
    collect_batch(collector, batch, lambda rows: next_token_loss(model, rows, num_leading))
