"""Which layers to edit, without labels: where recited and other examples use different directions.

Where a layer holds what is recited, it reads recited examples with another share of their energy in the flat directions
of its inputs' curvature than other examples. How well that share tells the two apart says which layer that is. It takes
the factors and one forward pass; which examples a model recites it says itself (``lightning-curvature mine``). How well
the ranking predicts what an edit of the layer does is measured in ``benchmarks/bench_layers.py``.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from lightning_curvature._checks import check_option
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.kinds import input_rows
from lightning_curvature.layers.modules import evaluating, find_layer
from lightning_curvature.recording.inputs import layer_inputs

Batch = TypeVar("Batch")


def flat_share(
    module: nn.Module,
    factors: KroneckerFactors,
    batches: Iterable[Batch],
    forward: Callable[[Batch], Any],
    flat: float = 0.5,
    positions: str = "all",
) -> dict[str, Tensor]:
    r"""Return the share of each example's activation energy in the flat directions of each layer's inputs.

    With :math:`v_j` the eigenvectors of A, strongest first, and :math:`a_t` the inputs at the positions of an example,
    the share is :math:`\sum_t \sum_{j \, flat} (v_j^\top a_t)^2 / \sum_t \|a_t\|^2`.

    Args:
        module: The network; it runs in eval mode, without gradients.
        factors: Its factors.
        batches: Examples, without padding: every position counts.
        forward: Runs the module on a batch; the first dimension of what the layers read is the examples.
        flat: Share of the directions that count as flat, the weakest ones, in (0, 1).
        positions: ``"all"``, or ``"first"`` for the first position of each example alone: the CLS token of a ViT, whose
            other tokens mean nothing in the last block.

    Returns:
        By layer, float64 ``[n]``; a layer that read only zeros has NaN.

    Raises:
        ValueError: If there is no batch, ``flat`` is out of range, or the factors do not fit the module.
        RuntimeError: If a layer did not run, or not once in each batch, or its input was changed in place.
    """
    check_option(positions, ("all", "first"), "positions")
    if not 0.0 < flat < 1.0:
        raise ValueError(f"flat must lie between 0 and 1, found {flat!r}.")
    layers = {name: find_layer(module, name) for name in factors}
    shares: dict[str, list[Tensor]] = {name: [] for name in factors}
    with evaluating(module):
        for batch in batches:
            with layer_inputs(layers) as found:
                forward(batch)
            for name, calls in found.items():
                if len(calls) != 1:
                    raise RuntimeError(f"Layer {name!r} ran {len(calls)} times in a batch; it must run once.")
                rows = input_rows(layers[name], calls[0])
                basis = factors[name].basis.U_A
                if rows.shape[1] != len(basis):
                    raise ValueError(
                        f"Layer {name!r}: factors are for {len(basis)} inputs, the layer reads {rows.shape[1]}. Were "
                        "they collected on another model?"
                    )
                weak = basis[:, round((1 - flat) * len(basis)) :].to(rows.device)
                energy = torch.stack([(rows.double() @ weak).square().sum(1), rows.double().square().sum(1)])
                by_example = rearrange(energy, "two (n t) -> two n t", n=len(calls[0]))
                flat_energy, total = by_example[..., :1].sum(2) if positions == "first" else by_example.sum(2)
                shares[name].append((flat_energy / total).cpu())
    if not any(shares.values()):
        raise ValueError("There is nothing to measure: no batch was given.")
    return {name: torch.cat(parts) for name, parts in shares.items()}


def rank_layers(
    module: nn.Module,
    factors: KroneckerFactors,
    recited: Iterable[Batch],
    others: Iterable[Batch],
    forward: Callable[[Batch], Any],
    flat: float = 0.5,
    positions: str = "all",
) -> dict[str, float]:
    """Rank layers by how well the share of flat energy tells recited examples from others.

    Args:
        module: The network.
        factors: Its factors.
        recited: Batches of examples that the model recites.
        others: Batches of other examples.
        forward: As in :func:`flat_share`.
        flat: As in :func:`flat_share`.
        positions: As in :func:`flat_share`.

    Returns:
        By layer, the best one first: the area under the ROC curve. At 0.5 the share says nothing; the further from it,
        on either side, the better the layer. Examples of which a layer read only zeros do not count; a layer with
        no others has 0.5.

    Raises:
        ValueError: As :func:`flat_share`.
    """
    one, two = (flat_share(module, factors, batches, forward, flat, positions) for batches in (recited, others))
    areas = {}
    for name in factors:
        yes, no = (shares[name][shares[name].isfinite()] for shares in (one, two))
        target = torch.cat([torch.ones(len(yes)), torch.zeros(len(no))]).long()
        areas[name] = float(binary_auroc(torch.cat([yes, no]), target)) if len(yes) and len(no) else 0.5
    return dict(sorted(areas.items(), key=lambda item: -abs(item[1] - 0.5)))
