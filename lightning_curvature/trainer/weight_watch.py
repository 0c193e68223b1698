"""Whether the weights of a module are still those that a training step left."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_curvature.distributed import local_part, whole
from lightning_curvature.storage.hashes import tensor_hash


def weight_hashes(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the hash of each weight, gathered where it is spread over processes. A collective."""
    return {name: tensor_hash(whole(weight.detach())) for name, weight in weights.items()}


_SAME = 1e-3  # relative change of a weight below which the factors of a training step still describe it


_SAMPLED = 256  # entries of each weight that are compared


class WeightWatch:
    """Tells whether weights were changed outside of training steps, by more than what is usual there.

    A sample of each weight is kept as a step leaves it. Weight averaging swaps in other weights, often
    through ``.data``, which autograd does not see, and mostly swaps them back. Where training goes on from changed
    weights (a module that clamps them after each step), such a change is usual from then on.

    Args:
        weights: Returns the weights to watch, by name.
    """

    def __init__(self, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        self._weights = weights
        self._sample: list[Tensor] | None = None
        self._usual: list[Tensor] | None = None
        self._in_step = False

    @torch.no_grad()
    def begin_step(self) -> None:
        """Take the weights as they are for what training goes on from."""
        if self._sample is not None:  # stays on the device, which is not waited for
            twice = [2.0 * change for change in self._changes()]
            usual = self._usual or [torch.full_like(change, _SAME) for change in twice]
            self._usual = [torch.maximum(old, new) for old, new in zip(usual, twice, strict=True)]
        self._in_step = True

    def end_step(self) -> None:
        """Remember the weights as a training step leaves them."""
        self._sample, self._in_step = self._look(), False

    @torch.no_grad()
    def swapped(self) -> bool:
        """Tell whether the weights are not those that the last training step left."""
        if self._in_step or self._sample is None:
            return False
        changes = self._changes()
        usual = self._usual or [torch.full_like(change, _SAME) for change in changes]
        return any(bool(change > most) for change, most in zip(changes, usual, strict=True))

    def _changes(self) -> list[Tensor]:
        """Return the relative change of each weight since the last step."""
        pairs = zip(self._sample or (), self._look(), strict=True)
        return [(new - old).norm() / old.norm().clamp(min=1e-30) for old, new in pairs]

    @torch.no_grad()
    def _look(self) -> list[Tensor]:
        local = [local_part(weight).detach().flatten() for weight in self._weights().values()]
        return [weight[:: max(len(weight) // _SAMPLED, 1)].to(torch.float32, copy=True) for weight in local]
