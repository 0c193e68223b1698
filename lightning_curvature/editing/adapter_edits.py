"""Edits of LoRA adapters: an adapter is the update of a fine-tune, and its base stays as it is, bit for bit.

In a module with active adapters, an edit reaches the adapters of the layers that have factors. Layers without an
adapter are frozen, and stay. Copies that are trained as a whole (``modules_to_save``) have a start of their own: they
stay, too, unless a reference says what it was.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lightning_curvature._checks import listing
from lightning_curvature.checkpoints.adapter import Adapter
from lightning_curvature.distributed import Ranks, spread_like, whole
from lightning_curvature.editing.adapters import Adapted, no_adapter, trained_copy
from lightning_curvature.editing.file_layers import LayerEditor
from lightning_curvature.editing.low_rank import LowRank, edit_update
from lightning_curvature.editing.others import other_weights
from lightning_curvature.editing.reference import BASE, MatchedReference
from lightning_curvature.editing.report import EditReport, LayerEdit
from lightning_curvature.editing.results import sort_results
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.factors.layer import LayerFactors
from lightning_curvature.layers.ties import check_tie, find_tie, tied_names, with_replaced


class AdapterEditor(LayerEditor, Protocol):
    """What the edit of adapters needs of an editor; every ``WeightEditor`` is one."""

    ranks: Ranks
    skip_faulty: bool


class _UpdateOfAdapter:
    """The work on the adapter of one layer, whose tensors are gathered. A collective if they are sharded."""

    def __init__(self, name: str, adapter: Adapter, tensors: Mapping[str, Tensor], factors: KroneckerFactors) -> None:
        self.name, self.adapter, self.tensors, self.factors = name, adapter, tensors, factors
        A, B = (whole(tensors[key].detach()) for key in (adapter.A, adapter.B))
        self.update = LowRank(A, B, adapter.scaling)
        self.size = float(len(B) * A.shape[1])

    def part(self, editor: AdapterEditor) -> tuple[Tensor, LayerFactors]:  # noqa: ARG002
        """Return the update, and the factors of its layer."""
        return self.update.product(), self.factors[self.name]

    def edit(self, editor: AdapterEditor, energy: float) -> tuple[Tensor, LayerEdit]:
        """Return the new tensors, one behind the other, and the report."""
        new, edit = edit_update(editor, self.name, self.update, self.factors[self.name], energy)
        return torch.cat([new.A.flatten(), new.B.flatten()]), dataclasses.replace(edit, tensor=self.adapter.tensors)

    def unpacked(self, result: Tensor) -> dict[str, Tensor]:
        """Return the new tensors by name, spread as the old ones are; none if they did not change."""
        old = (self.update.A, self.update.B)
        parts = torch.split(result, [tensor.numel() for tensor in old])
        new = [part.view(tensor.shape).to(tensor, copy=True) for part, tensor in zip(parts, old, strict=True)]
        if all(map(torch.equal, new, old)):
            return {}
        names = (self.adapter.A, self.adapter.B)
        return {name: spread_like(tensor, self.tensors[name]) for name, tensor in zip(names, new, strict=True)}


class _UpdateOfCopy:
    """The work on one trained copy, whose weight is gathered. A collective if it is sharded."""

    def __init__(
        self, name: str, tensors: Mapping[str, Tensor], factors: KroneckerFactors, start: MatchedReference
    ) -> None:
        self.name, self.factors, self.start = name, factors, start
        self.stored = tensors[f"{name}.weight"]
        self.weight = whole(self.stored.detach())
        self.size = float(self.weight.numel())

    def part(self, editor: AdapterEditor) -> tuple[Tensor, LayerFactors]:
        """Return the update, and the factors of its layer."""
        factors = self.factors[self.name]
        return editor.part(self.name, self.weight, factors, factors.transposed, self.start)

    def edit(self, editor: AdapterEditor, energy: float) -> tuple[Tensor, LayerEdit]:
        """Return the new weight, and the report."""
        factors = self.factors[self.name]
        return editor.edit_weight(self.name, self.weight, factors, energy, factors.transposed, self.start)

    def unpacked(self, result: Tensor) -> dict[str, Tensor]:
        """Return the new weight by its name, spread as the old one is."""
        return {f"{self.name}.weight": spread_like(result, self.stored)}


def edit_adapters(
    editor: AdapterEditor, adapted: Adapted, tensors: Mapping[str, Tensor], factors: KroneckerFactors
) -> tuple[dict[str, Tensor], EditReport]:
    """Return new tensors of adapters by name, and a report; with a reference, of trained copies, too.

    With several processes each one edits a part of the layers, and every process gets all new tensors.

    Args:
        editor: Edits the updates.
        adapted: The adapters of the layers that have factors.
        tensors: The tensors of the module, by name. Sharded ones are gathered.
        factors: Factors of the layers.

    Raises:
        ValueError: If no layer of the factors has an adapter, if the tensors of two adapters are tied, or as
            :meth:`~lightning_curvature.editing.weight_editor.WeightEditor.edit_layers`.
    """
    energies, ranks, reference = editor.energies(factors), editor.ranks, editor.reference
    pairs = {name: adapted.adapters[name] for name in energies if name in adapted.adapters}
    _check_ties(pairs, tensors, ranks)
    work: dict[str, _UpdateOfAdapter | _UpdateOfCopy] = {
        name: _UpdateOfAdapter(name, adapter, tensors, factors) for name, adapter in pairs.items()
    }
    copies, skipped = [name for name in energies if name in adapted.copies], dict[str, str]()
    if reference is None:
        editor = editor.based_on(BASE, editor.scale)
        skipped = {name: trained_copy(name) for name in copies}
    elif copies:
        start = reference.matched({name: f"{name}.weight" for name in copies})
        work |= {name: _UpdateOfCopy(name, tensors, factors, start) for name in copies}
    if not work:
        raise ValueError(no_adapter(energies, adapted.bases))
    owners = factors.owners or ranks.owners({name: of_layer.size for name, of_layer in work.items()})
    mine = {name: of_layer for name, of_layer in work.items() if owners[name] == ranks.rank}
    editor = editor.prepared({name: partial(of_layer.part, editor) for name, of_layer in mine.items()})
    jobs = {name: partial(of_layer.edit, editor, energies[name]) for name, of_layer in mine.items()}
    made, edits, faulty = sort_results(ranks.spread(work, jobs, owners), editor.skip_faulty)
    new: dict[str, Tensor] = {}
    for name, result in made.items():
        new |= work[name].unpacked(result)
    source = BASE.name if reference is None else reference.name
    return new, EditReport(edits, editor.method, factors.provenance, {**faulty, **skipped}, source)


def edit_saved_adapters(
    editor: AdapterEditor, adapted: Adapted, state_dict: Mapping[str, Tensor], factors: KroneckerFactors
) -> tuple[dict[str, Tensor], EditReport]:
    """Return the state dict of a module with edited adapters, and a report; arguments and errors as above."""
    lacking = [f"{name}.weight" for name in adapted.modules if f"{name}.weight" not in state_dict]
    if lacking:
        raise ValueError(f"The state dict lacks tensors of the module's adapters: {listing(lacking, 3)}.")
    new, report = edit_adapters(editor, adapted, state_dict, factors)
    held = {name: state_dict[f"{name}.weight"] for name in adapted.held if f"{name}.weight" in state_dict}
    tied = tied_names(held, state_dict)
    others = other_weights(editor.reference, state_dict, tied, report, editor.share_of_others(report))
    new |= others
    replaced = {name: state_dict[name] for name in new}
    return with_replaced(state_dict, replaced, new), dataclasses.replace(report, others=len(others))


def _check_ties(adapters: Mapping[str, Adapter], tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Raise ``ValueError`` if two adapters share a tensor. A collective."""
    for side in ("A", "B"):
        tie = find_tie({name: tensors[getattr(adapter, side)] for name, adapter in adapters.items()})
        for of_rank in ranks.gather(tie):
            check_tie(of_rank)
