"""From the steps of a model to the K-FAC factors of its layers.

A :class:`Collector` knows nothing of trainers: :func:`lightning_curvature.collect.collect` runs it over a frozen model,
``KFACEditCallback`` inside a training loop.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_curvature.collect.accumulator import Accumulator
from lightning_curvature.collect.plan import place_sums
from lightning_curvature.collect.sharded_accumulator import ShardedAccumulator, owners_of
from lightning_curvature.collect.sums import LayerKind, LayerSums
from lightning_curvature.distributed import Ranks
from lightning_curvature.factors.fingerprints import fingerprint
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.kinds import is_conv1d, matrix_shape
from lightning_curvature.layers.selection import choose_layers
from lightning_curvature.recording.calls import BatchGradients
from lightning_curvature.recording.compiled import check_graphed
from lightning_curvature.recording.named_logits import named_target
from lightning_curvature.recording.network import WatchedNetwork
from lightning_curvature.recording.options import CollectorOptions
from lightning_curvature.recording.step import Step


class Collector:
    """Collects K-FAC factors from the steps of a model.

    Args:
        module: The network; layer names are relative to it.
        options: What is collected, and how.
        group: ``(i, n)``: cut the chosen layers into n groups and collect the i-th (from 0) alone, where all of them
            together do not fit into memory.
        ranks: The processes of the run; by default this one alone.
        shard: Spread the sums over the processes: each keeps those of its own layers.
        on_error: Called with an error that was met inside the step that is watched, in place of raising it there.

    Attributes:
        network: The network, and what its steps have shown of its layers.
        kinds: Widths and layout of each layer that may be chosen, by name.
        provenance: What the factors say of where they come from.

    Raises:
        ValueError: If ``layers`` matches nothing, or ``logits`` names nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> collector = Collector(model, CollectorOptions(layers=["0"]))
        >>> with collector.step() as step:
        ...     step.backward(nn.functional.cross_entropy(model(torch.ones(5, 4)), torch.arange(5) % 3))
        >>> collector.factors()["0"].num_inputs
        5
    """

    def __init__(
        self,
        module: nn.Module,
        options: CollectorOptions | None = None,
        *,
        group: tuple[int, int] = (0, 1),
        ranks: Ranks | None = None,
        shard: bool = False,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        self.options = CollectorOptions() if options is None else options
        self._group = group
        self._homes: dict[torch.device, torch.device] = {}
        if self.options.logits is not None:
            named_target(module, self.options.logits)
        self.network = WatchedNetwork(module, choose_layers(module, self.options.layers), self._layers_of_group)
        check_graphed(module)
        self.provenance: dict[str, Any] = {"model": type(module).__name__, **self.options.provenance}
        self.ranks = Ranks() if ranks is None else ranks
        self.on_error = on_error
        self.kinds = {name: self._kind(layer) for name, layer in self.network.choice.modules.items()}
        common = (self._new_sums, self._home, self.options.positions, self.ranks)
        self.accumulator = (
            ShardedAccumulator(*common, owners_of(self.kinds, self.ranks)) if shard else Accumulator(*common)
        )

    def step(self, batch: Any = None) -> Step:
        """Return the recording of one step, a context manager around its forward and backward passes.

        What the step gives is added when the block ends. In a block that trains nothing, call ``backward(loss)`` of
        what it yields; around a training step, ``before_backward(loss)``, or nothing where the training calls
        ``loss.backward()``.

        Args:
            batch: The batch, needed for ``positions="mask:KEY"`` alone.
        """
        return Step(self.network, self.options, batch, self._seed, self._add, self.on_error)

    def _add(self, batch: BatchGradients | None) -> None:
        self.accumulator.add(batch, self.kinds)

    def add_nothing(self) -> None:
        """Take part in a batch from which this process has nothing to add. A collective where the sums are spread."""
        if self.is_sharded:
            self._add(None)

    def drain(self) -> None:
        """Take part in what other processes still add, until all are done. A collective where the sums are spread."""
        self.accumulator.drain()

    def reset(self) -> None:
        """Start to sum anew."""
        self.accumulator.reset()

    @property
    def chosen(self) -> list[str] | None:
        """Names of the chosen layers; None before the first batch has shown them."""
        return self.network.chosen

    @property
    def is_sharded(self) -> bool:
        """Whether each process keeps the sums of its own layers alone."""
        return self.accumulator.owners is not None

    @property
    def owners(self) -> Mapping[str, int] | None:
        """The process that keeps the sums of each layer; None if each keeps those of its own data."""
        return self.accumulator.owners

    @property
    def num_batches_seen(self) -> int:
        """Batches that this process has taken, whether they could be used or not."""
        return self.accumulator.num_batches_seen

    @property
    def num_batches(self) -> int:
        """Batches that were used."""
        return self.accumulator.num_batches

    @property
    def num_skipped(self) -> int:
        """Batches that were not used, because they held NaN or infinite values."""
        return self.accumulator.num_skipped

    @property
    def num_positions(self) -> dict[str, int]:
        """Positions of each layer since the last reset, over all processes."""
        return self.accumulator.num_positions

    @property
    def sums(self) -> Mapping[str, LayerSums]:
        """The running sums that this process keeps, by layer."""
        return self.accumulator.sums

    @property
    def silent(self) -> list[str]:
        """Chosen layers that have not run in any batch since the last reset, as far as this process knows."""
        return [name for name in self.chosen or [] if name not in self.num_positions]

    def factors(self) -> KroneckerFactors:
        """Return the factors of all batches since the sums were last reset."""
        return KroneckerFactors({name: sums.factors() for name, sums in self.sums.items()}, self._full_provenance)

    def finish(self) -> KroneckerFactors:
        """Return the same factors, and drop the sums one by one, so that the two are never there as a whole."""
        modules, layers = self.network.choice.modules, self.accumulator.take()
        for name, layer in layers.items():  # after a pass over a frozen model, whose weights are what was collected on
            layers[name] = dataclasses.replace(layer, weight=fingerprint(modules[name].get_parameter("weight")))
        return KroneckerFactors(layers, self._full_provenance)

    @property
    def _full_provenance(self) -> dict[str, Any]:
        return {**self.provenance, "batches_skipped": self.num_skipped}

    def state_dict(self) -> dict[str, Any]:
        """Return what an interrupted collection needs to go on as if nothing had happened: tensors and primitives.

        A collective; what comes back on the first process holds the sums of all.
        """
        return {"chosen": self.chosen, **self.accumulator.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the sums move to their layers' device with the next batch."""
        self.network.chosen = state["chosen"]
        self.accumulator.load_state_dict(state)

    def _layers_of_group(self, chosen: list[str]) -> list[str]:
        """Return the layers of this collector's group, having checked that their factors fit into memory."""
        index, count = self._group
        if count > len(chosen):
            raise ValueError(
                f"{len(chosen)} layers cannot be cut into {count} groups; use at most {len(chosen)} passes."
            )
        group = [name for i, name in enumerate(chosen) if i * count // len(chosen) == index]
        for device in {self._device_of(name) for name in group}:
            self._home(device, group)
        return group

    def _home(self, device: torch.device, chosen: Sequence[str] = ()) -> torch.device:
        """Return where the sums of the layers on a device live, having checked that they fit there."""
        if device not in self._homes:
            owners = self.owners
            shapes = {
                name: (self.kinds[name].d_out, self.kinds[name].d_in)
                for name in self.chosen or chosen
                if self._device_of(name) == device and (owners is None or owners[name] == self.ranks.rank)
            }
            self._homes[device] = place_sums(shapes, device, self.options.accumulate_on)
        return self._homes[device]

    def _device_of(self, name: str) -> torch.device:
        return self.network.choice.modules[name].get_parameter("weight").device

    @property
    def _seed(self) -> int:
        """Seed of a batch: the same one if the batch is repeated, another one on other data."""
        seed = self.options.seed * 0x9E3779B1 + self.ranks.data * 0x85EBCA77 + self.num_batches_seen
        return seed % 2**32

    def _kind(self, layer: nn.Module) -> LayerKind:
        d_out, d_in = matrix_shape(layer)
        return LayerKind(d_in, d_out, is_conv1d(layer), self.options.coupled)

    def _new_sums(self, name: str, kind: LayerKind, home: torch.device) -> LayerSums:  # noqa: ARG002 - a subclass needs it
        return LayerSums.zero(kind, home)
