"""The LoRA adapters of a module that are active, and which of them can be edited."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from lightning_curvature._checks import listing
from lightning_curvature.checkpoints.adapter import Adapter, check_kind, refusal
from lightning_curvature.checkpoints.names import match_some


class Adapted(NamedTuple):
    """The active adapters of a module.

    Args:
        adapters: The adapter of each layer, by the layer's name in the factors; tensors as the module names them.
        copies: Layers of the factors that are trained copies.
        bases: Names of all layers under active adapters, whether they have factors or not.
    """

    adapters: dict[str, Adapter]
    copies: list[str]
    bases: list[str]

    @property
    def modules(self) -> list[str]:
        """Names of the modules whose weights an edit may change."""
        names = [name for adapter in self.adapters.values() for name in (adapter.A, adapter.B)]
        return [*(name.removesuffix(".weight") for name in names), *self.copies]

    @property
    def held(self) -> list[str]:
        """Names of the layers whose weights are never moved towards a reference as other weights are."""
        return [*self.bases, *self.copies]


def find_adapters(module: nn.Module, layers: Iterable[str]) -> Adapted | None:
    """Return the active adapters of layers; None if no layer of the module has one that is active.

    Args:
        module: The network.
        layers: Layers of the factors. Adapted layers may have their names in the module, with or without
            ``.base_layer``, or those in the model that the adapters were put on.

    Raises:
        ValueError: If the adapter of one of these layers cannot be edited.
    """
    tuned = {name: layer for name, layer in module.named_modules() if _active(layer)}
    if not tuned:
        return None
    known = {name for name, _ in module.named_modules()}
    layers = list(layers)
    places = {layer: layer.removesuffix(".base_layer") for layer in layers if layer in known}
    elsewhere = match_some([layer for layer in layers if layer not in known], [f"{name}.weight" for name in tuned])
    places |= {layer: name.removesuffix(".weight") for layer, name in elsewhere.items()}
    configs = [held for part in module.modules() if isinstance(held := getattr(part, "peft_config", None), dict)]
    found = {layer: _adapter(layer, name, tuned[name], configs) for layer, name in places.items() if name in tuned}
    copies = [layer for layer in layers if layer in known and ".modules_to_save." in f".{layer}"]
    return Adapted(found, copies, [f"{name}.base_layer" for name in tuned])


def has_adapters(module: nn.Module) -> bool:
    """Tell whether a layer of a module has an active adapter."""
    return any(_active(layer) for layer in module.modules())


def _active(layer: nn.Module) -> list[str]:
    """Return the names of the active adapters of a layer; none if it is no layer of peft, which is not imported."""
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None or not isinstance(layer, tuners.BaseTunerLayer) or layer.disable_adapters:
        return []
    held = {name for kind in layer.adapter_layer_names for name in getattr(layer, kind, None) or ()}
    return [name for name in layer.active_adapters if name in held]


def _adapter(layer: str, name: str, lora: Any, configs: Sequence[Mapping[str, Any]]) -> Adapter:
    """Return the adapter of a layer, which is an update of its base.

    Args:
        layer: Name of the layer in the factors.
        name: Its name in the module.
        lora: The layer of peft.
        configs: The configurations that the module holds, by name of the adapter.

    Raises:
        ValueError: If the layer has several active adapters, or one that is merged, or is of another kind.
    """
    active = _active(lora)
    if lora.merged:
        raise ValueError(
            f"Layer {layer!r}: its adapter {listing(lora.merged_adapters)} is merged into the weight of the base. Take "
            "it out first (unmerge_adapter)."
        )
    if len(active) > 1:
        raise ValueError(
            f"Layer {layer!r} has several active adapters, {listing(active)}: choose one of them (set_adapter), or "
            "make one of them (add_weighted_adapter)."
        )
    (adapter,) = active
    what = f"Layer {layer!r}: its adapter {adapter!r}"
    config = next((held[adapter] for held in configs if adapter in held), None)
    if config is not None:
        check_kind(config.to_dict(), what)
    pair = [getattr(lora, kind, {}) for kind in ("lora_A", "lora_B")]
    if not all(adapter in held and isinstance(held[adapter], nn.Linear) for held in pair):
        raise refusal(what, f"{type(lora).__name__}, on a layer of the kind {type(lora.get_base_layer()).__name__}")
    if (variant := getattr(lora, "lora_variant", {}).get(adapter)) is not None:
        raise refusal(what, type(variant).__name__)
    if pair[1][adapter].bias is not None:
        raise refusal(what, "LoRA with a bias (lora_bias)")
    A, B = (f"{name}.{kind}.{adapter}.weight".lstrip(".") for kind in ("lora_A", "lora_B"))
    return Adapter(A, B, float(lora.scaling[adapter]))


def refuse_adapters(layers: Iterable[str], tensors: Iterable[str]) -> None:
    """Raise ``ValueError`` if saved tensors hold adapters of some layers, whose scaling is not saved with them.

    Args:
        layers: Names of layers in the state dict.
        tensors: Names of its tensors.
    """
    adapted = {name.partition(".lora_A.")[0] for name in tensors if ".lora_A." in name}
    for layer in layers:
        if layer.endswith(".base_layer") and layer.removesuffix(".base_layer") in adapted:
            raise ValueError(
                f"Layer {layer!r} is the base under a LoRA adapter, and what was learned is in the adapter, whose "
                "scaling is not saved with its tensors. Give the module, too (edit_state_dict(..., module=)), or save "
                "the adapter with save_pretrained, and edit that folder."
            )


def trained_copy(layer: str) -> str:
    """Return why a copy that is trained as a whole stays as it is."""
    return (
        f"Layer {layer!r} has no adapter but a copy that was trained as a whole (modules_to_save): without a reference "
        "its update is not known."
    )


def no_adapter(layers: Iterable[str], adapted: Iterable[str]) -> str:
    """Return what is wrong where no layer of the factors has an adapter."""
    return (
        f"None of the layers {listing(layers, 4)} has an adapter, and the base under adapters is not edited. Collect "
        f"factors of the adapted layers: {listing(adapted, 4)}. To edit the base, disable the adapters first "
        "(disable_adapter_layers)."
    )
