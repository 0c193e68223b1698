"""The report of an edit."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_curvature._checks import listing
from lightning_curvature._groups import MANY
from lightning_curvature.editing.cost import PairCost
from lightning_curvature.editing.report_table import edit_table

RUINOUS = 0.35
"""Rise of a loss, in nats, at which a model is on its way out: 1.4 times the perplexity.

Predicted for a single layer it means that the perplexity is likely to double, since predictions are low by two."""
RUINOUS_OF_SEVERAL, RUINOUS_OF_SOFT = 0.1, 0.03
"""The same as predicted for several layers, and for a soft edit, of which predictions are lower still.

Source: ``docs/decisions.md``, "What is edited where nobody says it"."""


SHOWN = 5
"""Of many layers so many are named in a remark."""


@dataclass(frozen=True)
class LayerEdit:
    """What an edit did to one layer.

    Args:
        energy: Share of the method's mass to keep, as it was asked for; None if a budget was.
        energy_kept: Share that was kept.
        kept: Kept coefficients.
        total: All coefficients, ``d_out * d_in``.
        relative_change: ``||W' - W|| / ||W||`` (Frobenius).
        changed: Entries of the stored weight that are not what they were, after rounding to its dtype.
        tensor: Name of the weight.
        num_inputs: Positions behind the layer's factors.
        dropped: Share of the positions seen that did not count.
        num_gradients: Positions behind the factor of the outputs.
        needed: Positions that the factors should rest on, the larger side of the weight; 0 if no factor is read.
        also: Names of the tensors that are tied to the weight, and edited with it.
        predicted_loss: Predicted rise of the loss, in nats per loss position, to second order, see
            :mod:`lightning_curvature.editing.cost`; None if no factors are known.
        costliest: The coefficient whose change costs most; None if none is known.
        update: ``||W - W0|| / ||W||``, how far the layer is from its reference; None without one.
        update_kept: Share of the update that is kept, ``||W' - W0|| / ||W - W0||``; None without a reference.
            An adapter is an update: there, ``relative_change`` and ``changed`` are of the update, too.
        rank_loss: Share of the squared norm of the edited update that the rank of its adapter cannot hold; None if the
            layer has none.
    """

    energy: float | None
    energy_kept: float
    kept: int
    total: int
    relative_change: float
    changed: int
    tensor: str
    num_inputs: int
    dropped: float
    num_gradients: int = 0
    needed: int = 0
    also: tuple[str, ...] = ()
    predicted_loss: float | None = None
    costliest: PairCost | None = None
    update: float | None = None
    update_kept: float | None = None
    rank_loss: float | None = None

    @property
    def positions(self) -> int:
        """Positions behind the factor that rests on fewer."""
        return min(self.num_inputs, self.num_gradients)


@dataclass(frozen=True)
class EditReport:
    """What an edit did; ``print(report)`` shows a table.

    Args:
        layers: By module name.
        method: Name of the editing method.
        provenance: Where the factors come from.
        skipped: Why a layer was not edited although it was asked for, by layer.
        reference: What the weights were fine-tuned from, for an edit of the update.
        others: Weights outside of the layers that an edit of the update moved towards the reference.
        norms: Batch norms that keep running statistics.
        renewed: Those whose statistics were estimated anew for the edited weights.
        was_measured: Whether the edit was chosen by what it costs, so that the predicted loss warns of nothing.
    """

    layers: Mapping[str, LayerEdit]
    method: str = "kfac"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    reference: str | None = None
    others: int = 0
    norms: int = 0
    renewed: int = 0
    was_measured: bool = False

    @property
    def update_kept(self) -> float | None:
        """Share of the update that the edited layers keep on the average of their coefficients; None if none has one.

        Other weights that differ from the reference keep the geometric mean of this share and of the factor of all
        updates.
        """
        shares = [(edit.update_kept, edit.total) for edit in self.layers.values() if edit.update_kept is not None]
        return sum(share * total for share, total in shares) / sum(total for _, total in shares) if shares else None

    @property
    def keeps_nothing(self) -> bool:
        """Whether no coefficient of any layer is left, so that no edit can be stronger."""
        return not any(edit.kept for edit in self.layers.values())

    @property
    def changes_nothing(self) -> bool:
        """Whether all weights are what they were."""
        return not (self.others or any(edit.changed for edit in self.layers.values()))

    @property
    def predicted_loss(self) -> float | None:
        """Predicted rise of the loss by all layers, in nats per loss position; None if that of a layer is not known."""
        costs = [edit.predicted_loss for edit in self.layers.values() if edit.predicted_loss is not None]
        return sum(costs) if len(costs) == len(self.layers) else None

    @property
    def warning(self) -> str | None:
        """What a user must not overlook, that the model is likely to be gone; None if nothing says so."""
        limit = RUINOUS if len(self.layers) == 1 else RUINOUS_OF_SEVERAL
        limit = RUINOUS_OF_SOFT if self.method.endswith("soft") else limit
        if self.was_measured or self.predicted_loss is None or self.predicted_loss < limit:
            return None
        name = max(self.layers, key=lambda layer: self.layers[layer].predicted_loss or 0.0)
        return (
            f"This edit is likely to ruin the model: its loss is predicted to rise by {self.predicted_loss:.2g} nats, "
            f"by {self.layers[name].predicted_loss:.2g} in layer {name!r} alone, and it rises by more than that. "
            f"Measure the edited model, or make a milder edit: budget={limit / 50:.1g} (--budget {limit / 50:.1g})."
        )

    def with_tied(self, names: Mapping[str, Iterable[str]]) -> "EditReport":
        """Return the report with the names of the tensors that are tied to each layer's weight.

        Args:
            names: All names of the tensor of each layer's weight; the weight's own name may be among them.
        """
        layers = {
            layer: dataclasses.replace(edit, also=tuple(name for name in names[layer] if name != edit.tensor))
            for layer, edit in self.layers.items()
        }
        return dataclasses.replace(self, layers=layers)

    def __str__(self) -> str:
        source = ", ".join(f"{key}={value}" for key, value in self.provenance.items())
        title = f"Edited layers (method {self.method}; {source})" if source else f"Edited layers (method {self.method})"
        if self.reference is not None:
            title = title.replace("Edited layers", f"Edited updates since {self.reference!r}", 1)
        return "\n".join([title, edit_table(self.layers), *self._remarks()])

    def _remarks(self) -> list[str]:
        """Return sentences on what the table does not show."""
        few = [
            f"{name!r} ({edit.positions} of {edit.needed})"
            for name, edit in self.layers.items()
            if edit.positions < edit.needed
        ]
        remarks = [f"Not edited: {reason}" for reason in self.skipped.values()]
        if self.predicted_loss is not None:
            remarks.append(self._loss_remark(self.predicted_loss))
        if self.update_kept is not None:
            rest = f", and {self.others} other weights that fine-tuning moved go back, too" if self.others else ""
            remarks.append(f"The layers keep {self.update_kept:.1%} of their update on the average{rest}.")
        if lost := {name: edit.rank_loss for name, edit in self.layers.items() if edit.rank_loss}:
            name = max(lost, key=lost.__getitem__)
            remarks.append(
                "An edited adapter keeps its rank, which cannot hold all of the edited update: it loses at most "
                f"{lost[name]:.1%} of its square (layer {name!r})."
            )
        if self.renewed:
            remarks.append(f"Statistics of {_norms(self.renewed)} were estimated anew, on training data.")
        if (stale := self.norms - self.renewed) and not self.changes_nothing:
            remarks.append(
                f"{_norms(stale)} {'keep' if stale > 1 else 'keeps'} statistics of the unedited weights, which may "
                "harm the model. Estimate them anew on training data: torch.optim.swa_utils.update_bn(loader, model)."
            )
        if few:
            remarks.append(
                f"Factors that rest on fewer positions than the larger side of the weight: {_some(few)}. Their "
                "spectrum looks steeper than it is, and the edit removes more than it should: collect more positions."
            )
        for name, edit in self.layers.items():
            if edit.also and edit.changed:
                remarks.append(
                    f"The weight of layer {name!r} is that of {listing(edit.also)}, too, which is edited with it."
                )
        return [*remarks, *([] if self.warning is None else [self.warning])]

    def _loss_remark(self, total: float) -> str:
        """Return a sentence on the cost of the edit, and on where most of it comes from."""
        remark = f"Predicted cost: the loss rises by {total:.2g} nats per loss position, to second order, without data."
        costs = {name: edit.predicted_loss for name, edit in self.layers.items() if edit.predicted_loss}
        if not costs:
            return remark
        name, *others = sorted(costs, key=lambda layer: -costs[layer])
        pair = self.layers[name].costliest
        of_pair = "" if pair is None else f", of them {pair.nats:.2g} for the pair ({pair.row}, {pair.column}) alone"
        remark = f"{remark} Most of it in layer {name!r}: {costs[name]:.2g}{of_pair}."
        if len(self.layers) <= MANY:
            return remark
        return f"{remark} Then in {', '.join(f'{layer!r} ({costs[layer]:.2g})' for layer in others[:SHOWN])}."


def _some(entries: Sequence[str]) -> str:
    """Return the first of some entries, and how many there are beside."""
    rest = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return ", ".join(entries[:SHOWN]) + rest


def _norms(count: int) -> str:
    return f"{count} batch norm{'s' * (count > 1)}"
