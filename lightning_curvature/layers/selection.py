"""Which layers are chosen: presets and name patterns.

Presets never take the output head (the layer whose output *is* the logits), a layer with a tied weight, the small
matrices of an adapter (LoRA), a layer whose weight another module reads without calling it, or a copy of the network
that is not trained (a running average, a teacher). A pattern that names such a layer takes it, or is an error. A preset
is an error if it would have to leave out fused experts, or layers whose weights cannot be edited (quantized, computed
before each forward pass).

============  ===========================================================================================
preset        layers
============  ===========================================================================================
"last-mlp"    the layer of "mlp" that ran last: the output projection of a transformer's last MLP, the last hidden
              layer of a plain MLP, the last hidden linear layer of a CNN
"mlp"         in a transformer the MLP layers of its blocks; in a network without attention every hidden linear layer,
              or, if it has none (a CNN whose only linear layer is its head), the convolutions
"attention"   the linear layers of attention modules
"linear"      every ``nn.Linear``, ``Conv1D`` and ``nn.Conv2d`` of one group
============  ===========================================================================================

The role of a layer is read off the modules around it, see :mod:`lightning_curvature.layers.roles`. The linear layers of
state-space and recurrent mixers are neither MLP nor attention: "linear" or a pattern takes them. The first collected
batch tells which layer is the head, and which layer is last; names do not.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_curvature._checks import did_you_mean, listing
from lightning_curvature.layers.choice import LayerChoice, incomplete_message
from lightning_curvature.layers.copies import find_copies
from lightning_curvature.layers.kinds import fused_experts, is_editable, is_matmul, refusal
from lightning_curvature.layers.roles import ATTENTION, MIXER, MLP, block_of, layer_role, mixer_of, mlp_layers

PRESETS = ("last-mlp", "mlp", "attention", "linear")
DEEP = 6
"""A network of more blocks is deep: what it memorized lies in many of them, and the default is ``"mlp"``.

