"""The adapters of a saved folder to edit, one layer after the other."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_curvature.checkpoints.adapter import Adapter, AdapterFolder
from lightning_curvature.checkpoints.base import Checkpoint
from lightning_curvature.checkpoints.names import match_some
from lightning_curvature.editing.adapters import no_adapter, trained_copy
from lightning_curvature.editing.file_layers import EditedTensor, FileLayers, LayerEditor, StreamedFactors
from lightning_curvature.editing.low_rank import LowRank, edit_update
from lightning_curvature.editing.reference import BASE
from lightning_curvature.editing.report import LayerEdit
from lightning_curvature.factors.layer import LayerFactors


class AdapterLayers(FileLayers):
    """The layers of an adapter's folder to edit; arguments as :class:`FileLayers`.

    Layers of the factors without an adapter are frozen, and are passed over.

    Raises:
        ValueError: If no layer has an adapter, or there is a reference.
    """

    def __init__(
        self, editor: LayerEditor, folder: AdapterFolder, factors: StreamedFactors, before: Mapping[str, Any] | None
    ) -> None:
        if editor.reference is not None:
            raise ValueError(
                f"{folder.path} is an adapter, and an adapter is the update since its base: give no reference "
                "(reference=, --reference)."
            )
        self._adapters = folder.adapters
        self._adapter_of: dict[str, Adapter] = {}
        super().__init__(editor, folder, factors, before)
        self.editor = editor.based_on(BASE, editor.scale)

    @override
    def _matched(self) -> dict[str, str]:
        found = match_some(self.energies, [f"{layer}.weight" for layer in self._adapters])
        if not found:
            raise ValueError(no_adapter(self.energies, self._adapters))
        self._adapter_of = {layer: self._adapters[name.removesuffix(".weight")] for layer, name in found.items()}
        lora = {name for adapter in self._adapters.values() for name in (adapter.A, adapter.B)}
        rest = [layer for layer in self.energies if layer not in found]
        copies = match_some(rest, [name for name in self.checkpoint.shapes() if name not in lora])
        self._skipped = {layer: trained_copy(layer) for layer in copies}
        self.energies = {layer: energy for layer, energy in self.energies.items() if layer in found}
        return {layer: adapter.B for layer, adapter in self._adapter_of.items()}

    @override
    def check_origin(self, source: Any, hashes: Mapping[str, str], force: bool) -> None:
        """Compare nothing: the factors say on which weights of the base they were collected, which are not here."""

    @override
    def _part(self, layer: str) -> tuple[Tensor, LayerFactors]:
        return self._update(layer).product(), self.factors.on_device(layer)

    @override
    def _edited(self, layer: str, factors: LayerFactors) -> tuple[list[EditedTensor], LayerEdit]:
        adapter, old = self._adapter_of[layer], self._update(layer)
        new, edit = edit_update(self.editor, layer, old, factors, self.energies[layer])
        edited = [EditedTensor(adapter.A, old.A, new.A), EditedTensor(adapter.B, old.B, new.B)]
        return edited, dataclasses.replace(edit, tensor=adapter.tensors)

    def _update(self, layer: str) -> LowRank:
        adapter = self._adapter_of[layer]
        return LowRank(self.checkpoint.read(adapter.A), self.checkpoint.read(adapter.B), adapter.scaling)


def layers_to_edit(
    editor: LayerEditor, checkpoint: Checkpoint, factors: StreamedFactors, before: Mapping[str, Any] | None
) -> FileLayers:
    """Return the layers of a checkpoint of any format to edit; arguments and errors as :class:`FileLayers`."""
    if isinstance(checkpoint, AdapterFolder):
        return AdapterLayers(editor, checkpoint, factors, before)
    return FileLayers(editor, checkpoint, factors, before)
