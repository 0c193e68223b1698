"""One batch, as rows: which positions of which layer count, and which layers see the same ones.

An accelerator is waited for once for the whole batch, in :func:`read_batch`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature.fisher import Gradients
from lightning_curvature.layers import gradient_rows, input_rows, is_matmul, num_rows
from lightning_curvature.positions import counted_positions
from lightning_curvature.ranks import whole
from lightning_curvature.taps import LayerCall


@dataclass
class BatchGradients:
    """What one batch adds.

    Args:
        calls: Calls of the chosen layers.
        passes: Of each backward pass, the gradients at the outputs of the calls.
        scale: Factor of the products of gradients: over passes that are averaged, or the square of their unit.
        mask: Mask of the batch, for ``positions="mask:KEY"``.
        share: Share of the positions that is used, chosen at random.
        seed: Seed of that choice.
    """

    calls: Sequence[LayerCall]
    passes: Sequence[Gradients]
    scale: float | Tensor = 1.0
    mask: Tensor | None = None
    share: float = 1.0
    seed: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that was captured."""
        gradients = [gradient for passed in self.passes for gradient in passed if gradient is not None]
        return [*(call.inputs for call in self.calls), *gradients]


@dataclass
class CallRows:
    """The rows of one call that count.

    Attributes:
        call: The call.
        inputs: What it read.
        gradients: Gradients at its output, of each backward pass that reached it.
        counted: Which positions count, bool ``[n]``; None for all.
        num_counted: How many do.
        num_seen: Positions of the call, or of the share of them that is used.
        key: Equal for two calls that read the same positions of the same tensor in the same way.
    """

    call: LayerCall
    inputs: Tensor
    gradients: list[Tensor]
    counted: Tensor | None = None
    num_counted: int = 0
    num_seen: int = 0
    key: tuple[Any, ...] = field(default=())

    def input_rows(self) -> Tensor:
        """Return the inputs at the positions that count, ``[num_counted, d_in]``."""
        return self._select(input_rows(self.call.module, self.inputs))

    def gradient_rows(self) -> list[Tensor]:
        """Return the gradients at these positions, ``[num_counted, d_out]``, of each backward pass."""
        return [self._select(gradient_rows(self.call.module, gradient)) for gradient in self.gradients]

    def _select(self, rows: Tensor) -> Tensor:
        if self.counted is None or self.num_counted == len(rows):
            return rows
        # Their number is known, so that nothing has to be read from the device, as a mask for an index would.
        return rows[self.counted.byte().argsort(descending=True, stable=True)[: self.num_counted]]


def read_batch(batch: BatchGradients, positions: str) -> list[CallRows] | None:
    """Return the rows of a batch, or None if it holds NaN or infinite values.

    Args:
        batch: The batch.
        positions: Which positions count.

    Raises:
        RuntimeError: If a layer's input was overwritten, or positions cannot be told.
    """
    rows, finite, samples = [], dict[Any, Tensor](), dict[int, tuple[Tensor, int]]()
    for index, call in enumerate(batch.calls):
        call.check_input()
        inputs = whole(call.inputs)
        gradients = [whole(gradient) for passed in batch.passes if (gradient := passed[index]) is not None]
        own = CallRows(call, inputs, gradients, key=_reading(call))
        if own.key not in finite:
            finite[own.key] = _is_finite(inputs)
        not_zero = []
        for number, gradient in enumerate(gradients):
            if positions == "contributing" and is_matmul(call.module):
                # Extremes keep NaN and infinities, and are several times faster than a search for what is not zero.
                flat = gradient_rows(call.module, gradient)
                top, bottom = flat.amax(1), flat.amin(1)
                not_zero.append((top != 0) | (bottom != 0))
                finite[index, number] = (torch.isfinite(top) & torch.isfinite(bottom)).all()
            else:
                finite[index, number] = _is_finite(gradient)
        own.num_seen = own.num_counted = num_rows(call.module, inputs, call.output_shape)
        own.counted = counted_positions(positions, call, not_zero, own.num_seen, batch.mask)
        if batch.share < 1.0:
            if own.num_seen not in samples:
                samples[own.num_seen] = _sample(own.num_seen, batch)
            sample, own.num_seen = samples[own.num_seen]
            sample = sample.to(inputs.device, non_blocking=True)
            own.counted = sample if own.counted is None else own.counted & sample
        rows.append(own)
    readers = Counter(own.key for own in rows)
    asked = [*finite.values()]
    for own in rows:
        if own.counted is not None:
            asked += [own.counted.sum(), _fingerprint(own.counted) if readers[own.key] > 1 else own.counted.any()]
    # The only wait for an accelerator: everything that is to be known of the batch is read at once.
    answers = iter(torch.stack([number.to(asked[0].device, torch.int64) for number in asked]).tolist())
    if not all(next(answers) for _ in finite):
        return None
    for own in rows:
        if own.counted is not None:
            own.num_counted = next(answers)
            own.key += (own.num_counted, next(answers))
    return rows


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


def _sample(count: int, batch: BatchGradients) -> tuple[Tensor, int]:
    """Choose positions, the same for all layers that have as many: bool ``[count]`` on the CPU, and their number."""
    generator = torch.Generator().manual_seed((batch.seed + count) % 2**63)
    sample = torch.rand(count, generator=generator) < batch.share
    return sample, int(sample.sum())


def _fingerprint(mask: Tensor) -> Tensor:
    """Return a number that differs for two masks but for a chance of 2**-62."""
    return (mask * _weights(len(mask)).to(mask.device, non_blocking=True)).sum()


@lru_cache(maxsize=8)
def _weights(count: int) -> Tensor:
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(count))


def _is_finite(values: Tensor) -> Tensor:
    """Tell whether no value is NaN or infinite; a sum keeps either, and is several times faster than isfinite."""
    return torch.isfinite(values.sum(dtype=torch.promote_types(values.dtype, torch.float32)))
