"""One batch as rows: the positions of each layer that count, and the layers that read the same ones.

An accelerator is waited for once for each batch, in :func:`read_batch`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature.distributed import local_part, whole
from lightning_curvature.layers.kinds import gradient_rows, input_rows, is_matmul, num_rows
from lightning_curvature.recording.calls import BatchGradients, LayerCall
from lightning_curvature.recording.one_read import OneRead
from lightning_curvature.recording.positions import counted_positions


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
        positions_key: A number that tells one choice of positions from another, up to a chance of 2**-62.
        index: Where they are, int64 ``[num_counted]``; None if all count.
        num_seen: Positions of the call, or of the share of them that is used.
        num_losses: Its part of the loss positions behind the layer's gradients, by ``num_seen``: of a layer that is
            called once, all of them, or that share. Known when the batch has been read.
        key: Equal for two calls that read the same positions of the same tensor in the same way.
    """

    call: LayerCall
    inputs: Tensor
    gradients: list[Tensor]
    scale: float = 1.0
    counted: Tensor | None = None
    num_counted: int = 0
    positions_key: int = 0
    index: Tensor | None = None
    num_seen: int = 0
    num_losses: float = 0.0
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
    rows = [_rows_of(call, gradients) for call, gradients in zip(batch.calls, batch.gradients, strict=True)]
    passed = _positions_by_layer(rows)
    totals, not_zero = _look_at(rows, positions)
    _choose_positions(rows, not_zero, batch, positions)
    device = rows[0].inputs.device
    read = OneRead()
    is_finite = read.ask(torch.isfinite(torch.stack([total.to(device) for total in totals])))
    units = {id(scale): read.ask_float(scale) for scale in batch.scales if isinstance(scale, Tensor)}
    losses = {name: read.ask(count.reshape(1)) for name, count in batch.losses.items()}
    masked = [call_rows for call_rows in rows if call_rows.counted is not None]
    groups = _of_one_length([(call_rows, call_rows.counted) for call_rows in masked if call_rows.counted is not None])
    answers = []
    for group in groups:
        masks = torch.stack([counted for _, counted in group])
        weights = _weights(masks.shape[1], masks.device)
        answers.append((group, read.ask(masks.sum(1)), read.ask((masks * weights).sum(1))))
    read.run(device)
    if not all(is_finite.values):
        return None
    for call_rows, scale in zip(rows, batch.scales, strict=True):
        call_rows.scale = units[id(scale)].as_float() if isinstance(scale, Tensor) else scale
        name = call_rows.call.name
        num_losses = losses[name].values[0] if name in losses else passed[name]
        call_rows.num_losses = num_losses * call_rows.num_seen / max(passed[name], 1)
    for group, counts, positions_keys in answers:
        for (call_rows, _), count, positions_key in zip(group, counts.values, positions_keys.values, strict=True):
            call_rows.num_counted, call_rows.positions_key = count, positions_key
    _index_rows(masked)
    return rows


def _rows_of(call: LayerCall, gradients: Sequence[Tensor]) -> CallRows:
    """Return the rows of a call, all of which count so far."""
    call.check_input()
    inputs = whole(call.inputs)
    count = num_rows(call.module, inputs, call.output_shape)
    rows = CallRows(call, inputs, [whole(gradient) for gradient in gradients], key=_reading(call))
    rows.num_seen = rows.num_counted = count
    return rows


def _positions_by_layer(rows: Sequence[CallRows]) -> Counter[str]:
    """Return the positions that went through each layer, all of them."""
    passed = Counter[str]()
    for call_rows in rows:
        passed[call_rows.call.name] += call_rows.num_seen
    return passed


