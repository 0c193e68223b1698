"""Running sums of one layer's factors."""

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_curvature.collect.moments import SecondMoment
from lightning_curvature.distributed import Ranks
from lightning_curvature.factors.kronecker import LayerFactors

STATE_VERSION = 5
"""Of what :func:`state_of` returns; sums of another version are not read."""


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
        return self.gradients.dim, self.inputs.dim

    def share_inputs(self, inputs: SecondMoment) -> None:
        """Use the inputs' moment of another layer, which reads the same positions of the same tensors."""
        self.moments = {"inputs": inputs} | {name: own for name, own in self.moments.items() if name != "inputs"}

    def add_inputs(self, inputs: Tensor) -> None:
        """Add inputs ``[n, d_in]`` at the positions that count; once for all layers that share the moment."""
        self.inputs.add(inputs)

    def add_gradients(self, inputs: Tensor, passes: Sequence[Tensor], scale: float, seen: int) -> None:
        """Add the gradients at the same positions.

        Args:
            inputs: The inputs there, ``[n, d_in]``.
            passes: Gradients at their outputs, ``[n, d_out]``, of each backward pass.
            scale: Factor of their products.
            seen: Positions that went through the layer, counted or not.
        """
        rows = {"gradients": passes}
        if "A_coupled" in self.moments:
            rows["A_coupled"] = [inputs * part.norm(dim=1, keepdim=True) for part in passes]
            rows["G_coupled"] = [part * inputs.norm(dim=1, keepdim=True) for part in passes]
        for name, parts in rows.items():
            self.moments[name].add(*parts, count=len(inputs), scale=scale)
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
        sums = cls(d_in, d_out, torch.device("meta"), layer.transposed, layer.A_coupled is not None)
        means = {**layer.tensors, "inputs": layer.A, "gradients": layer.G}
        errors = {"inputs": layer.A_error, "gradients": layer.G_error}
        for name in sums.moments:
            count = layer.num_gradients if name == "gradients" else layer.num_inputs
            sums.moments[name] = SecondMoment.of(means[name], count, errors.get(name))
        sums.num_seen = layer.num_seen
        return sums

    def merge_(self, other: "LayerSums", with_inputs: bool = True) -> None:
        """Add the sums of other positions; without the inputs' moment where another layer's, which is the same, was."""
        for name, moment in self.moments.items():
            if with_inputs or name != "inputs":
                moment.merge_(other.moments[name])
        self.num_seen += other.num_seen

    def over(self, ranks: Ranks, to: int | None = None, inputs: SecondMoment | None = None) -> "LayerSums":
        """Return the sums over all processes; those of one process alone are returned as they are. A collective.

        Args:
            ranks: The processes.
            to: The only process that needs the totals; None for all. Counts are right on each.
            inputs: The inputs' moment over all processes, if it is known.
        """
        if ranks.size == 1:
            return self
        merged = LayerSums.zero(self.kind, torch.device("meta"))
        sent = {name: moment.settled() for name, moment in self.moments.items() if inputs is None or name != "inputs"}
        numbers = [self.num_seen]
        for moment in sent.values():
            numbers += [moment.count, moment.groups, int(moment.dtype == torch.float64)]
        merged.num_seen, *rest = ranks.sum(torch.tensor(numbers)).tolist()
        if inputs is not None:
            merged.share_inputs(inputs)
        for index, (name, moment) in enumerate(sent.items()):
            own = merged.moments[name]
            own.count, own.groups, doubles = rest[3 * index : 3 * index + 3]
            own.set_double(ranks.sum(moment.double(), to), torch.float64 if doubles else torch.float32)
            own.squares = ranks.sum(moment.squares, to)
        return merged

    def share(self, ranks: Ranks) -> "LayerSums":
        """Return the part of sums over all processes with which this one goes on; the parts sum to them."""
        if ranks.size == 1:
            return self
        part = copy.copy(self)
        part.moments = {
            name: moment.part(ranks.share(moment.count), ranks.share(moment.groups))
            for name, moment in self.moments.items()
        }
        part.num_seen = ranks.share(self.num_seen)
        return part

    def factors(self) -> LayerFactors:
        """Return the normalised factors; layers that share the inputs' moment share the tensor."""
        coupled: dict[str, Any] = {
            name: self.moments[name].mean() for name in self.moments.keys() - {"inputs", "gradients"}
        }
        return LayerFactors(
            A=self.inputs.mean(),
            G=self.gradients.mean(),
            num_inputs=self.inputs.count,
            num_gradients=self.gradients.count,
            num_seen=self.num_seen,
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
            "transposed": self.transposed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the place of the sums that :meth:`state_dict` was taken from, on the device of its tensors."""
        if "eigenvalues" in state:
            raise ValueError("The state is one of a collection of eigenvalues, which holds no factors. Begin anew.")
        self.moments = {name: SecondMoment.from_state_dict(moment) for name, moment in state["moments"].items()}
        self.num_seen = state["num_seen"]

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "LayerSums":
        """Return the sums that :meth:`state_dict` was taken from, on the device of its tensors."""
        sums = cls(0, 0, torch.device("meta"), state["transposed"])
        sums.load_state_dict(state)
        return sums


def sharing(sums: Mapping[str, LayerSums]) -> dict[str, str]:
    """Return, for each layer, the first one that has the same inputs' moment; itself if there is none."""
    first: dict[int, str] = {}  # the sums keep the moments, so that no id is used again
    return {name: first.setdefault(id(layer.inputs), name) for name, layer in sums.items()}


def share_again(sums: Mapping[str, LayerSums], shared: Mapping[str, str]) -> None:
    """Let layers share inputs' moments, as :func:`sharing` tells, that were made separately from shared ones."""
    for name, other in shared.items():
        sums[name].share_inputs(sums[other].inputs)


def state_of(sums: Mapping[str, LayerSums]) -> dict[str, Any]:
    """Return everything that :func:`sums_from` needs, as tensors and primitives; what is shared is there once."""
    shared, states = sharing(sums), {name: layer.state_dict() for name, layer in sums.items()}
    for name, other in shared.items():
        if name != other:
            del states[name]["moments"]["inputs"]
    return {"version": STATE_VERSION, "sums": states, "shared": shared}


def sums_from(
    state: Mapping[str, Any], new: Callable[[str, LayerKind, torch.device], LayerSums]
) -> dict[str, LayerSums]:
    """Return the sums that :func:`state_of` was given.

    Args:
        state: What it returned.
        new: Returns empty sums of a layer, given its name, its kind, and the device on which they live.
    """
    sums, nowhere = dict[str, LayerSums](), torch.device("meta")
    for name, layer in state["sums"].items():
        sums[name] = new(name, LayerKind(0, 0, layer["transposed"]), nowhere)
        sums[name].load_state_dict(layer)
    share_again(sums, state["shared"])
    return sums


def shared_by_all(ranks: Ranks, shared: Mapping[str, str]) -> dict[str, Hashable]:
    """Return a key for each layer, equal for layers that share on all processes. A collective.

    Args:
        ranks: The processes.
        shared: For each layer that this one has seen, the first that shares with it, as :func:`sharing` tells.
    """
    told = ranks.gather(dict(shared))
    return {name: tuple(own.get(name) for own in told) for name in dict.fromkeys(name for own in told for name in own)}


def sums_over(
    ranks: Ranks,
    kinds: Mapping[str, LayerKind],
    get: Callable[[str], LayerSums],
    to: Callable[[str], int | None] = lambda _: None,
    groups: Mapping[str, Hashable] | None = None,
    new: Callable[[str, LayerKind, torch.device], LayerSums] = lambda _, kind, device: LayerSums.zero(kind, device),
) -> Iterator[tuple[str, LayerSums]]:
    """Yield the sums of all processes by layer, one layer at a time. A collective.

    Args:
        ranks: The processes; not all of them need to have seen every layer, or any.
        kinds: Layers that this process has seen.
        get: Returns the sums of one of these.
        to: Returns the only process that needs the totals of a layer, or None.
        groups: What :func:`shared_by_all` returned; layers of one group, which go to one process, have one inputs'
            moment in the result, too. By default each layer has its own.
        new: Returns empty sums of a layer that this process has not seen.

    Raises:
        RuntimeError: If two processes have seen a layer of one name and of different kinds.
    """
    union: dict[str, LayerKind] = {}
    for told in ranks.gather(dict(kinds)):
        for name, kind in told.items():
            if union.setdefault(name, kind) != kind:
                raise RuntimeError(f"Layer {name!r} is {union[name]} on one process and {kind} on another.")
    groups = groups or {name: name for name in union}
    left = Counter(groups[name] for name in union)
    inputs: dict[Hashable, SecondMoment] = {}
    for name, kind in union.items():
        own = get(name) if name in kinds else new(name, kind, ranks.device)
        summed = own.over(ranks, to(name), inputs.pop(groups[name], None))
        left[groups[name]] -= 1
        if left[groups[name]]:
            inputs[groups[name]] = summed.inputs  # only as long as another layer needs it
        yield name, summed
