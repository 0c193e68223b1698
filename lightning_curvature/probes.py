"""Probes: data on which a model is measured before and after the edit."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_curvature.metrics import NoisyLabelAccuracy

Probes = Mapping[str, Iterable[Any]]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode without gradients, and every submodule back in its own mode afterwards."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for submodule, training in modes:
            submodule.training = training


def run_probes(
    predict: Callable[[Any], Any], probes: Probes, to_device: Callable[[Any], Any] = lambda batch: batch
) -> dict[str, float]:
    """Measure a classifier on each probe.

    Args:
        predict: Returns logits ``[n, k]`` (or an object with ``logits``) of a batch of inputs.
        probes: By name, batches ``(inputs, labels)``, or ``(inputs, noised, clean)`` where labels were noised.
        to_device: Moves a batch.

    Returns:
        ``{name}/accuracy`` for the first kind of batch; ``{name}/memorized`` and ``{name}/recovered``, over the noised
        examples, and ``{name}/accuracy``, over the others, for the second.

    Raises:
        ValueError: If a batch is neither.
    """
    results: dict[str, float] = {}
    for name, batches in probes.items():
        accuracy, noisy = MeanMetric(), NoisyLabelAccuracy()
        for batch in batches:
            if not (isinstance(batch, (list, tuple)) and len(batch) in (2, 3)):
                raise ValueError(
                    f"Probe {name!r}: a batch must be (inputs, labels) or (inputs, noised, clean), found "
                    f"{type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, (list, tuple)) else ''}."
                )
            inputs, labels, *clean = to_device(batch)
            output = predict(inputs)
            logits: Tensor = getattr(output, "logits", output).detach().cpu()
            labels = labels.cpu()
            untouched = labels == clean[0].cpu() if clean else torch.ones_like(labels, dtype=torch.bool)
            accuracy.update((logits.argmax(1) == labels)[untouched].float())
            if clean:
                noisy.update(logits, labels, clean[0].cpu())
        results[f"{name}/accuracy"] = float(accuracy.compute())
        if int(noisy.counts[2]):
            results |= {f"{name}/{key}": float(value) for key, value in noisy.compute().items()}
    return results
