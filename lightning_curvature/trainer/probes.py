"""Probes: data on which a model is measured before and after the edit."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_curvature._checks import check_option
from lightning_curvature.distributed import Ranks
from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.editing.weight_editor import WeightEditor
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.modules import evaluating
from lightning_curvature.search.energy import Match, match_energy
from lightning_curvature.search.price import Purchase, spend_shares
from lightning_curvature.trainer.measuring import check_batch, random_state_kept, run_probes
from lightning_curvature.trainer.target import Target


class Probes:
    """The probes of a run: files, and dataloaders of the module or the datamodule.

    Args:
        files: By name, a path, or a dict with ``path`` and optionally ``metrics`` and ``tokenizer``.
    """

    def __init__(self, files: Mapping[str, Any]) -> None:
        self.files = dict(files)
        self._readers: dict[str, Any] = {}

    def check(self, target: "Target | None", sources: Iterable[object]) -> None:
        """Check the files, and that a target has a probe, before a run starts, not after its first epoch.

        Args:
            target: What the edit may cost, or None.
            sources: The module and the datamodule, which may give dataloaders.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If a dict has no ``path``, or an entry that means nothing; or if there is no such probe.
        """
        for name, spec in self.files.items():
            options = {"path": spec} if isinstance(spec, (str, PathLike)) else dict(spec)
            for key in options:
                check_option(key, ("path", "metrics", "tokenizer"), f"An entry of probe {name!r}")
            if "path" not in options:
                raise ValueError(f"Probe {name!r} has no 'path'; found {options}.")
            if not Path(options["path"]).is_file():
                raise FileNotFoundError(f"Probe {name!r}: there is no file {options['path']}.")
        if target is not None:
            target.check(self.files, any(hasattr(source, "probe_dataloader") for source in sources))

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
        if target is not None and (missing := target.missing(measured, self.files)) is not None:
            raise ValueError(missing)

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
        editor: CurvatureEditor,
        factors: KroneckerFactors,
        target: "Target",
    ) -> Match | Purchase | None:
        """Find the strongest edit within a target; None, with a warning, if the metric says nothing yet.

        Of a soft edit of updates it is the factor of all updates, and a budget; otherwise an energy.

        Raises:
            ValueError: If no probe has the target's metric.
        """
        run = self._runner(trainer, module, factors, editor.ranks, target.probes)
        with random_state_kept(self._loaders(trainer, module)), evaluating(module):
            before = {} if run is None else run()
            missing = target.missing(before)
            if run is None or missing is not None:
                raise ValueError(missing)
            for limit in target.limits:
                if not 0 < before[limit.name] < math.inf:
                    rank_zero_warn(
                        f"{target}: {limit.name} of the unedited model is {before[limit.name]}, there is nothing to "
                        "keep yet."
                    )
                    return None
            if target.of_updates and editor.soft:
                return spend_shares(editor, module, factors, lambda: target.used(run(), before))
            return match_energy(
                editor,
                module,
                factors,
                lambda: target.spent(run(), before),
                target.most,
                higher_is_better=target.higher_is_better,
                before=1.0,
                found=target.found,
            )

    def _runner(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        factors: KroneckerFactors,
        ranks: Ranks,
        only: Collection[str] | None = None,
    ) -> Callable[[], dict[str, float]] | None:
        """Return what measures the module as it is, on all probes or one of them; None if there is no probe.

        With several processes, each runs the probes, and the results of the first one count: what they decide next
        must be the same.
        """
        sources = (module, getattr(trainer, "datamodule", None))
        loaders: dict[str, Any] = {}
        for source in sources:
            loaders |= _loaders_of(source) or {}
        if self.files and not self._readers:
            from lightning_curvature.text.probes import make_probes  # transformers is imported by those who need it

            tokenizers = [t for source in sources if (t := getattr(source, "tokenizer", None)) is not None]
            self._readers = make_probes(self.files, tokenizers[0] if tokenizers else None)
        loaders, readers = (
            {name: probe for name, probe in probes.items() if only is None or name in only}
            for probes in (loaders, self._readers)
        )
        if not loaders and not readers:
            return None
        precision, layers = trainer.precision_plugin, list(factors)

        def to_device(batch: Any) -> Any:
            return trainer.strategy.batch_to_device(precision.convert_input(batch))

        def run() -> dict[str, float]:
            results = run_probes(module, loaders, to_device, precision.val_step_context, layers)
            for name, reader in readers.items():
                results |= {f"{name}/{metric}": value for metric, value in reader.measure(module, layers).items()}
            return results

        return lambda: ranks.gather(ranks.together(run))[0]

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
