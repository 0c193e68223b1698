"""The losses of a backward pass as parts of one loss, also where the user names the logits."""

from collections.abc import Collection, Sequence

from torch import Tensor

from lightning_curvature.recording import objectives
from lightning_curvature.recording.losses import OutputLoss
from lightning_curvature.recording.named_logits import find_class_dim, hide_a_softmax, losses_above, with_classes
from lightning_curvature.recording.options import CollectorOptions
from lightning_curvature.recording.taps import Taps


def parts_of(
    losses: Sequence[OutputLoss],
    taps: Taps,
    options: CollectorOptions,
    parameters: Collection[int],
    objective: Tensor | None,
) -> list[OutputLoss]:
    """Return the losses of a backward pass as parts of one loss, having checked that they are.

    Args:
        losses: The losses, or the named logits.
        taps: What the step recorded.
        options: What is collected.
        parameters: Addresses (``id``) of the network's parameters.
        objective: What is backpropagated, or None.

    Raises:
        RuntimeError: If they are no parts of one loss, or cannot be measured any more.
    """
    for loss in losses:
        loss.check_logits()
    name = options.logits
    if name is not None:
        above = objectives.of_the_output(losses_above(losses, taps.losses_beside_named, objective))
        by_hand = all(loss.kind != "softmax" for loss in above) and hide_a_softmax(losses, objective)
        if by_hand or not above:
            dims = [find_class_dim(loss, name, options.class_dim, taps.other_losses, objective) for loss in losses]
            above = [with_classes(loss, dim) for loss, dim in zip(losses, dims, strict=True)]
        losses = above
    parts = objectives.as_one_loss(losses, parameters, named=name is not None)
    if not options.is_empirical:
        parts = [objectives.without_ignored(loss, objective) for loss in parts]
    for loss in parts:
        objectives.check_log_probabilities(loss)
    return parts
