"""Which layers are chosen: presets and name patterns.

Presets never take the output head (the layer whose output *is* the logits), a weight that is shared with another
module, the small matrices of an adapter (LoRA), a layer whose weight another module reads without calling it, or a copy
of the network that is not trained (a running average, a teacher); a pattern that names such a layer does, or is an
error. A preset that would have to leave out layers whose weights cannot be edited (quantized, computed anew before each
forward pass), or fused experts, is an error.

============  ===========================================================================================
preset        layers
============  ===========================================================================================
"last-mlp"    of the layers of "mlp" the one that ran last: the output projection of a transformer's last MLP,
              the last hidden layer of a plain MLP, the last hidden linear layer of a CNN
"mlp"         MLP layers: in a transformer those of its blocks; in a network without attention every hidden linear
              layer; in one without hidden linear layers (a CNN whose only linear layer is its head) the convolutions
"attention"   the linear layers of attention modules
"linear"      every ``nn.Linear`` and ``Conv1D``
============  ===========================================================================================

What a layer is for is read off the modules around it, see :mod:`lightning_curvature.roles`. The linear layers of
state-space and recurrent mixers are neither MLP nor attention: "linear" or a pattern takes them. Which layer is the
head and which one is last is read off the first collected batch, not guessed from names.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_curvature._checks import did_you_mean, listing
from lightning_curvature.copies import find_copies, is_idle_copy
from lightning_curvature.layers import fused_experts, is_editable, is_matmul, refusal
from lightning_curvature.roles import ATTENTION, MIXER, MLP, block_of, is_gate, layer_role, mixer_of, mlp_layers

PRESETS = ("last-mlp", "mlp", "attention", "linear")


@dataclass(frozen=True)
class LayerChoice:
    """The layers that a choice may take, before a batch has shown the rest.

    Args:
        modules: Candidates by module name.
        named: Candidates that a pattern asked for; they are taken whatever they are.
        pools: For each chosen preset, what it stands for in falling order of preference; the first pool that holds a
            layer beside the output head counts.
        refused: Why layers of the pools that are no candidates cannot be edited.
        uncalled: Candidates whose weight another module reads without calling them.
        mixed: Candidates in mixers, whose weights a kernel may read without calling them.
        blocks: Of candidates in a block, the name of the innermost one.
        copies: For candidates in one of several modules of the same structure, their counterparts in the others.
    """

    modules: Mapping[str, nn.Module]
    named: frozenset[str]
    pools: Mapping[str, Sequence[frozenset[str]]]
    refused: Mapping[str, str] = field(default_factory=dict)
    uncalled: frozenset[str] = frozenset()
    mixed: frozenset[str] = frozenset()
    blocks: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def resolve(
        self, fired: Iterable[str], heads: Collection[str], dead: Collection[str] = (), read: Collection[str] = ()
    ) -> list[str]:
        """Return the chosen layers, given what one batch showed.

        A preset takes what ran of its candidates. Of the rest it leaves out what never will, and says so: layers whose
        weight is read without a call, and copies of the network that are not trained. The others may run, or get
        gradients, in later batches.

        Args:
            fired: Candidates in the order in which they first ran.
            heads: Candidates whose output is the logits.
            dead: Candidates that ran without a graph, or on which the logits do not depend; whether or not they are
                among ``fired``.
            read: Candidates whose weight some function was seen to read.

        Returns:
            Their names in the order in which they ran; last those that did not run yet.

        Raises:
            RuntimeError: If a chosen layer never runs, or if no layer is left.
        """
        order = list(dict.fromkeys([*fired, *sorted(set(dead) - set(fired))]))
        live = {name for name in order if name not in dead}
        uncalled = self._uncalled(set(order)) | (set(read) - set(order))
        passed_over = uncalled | self._passed_over(set(order))
        spared = passed_over | self._idle(live, dead)
        chosen, left_out = set(self.named), set[str]()
        for preset, pools in self.pools.items():
            pool = self._pool(preset, pools, heads, spared)
            kept = (pool - spared) or pool
            left_out |= pool - kept
            chosen |= _last(kept, order, live) if preset == "last-mlp" else kept
        if not chosen:
            raise RuntimeError(
                f"Layers {listing(self.pools)}: nothing to edit besides the output head ({listing(heads)}). "
                "Name the layers, for example layers=['features.*']; the head is taken only when a pattern names it."
            )
        silent = sorted(chosen - set(order))
        never = [name for name in silent if name in uncalled]
        if never or len(silent) == len(chosen):
            raise RuntimeError(
                f"Chosen layers {listing(never or silent)} never ran in the first collected batch (with gradients), "
                "so they have no factors. (nn.MultiheadAttention reads the weight of its out_proj without calling it; "
                "torchvision's Swin and the kernels of state-space mixers do the like.) Choose among the layers that "
                f"ran: {listing(order)}."
            )
        self._tell(left_out - chosen, passed_over)
        return [name for name in order if name in chosen] + silent

    def _idle(self, live: set[str], dead: Collection[str]) -> set[str]:
        """Return candidates without gradients that are copies of trained ones, or a teacher's."""
        without = [name for name in self.modules if name not in live]
        return {name for name in without if is_idle_copy(name, self.modules, self.copies.get(name, ()), live, dead)}

    def _pool(
        self, preset: str, pools: Sequence[frozenset[str]], heads: Collection[str], spared: Collection[str]
    ) -> frozenset[str]:
        """Return the first pool of a preset with a candidate beside the head that is not spared."""
        beside: list[frozenset[str]] = []
        for pool in pools:
            lost = sorted(pool & set(self.refused))
            if len(lost) > bool(not heads):  # one layer that is no candidate may be the head, if no candidate is
                raise RuntimeError(_incomplete(preset, lost, self.refused))
            beside.append(pool - set(heads) - set(lost))
            if beside[-1] - set(spared):
                return beside[-1]
        return next(filter(None, beside), frozenset())

    def _uncalled(self, ran: set[str]) -> Set[str]:
        """Return candidates that will not be called: what is known beforehand, and what a mixer that ran left out."""
        parents = {name.rpartition(".")[0] for name in ran}
        in_kernels = {name for name in self.mixed - ran if name.rpartition(".")[0] in parents}
        return (self.uncalled - ran) | in_kernels

    def _passed_over(self, ran: set[str]) -> Set[str]:
        """Return candidates that ran in none of several repeated blocks, all of which ran."""
        groups: dict[str, list[str]] = {}
        for name in self.modules:
            groups.setdefault(re.sub(r"\d+", "#", name), []).append(name)
        busy = {self.blocks[name] for name in ran if name in self.blocks}
        silent = (group for group in groups.values() if len(group) > 1 and not ran.intersection(group))
        return {name for group in silent if all(self.blocks.get(name) in busy for name in group) for name in group}

    def _tell(self, left_out: Set[str], uncalled: Set[str]) -> None:
        """Say which candidates of a preset are not taken, and why."""
        for names, reason in (
            (left_out & uncalled, "the modules that hold them ran and did not call them"),
            (left_out - uncalled, "they belong to a copy of the network, or to a teacher, that is not trained"),
        ):
            if names:
                rank_zero_info(f"layers={listing(self.pools)} leaves out {listing(sorted(names))}: {reason}.")


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
            name for name in candidates if is_matmul(modules[name]) and _role(name, roles, modules) == MIXER
        ),
        blocks={name: block for name in candidates if (block := block_of(name, modules))},
        copies=find_copies(modules, candidates),
    )


