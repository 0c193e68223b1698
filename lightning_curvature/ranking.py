"""Which layers to edit, without labels: where recited and other examples use different directions.

A layer reads a recited example with more of its energy in the flat directions of its inputs' curvature than it reads
another example. How well that share tells the two apart, layer by layer, says where the flat directions hold what is
recited. It takes the factors and one forward pass; which examples a model recites it says itself
(``lightning-curvature mine``). Whether the ranking predicts what an edit of the layer does is measured in
``benchmarks/bench_layers.py``; see ``docs/methods.md``.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from lightning_curvature.editor import find_layer
from lightning_curvature.factors import KroneckerFactors
from lightning_curvature.layers import input_rows
from lightning_curvature.probes import evaluating
from lightning_curvature.taps import layer_inputs

Batch = TypeVar("Batch")


def flat_share(
    module: nn.Module,
    factors: KroneckerFactors,
    batches: Iterable[Batch],
    forward: Callable[[Batch], Any],
    flat: float = 0.5,
) -> dict[str, Tensor]:
    r"""Return the share of each example's activation energy in the flat directions of each layer's inputs.

    With :math:`v_j` the eigenvectors of A, strongest first, and :math:`a_t` the inputs at the positions of an example,
    the share is :math:`\sum_t \sum_{j \, flat} (v_j^\top a_t)^2 / \sum_t \|a_t\|^2`.

    Args:
        module: The network; it runs in eval mode, without gradients.
        factors: Its factors.
        batches: Examples.
        forward: Runs the module on a batch; the first dimension of what the layers read is the examples.
        flat: Share of the directions that count as flat, the weakest ones, in (0, 1).

    Returns:
        By layer, float64 ``[n]``; a layer that read only zeros has NaN.

    Raises:
        ValueError: If there is no batch, ``flat`` is out of range, or the factors do not fit the module.
        RuntimeError: If a layer did not run, or not once in each batch.
    """
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
                flat_energy, total = rearrange(energy, "two (n t) -> two n t", n=len(calls[0])).sum(2)
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
) -> dict[str, float]:
    """Rank layers by how well the share of flat energy tells recited examples from others.

    Args:
        module: The network.
        factors: Its factors.
        recited: Batches of examples that the model recites.
        others: Batches of other examples.
        forward: As in :func:`flat_share`.
        flat: As in :func:`flat_share`.

    Returns:
        By layer, the best one first: the area under the ROC curve, 0.5 where the share says nothing.

    Raises:
        ValueError: As :func:`flat_share`.
    """
    one, two = (flat_share(module, factors, batches, forward, flat) for batches in (recited, others))
    areas = {}
    for name in factors:
        target = torch.cat([torch.ones(len(one[name])), torch.zeros(len(two[name]))]).long()
        areas[name] = float(binary_auroc(torch.cat([one[name], two[name]]), target))
    return dict(sorted(areas.items(), key=lambda item: -item[1]))
