"""The results of editing several layers."""

import warnings
from collections.abc import Mapping

from torch import Tensor

from lightning_curvature.editing.report import LayerEdit
from lightning_curvature.factors.decomposition import FaultyLayerError, TooFewPositionsError

Result = tuple[Tensor, LayerEdit] | ValueError
"""What the edit of a layer returned, or the error that it raised."""


def sort_results(
    results: Mapping[str, Result], skip_faulty: bool
) -> tuple[dict[str, Tensor], dict[str, LayerEdit], dict[str, str]]:
    """Return the new weights, the reports, and the reasons why layers were left as they are, with a warning for each.

    Args:
        results: Results by layer.
        skip_faulty: Whether a layer that cannot be edited is left as it is; one of too few positions always is.

    Raises:
        ValueError: If the edit of a layer raised one.
        FaultyLayerError: A ``ValueError``; if no layer can be edited.
    """
    new, edits, skipped = dict[str, Tensor](), dict[str, LayerEdit](), dict[str, str]()
    for name, result in results.items():
        if isinstance(result, TooFewPositionsError) or (isinstance(result, FaultyLayerError) and skip_faulty):
            skipped[name] = str(result)
        elif isinstance(result, ValueError):
            raise result
        else:
            new[name], edits[name] = result
    if skipped and not new:
        raise FaultyLayerError(f"No layer can be edited: {next(iter(skipped.values()))}")
    for reason in skipped.values():
        warnings.warn(f"Not edited: {reason}", stacklevel=3)
    return new, edits, skipped
