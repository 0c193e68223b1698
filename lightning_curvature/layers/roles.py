"""What a linear layer is for: attention, an MLP, or a state-space or recurrent mixer.

A layer's own name decides if a word in it says ``attention`` or ``mlp``; an ``out_proj`` alone says nothing. Otherwise
the modules around the layer decide, the nearest first, up to the block that holds it: what a module is made of
(parameters of a state space; query, key and value projections together), and the names of its class and of the
attribute that holds it.

A *block* is a composite module held by an ``nn.ModuleList`` or ``nn.ModuleDict``, or beside others by an
``nn.Sequential``.
"""

import re
from collections.abc import Mapping, Sequence

from torch import nn

ATTENTION, MLP, MIXER = "attention", "mlp", "mixer"

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_ENDINGS = r"(_?(v?\d+|layer|block|module|bn))*$"
_IS_MIXER = re.compile(
    r"(mamba\d?|mamba\d?_?mixer|ssm|ss2d|s4d?|s5|s6|state_?space|rwkv\d?|time_?mix(ing)?|hyena(_?operator|_?filter)?"
    r"|retention|recurrent|rg_?lru|lru|[msx]_?lstm(_?cell)?|min_?gru|min_?lstm|delta_?net|delta_?attention|short_?conv)"
    + _ENDINGS,
    re.IGNORECASE,
)
_IS_RECURRENT_CLASS = re.compile(r"^(conv)?(lstm|gru|rnn)$|(lstm|gru|rnn)_?cell$", re.IGNORECASE)
_IS_ATTENTION_CLASS = re.compile(
    r"(attn|attention)(head|pool(ing)?(head)?|latent|subsample)?" + _ENDINGS, re.IGNORECASE
)
_IS_MLP_CLASS = re.compile(
    r"(mlp|ffn?|ffw|feed_?forward|dense_?(gated_?)?act_?dense|intermediate|(swi|ge|re)?glu|experts?|moe)" + _ENDINGS,
    re.IGNORECASE,
)
_ATTENTION_NAME = re.compile(r"attn|attention", re.IGNORECASE)
_MLP_NAME = re.compile(
    r"mlp|ffn|ffw|feed_?forward|(^|_)ff\d*(_|$)|dense_?relu|expert|(^|_)moe(_|$)|(^|_)intermediate$", re.IGNORECASE
)
_MLP_LEAF = re.compile(
    r"(fc|lin|linear|dense)_?\d+|wi(_\d)?|(gate|up|down|gate_up|up_gate)_proj|c_fc|dense_\w+_to_\w+|intermediate|ffn\w*",
    re.IGNORECASE,
)
_IS_MLP_OUTPUT = re.compile(r"(?<!Self)(?<!Attention)Output$")  # of BERT, beside "intermediate"
_NO_MLP_NAME = re.compile(r"cpb|bias|(^|_)pos|rope|router", re.IGNORECASE)
_OUTSIDE = re.compile(r"merg(er|ing)$|down_?sampl\w*$|patch_?embed\w*$|embeddings?$|pooler$|reduction$", re.IGNORECASE)
_GATE = re.compile(r"(\w*_)?(gate|router|receptance|gating)", re.IGNORECASE)
_ROUTER = re.compile(r"(\w*_)?router(_\w*)?|gate", re.IGNORECASE)
_ENTRY, _EXIT = re.compile(r"(in|linear_(in|x))(_?proj\w*)?"), re.compile(r"(out|linear_out)(_?proj\w*)?")

_STATE_SPACE = frozenset(
    ["A_log", "A_logs", "log_A", "A_log_bias", "dt_bias", "time_decay", "time_first", "time_faaaa"]
)
_AFFIXES = re.compile(r"^(to|in_proj|linear|proj|w)_?|_?(proj\w*|lin|linear|layer|dense|a|b)$", re.IGNORECASE)
_QUERY, _KEY, _VALUE = {"q", "query", "queries"}, {"k", "key", "keys"}, {"v", "value", "values"}
_FUSED = {"qkv", "qkvz", "query_key_value", "queries_keys_values", "c_attn", "mixed_qkv", "qkvg"}
_FUSED_KEYS = {"kv", "key_value", "keys_values", "kv_a", "kv_b"}
_OUTPUTS = {"o", "out", "output", "outputs", "merge", "dense", "c", "", "projection", "g", "gate"}


