"""The strongest edit of a language model within a perplexity: its energy, or, of updates, its budget."""

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.search.energy import FLOOR, Match, match_energy
from lightning_curvature.search.price import spend_shares

Multiples = Callable[[], Mapping[Path, float]]
"""Returns the perplexity on each text, as a multiple of what it was."""
_FREE = 0.001
"""The smallest relative rise of the perplexity that counts as the cost of an edit."""
_NO_EDIT = "No edit of these layers stays within {:g} times the perplexity. Allow more, or edit fewer."


def strongest(
    editor: CurvatureEditor,
    model: nn.Module,
    factors: KroneckerFactors,
    multiples: Multiples,
    limit: float,
    corpora: str,
) -> tuple[CurvatureEditor, dict[str, float]]:
    """Find the strongest edit within a perplexity on each text.

    Args:
        editor: Edits the model. Of an energy, one for all layers is searched for; of a soft edit of updates a budget,
            which is one penalty for all layers, and, unless it was given, the factor of all updates.
        model: The model; edited only while it is measured.
        factors: Its factors.
        multiples: Measures it.
        limit: What each multiple may become, above 1.
        corpora: What to call the texts.

    Returns:
        The edit, and its ``energy``, or its ``budget`` and ``scale``.

    Raises:
        ValueError: If the texts do not tell what an edit costs, or no edit is within the limit.
    """
    if type(editor) is CurvatureEditor and editor.soft and editor.reference is not None:
        return _by_budget(editor, model, factors, multiples, limit)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No edit stays within")  # said below, with the remedy
        match = match_energy(editor, model, factors, lambda: max(multiples().values()), limit, before=1.0)
    _check_match(match, editor, limit, corpora)
    return editor.at(match.energy), {"energy": match.energy}


def _by_budget(
    editor: CurvatureEditor, model: nn.Module, factors: KroneckerFactors, multiples: Multiples, limit: float
) -> tuple[CurvatureEditor, dict[str, float]]:
    def used() -> dict[str, float]:
        return {str(corpus): math.log(value) / math.log(limit) for corpus, value in multiples().items()}

    purchase = spend_shares(editor, model, factors, used)
    if not purchase.budget and purchase.scale == 1.0:
        raise ValueError(_NO_EDIT.format(limit))
    found = editor.within(purchase.budget) if purchase.budget else editor.at(1.0)
    found.scale = purchase.scale
    return found, {"budget": purchase.budget, "scale": purchase.scale}


def _check_match(match: Match, editor: CurvatureEditor, limit: float, corpora: str) -> None:
    """Raise ``ValueError`` if the edit costs nothing on the texts, or no edit is within the limit."""
    if match.energy <= FLOOR and max(match.points.values()) <= 1 + _FREE:
        raise ValueError(
            f"{corpora} does not tell what the edit costs: its perplexity rises by less than {_FREE:.1%} with every "
            f"energy that was tried, down to {match.energy:.3g}. Measure on text that the model knows (--corpus), "
            "edit other layers (--layers), or give an --energy."
        )
    if match.value > limit:
        raise ValueError(
            f"The bulk step alone makes the perplexity {match.value:.4g} times what it was. Make it shorter "
            "(--strength), or allow more (--perplexity)."
        )
    if match.energy == 1.0 and editor.keeps_at_full_energy:
        raise ValueError(_NO_EDIT.format(limit))
