"""What a run comes to: the strength that is allowed, what an edit of its weights does, probes, and what is shown."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_curvature._checks import listing
from lightning_curvature.collect.passes import check_silent
from lightning_curvature.editing.budget import careful_budget
from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.editing.report import EditReport
from lightning_curvature.factors.decomposition import FaultyLayerError
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.search.energy import Match
from lightning_curvature.search.gap import Candidate, curves
from lightning_curvature.search.price import Purchase
from lightning_curvature.trainer.durations import tell_time
from lightning_curvature.trainer.measuring import before_after
from lightning_curvature.trainer.price import MeasuredPrice
from lightning_curvature.trainer.probes import Probes
from lightning_curvature.trainer.samples import Arguments, Sample
from lightning_curvature.trainer.target import Target


class Outcome:
    """The results of a callback.

    Args:
        editor: Edits; it gets the strength that a target asks for.
        target: What the edit may cost; None if the energy is given.
        probes: Data on which the model is measured.
        prefix: First part of the names under which results of probes are logged.
        price: Measures what an edit costs, if neither a target nor a strength is given.

    Attributes:
        report: What an edit of the live weights does.
        match: The energy or the budget that the target or the price allows, and what it costs.
        probe_results: By ``{prefix}/{probe}/{metric}/before|after``.
        copies: What was done to each edited copy, by its path.
    """

    def __init__(
        self,
        editor: CurvatureEditor,
        target: Target | None,
        probes: Probes,
        prefix: str,
        price: MeasuredPrice | None = None,
    ) -> None:
        self.report: EditReport | None = None
        self.match: Match | Purchase | None = None
        self.probe_results: dict[str, float] = {}
        self.copies: dict[str, EditReport] = {}
        self._editor = editor
        self._target = target
        self._price = price
        self._probes = probes
        self._prefix = prefix
        self._started = time.monotonic()

    def start(self) -> None:
        """Start the clock of a run, which has no edited copies yet."""
        self.copies, self._started = {}, time.monotonic()
        if self._price is not None:
            self._price.validated.clear()
            self._use_predicted(self._price)

    def clear(self) -> None:
        """Forget the results of the run before, since other factors are collected."""
        self.report, self.match, self.probe_results = None, None, {}

    def take_over(self, other: "Outcome") -> None:
        """Hold the results of another one."""
        self.report, self.match, self.probe_results = other.report, other.match, other.probe_results

    @property
    def is_undecided(self) -> bool:
        """Whether there is a target and no strength was found for it yet."""
        return self._target is not None and self.match is None

    def spend(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        factors: KroneckerFactors,
        trained: Sample,
        others: Callable[[Sequence[Arguments]], Candidate] | None = None,
    ) -> KroneckerFactors | None:
        """Find the strongest edit within the price, if one is measured, and return the factors that it needs.

        Arguments as of :meth:`.MeasuredPrice.find`. None means those that were given.
        """
        if self._price is None:
            return None
        self._price.predicted = careful_budget(self._editor.soft, len(self._editor.energies(factors)) == 1)
        self._use_predicted(self._price)
        found = self._price.find(trainer, module, self._editor, factors, trained, others)
        if found is None:
            return None
        purchase = found.purchase
        self._editor.use_soft(found.candidate.editor.soft)
        self._use(purchase)
        if purchase.budget:
            rank_zero_info(f"\n{purchase}")
        else:
            copies = "the checkpoints" if purchase.scale == 1.0 else f"the updates times {purchase.scale:g}"
            rank_zero_warn(f"The edited copies are {copies}. {purchase}")
        return found.candidate.factors

    def _use(self, purchase: Purchase) -> None:
        """Make an edit that was found the one that is made."""
        self.match, self._editor.scale = purchase, purchase.scale
        if purchase.budget:
            self._editor.use_budget(purchase.budget)
        else:
            self._editor.budget, self._editor.energy = None, 1.0

    def _use_predicted(self, price: MeasuredPrice) -> None:
        """Make the edit the one that is made where nothing is measured."""
        self._editor.use_budget(price.predicted)
        self._editor.scale = 1.0

    def search(self, trainer: pl.Trainer, module: pl.LightningModule, factors: KroneckerFactors) -> None:
        """Find the energy of the target, or, of a soft edit of updates, its budget, if there is a target."""
        if self._target is None:
            return
        self._editor.scale = 1.0
        match = self._probes.match(trainer, module, self._editor, factors, self._target)
        self.match = match
        if isinstance(match, Purchase):
            self._use(match)
            used = ", ".join(f"{share:.0%} of {name}" for name, share in match.after.items())
            rank_zero_info(
                f"{self._target}: the update times {match.scale:g}, shrunk for a predicted {match.predicted:.2g} nats; "
                f"of what the limits allow it uses {used}"
            )
        elif match is not None:
            self._editor.energy = match.energy
            rank_zero_info(f"{self._target}: energy {match.energy:.4g}, {self._target.found(match.value)}")

    def state(self) -> dict[str, Any]:
        """Return the energy or the budget that was found for a target, as primitives; empty if there is none."""
        if self._target is None or self.match is None:
            return {}
        if isinstance(self.match, Purchase):
            found: dict[str, Any] = {key: getattr(self.match, key) for key in ("budget", "predicted", "scale")}
            found["after"] = dict(self.match.after)
        else:
            found = {"energy": self.match.energy, "value": self.match.value}
        return {"match": {"target": self._target.entry, **found}}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on with the strength that :meth:`state` returned, if it is that of the same target."""
        saved = state.get("match")
        if not saved or self._target is None or saved["target"] != self._target.entry:
            return
        if "budget" in saved:
            after, budget = saved["after"], saved["budget"]
            before = dict.fromkeys(after, 0.0)
            points = {0.0: before, budget: after}
            self._use(Purchase(budget, saved["predicted"], before, after, points, scale=saved["scale"]))
        else:
            self.match = Match(saved["energy"], saved["value"], {saved["energy"]: saved["value"]})
            self._editor.energy = saved["energy"]

    def measure(
        self, trainer: pl.Trainer, module: pl.LightningModule, factors: KroneckerFactors, may_fail: bool
    ) -> dict[str, float]:
        """Measure the probes before and after the edit, and return the results.

        Args:
            trainer: The Trainer.
            module: The module; its weights are what they were afterwards.
            factors: Its factors.
            may_fail: Whether an error costs a warning.
        """
        results: dict[str, float] = {}
        if not self.is_undecided:
            try:
                results = self._probes.measure(trainer, module, self._editor, factors)
            except Exception as error:
                if not may_fail:
                    raise
                rank_zero_warn(f"A probe could not be measured, and the run goes on without: {error}")
        self.probe_results = {f"{self._prefix}/{name}": value for name, value in results.items()}
        return self.probe_results

    def log(self, loggers: Iterable[Logger], step: int, results: Mapping[str, float]) -> None:
        """Log results, and after them, a step for each edit, what was measured where the edit was chosen."""
        tried = self.match.tried if isinstance(self.match, Purchase) else {}
        rows = [
            {f"{self._prefix}/choice/{name}/{cost}": value for cost, value in row.items()}
            for name, row in curves(tried)
        ]
        for logger in loggers:
            for number, row in enumerate([results, *rows]):
                logger.log_metrics(dict(row), step + number)

    def edit_live(self, module: pl.LightningModule, factors: KroneckerFactors) -> None:
        """Work out what an edit of the live weights does; they stay as they are."""
        if self.is_undecided:
            return
        try:
            self.report = self._editor.edited_weights(module, factors)[1]
        except FaultyLayerError as error:
            rank_zero_warn(f"There is no edit of the weights at the end: {error}")

    def tell_silent(self, silent: list[str], frozen: set[str], may_fail: bool) -> None:
        """Tell of chosen layers that have no factors.

        Args:
            silent: Chosen layers that never ran.
            frozen: Layers that ran, and whose outputs needed no gradient.
            may_fail: Whether they stay as they are with a warning, and the others are edited.

        Raises:
            RuntimeError: If there are such layers, unless they may fail.
        """
        if not silent:
            return
        if not (may_fail or self._editor.skip_faulty):
            check_silent(silent, frozen)
        asleep = sorted(set(silent) & frozen)
        why = f" (the outputs of {listing(asleep)} needed no gradient: frozen)" if asleep else ""
        rank_zero_warn(f"Chosen layers {listing(silent)} never ran{why}, and stay as they are.")

    def tell_time(self, num_copies: int, weights: Iterable[torch.Tensor]) -> None:
        """Say how long edits of some weights take that are made now, if that is over a tenth of the training's time."""
        tell_time(num_copies, weights, time.monotonic() - self._started)

    def show(self, nothing_written: str, factors: KroneckerFactors, path: str | None) -> None:
        """Show what was edited in which file, and what the probes say; save the factors. A collective.

        Args:
            nothing_written: Heading of the table where no file was edited.
            factors: The factors.
            path: File to save them to, or None. What goes wrong there costs a warning.
        """
        purchase = self.match if isinstance(self.match, Purchase) and self.match.budget else None
        if purchase is not None:
            self.copies = {path: replace(report, was_measured=True) for path, report in self.copies.items()}
            self.report = None if self.report is None else replace(self.report, was_measured=True)
        reports = [entry for entry in self.copies.items() if not _is_gone(entry[0])]
        if reports:
            copy, report = reports[-1]
            rank_zero_info(f"\n{copy}:\n{report}")
            if len(reports) > 1:
                earlier = listing(path for path, _ in reports[:-1])
                rank_zero_info(f"Edited likewise: {earlier}.")
        elif self.report is not None:
            rank_zero_info(f"\n{nothing_written}\n{self.report}")
        if self.probe_results:
            rank_zero_info(f"\n{before_after(self.probe_results)}")
        if path is not None:
            gathered = factors.gathered()
            try:
                self._editor.ranks.first(lambda: gathered.save(path))
                rank_zero_info(f"Factors written to {path}.")
            except (OSError, ValueError) as error:
                rank_zero_warn(f"save_factors: the factors could not be written to {path}: {error}")
        warnings = [report.warning for _, report in reports] if purchase is None else [purchase.warning]
        for warning in [warning for warning in warnings if warning is not None][-1:]:
            rank_zero_warn(warning)  # the last thing that is said


def _is_gone(path: str) -> bool:
    """Tell whether a local file was removed since it was written."""
    return isinstance(get_filesystem(path), LocalFileSystem) and not Path(path).exists()
