"""Running sums of one layer's factors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.factors import LayerFactors
from lightning_curvature.moments import SecondMoment


class LayerSums:
    """Running sums of one layer's factors.

    Args:
        d_in: Width of the layer's inputs.
        d_out: Width of its outputs.
        device: Where the sums live.
        transposed: Whether the layer stores its weight as ``[d_in, d_out]``.
        coupled: Whether to sum the norm-weighted moments of the score ``"coupled"``, too.
    """

    def __init__(self, d_in: int, d_out: int, device: torch.device, transposed: bool, coupled: bool = False) -> None:
        names = ("inputs", "gradients", *(("A_coupled", "G_coupled") if coupled else ()))
        sizes = {"inputs": d_in, "gradients": d_out, "A_coupled": d_in, "G_coupled": d_out}
        self.moments = {name: SecondMoment(sizes[name], device) for name in names}
        self.num_seen = 0
        self.transposed = transposed

    @property
    def inputs(self) -> SecondMoment:
        """The inputs' moment."""
        return self.moments["inputs"]

    @property
    def gradients(self) -> SecondMoment:
        """The output gradients' moment."""
        return self.moments["gradients"]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(d_out, d_in)`` of the weight matrix."""
        return len(self.gradients.total), len(self.inputs.total)

    def add(self, inputs: Tensor, passes: Sequence[Tensor], draws: int, seen: int) -> None:
        """Add positions.

        Args:
            inputs: Inputs at the positions that count, ``[n, d_in]``.
            passes: Gradients at their outputs, ``[n, d_out]``, of each backward pass.
            draws: Passes over which to average; 1 if they are to be summed.
            seen: Positions that went through the layer, counted or not.
        """
        self.inputs.add(inputs)
        for gradients in passes:
            scaled = gradients / draws**0.5
            self.gradients.add(scaled, count=0)
            if "A_coupled" in self.moments:
                self.moments["A_coupled"].add(inputs * scaled.norm(dim=1, keepdim=True), count=0)
                self.moments["G_coupled"].add(scaled * inputs.norm(dim=1, keepdim=True), count=0)
        for name, moment in self.moments.items():
            moment.count += len(inputs) if name != "inputs" else 0
        self.num_seen += seen

    def factors(self) -> LayerFactors:
        """Return the normalised factors."""
        coupled = {name: self.moments[name].mean() for name in self.moments.keys() - {"inputs", "gradients"}}
        return LayerFactors(
            A=self.inputs.mean(),
            G=self.gradients.mean(),
            num_inputs=self.inputs.count,
            num_gradients=self.gradients.count,
            num_seen=self.num_seen,
            transposed=self.transposed,
            **coupled,
        )

    def move(self, device: torch.device) -> None:
        """Move the sums to a device."""
        for moment in self.moments.values():
            moment.total = moment.total.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that :meth:`from_state_dict` needs, as tensors and primitives."""
        return {
            "moments": {
                key: {"total": m.total, "count": m.count, "dtype": str(m.dtype)} for key, m in self.moments.items()
            },
            "num_seen": self.num_seen,
            "transposed": self.transposed,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "LayerSums":
        """Return the sums that :meth:`state_dict` was taken from, on the device of its tensors."""
        saved = state["moments"]
        total = saved["inputs"]["total"]
        sums = cls(len(total), len(saved["gradients"]["total"]), total.device, state["transposed"], len(saved) > 2)
        for key, moment in sums.moments.items():
            moment.total, moment.count = saved[key]["total"], saved[key]["count"]
            moment.dtype = getattr(torch, saved[key]["dtype"].removeprefix("torch."))
        sums.num_seen = state["num_seen"]
        return sums
