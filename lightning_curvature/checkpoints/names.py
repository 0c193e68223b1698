"""Which tensor of a checkpoint belongs to which layer of a factor file.

Names differ by what wraps the model: ``model.`` of a LightningModule, ``module.`` of a data-parallel wrapper,
``_orig_mod.`` of ``torch.compile``, ``base_layer`` of a LoRA adapter. Marks of wrappers are dropped; of what is left,
one name must be the other one behind a prefix, and the prefix must be the same for all layers. Where a library renames
tensors when it loads them (transformers does), its names count, too.
"""

from collections.abc import Callable, Iterable, Mapping

from lightning_curvature._checks import did_you_mean, listing

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})


def plain(name: str) -> str:
    """Return a name without the marks of wrappers.

    >>> plain("model._orig_mod.layers.0.fc")
    'model.layers.0.fc'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def match_layers(
    layers: Iterable[str], tensors: Iterable[str], renamed: Callable[[], Mapping[str, str]] = dict
) -> dict[str, str]:
    """Return the name of the weight of each layer.

    Args:
        layers: Module names of a factor file, without ``.weight``.
        tensors: Tensor names of a checkpoint.
        renamed: Returns tensors by the name that a library gives them when it loads them; asked if the names in the
            checkpoint do not fit.

    Raises:
        ValueError: If a layer has no weight, or several may be meant; lists all of them with the closest names.
    """
    layers, tensors = list(layers), list(tensors)
    try:
        return _match(layers, tensors)
    except LookupError as error:
        found: Mapping[str, str] = error.args[0]
    loaded = renamed()
    try:
        return {layer: loaded[name] for layer, name in _match(layers, list(loaded)).items()}
    except LookupError as error:
        found = max(found, error.args[0], key=len)
    lost = [layer for layer in layers if layer not in found]
    options = [*tensors, *loaded]
    lines = []
    for layer in lost:
        packed = [
            name for name in tensors if name.endswith((f"{plain(layer)}.qweight", f"{plain(layer)}.weight_packed"))
        ]
        reason = f" Its weight is packed (quantized): {packed[0]!r}." if packed else ""
        lines.append(f"  {layer!r}.{reason or did_you_mean(f'{plain(layer)}.weight', options)}")
    raise ValueError(
        "\n".join(
            [
                f"{len(lines)} of {len(layers)} layers of the factors have no weight in the checkpoint:",
                *lines[:20],
                "Were the factors collected on another model?",
            ]
        )
    )


def _match(layers: list[str], tensors: list[str]) -> dict[str, str]:
    """Match names behind one common prefix; raise ``LookupError`` with the best incomplete match."""
    there = set(tensors)
    if all(f"{layer}.weight" in there for layer in layers):
        return {layer: f"{layer}.weight" for layer in layers}
    weights: dict[str, list[str]] = {}
    for name in tensors:
        if name.endswith(".weight"):
            weights.setdefault(plain(name.removesuffix(".weight")), []).append(name)
    found: dict[tuple[str, str], dict[str, str]] = {}  # by the prefix to cut off a layer, and the one to put before it
    for layer in layers:
        own = plain(layer)
        for weight, names in weights.items():
            if weight == own or weight.endswith(f".{own}"):
                prefixes = ("", weight.removesuffix(own))
            elif own.endswith(f".{weight}"):
                prefixes = (own.removesuffix(weight), "")
            else:
                continue
            if any(part.isdigit() for prefix in prefixes for part in prefix.split(".")):
                continue  # it leads to another block, or to a part of another layer
            if len(names) > 1:
                raise ValueError(f"Layer {layer!r} may be any of {', '.join(map(repr, names))}.")
            found.setdefault(prefixes, {})[layer] = names[0]
    complete = {prefix: matches for prefix, matches in found.items() if len(matches) == len(layers)}
    for matches in complete.values():
        if len(set(matches.values())) < len(layers):
            raise ValueError(f"Several of the layers {listing(layers, 4)} would be one tensor of the checkpoint.")
    if ("", "") in complete:
        return complete["", ""]
    if len(complete) == 1:
        return next(iter(complete.values()))
    if complete:
        options = ", ".join(repr(next(iter(matches.values()))) for matches in complete.values())
        raise ValueError(
            f"Layer {layers[0]!r} may be any of {options}: the checkpoint holds several models with such layers. Save "
            "the one that is meant on its own."
        )
    raise LookupError(max(found.values(), key=len, default={}))
