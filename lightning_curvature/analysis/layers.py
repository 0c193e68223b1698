"""Which layers to edit, without labels: where recited and other examples use different directions.

A layer that holds what is recited reads recited examples with another share of their energy in the flat directions of
its inputs than other examples. The better that share tells the two kinds apart, the more the layer holds. This takes
the factors, one forward pass, and the examples that the model recites (``lightning-curvature mine`` finds them). How
well the ranking predicts what an edit of a layer does is measured in ``benchmarks/bench_layers.py``.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature._checks import check_option
from lightning_curvature.analysis.detection import FLAT, auroc, flat_shares
from lightning_curvature.analysis.inputs import POSITIONS, Batch, read_inputs
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.modules import evaluating, find_layer


def flat_shares_by_layer(
    module: nn.Module,
    factors: KroneckerFactors,
    batches: Iterable[Batch],
    run: Callable[[Batch], Any],
    flat: float = FLAT,
    positions: str = "all",
) -> dict[str, Tensor]:
    """Return :func:`~lightning_curvature.analysis.flat_shares` of each example in each layer.

    Args:
        module: The network; it runs in eval mode, without gradients.
        factors: Its factors.
        batches: Examples, without padding: every position counts.
        run: Runs the module on a batch; the first dimension of what the layers read is the examples.
        flat: Share of the directions that counts as flat, those of lowest eigenvalue, in (0, 1).
        positions: ``"all"``, or ``"first"`` for the first position of each example alone: the class token of a ViT,
            whose other tokens mean nothing in the last block.

    Returns:
        By layer, float64 ``[n]``; NaN for an example of which the layer read only zeros.

    Raises:
        ValueError: If there is no batch, ``flat`` is out of range, or the factors do not fit the module.
        RuntimeError: If a layer did not run exactly once in each batch, or its input was changed in place.
    """
    check_option(positions, POSITIONS, "positions")
    if not 0.0 < flat < 1.0:
        raise ValueError(f"flat must lie between 0 and 1, found {flat!r}.")
    layers = {name: find_layer(module, name) for name in factors}
    shares: dict[str, list[Tensor]] = {name: [] for name in factors}
    with evaluating(module):
        for batch in batches:
            for name, inputs in read_inputs(layers, batch, run, POSITIONS[positions]).items():
                d_in = factors[name].shape[1]
                if inputs.shape[2] != d_in:
                    raise ValueError(
                        f"Layer {name!r}: factors are for {d_in} inputs, the layer reads {inputs.shape[2]}. Were they "
                        "collected on another model?"
                    )
                zero = (inputs == 0).flatten(1).all(1)
                shares[name].append(flat_shares(factors[name], inputs, flat).masked_fill(zero, torch.nan).cpu())
    if not any(shares.values()):
        raise ValueError("There is nothing to measure: no batch was given.")
    return {name: torch.cat(values) for name, values in shares.items()}


def rank_layers(
    module: nn.Module,
    factors: KroneckerFactors,
    recited: Iterable[Batch],
    others: Iterable[Batch],
    forward: Callable[[Batch], Any],
    flat: float = FLAT,
    positions: str = "all",
) -> dict[str, float]:
    """Rank layers by how well the share of flat energy tells recited examples from others.

    Args:
        module: The network.
        factors: Its factors.
        recited: Batches of examples that the model recites.
        others: Batches of other examples.
        forward: Runs the module on a batch, as ``run`` of :func:`flat_shares_by_layer`.
        flat: As in :func:`flat_shares_by_layer`.
        positions: As in :func:`flat_shares_by_layer`.

    Returns:
        By layer, the best first, the area under the ROC curve. At 0.5 the share says nothing; the further from 0.5, on
        either side, the better the layer. Examples of which a layer read only zeros do not count; a layer that has
        none left on one side gets 0.5.

    Raises:
        ValueError: As :func:`flat_shares_by_layer`.
        RuntimeError: As :func:`flat_shares_by_layer`.
    """
    recited_shares, other_shares = (
        flat_shares_by_layer(module, factors, batches, forward, flat, positions) for batches in (recited, others)
    )
    areas = {}
    for name in factors:
        scores = [shares[name][shares[name].isfinite()] for shares in (recited_shares, other_shares)]
        areas[name] = auroc(*scores) if all(len(values) for values in scores) else 0.5
    return dict(sorted(areas.items(), key=lambda item: -abs(item[1] - 0.5)))
