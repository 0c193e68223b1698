"""Probes: data on which a model is measured before and after the edit."""

import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from tabulate import tabulate
from torch import Tensor, nn

from lightning_curvature._checks import check_option, did_you_mean, listing
from lightning_curvature.distributed import Ranks
from lightning_curvature.editing.weight_editor import WeightEditor
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.modules import evaluating
from lightning_curvature.metrics import NoisyLabelAccuracy, Perplexity
from lightning_curvature.search.energy import Match, match_energy

COSTS = ("perplexity",)
BENEFITS = ("accuracy", "recall", "recall_open_book")
"""Metrics of a probe that tell what an edit costs."""


class Probes:
    """The probes of a run: files, and dataloaders of the module or the datamodule.

    Args:
        files: By name, a path, or a dict with ``path`` and optionally ``metrics`` and ``tokenizer``.
    """

    def __init__(self, files: Mapping[str, Any]) -> None:
        self.files = dict(files)
        self._readers: dict[str, Any] = {}

    def check(self) -> None:
        """Check the files before a run starts, not after its first epoch.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If a dict has no ``path``, or an entry that means nothing.
        """
        for name, spec in self.files.items():
            options = {"path": spec} if isinstance(spec, (str, PathLike)) else dict(spec)
            for key in options:
                check_option(key, ("path", "metrics", "tokenizer"), f"An entry of probe {name!r}")
            if "path" not in options:
                raise ValueError(f"Probe {name!r} has no 'path'; found {options}.")
            if not Path(options["path"]).is_file():
                raise FileNotFoundError(f"Probe {name!r}: there is no file {options['path']}.")

    def check_loaders(self, trainer: pl.Trainer, module: pl.LightningModule, target: "Target | None") -> None:
        """Check the dataloaders of the module and the datamodule, and the first batch of each, before a run starts.

        Raises:
            MisconfigurationException: If they are no dict of dataloaders, or the module cannot read their batches.
            ValueError: If none of them measures the metric of the target.
        """
        measured = set[str]()
        for source in (module, getattr(trainer, "datamodule", None)):
            if not hasattr(source, "probe_dataloader"):
                continue
            loaders = _loaders_of(source)
            where = f"{type(source).__name__}.probe_dataloader"
            if not isinstance(loaders, Mapping):
                raise MisconfigurationException(
                    f"{where}() must return a dict of dataloaders by name, such as {{'val': DataLoader(...)}}; found a "
                    f"{type(loaders).__name__}."
                )
            for name, loader in loaders.items():
                measured |= {f"{name}/{metric}" for metric in _first_batch(where, name, loader, module)}
        if target is not None and target.probe not in self.files and target.name not in measured:
            raise ValueError(target.unmeasured(measured))

    def measure(
        self, trainer: pl.Trainer, module: pl.LightningModule, editor: WeightEditor, factors: KroneckerFactors
    ) -> dict[str, float]:
        """Return ``{probe}/{metric}/before`` and ``.../after`` an edit, which is taken back."""
        run = self._runner(trainer, module, factors, editor.ranks)
        if run is None:
            return {}
        with random_state_kept(self._loaders(trainer, module)), evaluating(module):
            before = run()
            with editor.applied(module, factors):
                after = run()
        columns = (("before", before), ("after", after))
        return {f"{name}/{when}": value for when, column in columns for name, value in column.items()}

    def match(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        editor: WeightEditor,
        factors: KroneckerFactors,
        target: "Target",
    ) -> Match | None:
        """Find the strongest edit within a target; None, with a warning, if the metric says nothing yet.

        Raises:
            ValueError: If no probe has the target's metric.
        """
        run = self._runner(trainer, module, factors, editor.ranks, target.probe)
        with random_state_kept(self._loaders(trainer, module)), evaluating(module):
            found = {} if run is None else run()
            if run is None or target.name not in found:
                raise ValueError(target.unmeasured(found))
            before = found[target.name]
            if not 0 < before < math.inf:
                rank_zero_warn(f"{target}: the metric of the unedited model is {before}, there is nothing to keep yet.")
                return None
            return match_energy(
                editor,
                module,
                factors,
                lambda: run()[target.name],
                target.limit,
                higher_is_better=target.benefit,
                before=before,
            )

    def _runner(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        factors: KroneckerFactors,
        ranks: Ranks,
        only: str | None = None,
    ) -> Callable[[], dict[str, float]] | None:
        """Return what measures the module as it is, on all probes or one of them; None if there is no probe.

        With several processes, each runs the probes, and what the first one finds counts: what they decide next must
        be the same.
        """
        sources = (module, getattr(trainer, "datamodule", None))
        loaders: dict[str, Any] = {}
        for source in sources:
            loaders |= _loaders_of(source) or {}
        if self.files and not self._readers:
            from lightning_curvature.text.probes import make_probes  # transformers is imported by those who need it

            tokenizers = [found for source in sources if (found := getattr(source, "tokenizer", None)) is not None]
            self._readers = make_probes(self.files, tokenizers[0] if tokenizers else None)
        loaders, readers = (
            {name: probe for name, probe in probes.items() if only in (None, name)}
            for probes in (loaders, self._readers)
        )
        if not loaders and not readers:
            return None
        precision, layers = trainer.precision_plugin, list(factors)

        def to_device(batch: Any) -> Any:
            return trainer.strategy.batch_to_device(precision.convert_input(batch))

        def run() -> dict[str, float]:
            failure, results = None, dict[str, float]()
            try:
                results = run_probes(module, loaders, to_device, precision.val_step_context, layers)
                for name, reader in readers.items():
                    results |= {f"{name}/{metric}": value for metric, value in reader.measure(module, layers).items()}
            except Exception as error:
                if ranks.size == 1:
                    raise
                failure = f"{type(error).__name__}: {error}"
            failures = [told for told in ranks.gather(failure) if told]
            if failures:  # told to all: none waits for one that has given up
                raise RuntimeError(failures[0])
            return ranks.gather(results)[0]

        return run

    def _loaders(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[Any]:
        """Return the dataloaders whose iteration may draw random numbers: those of probes, and of the Trainer."""
        sources = (module, getattr(trainer, "datamodule", None))
        probes = [loader for source in sources for loader in (_loaders_of(source) or {}).values()]
        training = getattr(trainer, "train_dataloader", None)
        return [*probes, *([] if training is None else [training])]


def _loaders_of(source: Any) -> Any:
    """Return what a module's or datamodule's ``probe_dataloader`` gives; None if it has none."""
    make = getattr(source, "probe_dataloader", None)
    return make() if callable(make) else make


@contextmanager
def random_state_kept(loaders: Iterable[Any]) -> Iterator[None]:
    """Put the random state back after a ``with`` block, also if it fails: the global one, and those of dataloaders.

    Args:
        loaders: Dataloaders that may have generators of their own, which others may share.
    """
    owners = [part for loader in loaders for part in (loader, getattr(loader, "sampler", None))]
    generators = [g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)]
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