def _role(name: str, roles: Mapping[str, str | None], modules: Mapping[str, nn.Module]) -> str | None:
    return roles[name] if name in roles else layer_role(name, modules)


def _check_preset(
    preset: str,
    root: nn.Module,
    pools: Sequence[frozenset[str]],
    refused: Mapping[str, str],
    roles: Mapping[str, str | None],
    editable: Sequence[str],
) -> None:
    """Raise ``ValueError`` if a preset matches nothing, or would have to leave out some of what it stands for."""
    modules, kind = dict(root.named_modules()), type(root).__name__
    experts = [name for name, module in modules.items() if fused_experts(module)]
    if experts and preset != "attention":
        raise ValueError(
            f"Preset {preset!r} would leave out the experts of this {kind}: {listing(experts, 3)} keep them in fused "
            "3-D parameters, which cannot be edited. Name the layers that you want instead, for example "
            "layers='attention'."
        )
    lost = [name for name in refused if name in pools[0]]
    last = [name for name in roles if name in pools[0]][-1:]  # may be the output head, which a preset leaves out
    if lost and lost != last:
        raise ValueError(_incomplete(preset, lost, refused))
    if any(pools):
        return
    mixers = {name: mixer_of(name, modules) for name, role in roles.items() if role == MIXER}
    if not mixers:
        raise ValueError(
            f"Preset {preset!r} matches no layer of this {kind}; its editable layers are {listing(editable)}."
        )
    name = max(mixers, key=lambda name: ("out" in name.rpartition(".")[2], name))
    pattern = "*" + name[len(mixers[name].rpartition(".")[0]) :]
    shown = list(dict.fromkeys(f"{mixer!r} ({type(modules[mixer]).__name__})" for mixer in mixers.values()))[:3]
    raise ValueError(
        f"Preset {preset!r} does not apply to this {kind}: its linear layers belong to state-space or recurrent "
        f"mixers, which are neither MLP nor attention: {', '.join(shown)}. Name layers that are called, for example "
        f"layers=[{pattern!r}]; its editable layers are {listing(editable)}."
    )


def _incomplete(preset: str, lost: Sequence[str], refused: Mapping[str, str]) -> str:
    """Return the words of the error that a preset would have holes."""
    reason = refused[lost[0]]
    packed = "packed or quantized" in reason
    what = "whose weights are packed (quantized)" if packed else "that cannot be edited"
    remedy = (
        "Load the model in full precision, edit it, and quantize it afterwards"
        if packed
        else "Or name the layers that you want instead"
    )
    return f"Preset {preset!r} would leave out layers {what}: {listing(lost, 3)} ({reason}). {remedy}."


def _weight_refusal(module: nn.Module) -> str | None:
    """Return why a layer of a kind that can be edited cannot be, or None."""
    is_kind = is_matmul(module) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    return refusal(module) if is_kind else None


def _presets(
    modules: Mapping[str, nn.Module], free: Sequence[str], roles: Mapping[str, str | None]
) -> dict[str, list[frozenset[str]]]:
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
    return {"last-mlp": mlp, "mlp": mlp, "attention": [attention], "linear": [frozenset(roles)]}


def _last(pool: Collection[str], fired: Sequence[str], live: Collection[str]) -> set[str]:
    """Return the layer of a pool that ran last: of those with a graph if there are any, gates and routers aside."""
    ran = [name for name in fired if name in pool]
    ran = [name for name in ran if name in live] or ran
    return set(([name for name in ran if not is_gate(name)] or ran)[-1:]) or set(pool)


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
