"""Factors of a saved language model over a text file, in passes that survive an interruption."""

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_curvature._checks import check_count, check_option
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.passes import check_collected, check_positions, collect_batch
from lightning_curvature.collect.tied_inputs import STATE_VERSION
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.recording.options import CollectorOptions
from lightning_curvature.recording.positions import POSITIONS
from lightning_curvature.storage.atomic import replacing
from lightning_curvature.text.corpus import token_windows
from lightning_curvature.text.decoding import context_length
from lightning_curvature.text.leading import leading_tokens, next_token_loss
from lightning_curvature.text.models import check_vocabulary

log = logging.getLogger(__name__)

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
    is kept in ``OUT.partial`` (and ``OUT.partial.N``, the factors of finished passes) and removed at the end. The
    result of an interrupted run is bit for bit that of an uninterrupted one.

    Args:
        model: A transformers causal LM in eval mode.
        tokenizer: Its tokenizer.
        corpus: Text or JSON lines, see :mod:`lightning_curvature.text.corpus`.
        out: Factor file to write.
        tokens: Tokens to read at most.
        context: Tokens of a window, those in front of the text among them; by default 512, or what the model takes if
            that is less.
        batch_size: Windows per forward pass.
        passes: Groups of layers, each with a pass of its own, where the factors of all do not fit into memory at once.
        save_every: Batches between two saves of the progress.
        **options: Arguments of :class:`~lightning_curvature.recording.options.CollectorOptions`: layers, fisher,
            draws, positions, seed, accumulate_on.

    Returns:
        The factors.

    Raises:
        ValueError: If the text is shorter than a window, the window longer than the model's context, the tokenizer of
            another model, or ``OUT.partial`` from a run with other arguments.
        RuntimeError: If the factors do not fit into memory, or a chosen layer never ran.
    """
    for name, value in (("passes", passes), ("batch_size", batch_size), ("save_every", save_every)):
        check_count(value, name)
    check_vocabulary(model, tokenizer)
    context = min(WINDOW, context_length(model)) if context is None else check_count(context, "context")
    leading = leading_tokens(tokenizer)
    if context <= max(len(leading), 1):
        raise ValueError(f"context={context}: in a window of so many tokens there is nothing to predict.")
    if context > context_length(model):
        raise ValueError(f"context={context} is longer than the model's, {context_length(model)} tokens.")
    partial = Path(f"{os.fspath(out)}.partial")
    if "positions" in options:
        check_option(options["positions"], POSITIONS, "positions")  # there are no masks in a text
    settings = {"tokens": tokens, "context": context, "batch_size": batch_size, "passes": passes, **options}
    run = _fingerprint(model, tokenizer, corpus, **settings, **({"leading": leading} if leading else {}))
    state = _load(partial, run, passes) or {"pass": 0, "batches": 0, "collector": None}
    device = next(model.parameters()).device
    pieces = [Path(f"{partial}.{index}") for index in range(passes)]
    for index in range(state["pass"], passes):
        collector = Collector(model, CollectorOptions(**options), group=(index, passes))
        if state["collector"] is not None:
            collector.load_state_dict(state["collector"])
        windows = token_windows(corpus, tokenizer, context, tokens)
        total = None if tokens is None else tokens // context * context
        with tqdm(
            total=total, unit="token", desc=f"Collecting, pass {index + 1} of {passes}", disable=None
        ) as progress:
            seen = 0
            for number, batch in enumerate(_batches(windows, batch_size, device), 1):
                seen += batch.numel()
                if number > state["batches"]:
                    _step(model, collector, batch, len(leading))
                    if number % save_every == 0:
                        _save(partial, run, index, number, collector.state_dict())
                progress.update(batch.numel())
        check_collected(collector)
        collector.provenance |= {"corpus": Path(corpus).name, "tokens": seen}
        found = collector.finish()
        check_positions(found)
        found.save(pieces[index])
        state = {"pass": index + 1, "batches": 0, "collector": None}
        _save(partial, run, index + 1, 0, None)
    loaded = [KroneckerFactors.load(piece) for piece in pieces]
    factors = KroneckerFactors({name: layer for piece in loaded for name, layer in piece.items()}, loaded[0].provenance)
    factors.save(out)
    for path in (partial, *pieces):
        path.unlink()
    return factors


def _step(model: Any, collector: Collector, batch: Tensor, num_leading: int) -> None:
    collect_batch(collector, batch, lambda windows: next_token_loss(model, windows, num_leading))


def _batches(windows: Iterator[list[int]], size: int, device: torch.device) -> Iterator[Tensor]:
    while rows := list(itertools.islice(windows, size)):
        yield torch.tensor(rows, device=device)


def _fingerprint(model: Any, tokenizer: Any, corpus: str | os.PathLike[str], **options: Any) -> str:
    """Return a text that is the same for runs that can be continued by one another."""
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        weights.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        weights.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    fast = getattr(tokenizer, "backend_tokenizer", None)
    words = fast.to_str() if fast is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    path = Path(corpus)
    facts = {
        "model": weights.hexdigest(),
        "tokenizer": hashlib.sha256(words.encode()).hexdigest(),
        "corpus": [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns],
        "version of the sums": STATE_VERSION,
        **options,
    }
    return json.dumps(facts, sort_keys=True)


def _save(partial: Path, run: str, index: int, batches: int, collector: dict[str, Any] | None) -> None:
    with replacing(partial) as temporary:
        torch.save({"run": run, "pass": index, "batches": batches, "collector": collector}, temporary)


def _load(partial: Path, run: str, passes: int) -> dict[str, Any] | None:
    """Return the progress of a run, or None; raise ``ValueError`` if it is damaged, or that of another run."""
    if not partial.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(partial, weights_only=True)
        old, new = json.loads(state["run"]), json.loads(run)
        state["pass"], state["batches"], state["collector"] = (state[key] for key in ("pass", "batches", "collector"))
        if old == new:
            for index in range(state["pass"]):
                KroneckerFactors.open(f"{partial}.{index}")
    except Exception as error:  # a file that was cut off can fail in any way
        pieces = f" and {partial}.0 to .{passes - 1}" if passes > 1 else ""
        raise ValueError(
            f"{partial}, the progress of an interrupted collection, is damaged or not complete "
            f"({type(error).__name__}). Delete it{pieces}, and collect from the start."
        ) from error
    if old != new:
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        raise ValueError(
            f"{partial} is the progress of another run: {changed} differ. Finish that run with its own arguments, or "
            "delete the file."
        )
    log.info("Going on with pass %d after %d batches (%s).", state["pass"] + 1, state["batches"], partial)
    return state
