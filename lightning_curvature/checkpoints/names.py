"""Which tensor of a checkpoint belongs to which layer of a factor file.

Names differ by what wraps the model: ``model.`` of a LightningModule, ``module.`` of a data-parallel wrapper,
``_orig_mod.`` of ``torch.compile``, ``base_layer`` of a LoRA adapter, ``modules_to_save.NAME`` of a copy that is
trained beside one. Marks of wrappers are dropped; of what is left, one name must be the other one behind a prefix, and
the prefix must be the same for all layers. Where a library renames tensors when it loads them (transformers does), its
names count, too.
"""

from collections.abc import Callable, Iterable, Mapping

from lightning_curvature._checks import did_you_mean, listing

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})


def plain(name: str) -> str:
    """Return a name without the marks of wrappers.

    >>> plain("model._orig_mod.layers.0.fc")
    'model.layers.0.fc'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while "modules_to_save" in parts[:-1]:
        place = parts.index("modules_to_save")
        del parts[place : place + 2]  # with the name of the adapter
    return ".".join(parts)


def match_layers(
    layers: Iterable[str], tensors: Iterable[str], renamed: Callable[[], Mapping[str, str]] = dict
) -> dict[str, str]:
    """Return the name of the weight of each layer.

    Args:
        layers: Module names of a factor file, without ``.weight``.
        tensors: Tensor names of a checkpoint.
        renamed: Returns the tensors by the names that a library gives them when it loads them. It is called if the
            names in the checkpoint do not fit.

    Raises:
        ValueError: If a layer has no weight, or several may be meant; lists all of them with the closest names.
    """
    layers, tensors = list(dict.fromkeys(layers)), list(tensors)
    matches = _best_matches(layers, tensors)
    if len(matches) == len(layers):
        return matches
    loaded = renamed()
    loaded_matches = _best_matches(layers, list(loaded))
    if len(loaded_matches) == len(layers):
        return {layer: loaded[name] for layer, name in loaded_matches.items()}
    matched = max(matches, loaded_matches, key=len)
    lines = [_missing(layer, tensors, loaded) for layer in layers if layer not in matched]
    raise ValueError(
        "\n".join(
            [
                f"{len(lines)} of {len(layers)} layers of the factors have no weight in the checkpoint:",
                *lines[:20],
                "Were the factors collected on another model?",
            ]
        )
    )


def match_some(layers: Iterable[str], tensors: Iterable[str]) -> dict[str, str]:
    """Return the name of the weight of each layer that has one, as :func:`match_layers`; the others may lack theirs."""
    return _best_matches(list(dict.fromkeys(layers)), list(tensors))


def _missing(layer: str, tensors: list[str], loaded: Iterable[str]) -> str:
    """Return a line that says of a layer without a weight what may be meant."""
    weight = plain(layer)
    packed = [name for name in tensors if name.endswith((f"{weight}.qweight", f"{weight}.weight_packed"))]
    if packed:
        return f"  {layer!r}. Its weight is packed (quantized): {packed[0]!r}."
    return f"  {layer!r}.{did_you_mean(f'{weight}.weight', [*tensors, *loaded])}"


def _best_matches(layers: list[str], tensors: list[str]) -> dict[str, str]:
    """Return the weight of each layer, or of as many as can be matched behind one common prefix.

    Raises:
        ValueError: If all layers can be matched, but in several ways, or several layers with one weight.
    """
    names = set(tensors)
    if all(f"{layer}.weight" in names for layer in layers):
        return {layer: f"{layer}.weight" for layer in layers}
    by_prefixes = _matches_by_prefixes(layers, tensors)
    complete = {prefixes: matches for prefixes, matches in by_prefixes.items() if len(matches) == len(layers)}
    for matches in complete.values():
        if len(set(matches.values())) < len(layers):
            raise ValueError(f"Several of the layers {listing(layers, 4)} would be one tensor of the checkpoint.")
    if ("", "") in complete:
        return complete["", ""]
    if len(complete) > 1:
        options = ", ".join(repr(next(iter(matches.values()))) for matches in complete.values())
        raise ValueError(
            f"Layer {layers[0]!r} may be any of {options}: the checkpoint holds several models with such layers. Save "
            "only the one that you want, in a file of its own."
        )
    return max(by_prefixes.values(), key=len, default={})


def _matches_by_prefixes(layers: list[str], tensors: list[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Return which weights layers have if a prefix is cut off their names, and another one is put before them.

    Returns:
        By the prefix to cut off and the one to put there, one of which is empty: the weight of each layer that has one.

    Raises:
        ValueError: If a layer may have several weights with one pair of prefixes.
    """
    weights: dict[str, list[str]] = {}
    for name in tensors:
        if name.endswith(".weight"):
            weights.setdefault(plain(name.removesuffix(".weight")), []).append(name)
    matches: dict[tuple[str, str], dict[str, str]] = {}
    for layer in layers:
        module = plain(layer)
        for weight, names in weights.items():
            if weight == module or weight.endswith(f".{module}"):
                prefixes = ("", weight.removesuffix(module))
            elif module.endswith(f".{weight}"):
                prefixes = (module.removesuffix(weight), "")
            else:
                continue
            if any(part.isdigit() for prefix in prefixes for part in prefix.split(".")):
                continue  # it leads to another block, or to a part of another layer
            if len(names) > 1:
                raise ValueError(f"Layer {layer!r} may be any of {', '.join(map(repr, names))}.")
            matches.setdefault(prefixes, {})[layer] = names[0]
    return matches
