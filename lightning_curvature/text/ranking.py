"""Windows of text in the order of how memorized they look."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_curvature.analysis.detection import flat_shares
from lightning_curvature.analysis.inputs import check_layer, chosen_layer
from lightning_curvature.editing.origin import check_loaded
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.text.detection import likelihood_scores, window_activations
from lightning_curvature.text.saved import SavedModel
from lightning_curvature.text.sequences import read_sequences

WINDOW = 64
"""Tokens of a window, where the model takes as many."""


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
    """Return windows, the one that looks most memorized first; arguments as the command ``detect``.

    Tokens in front of a text do not count: neither what a layer reads there, nor how likely they are.

    Returns:
        ``rank``, ``score`` (:func:`lightning_curvature.analysis.flat_shares`), the scores of
        :func:`lightning_curvature.text.detection.likelihood_scores`, ``window`` (its number in the data), and ``text``.

    Raises:
        ValueError: If neither or both of ``sequences`` and ``corpus`` are given, sequences differ in length, or there
            is no such layer among the factors.
    """
    if (sequences is None) == (corpus is None):
        raise ValueError("Give what to rank: either --sequences or --corpus.")
    saved = SavedModel(folder, checkpoint, allow_globals)
    tokenizer, leading = saved.tokenizer, saved.leading
    check_layer(factors, layer)
    if sequences is not None:
        asked = read_sequences(sequences, leading=leading)
        saved.check_fit(asked)
        ids = [list(sequence.ids) for sequence in asked]
        lengths = {len(one) for one in ids}
        if len(lengths) > 1:
            raise ValueError(
                f"{sequences}: sequences of {min(lengths)} to {max(lengths)} tokens cannot be compared; rank those of "
                "one length at a time."
            )
    else:
        ids = saved.windows(Path(str(corpus)), tokens, context, WINDOW).tolist()
    if len(ids[0]) < len(leading) + 2:
        raise ValueError(
            f"Windows of {len(ids[0]) - len(leading)} token of text say nothing: a score is about what a layer reads "
            "before the last one. Use longer ones."
        )
    model = saved.load()
    name, own = chosen_layer(factors, layer, model)
    names = {check_layer(factors, layer): name}
    check_loaded(model, names, factors, saved.source, force=force, allow_globals=allow_globals)
    windows = torch.tensor(ids)
    scores = {
        "score": flat_shares(own, window_activations(model, windows, [name], len(leading), batch_size)[name]),
        **likelihood_scores(model, windows, max(len(leading) - 1, 0), batch_size),
    }
    order = scores["score"].argsort(descending=True, stable=True).tolist()
    return [
        {
            "rank": rank,
            **{key: float(value[index]) for key, value in scores.items()},
            "window": index,
            "text": tokenizer.decode(ids[index][len(leading) :]),
        }
        for rank, index in enumerate(order, 1)
    ]
