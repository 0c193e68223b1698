"""Running sums of one layer's factors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_curvature.factors import LayerFactors
from lightning_curvature.moments import SecondMoment
from lightning_curvature.ranks import Ranks


class LayerKind(NamedTuple):
    """What the sums of a layer depend on; arguments of :class:`LayerSums`."""

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

    @property
    def kind(self) -> LayerKind:
        """What they depend on."""
        d_out, d_in = self.shape
        return LayerKind(d_in, d_out, self.transposed, len(self.moments) > 2)

    @classmethod
    def zero(cls, kind: LayerKind, device: torch.device) -> "LayerSums":
        """Return sums of nothing."""
        return cls(kind.d_in, kind.d_out, device, kind.transposed, kind.coupled)

    @classmethod
    def of(cls, layer: LayerFactors) -> "LayerSums":
        """Return the sums that finished factors stand for."""
        d_out, d_in = layer.shape
        sums = cls(d_in, d_out, layer.A.device, layer.transposed, layer.A_coupled is not None)
        counts = {"inputs": layer.num_inputs, "gradients": layer.num_gradients}
        means = {**layer.tensors, "inputs": layer.A, "gradients": layer.G}
        for name, moment in sums.moments.items():
            moment.count, moment.dtype = counts.get(name, layer.num_inputs), means[name].dtype
            moment.total = means[name].double() * moment.count
        sums.num_seen = layer.num_seen
        return sums

    def merge_(self, other: "LayerSums") -> None:
        """Add the sums of other positions."""
        for name, moment in self.moments.items():
            more = other.moments[name]
            moment.total += more.total.to(moment.total.device)
            moment.count += more.count
            moment.dtype = torch.promote_types(moment.dtype, more.dtype)
        self.num_seen += other.num_seen

    def over(self, ranks: Ranks, to: int | None = None) -> "LayerSums":
        """Return the sums over all processes; those of one process alone are returned as they are. A collective.

        Args:
            ranks: The processes.
            to: The only process that needs the totals; None for all. Counts are right on each.
        """
        if ranks.size == 1:
            return self
        merged = LayerSums.zero(self.kind, self.inputs.total.device)
        numbers = [self.num_seen]
        for name, moment in self.moments.items():
            merged.moments[name].total = ranks.sum(moment.total, to)
            numbers += [moment.count, int(moment.dtype == torch.float64)]
        merged.num_seen, *rest = ranks.sum(torch.tensor(numbers)).tolist()
        for moment, count, doubles in zip(merged.moments.values(), rest[::2], rest[1::2], strict=True):
            moment.count, moment.dtype = count, torch.float64 if doubles else torch.float32
        return merged

    def share(self, ranks: Ranks) -> "LayerSums":
        """Return the part of sums over all processes with which this one goes on; the parts sum to them."""
        part = LayerSums.zero(self.kind, self.inputs.total.device)
        for name, moment in self.moments.items():
            own = part.moments[name]
            own.count, own.dtype = ranks.share(moment.count), moment.dtype
            own.total = moment.total * (own.count / max(moment.count, 1))
        part.num_seen = ranks.share(self.num_seen)
        return part

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


def sums_over(
    ranks: Ranks,
    kinds: Mapping[str, LayerKind],
    get: Callable[[str], LayerSums],
    to: Callable[[str], int | None] = lambda _: None,
) -> Iterator[tuple[str, LayerSums]]:
    """Yield the sums of all processes by layer, one layer at a time. A collective.

    Args:
        ranks: The processes; not all of them need to have seen every layer, or any.
        kinds: Layers that this process has seen.
        get: Returns the sums of one of these.
        to: Returns the only process that needs the totals of a layer, or None.

    Raises:
        RuntimeError: If two processes have seen a layer of one name and of different kinds.
    """
    union: dict[str, LayerKind] = {}
    for told in ranks.gather(dict(kinds)):
        for name, kind in told.items():
            if union.setdefault(name, kind) != kind:
                raise RuntimeError(f"Layer {name!r} is {union[name]} on one process and {kind} on another.")
    for name, kind in union.items():
        own = get(name) if name in kinds else LayerSums.zero(kind, ranks.device)
        yield name, own.over(ranks, to(name))