def _look_at(rows: Sequence[CallRows], positions: str) -> tuple[list[Tensor], dict[int, list[Tensor]]]:
    """Look through all values of a batch once.

    Returns:
        Scalars, one of which is NaN or infinite if any value of the batch is. And, for the rows whose positions count
        by their gradients, where the gradients are not zero: bool ``[n]`` of each backward pass, by the ``id`` of the
        rows.
    """
    totals = [_sum(call_rows.inputs) for call_rows in _one_of_each(rows)]
    extremes: list[tuple[CallRows, Tensor]] = []
    for call_rows in rows:
        module = call_rows.call.module
        if positions == "contributing" and is_matmul(module):
            extremes += [(call_rows, _extreme(gradient_rows(module, gradient))) for gradient in call_rows.gradients]
        else:
            totals += map(_sum, call_rows.gradients)
    not_zero: dict[int, list[Tensor]] = {}
    for group in _of_one_length(extremes):
        stacked = torch.stack([extreme for _, extreme in group])
        totals.append(_sum(stacked))
        for (call_rows, _), flags in zip(group, (stacked != 0).unbind(), strict=True):
            not_zero.setdefault(id(call_rows), []).append(flags)
    return totals, not_zero


def _one_of_each(rows: Sequence[CallRows]) -> list[CallRows]:
    """Return the first of all rows that read the same inputs in the same way."""
    first: dict[tuple[Any, ...], CallRows] = {}
    for call_rows in rows:
        first.setdefault(call_rows.key, call_rows)
    return list(first.values())


def _choose_positions(
    rows: Sequence[CallRows], not_zero: Mapping[int, Sequence[Tensor]], batch: BatchGradients, positions: str
) -> None:
    """Set which positions of each call count: by the rule, and by chance where only a share of them is used."""
    samples = dict[Any, tuple[Tensor, int]]()
    for call_rows in rows:
        flags = not_zero.get(id(call_rows), [])
        counted = counted_positions(positions, call_rows.call, flags, call_rows.num_seen, batch.mask)
        if batch.share < 1.0:
            which = (call_rows.num_seen, call_rows.inputs.device)
            if which not in samples:
                samples[which] = _sample(*which, batch)
            sample, call_rows.num_seen = samples[which]
            counted = sample if counted is None else counted & sample
        call_rows.counted = counted


def _index_rows(rows: Sequence[CallRows]) -> None:
    """Set the indices of the positions that count; equal choices of positions get one tensor."""
    made: dict[tuple[Any, ...], Tensor] = {}
    for call_rows in rows:
        count, counted = call_rows.num_counted, call_rows.counted
        call_rows.key += (count, call_rows.positions_key)
        if counted is not None and count < len(counted):
            which = (counted.device, len(counted), count, call_rows.positions_key)
            if which not in made:
                # Their number is known, so that nothing has to be read from the device, as a mask for an index would.
                made[which] = counted.byte().argsort(descending=True, stable=True)[:count]
            call_rows.index = made[which]


def _of_one_length(items: Sequence[tuple[CallRows, Tensor]]) -> list[list[tuple[CallRows, Tensor]]]:
    """Group tensors ``[n]``, each with its rows, by device and length: those of one group are read together."""
    groups: dict[Any, list[tuple[CallRows, Tensor]]] = {}
    for item in items:
        groups.setdefault((item[1].device, len(item[1])), []).append(item)
    return list(groups.values())


def same_inputs(rows: Sequence[CallRows]) -> list[dict[str, list[CallRows]]]:
    """Return the rows by layer, in groups of layers that read the same positions of the same tensors."""
    by_layer: dict[str, list[CallRows]] = {}
    for call_rows in rows:
        by_layer.setdefault(call_rows.call.name, []).append(call_rows)
    groups: dict[tuple[Any, ...], dict[str, list[CallRows]]] = {}
    for name, calls in by_layer.items():
        groups.setdefault(tuple(call_rows.key for call_rows in calls), {})[name] = calls
    return list(groups.values())


def _reading(call: LayerCall) -> tuple[Any, ...]:
    """Return a key that is equal for two calls if they read the same tensor, unchanged in between, in the same way."""
    inputs, module = call.inputs, call.module
    local = local_part(inputs)
    how = None
    if isinstance(module, nn.Conv2d):
        how = (module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode)
    return (local.data_ptr(), call.version, local.dtype, local.device, local.shape, local.stride(), inputs.shape, how)


def _sample(count: int, device: torch.device, batch: BatchGradients) -> tuple[Tensor, int]:
    """Choose positions at random, bool ``[count]``, and count them; layers with as many positions get the same."""
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
