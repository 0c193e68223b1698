"""What ``fisher="empirical"`` needs: the scale at which the training's own gradients arrive, and one path for them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_curvature.distributed import whole
from lightning_curvature.recording.graph import (
    reaches,
)
from lightning_curvature.recording.losses import OutputLoss


def scales_of(losses: Sequence[Sequence[OutputLoss]], gradients: Sequence[Sequence[Tensor]]) -> list[float | Tensor]:
    """Return, for each call of a layer, the factor of the products of the gradients that the training sent there.

    Args:
        losses: For each call, the losses whose gradients it received.
        gradients: For each call, the gradients.

    Raises:
        RuntimeError: If no call received a gradient, and as :func:`empirical_unit`.
    """
    if not any(gradients):
        raise RuntimeError("The training's backward sent no gradient to the chosen layers; use another fisher=.")
    units: dict[tuple[int, ...], Tensor] = {}
    scales: list[float | Tensor] = []
    for call_losses in losses:
        key = tuple(map(id, call_losses))  # losses that the caller keeps alive
        if call_losses and key not in units:
            units[key] = empirical_unit(call_losses).square()
        scales.append(units.get(key, 1.0))
    return scales


def empirical_unit(losses: Sequence[OutputLoss]) -> Tensor:
    """Return the factor, float64, that makes gradients of the training's backward those of the plain summed loss.

    The factor that arrived at the loss (gradient accumulation, loss scaling, a user's own weight) and the reduction's
    denominator are divided out.

    Raises:
        RuntimeError: If the loss reached the backward pass with a weight of its own for each position, or chunks of it
            with different ones.
    """
    units = [_unit(loss) for loss in losses]
    if len(units) > 1:
        first = units[0]
        if not all(torch.allclose(unit, first.to(unit.device), rtol=1e-4, atol=0) for unit in units):
            raise RuntimeError(_WEIGHED)
    return units[0]


_WEIGHED = (
    "fisher='empirical': the training weighs its loss positions differently, so gradients of the plain loss cannot be "
    "told from them. Use fisher='sketched', which does not depend on the training loss."
)


def _unit(loss: OutputLoss) -> Tensor:
    parts: list[tuple[Tensor, Tensor]] = []
    for part in (loss, *loss.twins):
        factor, denominator = part.factor, part.denominator
        if factor is None or denominator is None:
            raise RuntimeError(
                "The training's backward never reached the loss; fisher='empirical' has nothing to read."
            )
        if not (part is loss or torch.equal(part.counted, loss.counted)):
            raise RuntimeError(_WEIGHED)
        parts.append((_uniform(whole(factor)), whole(denominator).double()))
    if len(parts) == 1:
        factor, denominator = parts[0]
        return denominator / factor
    rates = [factor / denominator for factor, denominator in parts]
    return 1.0 / sum(rates[1:], rates[0])


def check_single_path(losses: Sequence[OutputLoss], goals: set[Node], objective: Tensor | None) -> None:
    """Raise if the training loss reaches the layers on another path than through the softmax loss."""
    if any(loss.output is None for loss in losses) or objective is None:
        raise RuntimeError("fisher='empirical' reads the training's own loss; it cannot be used with logits='...'.")
    barriers = {part.node for loss in losses for part in (loss, *loss.twins)}
    stack, seen = [objective.grad_fn], set(barriers)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node in goals:
            raise RuntimeError(
                "fisher='empirical': the training loss reaches the layers on other paths than through the "
                "cross-entropy (a regularizer, an auxiliary loss), so their gradients are mixed. Use fisher='sketched' "
                "or 'sampled'."
            )
        seen.add(node)
        stack.extend(parent for parent, _ in node.next_functions)


def check_unreached(goals: set[Node], objective: Tensor) -> None:
    """Raise if another backward pass of the same step would reach the layers too."""
    if reaches(objective.grad_fn, goals):
        raise RuntimeError(
            "fisher='empirical': a second backward pass through the same forward pass reaches the layers, and its "
            "gradients would mix with the first's. Use fisher='sketched' or 'sampled'."
        )


def _uniform(arrived: Tensor) -> Tensor:
    """Return the one factor, float64, that arrived at all positions of a loss."""
    if arrived.numel() == 1:  # nothing to compare, so that an accelerator is not waited for
        return torch.where(arrived == 0, 1, arrived).double().reshape(())
    factors = arrived[arrived != 0]  # with reduction="none" a weight of zero leaves a position out
    factor = factors[0] if factors.numel() else arrived.new_ones(())
    if bool((factors != factor).any()):
        raise RuntimeError(_WEIGHED)
    return factor.double()
