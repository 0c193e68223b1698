"""Factors of a saved language model over text files, in passes that survive an interruption."""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_curvature._checks import check_count, check_option, check_weights
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
    corpus: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    tokens: int | None = None,
    context: int | None = None,
    batch_size: int = 4,
    passes: int = 1,
    save_every: int = 50,
    **options: Any,
) -> KroneckerFactors:
    """Collect factors over text files and save them; an interrupted run goes on where it last saved.

    This is the setting of arXiv:2510.24256: one streaming pass over a frozen model, for each group of layers. Progress
    is kept in files beside ``out`` and removed at the end (:mod:`lightning_curvature.text.progress`). An interrupted
    run gives the result of an uninterrupted run, bit for bit.

    Several corpora are collected one after the other, each as it is alone, and merged at the end.

    Args:
        model: A transformers causal LM in eval mode.
        tokenizer: Its tokenizer.
        corpus: Text or JSON lines, see :mod:`lightning_curvature.text.corpus`; one file, or several.
        out: Factor file to write.
        weights: What each corpus counts in the factors, whatever its length; by default all count the same.
        tokens: Tokens of each corpus to read at most.
        context: Tokens of a window, the tokens in front of the text among them; by default 512, or what the model
            takes if that is less.
        batch_size: Windows per forward pass.
        passes: Groups of layers, each with a pass of its own over each corpus; more than one where the factors of all
            layers do not fit into memory at once.
        save_every: Batches between two saves of the progress.
        **options: Arguments of :class:`~lightning_curvature.recording.options.CollectorOptions`: layers, fisher,
            draws, positions, seed, accumulate_on.

    Returns:
        The factors.

    Raises:
        ValueError: If a text is shorter than a window, the window is longer than the model's context, the weights are
            not one positive number for each text, the tokenizer belongs to another model, or the progress to a run with
            other arguments.
        RuntimeError: If the factors do not fit into memory, or a chosen layer never ran.
    """
    for name, value in (("passes", passes), ("batch_size", batch_size), ("save_every", save_every)):
        check_count(value, name)
    corpora = [corpus] if isinstance(corpus, str | os.PathLike) else list(corpus)
    if not corpora:
        raise ValueError("There is no corpus to collect over: name a text file.")
    weights = check_weights([1.0] * len(corpora) if weights is None else weights, len(corpora), "weights")
    check_vocabulary(model, tokenizer)
    leading = leading_tokens(tokenizer)
    context = _check_context(model, context, len(leading))
    if "positions" in options:
        check_option(options["positions"], POSITIONS, "positions")  # there are no masks in a text
    settings = {"tokens": tokens, "context": context, "batch_size": batch_size, "passes": passes, **options}
    settings |= ({"leading": leading} if leading else {}) | ({"weights": weights} if len(corpora) > 1 else {})
    saved = Progress(out, run_key(model, tokenizer, corpora, **settings), passes, weights)
    texts = [_Windows(path, tokenizer, context, tokens, batch_size) for path in corpora]
    _collect_passes(model, texts, saved, save_every, len(leading), options)
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
    model: Any, texts: Sequence[_Windows], saved: Progress, save_every: int, num_leading: int, options: dict[str, Any]
) -> None:
    """Collect the groups of layers that are not finished yet, each in a pass of its own over each text."""
    state = saved.load()
    device = next(model.parameters()).device
    for text in texts[1:]:
        next(text.batches(device))  # raises before another text is read for hours
    for number in range(state["pass"], len(saved.pieces)):
        place, index = divmod(number, saved.passes)
        collector = Collector(model, CollectorOptions(**options), group=(index, saved.passes))
        if state["collector"] is not None:
            collector.load_state_dict(state["collector"])
        elif place:  # the layers are those that ran in the first text
            collector.network.chosen = list(KroneckerFactors.open(saved.pieces[index]))
        text = texts[place]
        source = f" from {Path(text.corpus).name}" if len(texts) > 1 else ""
        what = f"Collecting{source}, pass {index + 1} of {saved.passes}"
        seen = 0
        with tqdm(total=text.total, unit="token", desc=what, disable=None) as progress:
            for count, batch in enumerate(text.batches(device), 1):
                seen += batch.numel()
                if count > state["batches"]:
                    _step(model, collector, batch, num_leading)
                    if count % save_every == 0:
                        saved.save(number, count, collector.state_dict())
                progress.update(batch.numel())
        check_collected(collector)
        collector.provenance |= {"corpus": Path(text.corpus).name, "tokens": seen}
        factors = collector.finish()
        check_not_empty(factors)
        saved.finish_pass(number, factors)
        state = {"pass": number + 1, "batches": 0, "collector": None}


def _step(model: Any, collector: Collector, batch: Tensor, num_leading: int) -> None:
    collect_batch(collector, batch, lambda rows: next_token_loss(model, rows, num_leading))