class Target:
    """What an edit may cost on a probe.

    Args:
        entry: One entry, ``"{probe}/{metric}"`` and the multiple that the metric may become.

    Raises:
        TypeError: If it is no such dict.
        ValueError: If the metric is not one that tells what an edit costs, or the multiple lies on its wrong side.
    """

    def __init__(self, entry: Mapping[str, float]) -> None:
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise TypeError(
                f"target must be a dict of one entry, such as {{'clean/perplexity': 1.1}}; found {entry!r}."
            )
        ((self.name, limit),) = entry.items()
        self.entry = dict(entry)
        self.probe, _, metric = self.name.partition("/")
        check_option(metric, (*COSTS, *BENEFITS), f"The metric of target {self.name!r}")
        self.benefit = metric in BENEFITS
        if isinstance(limit, bool) or not isinstance(limit, (int, float)):
            raise TypeError(f"target {self.name!r} must be a number, found {limit!r}.")
        if not (0 < limit <= 1 if self.benefit else 1 < limit < math.inf):
            side = "at most 1: the share that is kept" if self.benefit else "above 1: what it may become"
            raise ValueError(f"target {self.name!r} must be {side}, as a multiple of what it was; found {limit!r}.")
        self.limit = float(limit)

    def check(self, files: Iterable[str], loaders: bool) -> None:
        """Check before a run starts that there may be such a probe.

        Args:
            files: Names of the probes that are files.
            loaders: Whether there are others, whose names are known when they are measured.

        Raises:
            ValueError: If there can be none.
        """
        if not loaders and self.probe not in files:
            raise ValueError(
                f"{self}: there is no probe {self.probe!r}. Give a file, probes={{{self.probe!r}: ...}}, or a method "
                "probe_dataloader() of the module or the datamodule."
            )

    def unmeasured(self, measured: Iterable[str]) -> str:
        """Return what to do where no probe has the metric."""
        names = sorted(name for name in measured if name.startswith(f"{self.probe}/"))
        return (
            f"{self}: no probe measures that.{did_you_mean(self.name, names)} Give files (probes=) or a method "
            f"probe_dataloader() of the module or datamodule; measured: {listing(names) or 'nothing'}."
        )

    def __str__(self) -> str:
        return f"target {self.name} x {self.limit:g}"


def _first_batch(where: str, name: str, loader: Any, module: nn.Module) -> list[str]:
    """Return what the first batch of a probe's loader allows to measure; raise if it is no such loader."""
    what = f"{where}(): the probe {name!r}"
    if isinstance(loader, (str, bytes, Tensor, Iterator)) or not isinstance(loader, Iterable):
        raise MisconfigurationException(
            f"{what} is a {type(loader).__name__}; expected a DataLoader, or another iterable of batches that can be "
            "read more than once."
        )
    with random_state_kept([loader]):
        batch = next(iter(loader), None)
    if batch is None:
        raise MisconfigurationException(f"{what} holds no batch.")
    if isinstance(batch, Mapping) and "input_ids" in batch:
        return ["perplexity"]
    check_batch(name, batch)
    if getattr(module.forward, "__func__", module.forward) in (nn.Module.forward, pl.LightningModule.forward):
        raise MisconfigurationException(
            f"{what} is measured by the module's forward(inputs), and {type(module).__name__} has none. Define it so "
            "that it returns the logits."
        )
    return ["accuracy"]


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
                from lightning_curvature.text.inner_model import (
                    next_tokens,  # transformers is there if it made such a batch
                )

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
