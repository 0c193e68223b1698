"""One batch, as rows: which positions of which layer count, and which layers see the same ones.

An accelerator is waited for once for the whole batch, in :func:`read_batch`.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature.distributed import whole
from lightning_curvature.layers.kinds import gradient_rows, input_rows, is_matmul, num_rows
from lightning_curvature.recording.calls import LayerCall
from lightning_curvature.recording.positions import counted_positions


@dataclass
class BatchGradients:
    """What one batch adds.

    Args:
        calls: Calls of the chosen layers.
        gradients: Of each call, the gradients at its output, from every backward pass that reached it.
        scales: Of each call, the factor of the products of its gradients: over passes that are averaged, or the square
            of their unit (a scalar float64 tensor).
        mask: Mask of the batch, for ``positions="mask:KEY"``.
        share: Share of the positions that is used, chosen at random.
        seed: Seed of that choice.
    """

    calls: Sequence[LayerCall]
    gradients: Sequence[Sequence[Tensor]]
    scales: Sequence[float | Tensor] = ()
    mask: Tensor | None = None
    share: float = 1.0
    seed: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is read."""
        gradients = [gradient for received in self.gradients for gradient in received]
        return [*(call.inputs for call in self.calls), *gradients, *([] if self.mask is None else [self.mask])]


@dataclass
class CallRows:
    """The rows of one call that count.

    Attributes:
        call: The call.
        inputs: What it read.
        gradients: Gradients at its output, of each backward pass that reached it.
        scale: Factor of their products; known when the batch has been read.
        counted: Which positions count, bool ``[n]``; None for all.
        num_counted: How many do.
        fingerprint: A number that differs between two choices of positions but for a chance of 2**-62.
        index: Where they are, int64 ``[num_counted]``; None if all count.
        num_seen: Positions of the call, or of the share of them that is used.
        key: Equal for two calls that read the same positions of the same tensor in the same way.
    """

    call: LayerCall
    inputs: Tensor
    gradients: list[Tensor]
    scale: float = 1.0
    counted: Tensor | None = None
    num_counted: int = 0
    fingerprint: int = 0
    index: Tensor | None = None
    num_seen: int = 0
    key: tuple[Any, ...] = field(default=())

    def input_rows(self) -> Tensor:
        """Return the inputs at the positions that count, ``[num_counted, d_in]``.

        Autocast rounds them inside the layer. On a GPU they are rounded here, too, so that tensor cores can take their
        products; elsewhere that would save nothing.
        """
        inputs, dtype = self.inputs, self.call.output_dtype
        if inputs.is_cuda and dtype.itemsize < inputs.dtype.itemsize:
            inputs = inputs.to(dtype)
        return self._select(input_rows(self.call.module, inputs))

    def gradient_rows(self) -> list[Tensor]:
        """Return the gradients at these positions, ``[num_counted, d_out]``, of each backward pass."""
        return [self._select(gradient_rows(self.call.module, gradient)) for gradient in self.gradients]

    def _select(self, rows: Tensor) -> Tensor:
        return rows if self.index is None else rows[self.index]


def read_batch(batch: BatchGradients, positions: str) -> list[CallRows] | None:
    """Return the rows of a batch, or None if it holds NaN or infinite values.

    Args:
        batch: The batch.
        positions: Which positions count.

    Raises:
        RuntimeError: If a layer's input was overwritten, or positions cannot be told.
    """
    rows, sums, samples = [], dict[Any, Tensor](), dict[Any, tuple[Tensor, int]]()
    extremes: list[tuple[CallRows, Tensor]] = []
    for index, call in enumerate(batch.calls):
        call.check_input()
        inputs = whole(call.inputs)
        gradients = [whole(gradient) for gradient in batch.gradients[index]]
        own = CallRows(call, inputs, gradients, key=_reading(call))
        own.num_seen = own.num_counted = num_rows(call.module, inputs, call.output_shape)
        if own.key not in sums:
            sums[own.key] = _sum(inputs)
        for number, gradient in enumerate(gradients):
            if positions == "contributing" and is_matmul(call.module):
                extremes.append((own, _extreme(gradient_rows(call.module, gradient))))
            else:
                sums[index, number] = _sum(gradient)
        rows.append(own)
    not_zero: dict[int, list[Tensor]] = {}
    for parts in _of_one_length(extremes).values():
        stacked = torch.stack([extreme for _, extreme in parts])
        sums[id(parts)] = _sum(stacked)
        for (own, _), flags in zip(parts, (stacked != 0).unbind(), strict=True):
            not_zero.setdefault(id(own), []).append(flags)
    for own in rows:
        own.counted = counted_positions(positions, own.call, not_zero.get(id(own), []), own.num_seen, batch.mask)
        if batch.share < 1.0:
            which = (own.num_seen, own.inputs.device)
            if which not in samples:
                samples[which] = _sample(*which, batch)
            sample, own.num_seen = samples[which]
            own.counted = sample if own.counted is None else own.counted & sample
    masks = _of_one_length([(own, own.counted) for own in rows if own.counted is not None])
    device = rows[0].inputs.device
    asked = [torch.isfinite(torch.stack([total.to(device) for total in sums.values()])).to(torch.int64)]
    units = {id(scale): scale for scale in batch.scales if isinstance(scale, Tensor)}  # which the batch keeps alive
    asked += [unit.reshape(1).view(torch.int64) for unit in units.values()]  # their bits
    for parts in masks.values():
        stacked = torch.stack([counted for _, counted in parts])
        asked += [stacked.sum(1), (stacked * _weights(stacked.shape[1], stacked.device)).sum(1)]
    # The only wait for an accelerator: everything that is to be known of the batch is read at once.
    answers = iter(torch.cat([numbers.to(device) for numbers in asked]).tolist())
    finite = [next(answers) for _ in sums]
    if not all(finite):
        return None
    known = {key: struct.unpack("d", struct.pack("q", next(answers)))[0] for key in units}
    for own, scale in zip(rows, batch.scales, strict=True):
        own.scale = known[id(scale)] if isinstance(scale, Tensor) else scale
    for parts in masks.values():
        for name in ("num_counted", "fingerprint"):
            for own, _ in parts:
                setattr(own, name, next(answers))
    _index_rows([own for own in rows if own.counted is not None])
    return rows


