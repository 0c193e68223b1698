"""Collection in one pass over a frozen model."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_curvature._checks import listing
from lightning_curvature.collect.collector import Collector
from lightning_curvature.distributed import Ranks
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.recording.objectives import frozen_layers_message
from lightning_curvature.recording.options import CollectorOptions

Batch = TypeVar("Batch")


def collect(
    module: nn.Module,
    batches: Iterable[Batch],
    step: Callable[[Batch], Any],
    *,
    group: tuple[int, int] = (0, 1),
    ranks: Ranks | None = None,
    shard: bool = False,
    **options: Any,
) -> KroneckerFactors:
    """Collect factors of a frozen model in one pass over data, the setting of arXiv:2510.24256.

    Args:
        module: The network. Its mode (train or eval) is yours to set; weights, ``.grad`` and random state stay.
        batches: Data.
        step: Computes the loss of a batch, as a training step would; it may also return a dict, or a model output of
            transformers, that holds it as ``loss``.
        group: ``(i, n)``: cut the chosen layers into n groups and collect the i-th alone, where the factors of all do
            not fit into memory.
        ranks: The processes, if several collect together, each from its own data.
        shard: With several processes, let each process keep the factors of only some layers.
        **options: Arguments of :class:`~lightning_curvature.recording.options.CollectorOptions`.

    Returns:
        The factors, by layer name.

    Raises:
        RuntimeError: If no batch could be used.
    """
    collector = Collector(module, CollectorOptions(**options), group=group, ranks=ranks, shard=shard)
    return run_collector(collector, batches, step)


def run_collector(collector: Collector, batches: Iterable[Batch], step: Callable[[Batch], Any]) -> KroneckerFactors:
    """Run a collector over data; arguments and errors as :func:`collect`. A collective with several processes."""
    for batch in batches:
        collect_batch(collector, batch, step)
    check_collected(collector)
    factors = collector.finish()
    check_not_empty(factors)
    return factors


def collect_batch(collector: Collector, batch: Batch, step: Callable[[Batch], Any]) -> None:
    """Collect from one batch of a frozen model; arguments and errors as :func:`collect`."""
    with collector.step(batch) as recording, torch.enable_grad():
        recording.backward(loss_of(step(batch)))


def check_collected(collector: Collector) -> None:
    """Raise ``RuntimeError`` if a pass over data collected nothing, or nothing of some chosen layers. A collective."""
    ranks = collector.ranks
    collector.drain()  # where sums are spread, others may have more batches
    nothing = not any(ranks.gather(bool(collector.num_positions)))
    if nothing and (collector.chosen is None or any(ranks.gather(collector.num_skipped))):
        raise RuntimeError("No batch was collected: the data were empty, or every batch held NaN or infinite values.")
    check_silent(collector.silent, collector.network.frozen)


def loss_of(output: Any) -> Tensor:
    """Return the loss that a step returned, itself or in a dict or a model output.

    Raises:
        TypeError: If it returned none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        kind = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else f"{type(output).__name__}"
        raise TypeError(f"step(batch) must return the loss, one number, or a dict or output with 'loss'; found {kind}.")
    return loss


def check_not_empty(factors: KroneckerFactors) -> None:
    """Raise ``RuntimeError`` if factors rest on no position, as where no token of any batch is predicted."""
    empty = [name for name, count in factors.counts().items() if not count]
    if empty:
        raise RuntimeError(
            f"The factors of layers {listing(empty)} rest on no position: no gradient reached one that counts. Does "
            "the loss depend on them? Collect over data where it does, or use a larger share of the positions."
        )


def check_silent(silent: Collection[str], frozen: Collection[str] = ()) -> None:
    """Raise ``RuntimeError`` if there are chosen layers that never ran, or ran frozen.

    Args:
        silent: Chosen layers without factors.
        frozen: Layers that ran and whose outputs needed no gradient.
    """
    if asleep := sorted(set(silent) & set(frozen)):
        raise RuntimeError(frozen_layers_message(asleep))
    if silent:
        raise RuntimeError(
            f"Chosen layers {listing(silent)} never ran, so they have no factors and were not edited. Leave them out "
            "of layers=, or collect over data that reach them."
        )
