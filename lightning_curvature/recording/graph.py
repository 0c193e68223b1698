"""Questions to the autograd graph: what reaches what, which module made a tensor, which softmax a tensor goes into."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

# Nodes that hand values on as they are: views, copies and casts. Their names end with "Backward" and a number.
_HANDED_ON = (
    "Alias",
    "AsStrided",
    "Chunk",
    "Clone",
    "Contiguous",
    "Expand",
    "Index",
    "IndexSelect",
    "Movedim",
    "Narrow",
    "Permute",
    "Reshape",
    "ReshapeAlias",
    "Select",
    "Slice",
    "Split",
    "SplitWithSizes",
    "Squeeze",
    "Swap",
    "T",
    "ToCopy",
    "Transpose",
    "Unbind",
    "UnsafeSplit",
    "UnsafeView",
    "Unsqueeze",
    "View",
)
_REORDERED = ("T", "Transpose", "Permute", "Movedim", "Swap")
_PRODUCTS = ("Addmm", "Mm", "Bmm", "Baddbmm", "Linear", "Convolution", "Addmv", "Mv")
_SOFTMAX = ("Softmax", "LogSoftmax")
_LEAF = "torch::autograd::AccumulateGrad"


def node_of(tensor: Tensor) -> Node:
    """Return the node of a tensor that requires a gradient, also of a leaf."""
    return get_gradient_edge(tensor).node


def ancestors(start: Node | None, barrier: Node | None = None) -> Iterator[Node]:
    """Walk down the autograd graph from ``start``, which comes first, and not past ``barrier``."""
    stack, seen = [start], {barrier}
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        yield node
        seen.add(node)
        stack.extend(parent for parent, _ in node.next_functions)


def reaches(start: Node | None, goals: set[Node], barrier: Node | None = None) -> bool:
    """Tell whether a walk down the autograd graph from ``start`` meets a goal without passing ``barrier``."""
    return any(node in goals for node in ancestors(start, barrier))


def reached(start: Node | None, goals: Collection[Node]) -> set[Node]:
    """Return the goals that a walk down the autograd graph from ``start`` meets; it ends when all are met."""
    left = set(goals)
    if left:
        for node in ancestors(start):
            left.discard(node)
            if not left:
                break
    return set(goals) - left


@dataclass(frozen=True)
class Origin:
    """What made a tensor: the last layer below it, and what was done to that layer's output.

    Attributes:
        node: The layer's own node in the graph: one call of it.
        parameters: Addresses of the layer's parameters; empty if none are known.
        operations: What was done to the output, names of nodes; views, copies and casts are left out.
    """

    node: Node
    parameters: frozenset[int]
    operations: tuple[str, ...]

    def is_head_of(self, other: "Origin") -> bool:
        """Tell whether another tensor comes from the same layer in the same way, from this call of it or another."""
        same = self.node is other.node or (bool(self.parameters) and self.parameters == other.parameters)
        return same and self.operations == other.operations

    def looks_like(self, other: "Origin") -> bool:
        """Tell whether another tensor may come from the same place, where no parameters are known."""
        same = (self.operations, self.node.name()) == (other.operations, other.node.name())
        return not self.parameters and not other.parameters and same


def origin_of(node: Node, parameters: Collection[int]) -> Origin:
    """Return the layer that made a tensor.

    Args:
        node: The tensor's node.
        parameters: Addresses (``id``) of the network's parameters.
    """
    operations = list[str]()
    while True:
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        leaves = {parent: _leaf_below(parent) for parent in parents}
        known = frozenset(id(leaf) for leaf in leaves.values() if leaf is not None and id(leaf) in parameters)
        above = [parent for parent in parents if leaves[parent] is None]
        kind = _kind(node)
        if kind in _PRODUCTS:
            return Origin(node, known or _frozen_weight(node), tuple(operations))
        if len(above) != 1:
            return Origin(node, known, tuple(operations))
        if kind not in _HANDED_ON:  # a scale of its known belongs to what was done
            operations.append(f"{kind} {sorted(known)}" if known else kind)
        (node,) = above


def _frozen_weight(node: Node) -> frozenset[int]:
    """Return the address of the weight of a product whose parameters need no gradient, as autograd has kept it."""
    saved: Any = node
    weight = next((getattr(saved, name) for name in ("_saved_mat2", "_saved_weight") if hasattr(saved, name)), None)
    return frozenset() if weight is None else frozenset([-weight.data_ptr()])


def _leaf_below(node: Node) -> Tensor | None:
    """Return the leaf that a node hands on, or None if something is computed below it."""
    while node.name() != _LEAF:
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if len(parents) != 1 or _kind(node) not in _HANDED_ON:
            return None
        (node,) = parents
    leaf: Tensor = node.variable  # type: ignore[attr-defined]
    return leaf


def leaves_below(tensor: Tensor) -> list[Tensor]:
    """Return the leaves that a tensor was computed from."""
    return [node.variable for node in ancestors(node_of(tensor)) if node.name() == _LEAF]  # type: ignore[attr-defined]


def between(start: Node | None, goal: Node) -> list[Node]:
    """Return the nodes on all paths from ``start`` down to ``goal``, without the goal."""
    walked = list(ancestors(start, barrier=goal))
    children: dict[Node, list[Node]] = {}
    for node in walked:
        for parent, _ in node.next_functions:
            if parent is not None:
                children.setdefault(parent, []).append(node)
    stack, on_path = [goal], set[Node]()
    while stack:
        for child in children.get(stack.pop(), ()):
            if child not in on_path:
                on_path.add(child)
                stack.append(child)
    return [node for node in walked if node in on_path]


@dataclass(frozen=True)
class SoftmaxUse:
    """A softmax that a tensor goes into: its node, the shape of its output, and the dimension of its classes."""

    node: Node
    shape: tuple[int, ...]
    dim: int

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.shape[self.dim]


def softmax_uses(path: Collection[Node]) -> list[SoftmaxUse]:
    """Return the softmaxes and log-softmaxes on a path, and the normalisers (logsumexp) over one dimension."""
    uses = []
    for node in path:
        saved: Any = node
        if _kind(node) in _SOFTMAX:
            shape, dims = saved._saved_result.shape, [saved._saved_dim]
        elif _kind(node) == "Logsumexp":
            shape, dims = saved._saved_self.shape, list(saved._saved_dim)
        else:
            continue
        if len(shape) and len(dims) == 1:
            uses.append(SoftmaxUse(node, tuple(shape), _signed(dims[0]) % len(shape)))
    return uses


def path_below(start: Node, goal: Node) -> tuple[list[str], bool]:
    """Return the operations between a node and one below it that are no views, and whether dimensions are exchanged."""
    kinds = [_kind(node) for node in between(start, goal) if node is not start]
    return [kind for kind in kinds if kind not in _HANDED_ON], any(kind in _REORDERED for kind in kinds)


def hides_its_operations(path: Collection[Node]) -> bool:
    """Tell whether a path holds a function that torch does not see into: a fused or compiled one."""
    return any(hasattr(node, "_forward_cls") or "CppNode" in node.name() for node in path)


def _kind(node: Node) -> str:
    """Return a node's name without its ending: ``"View"`` for ``ViewBackward0``."""
    return node.name().rstrip("0123456789").removesuffix("Backward")


def _signed(dim: int) -> int:
    """Return a dimension as it was given: torch stores negative ones as large unsigned numbers."""
    return dim - 2**64 if dim >= 2**63 else dim
