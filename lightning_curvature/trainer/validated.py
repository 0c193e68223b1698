"""Factors of validation batches, for edits of what a fine-tune changed.

Curvature protects what it was collected on. The training steps of a fine-tune hold what it is to forget; what it is to
keep is in the validation.
"""

import math
from collections.abc import Collection, Sequence

import lightning.pytorch as pl
from torch import Tensor

from lightning_curvature._checks import listing
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.passes import check_not_empty
from lightning_curvature.collect.validation_step import collected_from
from lightning_curvature.collect.windows import WindowedFactors
from lightning_curvature.editing.weight_editor import WeightEditor
from lightning_curvature.factors.decomposition import TooFewPositionsError
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.recording.options import CollectorOptions
from lightning_curvature.trainer.samples import Arguments, run_again


def validated_factors(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    batches: Sequence[Arguments],
    options: CollectorOptions,
    layers: Collection[str] | None,
    editor: WeightEditor,
) -> KroneckerFactors:
    """Collect over validation steps that run once more. A collective.

    Args:
        trainer: The Trainer.
        module: The module; it is left as it was.
        batches: Arguments of the steps, as many on each process: batches of the validation, or of the training.
        options: What is collected.
        layers: The layers that are needed; None for all that are chosen, without dead ones, which cannot be edited.
        editor: Edits with the factors.

    Raises:
        RuntimeError: If nothing was collected, or not of all layers.
        ValueError: If a layer rests on too few positions.
    """
    collector = Collector(module, options, ranks=editor.ranks)
    windows = WindowedFactors(collector, None, options.settings)
    with collected_from(module, collector):
        editor.ranks.together(lambda: run_again(trainer, module, batches, module.validation_step))
    collector.drain()
    collector.provenance |= {"loop": "validation", "step": trainer.global_step}
    windows.start(complete=True)
    collected = windows.synchronise()
    # All processes have the same factors from here on, and meet the same errors.
    needed = list(collected) if layers is None else layers
    if silent := sorted(set(needed) - set(collected)):
        raise RuntimeError(f"Layers {listing(silent, 3)} had no part in a loss of the validation")
    if layers is None:
        needed = [name for name in needed if all(_is_sound(side) for side in (collected[name].A, collected[name].G))]
    factors = KroneckerFactors({name: collected[name] for name in needed}, collected.provenance)
    check_not_empty(factors)
    if layers is None:
        return factors
    for name in editor.energies(factors):
        try:
            editor.check_positions(factors[name])
        except TooFewPositionsError as error:
            raise ValueError(f"Layer {name!r}: {error}") from error
    return factors


def _is_sound(factor: Tensor) -> bool:
    """Tell whether a factor is finite and not zero."""
    trace = float(factor.diagonal().sum())
    return math.isfinite(trace) and trace > 0.0
