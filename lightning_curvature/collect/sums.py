"""Running sums of one layer's factors."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_curvature.collect.moments import SecondMoment
from lightning_curvature.distributed import Ranks
from lightning_curvature.factors.layer import LayerFactors


class LayerKind(NamedTuple):
    """What the sums of a layer depend on: its widths and layout, and whether moments for ``"coupled"`` are summed.

    The fields are arguments of :class:`LayerSums`.
    """

    d_in: int
    d_out: int
    transposed: bool
    coupled: bool = False


class LayerSums:
    """Running sums of one layer's factors.

    Args:
        d_in: Width of the layer's inputs.
        d_out: Width of its outputs.
        device: Where the sums live.
        transposed: Whether the layer stores its weight as ``[d_in, d_out]``.
        coupled: Whether to also sum the norm-weighted moments that the score ``"coupled"`` needs.
    """

    def __init__(self, d_in: int, d_out: int, device: torch.device, transposed: bool, coupled: bool = False) -> None:
        names = ("inputs", "gradients", *(("A_coupled", "G_coupled") if coupled else ()))
        sizes = {"inputs": d_in, "gradients": d_out, "A_coupled": d_in, "G_coupled": d_out}
        self.moments = {name: SecondMoment(sizes[name], device) for name in names}
        self.num_seen = 0
        self.num_losses = 0.0
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
        return self.gradients.dim, self.inputs.dim

    def tie_inputs(self, inputs: SecondMoment) -> None:
        """Use the inputs' moment of another layer that reads the same positions of the same tensors."""
        self.moments = {"inputs": inputs} | {name: moment for name, moment in self.moments.items() if name != "inputs"}

    def add_inputs(self, inputs: Tensor) -> None:
        """Add the inputs ``[n, d_in]`` at the positions that count. Call it once for all layers with this moment."""
        self.inputs.add(inputs)

    def add_gradients(self, inputs: Tensor, passes: Sequence[Tensor], scale: float, seen: int, losses: float) -> None:
        """Add the gradients at the same positions.

        Args:
            inputs: The inputs there, ``[n, d_in]``.
            passes: For each backward pass, the gradients at the layer's output at these positions, ``[n, d_out]``.
            scale: Number that multiplies the products of the gradients.
            seen: Positions that went through the layer, counted or not.
            losses: Loss positions behind the gradients; only a part of one, where a share of the positions is used.
        """
        rows = {"gradients": passes}
        if "A_coupled" in self.moments:
            rows["A_coupled"] = [inputs * gradients.norm(dim=1, keepdim=True) for gradients in passes]
            rows["G_coupled"] = [gradients * inputs.norm(dim=1, keepdim=True) for gradients in passes]
        for name, parts in rows.items():
            self.moments[name].add(*parts, count=len(inputs), scale=scale)
        self.num_seen += seen
        self.num_losses += losses

    @property
    def kind(self) -> LayerKind:
        """What the sums depend on."""
        d_out, d_in = self.shape
        return LayerKind(d_in, d_out, self.transposed, len(self.moments) > 2)

    @classmethod
    def zero(cls, kind: LayerKind, device: torch.device) -> "LayerSums":
        """Return sums of no positions."""
        return cls(kind.d_in, kind.d_out, device, kind.transposed, kind.coupled)

    @classmethod
    def of(cls, layer: LayerFactors) -> "LayerSums":
        """Return sums whose :meth:`factors` are those of ``layer``."""
        d_out, d_in = layer.shape
        sums = cls(d_in, d_out, torch.device("meta"), layer.transposed, layer.A_coupled is not None)
        means = {**layer.tensors, "inputs": layer.A, "gradients": layer.G}
        errors = {"inputs": layer.A_error, "gradients": layer.G_error}
        for name in sums.moments:
            count = layer.num_gradients if name == "gradients" else layer.num_inputs
            sums.moments[name] = SecondMoment.of(means[name], count, errors.get(name))
        sums.num_seen, sums.num_losses = layer.num_seen, float(layer.num_losses)
        return sums

    def merge_(self, other: "LayerSums", with_inputs: bool = True) -> None:
        """Add the sums of other positions.

        Args:
            other: The sums.
            with_inputs: Whether to add the inputs' moment, too. False if a layer with the same moment has added it.
        """
        for name, moment in self.moments.items():
            if with_inputs or name != "inputs":
                moment.merge_(other.moments[name])
        self.num_seen += other.num_seen
        self.num_losses += other.num_losses

    def over(self, ranks: Ranks, to: int | None = None, inputs: SecondMoment | None = None) -> "LayerSums":
        """Return the sums over all processes, or this object if there is only one process. A collective.

        Args:
            ranks: The processes.
            to: Rank of the only process that needs the totals; None if all do. Counts are correct on all processes.
            inputs: The inputs' moment over all processes, if a tied layer has already computed it.
        """
        if ranks.size == 1:
            return self
        merged = LayerSums.zero(self.kind, torch.device("meta"))
        sent = {name: moment.settled() for name, moment in self.moments.items() if inputs is None or name != "inputs"}
        numbers = [self.num_losses, self.num_seen]
        for moment in sent.values():
            numbers += [moment.count, moment.groups, moment.dtype == torch.float64]
        # The losses may be a fraction; float64 holds all other counts exactly.
        merged.num_losses, *totals = ranks.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()
        merged.num_seen, *rest = map(int, totals)
        if inputs is not None:
            merged.tie_inputs(inputs)
        for index, (name, moment) in enumerate(sent.items()):
            total = merged.moments[name]
            total.count, total.groups, doubles = rest[3 * index : 3 * index + 3]
            total.set_double(ranks.sum(moment.double(), to), torch.float64 if doubles else torch.float32)
            total.squares = ranks.sum(moment.squares, to)
        return merged

    def part(self, ranks: Ranks) -> "LayerSums":
        """Return this process's part of sums over all processes. The parts of all processes add up to these sums."""
        if ranks.size == 1:
            return self
        part = copy.copy(self)
        part.moments = {
            name: moment.part(ranks.part(moment.count), ranks.part(moment.groups))
            for name, moment in self.moments.items()
        }
        part.num_seen = ranks.part(self.num_seen)
        part.num_losses = float(ranks.part(round(self.num_losses)))
        return part

    def factors(self) -> LayerFactors:
        """Return the factors: the moments divided by their counts. Layers with tied inputs get the same tensor A."""
        coupled: dict[str, Any] = {
            name: self.moments[name].mean() for name in self.moments.keys() - {"inputs", "gradients"}
        }
        return LayerFactors(
            A=self.inputs.mean(),
            G=self.gradients.mean(),
            num_inputs=self.inputs.count,
            num_gradients=self.gradients.count,
            num_seen=self.num_seen,
            num_losses=round(self.num_losses),
            transposed=self.transposed,
            A_error=self.inputs.relative_error(),
            G_error=self.gradients.relative_error(),
            **coupled,
        )

    def move(self, device: torch.device) -> None:
        """Move the sums to a device."""
        for moment in self.moments.values():
            moment.move(device)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that :meth:`from_state_dict` needs, as tensors and primitives."""
        return {
            "moments": {name: moment.state_dict() for name, moment in self.moments.items()},
            "num_seen": self.num_seen,
            "num_losses": self.num_losses,
            "transposed": self.transposed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the sums from what :meth:`state_dict` returned, on the device of its tensors."""
        if "eigenvalues" in state:
            raise ValueError("This state is of a collection of eigenvalues, which holds no factors. Collect anew.")
        self.moments = {name: SecondMoment.from_state_dict(moment) for name, moment in state["moments"].items()}
        self.num_seen = state["num_seen"]
        self.num_losses = state.get("num_losses", float(self.gradients.count))  # which earlier versions did not count

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "LayerSums":
        """Return the sums whose :meth:`state_dict` is given, on the device of its tensors."""
        sums = cls(0, 0, torch.device("meta"), state["transposed"])
        sums.load_state_dict(state)
        return sums