In a fine-tuned SmolLM2-135M (30 blocks) the last MLP alone has to be ruined before recitation falls; in networks of two
to five blocks it holds most of it. See ``docs/decisions.md``."""


class PresetError(ValueError):
    """A preset has no layers in this network, or would leave out some of its layers."""


def default_layers(root: nn.Module) -> str:
    """Return the preset that is used where no layers are asked for: ``"mlp"`` in a deep network, or ``"last-mlp"``.

    >>> default_layers(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    'last-mlp'
    """
    modules = dict(root.named_modules())
    layers = [name for name, module in modules.items() if is_matmul(module)]
    copies, ours = find_copies(modules, layers), dict[str, None]()
    for name in layers:  # of a network and its teacher, one counts
        if not any(copy in ours for copy in copies.get(name, ())):
            ours[name] = None
    blocks = {block_of(name, modules) for name in ours}
    return "mlp" if len(blocks - {""}) > DEEP else "last-mlp"


def choose_layers(root: nn.Module, layers: str | Sequence[str] | None) -> LayerChoice:
    """Look up presets and patterns among the modules of a network.

    Args:
        root: The network; names are relative to it.
        layers: A preset, an fnmatch pattern on module names, or a list of them; None for :func:`default_layers`.

    Raises:
        TypeError: If ``layers`` is neither a string nor a list of strings.
        PresetError: A ``ValueError``; if a preset does not apply to this network.
        ValueError: If a pattern matches no editable layer, or names one that cannot be edited.
    """
    layers = default_layers(root) if layers is None else layers
    entries = [layers] if isinstance(layers, str) else list(layers)
    if not entries or not all(isinstance(entry, str) for entry in entries):
        raise TypeError(f"layers must be a preset {list(PRESETS)}, a pattern, or a list of them, found {layers!r}.")
    modules = dict(root.named_modules())
    tied = _tied(modules)
    editable = [name for name, module in modules.items() if is_editable(module)]
    refused = {name: reason for name, module in modules.items() if (reason := _weight_refusal(module))}
    kinds = {*editable, *refused} - tied
    free = [name for name in modules if name in kinds and not _is_adapter(name, modules)]
    roles = {name: layer_role(name, modules) for name in free if is_matmul(modules[name])}
    presets = _presets(modules, free, roles)
    named: set[str] = set()
    for entry in entries:
        if entry in PRESETS:
            _check_preset(entry, root, presets[entry], refused, roles, editable)
            continue
        matched = [name for name in modules if fnmatchcase(name, entry)]
        for name in matched:
            reason = refusal(modules[name])
            if reason:
                raise ValueError(f"Layer {name!r} (matched by {entry!r}) cannot be edited: {reason}. Leave it out.")
        if not set(matched) & set(editable):
            raise ValueError(
                f"layers={entry!r} is no preset ({', '.join(PRESETS)}) and matches no editable layer."
                f"{did_you_mean(entry, [*PRESETS, *editable])} Editable layers: {listing(editable)}."
            )
        named |= set(matched) & set(editable)
    pools = {entry: presets[entry] for entry in entries if entry in PRESETS}
    wanted = named.union(*(pool for preset in pools.values() for pool in preset))
    candidates = {name: modules[name] for name in editable if name in wanted}
    return LayerChoice(
        modules=candidates,
        named=frozenset(named),
        pools=pools,
        refused=refused,
        uncalled=frozenset(name for name in candidates if _is_uncalled(name, modules)),
        mixed=frozenset(
            name for name in candidates if is_matmul(modules[name]) and _role_of(name, roles, modules) == MIXER
        ),
        blocks={name: block for name in candidates if (block := block_of(name, modules))},
        copies=find_copies(modules, candidates),
    )


def _role_of(name: str, roles: Mapping[str, str | None], modules: Mapping[str, nn.Module]) -> str | None:
    return roles[name] if name in roles else layer_role(name, modules)


def _check_preset(
    preset: str,
    root: nn.Module,
    pools: Sequence[frozenset[str]],
    refused: Mapping[str, str],
    roles: Mapping[str, str | None],
    editable: Sequence[str],
) -> None:
    """Raise ``PresetError`` if a preset matches nothing, or would have to leave out some of its layers.

    Args:
        preset: The preset.
        root: The network.
        pools: Layers that the preset stands for, see :class:`LayerChoice`.
        refused: Layers that cannot be edited, with the reason.
        roles: Roles of the linear layers.
        editable: Layers that can be edited.
    """
    modules, kind = dict(root.named_modules()), type(root).__name__
    experts = [name for name, module in modules.items() if fused_experts(module)]
    if experts and preset != "attention":
        raise PresetError(
            f"Preset {preset!r} would leave out the experts of this {kind}: {listing(experts, 3)} keep them in fused "
            "3-D parameters, which cannot be edited. Name the layers that you want instead, for example "
            "layers='attention'."
        )
    lost = [name for name in refused if name in pools[0]]
    last = [name for name in roles if name in pools[0]][-1:]  # may be the output head, which a preset leaves out
    if lost and lost != last:
        raise PresetError(incomplete_message(preset, lost, refused))
    if any(pools):
        return
    mixers = {name: mixer_of(name, modules) for name, role in roles.items() if role == MIXER}
    if not mixers:
        raise PresetError(
            f"Preset {preset!r} matches no layer of this {kind}; its editable layers are {listing(editable)}."
        )
    name = max(mixers, key=lambda name: ("out" in name.rpartition(".")[2], name))
    pattern = "*" + name[len(mixers[name].rpartition(".")[0]) :]
    shown = list(dict.fromkeys(f"{mixer!r} ({type(modules[mixer]).__name__})" for mixer in mixers.values()))[:3]
    raise PresetError(
        f"Preset {preset!r} does not apply to this {kind}: its linear layers belong to state-space or recurrent "
        f"mixers, which are neither MLP nor attention: {', '.join(shown)}. Name layers that are called, for example "
        f"layers=[{pattern!r}]; its editable layers are {listing(editable)}."
    )


def _weight_refusal(module: nn.Module) -> str | None:
    """Return why a layer cannot be edited although its kind can be, or None."""
    is_kind = is_matmul(module) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    return refusal(module) if is_kind else None


def _presets(
    modules: Mapping[str, nn.Module], free: Sequence[str], roles: Mapping[str, str | None]
) -> dict[str, list[frozenset[str]]]:
    """Return the pools of each preset, see :class:`LayerChoice`.

    Args:
        modules: Every module of the network, by name.
        free: Layers that a preset may take: neither tied nor part of an adapter.
        roles: Roles of the linear layers among them.
    """
    attention = frozenset(name for name, role in roles.items() if role == ATTENTION)
    mixers = frozenset(name for name, role in roles.items() if role == MIXER)
    hidden = frozenset(roles) - attention - mixers
    convolutions = frozenset(free) - frozenset(roles)
    if attention or mixers or any(isinstance(module, nn.MultiheadAttention) for module in modules.values()):
        # The embedding, pooling and head of a transformer lie outside of its blocks.
        in_blocks = mlp_layers(roles, modules)
        if in_blocks or any(block_of(name, modules) for name in mixers):
            hidden = in_blocks
        else:
            hidden = frozenset(name for name in hidden if roles[name] == MLP) or hidden
    mlp = [hidden, frozenset[str]() if mixers else convolutions]
    return {"last-mlp": mlp, "mlp": mlp, "attention": [attention], "linear": [frozenset(roles) | convolutions]}


def _tied(modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the modules whose weight is a parameter of another module, too."""
    uses = Counter(id(weight) for module in modules.values() for weight in module.parameters(recurse=False))
    return {name for name, module in modules.items() if uses[id(module._parameters.get("weight"))] > 1}


def _is_adapter(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a layer belongs to an adapter of peft around another layer, or was replaced by a trained copy.

    peft keeps the layer inside an adapter as ``base_layer``, and the module that a trained copy replaces as
    ``original_module``, beside ``modules_to_save``.
    """
    path = name.split(".")
    for depth, part in enumerate(path):
        above = ".".join(path[:depth])
        if part != "base_layer" and f"{above}.base_layer".lstrip(".") in modules:
            return True
        if part == "original_module" and f"{above}.modules_to_save".lstrip(".") in modules:
            return True
    return False


def _is_uncalled(name: str, modules: Mapping[str, nn.Module]) -> bool:
    parent, _, leaf = name.rpartition(".")
    return leaf == "out_proj" and isinstance(modules[parent], nn.MultiheadAttention)
