"""Running statistics of batch norms, estimated anew for edited weights.

A batch norm keeps mean and variance of what came to it in training. An edit of the layers before it changes both, and
the old ones shift and scale the features wrongly from there on. No label is needed to estimate them again, and no
gradient: a pass over training data, in which each batch norm normalizes by the statistics of the batch.

Source: Izmailov et al. 2018, "Averaging weights leads to wider optima and better generalization", section 3.2, which
does the same for averaged weights; ``torch.optim.swa_utils.update_bn``.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_curvature.distributed import Ranks


class Recalibration(NamedTuple):
    """How statistics of batch norms are estimated.

    Args:
        run: Runs the module on training data, forward alone; a collective.
        norms: Names of the batch norms; others keep their statistics.
    """

    run: Callable[[], object]
    norms: Collection[str]


def batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch norms of a module that keep running statistics, by name."""
    return {
        name: norm for name, norm in module.named_modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats
    }


def count_norms(names: Collection[str]) -> int:
    """Return how many batch norms keep running statistics, by the names of saved tensors."""
    return sum(name.rpartition(".")[2] == "running_mean" for name in names)


def estimate(module: nn.Module, recalibration: Recalibration, ranks: Ranks) -> dict[str, Tensor]:
    """Return statistics of batch norms for the weights that a module has now, by name of the buffer. A collective.

    Mean and variance are those of all positions of all data; a batch norm that does not run, or meets an infinite
    value, is left out. The module is what it was afterwards.

    Args:
        module: The network.
        recalibration: What to run, and for which batch norms.
        ranks: The processes; their data count together.
    """
    norms = {name: norm for name, norm in batch_norms(module).items() if name in recalibration.norms}
    sums = {name: torch.zeros(3, norm.num_features, dtype=torch.float64) for name, norm in norms.items()}
    with _by_batch(norms, sums), torch.no_grad():
        recalibration.run()
    buffers: dict[str, Tensor] = {}
    for name, of_process in sums.items():
        counts, first, second = ranks.sum(of_process)
        mean = first / counts
        variance = (second / counts - mean.square()).clamp(min=0.0) * counts / (counts - 1).clamp(min=1)
        if not bool(torch.isfinite(mean + variance).all()):  # it never ran, or met an infinite value
            continue
        for key, value in (("running_mean", mean), ("running_var", variance)):
            buffers[f"{name}.{key}"] = value.to(getattr(norms[name], key))
    return buffers


@contextmanager
def _by_batch(norms: dict[str, _BatchNorm], sums: dict[str, Tensor]) -> Iterator[None]:
    """Let batch norms normalize by the statistics of each batch, and add these up; their buffers stay as they are.

    Args:
        norms: Batch norms by name.
        sums: Receives for each the count, the sum and the sum of squares, float64 ``[3, features]``.
    """
    modes = {name: norm.training for name, norm in norms.items()}
    saved = {name: [buffer.clone() for buffer in norm.buffers()] for name, norm in norms.items()}
    handles = []
    for name, norm in norms.items():

        def add(module: nn.Module, args: Any, kwargs: dict[str, Any], name: str = name) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            if not x.numel():
                return
            module.training = True  # whatever mode the step has put it into
            both = torch.var_mean(x.float(), [dim for dim in range(x.dim()) if dim != 1], correction=0)
            variance, mean = (part.cpu().double() for part in both)
            count = x.numel() // len(mean)
            sums[name] += count * torch.stack([torch.ones_like(mean), mean, variance + mean.square()])

        handles.append(norm.register_forward_pre_hook(add, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, norm in norms.items():
            norm.training = modes[name]
            for buffer, old in zip(norm.buffers(), saved[name], strict=True):
                buffer.copy_(old)
