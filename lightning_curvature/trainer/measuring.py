"""Measuring a model on the batches of probes, without a trace in the random state."""

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn

from lightning_curvature.metrics import NoisyLabelAccuracy, Perplexity


@contextmanager
def random_state_kept(loaders: Iterable[Any]) -> Iterator[None]:
    """Put the random state back after a ``with`` block, also if it fails: the global one, and those of dataloaders.

    Args:
        loaders: Dataloaders that may have generators of their own, which others may share.
    """
    holders = [part for loader in loaders for part in (loader, getattr(loader, "sampler", None))]
    generators = [g for holder in holders if isinstance(g := getattr(holder, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in generators]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def check_batch(name: str, batch: Any) -> None:
    """Raise ``ValueError`` if a batch of a probe is not one that can be measured."""
    if (
        isinstance(batch, (list, tuple))
        and len(batch) in (2, 3)
        and all(isinstance(part, Tensor) for part in batch[1:])
    ):
        return
    count = f" of {len(batch)}" if isinstance(batch, (list, tuple)) else ""
    raise ValueError(
        f"Probe {name!r}: a batch must be (inputs, labels), (inputs, noised, clean) or a dict with input_ids, found "
        f"{type(batch).__name__}{count}."
    )


def before_after(results: Mapping[str, float]) -> str:
    """Return results that end in ``/before`` and ``/after`` as a table."""
    names = [name.removesuffix("/before") for name in results if name.endswith("/before")]
    rows = [[name.partition("/")[2], results[f"{name}/before"], results[f"{name}/after"]] for name in names]
    return tabulate(rows, ["probe", "before", "after"], floatfmt=".3f")


def run_probes(
    module: nn.Module,
    probes: Mapping[str, Iterable[Any]],
    to_device: Callable[[Any], Any] = lambda batch: batch,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    layers: Collection[str] = (),
) -> dict[str, float]:
    """Measure a model on each probe.

    Args:
        module: In eval mode. A classifier returns logits ``[n, k]`` (or an object with ``logits``) of a batch of
            inputs; a language model holds a transformers causal LM.
        probes: By name, batches ``(inputs, labels)``, or ``(inputs, noised, clean)`` where labels were noised, or
            dicts with ``input_ids`` (and ``labels``, ``attention_mask``, ``position_ids``).
        to_device: Moves a batch.
        context: Entered around the forward pass of a classifier, for its precision, and around nothing else.
        layers: Layers that are edited; they tell which language model is meant if there are several.

    Returns:
        ``{name}/accuracy`` for the first kind of batch; ``{name}/memorized`` and ``{name}/recovered``, over the noised
        examples, and ``{name}/accuracy``, over the others, for the second; ``{name}/perplexity`` for the third.

    Raises:
        ValueError: If a batch is none of these.
    """
    results: dict[str, float] = {}
    for name, batches in probes.items():
        right = total = 0
        noisy, perplexity = NoisyLabelAccuracy(), Perplexity()
        for batch in batches:
            if isinstance(batch, Mapping) and "input_ids" in batch:
                # transformers is there if it made such a batch
                from lightning_curvature.text.inner_model import next_tokens

                perplexity.update(*(part.cpu() for part in next_tokens(module, to_device(batch), layers)))
                continue
            check_batch(name, batch)
            inputs, labels, *clean = to_device(batch)
            with context():
                output = module(inputs)
            logits: Tensor = getattr(output, "logits", output).detach().cpu()
            labels = labels.cpu()
            untouched = labels == clean[0].cpu() if clean else torch.ones_like(labels, dtype=torch.bool)
            right += int((logits.argmax(1) == labels)[untouched].sum())
            total += int(untouched.sum())
            if clean:
                noisy.update(logits, labels, clean[0].cpu())
        if int(perplexity.count):
            results[f"{name}/perplexity"] = float(perplexity.compute())
        if total:
            results[f"{name}/accuracy"] = right / total
        if int(noisy.counts[2]):
            results |= {f"{name}/{key}": float(value) for key, value in noisy.compute().items()}
    return results
