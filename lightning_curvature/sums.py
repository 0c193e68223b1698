"""Running sums of one layer's factors."""

from typing import Any

import torch

from lightning_curvature.factors import LayerFactors
from lightning_curvature.moments import SecondMoment


class LayerSums:
    """Running sums of one layer's factors.

    Args:
        d_in: Width of the layer's inputs.
        d_out: Width of its outputs.
        device: Where the sums live.
        transposed: Whether the layer stores its weight as ``[d_in, d_out]``.
    """

    def __init__(self, d_in: int, d_out: int, device: torch.device, transposed: bool) -> None:
        self.inputs = SecondMoment(d_in, device)
        self.gradients = SecondMoment(d_out, device)
        self.num_seen = 0
        self.transposed = transposed

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(d_out, d_in)`` of the weight matrix."""
        return len(self.gradients.total), len(self.inputs.total)

    def factors(self) -> LayerFactors:
        """Return the normalised factors."""
        return LayerFactors(
            A=self.inputs.mean(),
            G=self.gradients.mean(),
            num_inputs=self.inputs.count,
            num_gradients=self.gradients.count,
            num_seen=self.num_seen,
            transposed=self.transposed,
        )

    def move(self, device: torch.device) -> None:
        """Move the sums to a device."""
        for moment in (self.inputs, self.gradients):
            moment.total = moment.total.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that :meth:`from_state_dict` needs, as tensors and primitives."""
        moments = {"inputs": self.inputs, "gradients": self.gradients}
        return {
            **{key: {"total": m.total, "count": m.count, "dtype": str(m.dtype)} for key, m in moments.items()},
            "num_seen": self.num_seen,
            "transposed": self.transposed,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "LayerSums":
        """Return the sums that :meth:`state_dict` was taken from, on the device of its tensors."""
        total = state["inputs"]["total"]
        sums = cls(len(total), len(state["gradients"]["total"]), total.device, state["transposed"])
        for key, moment in (("inputs", sums.inputs), ("gradients", sums.gradients)):
            moment.total, moment.count = state[key]["total"], state[key]["count"]
            moment.dtype = getattr(torch, state[key]["dtype"].removeprefix("torch."))
        sums.num_seen = state["num_seen"]
        return sums