def _index_rows(rows: Sequence[CallRows]) -> None:
    """Make the indices of the positions that count; where they are the same ones, once."""
    made: dict[tuple[Any, ...], Tensor] = {}
    for own in rows:
        count, counted = own.num_counted, own.counted
        own.key += (count, own.fingerprint)
        if counted is not None and count < len(counted):
            which = (counted.device, len(counted), count, own.fingerprint)
            if which not in made:
                # Their number is known, so that nothing has to be read from the device, as a mask for an index would.
                made[which] = counted.byte().argsort(descending=True, stable=True)[:count]
            own.index = made[which]


def _of_one_length(items: Sequence[tuple[CallRows, Tensor]]) -> dict[Any, list[tuple[CallRows, Tensor]]]:
    """Return tensors ``[n]``, and whose they are, in groups of one device and one length: they are read together."""
    groups: dict[Any, list[tuple[CallRows, Tensor]]] = {}
    for item in items:
        groups.setdefault((item[1].device, len(item[1])), []).append(item)
    return groups


def same_inputs(rows: Sequence[CallRows]) -> list[dict[str, list[CallRows]]]:
    """Return the rows by layer, in groups of layers that read the same positions of the same tensors."""
    by_layer: dict[str, list[CallRows]] = {}
    for own in rows:
        by_layer.setdefault(own.call.name, []).append(own)
    groups: dict[tuple[Any, ...], dict[str, list[CallRows]]] = {}
    for name, calls in by_layer.items():
        groups.setdefault(tuple(own.key for own in calls), {})[name] = calls
    return list(groups.values())


def _reading(call: LayerCall) -> tuple[Any, ...]:
    """Return what tells one tensor from another at the time of a call, and how the layer reads it."""
    inputs, module = call.inputs, call.module
    local = getattr(inputs, "_local_tensor", inputs)
    how = None
    if isinstance(module, nn.Conv2d):
        how = (module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode)
    return (local.data_ptr(), call.version, local.dtype, local.device, local.shape, local.stride(), inputs.shape, how)


def _sample(count: int, device: torch.device, batch: BatchGradients) -> tuple[Tensor, int]:
    """Choose positions, the same for all layers that have as many: bool ``[count]`` on a device, and their number."""
    generator = torch.Generator().manual_seed((batch.seed + count) % 2**63)
    sample = torch.rand(count, generator=generator, dtype=torch.float32, device="cpu") < batch.share
    return sample.to(device, non_blocking=True), int(sample.sum())


@lru_cache(maxsize=8)
def _weights(count: int, device: torch.device) -> Tensor:
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(count)).to(device)


def _sum(values: Tensor) -> Tensor:
    """Return the sum: it keeps NaN and infinite values, and is several times faster than a search for them."""
    return values.sum(dtype=torch.promote_types(values.dtype, torch.float32))


def _extreme(rows: Tensor) -> Tensor:
    """Return the largest absolute value of each row of ``[n, d]``; it keeps NaN and infinite values, too."""
    if rows.is_cuda:
        extreme: Tensor = torch.linalg.vector_norm(rows, torch.inf, dim=1)  # one kernel
        return extreme
    return torch.maximum(rows.amax(1), -rows.amin(1))  # several times faster on a CPU
