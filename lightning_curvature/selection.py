"""Which layers are chosen: presets and name patterns.

Presets never take the output head (the layer whose output *is* the logits), a weight that is shared with another
module, or the small matrices of an adapter (LoRA); a pattern that names such a layer does. A preset that would have to
leave out layers whose weights are packed (quantized), or fused experts, is an error.

============  ===========================================================================================
preset        layers
============  ===========================================================================================
"last-mlp"    of the layers of "mlp" the one that ran last: the output projection of a transformer's last MLP,
              the last hidden layer of a plain MLP, the last hidden linear layer of a CNN
"mlp"         MLP layers: in a transformer the linear layers of its blocks outside attention; in a network
              without attention every hidden linear layer; in one without hidden linear layers (a CNN whose
              only linear layer is its head) the convolutions
"attention"   the linear layers of attention modules
"linear"      every ``nn.Linear`` and ``Conv1D``
============  ===========================================================================================

A transformer's *blocks* are the composite modules held by an ``nn.Sequential`` or ``nn.ModuleList``. Which layer is the
head and which one is last is read off the first collected batch, not guessed from names.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lightning_curvature._checks import did_you_mean, listing
from lightning_curvature.layers import fused_experts, is_editable, is_matmul, is_packed, refusal

PRESETS = ("last-mlp", "mlp", "attention", "linear")

_ATTENTION_NAME = re.compile(r"attn|attention", re.IGNORECASE)
_ATTENTION_CLASS = re.compile(r"(attn|attention)\d*$", re.IGNORECASE)
_ATTENTION_LEAF = re.compile(r"((to_)?(q|k|v|kv|qkv)|(q|k|v|o|qkv|out|in)_proj|query|key|value|to_out|c_attn)(_lin)?")


@dataclass(frozen=True)
class LayerChoice:
    """The layers that a choice may take, before a batch has shown the rest.

    Args:
        modules: Candidates by module name.
        named: Candidates that a pattern asked for; they are taken whatever they are.
        pools: For each chosen preset, its candidates in falling order of preference; the first pool that holds a
            layer beside the output head counts.
        uncalled: Candidates whose weight another module reads without calling them.
    """

    modules: Mapping[str, nn.Module]
    named: frozenset[str]
    pools: Mapping[str, Sequence[frozenset[str]]]
    uncalled: frozenset[str] = frozenset()

    def resolve(self, fired: Iterable[str], heads: Collection[str]) -> list[str]:
        """Return the chosen layers, given what one batch showed.

        Args:
            fired: Candidates in the order in which they first ran.
            heads: Candidates whose output is the logits.

        Returns:
            Their names; last those that did not run yet, and may do so in later batches.

        Raises:
            RuntimeError: If a chosen layer never runs, or if no layer is left.
        """
        fired = list(dict.fromkeys(fired))
        chosen = set(self.named)
        for preset, pools in self.pools.items():
            pool = next((pool - set(heads) for pool in pools if pool - set(heads)), frozenset[str]())
            if preset == "last-mlp":
                pool = frozenset([name for name in fired if name in pool][-1:])
            chosen |= pool
        if not chosen:
            raise RuntimeError(
                f"Layers {listing(self.pools)}: nothing to edit besides the output head ({listing(heads)}). "
                "Name the layers, for example layers=['features.*']; the head is taken only when a pattern names it."
            )
        silent = sorted(chosen - set(fired))
        uncalled = [name for name in silent if name in self.uncalled]
        if uncalled or len(silent) == len(chosen):
            raise RuntimeError(
                f"Chosen layers {listing(uncalled or silent)} never ran in the first collected batch (with gradients), "
                "so they have no factors. (nn.MultiheadAttention reads the weight of its out_proj without calling it.) "
                f"Choose among the layers that ran: {listing(fired)}."
            )
        return [name for name in fired if name in chosen] + silent


def choose_layers(root: nn.Module, layers: str | Sequence[str]) -> LayerChoice:
    """Look up presets and patterns among the modules of a network.

    Args:
        root: The network; names are relative to it.
        layers: A preset, an fnmatch pattern on module names, or a list of them.

    Raises:
        TypeError: If ``layers`` is neither a string nor a list of strings.
        ValueError: If an entry matches no editable layer, or names one that cannot be edited.
    """
    entries = [layers] if isinstance(layers, str) else list(layers)
    if not entries or not all(isinstance(entry, str) for entry in entries):
        raise TypeError(f"layers must be a preset {list(PRESETS)}, a pattern, or a list of them, found {layers!r}.")
    modules = dict(root.named_modules())
    tied = _tied(modules)
    editable = [name for name, module in modules.items() if is_editable(module)]
    free = [name for name in editable if name not in tied]
    presets = _presets(modules, [name for name in free if not _is_adapter(name, modules)])
    packed = [name for name, module in modules.items() if is_matmul(module) and is_packed(module)]
    complete = _presets(modules, [name for name in [*free, *packed] if not _is_adapter(name, modules)])
    named: set[str] = set()
    for entry in entries:
        if entry in PRESETS:
            experts = [name for name, module in modules.items() if fused_experts(module)]
            if experts and entry != "attention":
                raise ValueError(
                    f"Preset {entry!r} would leave out the experts of this {type(root).__name__}: "
                    f"{listing(experts, 3)} keep them in fused 3-D parameters, which cannot be edited. Name the layers "
                    "that you want instead, for example layers='attention'."
                )
            left_out = sorted(complete[entry][0] & set(packed))
            if left_out:
                raise ValueError(
                    f"Preset {entry!r} would leave out layers whose weights are packed (quantized): "
                    f"{listing(left_out, 3)}. Load the model in full precision, edit it, and quantize it afterwards."
                )
            if not any(presets[entry]):
                raise ValueError(f"Preset {entry!r} matches no layer of this {type(root).__name__}; "
                                 f"its editable layers are {listing(editable)}.")  # fmt: skip
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
    return LayerChoice(
        modules={name: modules[name] for name in editable if name in wanted},
        named=frozenset(named),
        pools=pools,
        uncalled=frozenset(name for name in editable if _is_uncalled(name, modules)),
    )


def _presets(modules: Mapping[str, nn.Module], free: Sequence[str]) -> dict[str, list[frozenset[str]]]:
    linear = frozenset(name for name in free if is_matmul(modules[name]))
    attention = frozenset(name for name in linear if _is_attention(name, modules))
    hidden = linear - attention
    if attention or any(isinstance(module, nn.MultiheadAttention) for module in modules.values()):
        # The embedding, pooling and head of a transformer lie outside of its blocks.
        hidden = frozenset(name for name in hidden if _in_block(name, modules)) or hidden
    mlp = [hidden, frozenset(free) - linear]
    return {"last-mlp": mlp, "mlp": mlp, "attention": [attention], "linear": [linear]}


def _tied(modules: Mapping[str, nn.Module]) -> set[str]:
    owners = Counter(id(weight) for module in modules.values() for weight in module.parameters(recurse=False))
    return {name for name, module in modules.items() if owners[id(getattr(module, "weight", None))] > 1}


def _is_adapter(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a layer belongs to an adapter around another layer, which peft keeps as ``base_layer``."""
    path = name.split(".")
    for depth in range(len(path)):
        if path[depth] != "base_layer" and f"{'.'.join(path[:depth])}.base_layer".lstrip(".") in modules:
            return True
    return False


def _is_uncalled(name: str, modules: Mapping[str, nn.Module]) -> bool:
    parent, _, leaf = name.rpartition(".")
    return leaf == "out_proj" and isinstance(modules[parent], nn.MultiheadAttention)


def _is_attention(name: str, modules: Mapping[str, nn.Module]) -> bool:
    *path, leaf = name.split(".")
    parent = modules.get(".".join(path))
    return (
        _ATTENTION_LEAF.fullmatch(leaf) is not None
        or any(_ATTENTION_NAME.search(part) for part in path[-2:])
        or (parent is not None and _ATTENTION_CLASS.search(type(parent).__name__) is not None)
    )


def _in_block(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a composite module held by a container lies above a layer."""
    path = name.split(".")
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return any(isinstance(modules[".".join(path[:depth])], containers) for depth in range(len(path) - 1))