def layer_role(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return ``"attention"``, ``"mlp"`` or ``"mixer"`` for a linear layer; None if neither its name nor a module tells.

    Args:
        name: Its module name.
        modules: Every module of the network, by name.
    """
    path = name.split(".")
    leaf = path[-1]
    if not leaf.isdigit() and (role := _role_by_name(leaf)):
        return role
    start = max(block_depth(name, modules), 1)
    for depth in range(len(path) - 1, start - 1, -1):
        module = modules[".".join(path[:depth])]
        if role := _role_by_module(module, _attribute(path, depth), path[depth]):
            if role == MLP and any(_is_mixer(path, above, modules) for above in range(start + 1, depth)):
                return MIXER  # such as the small network that computes the filter of a long convolution
            has_mlp_name = depth == len(path) - 1 and _MLP_LEAF.fullmatch(leaf)
            return MLP if role == ATTENTION and has_mlp_name and not _projections(module) else role
    root = modules.get("")
    return ATTENTION if start == 1 and root is not None and _holds_projection(root, path[0]) else None


def block_depth(name: str, modules: Mapping[str, nn.Module]) -> int:
    """Return how deep the innermost block above a layer lies, in parts of the layer's name; 0 if there is no block."""
    path = name.split(".")
    for depth in range(len(path) - 1, 0, -1):
        module, parent = modules[".".join(path[:depth])], modules[".".join(path[: depth - 1])]
        if not isinstance(module, _CONTAINERS) and _holds_blocks(parent):
            return depth
    return 0


def _holds_blocks(module: nn.Module) -> bool:
    """Tell whether a module is a container of blocks, rather than one module with a norm or an activation beside it."""
    if not isinstance(module, nn.Sequential):
        return isinstance(module, _CONTAINERS)
    composite = [any(True for _ in child.children()) for child in module.children()]
    return sum(composite) != 1 or len(composite) == 1


def block_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the name of the innermost block above a layer; an empty string if there is none."""
    return ".".join(name.split(".")[: block_depth(name, modules)])


def mixer_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the name of the innermost mixer above a layer; of the layer's parent if no module above is a mixer."""
    path = name.split(".")
    depths = (depth for depth in range(len(path) - 1, 0, -1) if _is_mixer(path, depth, modules))
    return ".".join(path[: next(depths, -1)])


def _attribute(path: Sequence[str], depth: int) -> str:
    """Return the attribute that holds a module; for a numbered module, the attribute that holds its container."""
    return path[depth - 2] if path[depth - 1].isdigit() and depth > 1 else path[depth - 1]


def _is_mixer(path: Sequence[str], depth: int, modules: Mapping[str, nn.Module]) -> bool:
    return _role_by_module(modules[".".join(path[:depth])], _attribute(path, depth), path[depth]) == MIXER


def mlp_layers(roles: Mapping[str, str | None], modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """Return the layers of MLPs in a network that has attention or mixers.

    In a block where :func:`layer_role` finds MLP layers, the layers are these; in another block they are all linear
    layers outside of attention and mixers. Embeddings, poolers, patch merging, routers of experts and the head are
    never among them.

    Args:
        roles: Role of each linear layer, see :func:`layer_role`.
        modules: Every module of the network, by name.
    """
    mixing_blocks = {block_of(name, modules) for name, role in roles.items() if role in (ATTENTION, MIXER)}
    stages = {block[: dot.start()] for block in mixing_blocks for dot in re.finditer(r"[.]", block)}
    blocks = {name: _mlp_block(name, modules, stages) for name in roles}
    with_known_mlp = {blocks[name] for name, role in roles.items() if role == MLP}

    def belongs(name: str, role: str | None) -> bool:
        if _is_router(name, modules):
            return False
        if role == MLP:
            return block_depth(name, modules) > 0
        in_unknown_block = bool(blocks[name]) and blocks[name] not in with_known_mlp
        return role is None and in_unknown_block and not _is_outside(name, modules)

    return frozenset(name for name, role in roles.items() if belongs(name, role))


def is_gate(name: str) -> bool:
    """Tell whether a layer is named a gate or a router, so that its output is not the output of an MLP."""
    return _GATE.fullmatch(name.rpartition(".")[2]) is not None


def _mlp_block(name: str, modules: Mapping[str, nn.Module], stages: set[str]) -> str:
    """Return the block of a layer; an empty string if there is none.

    If the innermost block is a stage, which holds blocks itself, return the innermost element of a container inside it.
    """
    block = block_of(name, modules)
    if block and block not in stages:
        return block
    path = name.split(".")
    for depth in range(len(path) - 1, block.count(".") + bool(block), -1):
        element = ".".join(path[:depth])
        if isinstance(modules[".".join(path[: depth - 1])], _CONTAINERS) and element not in stages:
            return element
    return ""


def _is_outside(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether the name or class of a module from the block to the layer says that the layer is not in an MLP."""
    path = name.split(".")
    for depth in range(max(block_depth(name, modules), 1), len(path) + 1):
        kind = type(modules[".".join(path[:depth])]).__name__
        if _OUTSIDE.search(path[depth - 1]) or _OUTSIDE.search(kind):
            return True
    return False


def _is_router(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a layer chooses among the experts beside it, or is part of a module that does."""
    *path, leaf = name.split(".")
    if any(_ROUTER.fullmatch(part) for part in path[block_depth(name, modules) :]):
        return True
    beside = [child for child, _ in modules[".".join(path)].named_children() if child != leaf]
    return is_gate(name) and any("expert" in child.lower() for child in beside)


def _role_by_name(name: str) -> str | None:
    """Return the role that a name states, or None; the last word in it counts (``attention_mlp`` is an MLP)."""
    words = [(match.start(), ATTENTION) for match in _ATTENTION_NAME.finditer(name)]
    if not _NO_MLP_NAME.search(name):
        words += [(match.start(), MLP) for match in _MLP_NAME.finditer(name)]
    return max(words)[1] if words else None


def _role_by_module(module: nn.Module, attribute: str, child: str) -> str | None:
    """Return the role that a module gives a layer below it, or None.

    Args:
        module: The module.
        attribute: Name of the attribute that holds the module.
        child: Name of the module's child that the layer is, or lies below.
    """
    if _is_state_space(module):
        return MIXER
    kind = type(module).__name__
    if not isinstance(module, _CONTAINERS):
        if _IS_MIXER.search(kind) or (_IS_RECURRENT_CLASS.search(kind) and not _holds_recurrence(module)):
            return MIXER
        if isinstance(module, nn.MultiheadAttention) or _IS_ATTENTION_CLASS.search(kind):
            return ATTENTION
        if _IS_MLP_CLASS.search(kind) and not _NO_MLP_NAME.search(attribute):
            return MLP
    if _IS_MIXER.fullmatch(attribute):
        return MIXER
    if role := _role_by_name(attribute):
        return role
    if attribute == "output" and _IS_MLP_OUTPUT.search(kind):
        return MLP
    if _holds_projection(module, child):
        return ATTENTION
    return MIXER if _is_gated_convolution(module) else None


def _is_state_space(module: nn.Module) -> bool:
    tensors = {name for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]}
    return bool(tensors & _STATE_SPACE) or {"x_proj", "dt_proj"} <= {name for name, _ in module.named_children()}


def _holds_recurrence(module: nn.Module) -> bool:
    return any(isinstance(submodule, nn.RNNBase) for submodule in module.modules())


def _is_gated_convolution(module: nn.Module) -> bool:
    """Tell whether a module is a depthwise convolution over time between an input and an output projection."""
    children = dict(module.named_children())
    linear = [name for name, child in children.items() if isinstance(child, nn.Linear)]
    depthwise = any(
        isinstance(child, nn.Conv1d) and child.groups == child.in_channels > 1 for child in children.values()
    )
    return depthwise and any(map(_ENTRY.fullmatch, linear)) and any(map(_EXIT.fullmatch, linear))


def _stem(name: str) -> str:
    """Return a projection's name without prefix and suffix: ``q`` of ``to_q``, ``q_proj`` and ``Wq``."""
    return _AFFIXES.sub("", _AFFIXES.sub("", name.lower()))


def _projections(module: nn.Module) -> set[str]:
    """Return the children of a module that are query, key and value projections; none if one of them is missing."""
    stems = {name: _stem(name) for name, _ in module.named_children()}
    present = set(stems.values())
    separate = all(present & kind for kind in (_QUERY, _KEY, _VALUE))
    if separate or present & _FUSED or (present & _QUERY and present & _FUSED_KEYS):
        return {name for name, stem in stems.items() if stem in _QUERY | _KEY | _VALUE | _FUSED | _FUSED_KEYS}
    return set()


def _holds_projection(module: nn.Module, child: str) -> bool:
    """Tell whether a child belongs to attention: one of its projections, or the output projection beside them."""
    projections = _projections(module)
    return child in projections or (bool(projections) and _stem(child) in _OUTPUTS)
