"""Losses whose curvature is known: what one call says about its logits, and which functions are other losses."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from lightning_curvature.distributed import whole


@dataclass(eq=False)
class OutputLoss:
    """Outputs of a model in one loss, and what the loss does with them.

    Args:
        logits: As the loss received them, with their graph.
        class_dim: Dimension of the classes, or of outputs that belong to one position.
        counted: Which loss positions count (not ``ignore_index``): bool, the logits' shape without the classes.
        kind: ``"softmax"`` over the classes; ``"binary"``, a sigmoid of each logit; or ``"squared"``, half the squared
            difference to a target.
        entries: Which logits count, bool, their shape with the classes last; None for a softmax, of which a row counts
            or not.
        denominator: What ``reduction="mean"`` divided by; 1 for sums; None if the loss is not known.
        output: The loss; its graph node identifies it. None for logits named by the user.
        log_probabilities: Whether ``logits`` must be normalised, as ``nll_loss`` wants them.
        arrived: Gradients of the training objective that arrived at the loss, once its backward has run.
        twins: Further losses over the same softmax, such as those of mixed labels.
        edge: Place of the loss in the autograd graph when it was computed, or of logits named by the user.
        version: Version counter of the logits when the loss read them.
    """

    logits: Tensor
    class_dim: int
    counted: Tensor
    kind: str = "softmax"
    entries: Tensor | None = None
    denominator: Tensor | None = None
    output: Tensor | None = None
    log_probabilities: bool = False
    arrived: list[Tensor] = field(default_factory=list)
    twins: "tuple[OutputLoss, ...]" = ()
    edge: GradientEdge | None = None
    version: int | None = None

    @property
    def node(self) -> Node:
        """Node of the loss in the autograd graph, as it was computed: later in-place operations do not move it."""
        edge = self.edge or get_gradient_edge(self.logits if self.output is None else self.output)
        return edge.node

    def check_logits(self) -> None:
        """Raise ``RuntimeError`` if the logits were overwritten after the loss read them."""
        if self.version is not None and self.logits._version != self.version:
            raise RuntimeError(
                "The logits were changed in place after the loss read them, so its curvature can no longer be "
                "measured. Change a copy: logits = logits.clone() before the in-place operation."
            )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.logits.shape[self.class_dim]

    def without_graph(self) -> "OutputLoss":
        """Return what says which loss positions count, and keeps neither logits nor their graph."""
        return OutputLoss(self.counted.new_empty(0), 0, self.counted)

    def without_ignored(self, factors: Sequence[Tensor | None]) -> "OutputLoss":
        """Return the loss without what has a weight of exactly zero.

        Args:
            factors: Gradients of an objective with respect to this loss and its twins. Those of one number, and of
                losses that do not tell them, take nothing away.
        """
        entries = self.counted if self.entries is None else self.entries.movedim(-1, self.class_dim)
        known = [whole(factor) for factor in factors if factor is not None and factor.numel() == entries.numel()]
        if len(known) < 1 + len(self.twins):
            return self
        entries = entries & torch.stack([factor.reshape(entries.shape) != 0 for factor in known]).any(0)
        if self.entries is None:
            return dataclasses.replace(self, counted=entries)
        entries = entries.movedim(self.class_dim, -1)
        return dataclasses.replace(self, counted=entries.any(-1), entries=entries)

    @property
    def num_counted(self) -> Tensor:
        """Number of loss positions that count, int64 ``[]``; those do not whose weight arrived, and is zero."""
        return self.without_ignored([part.factor for part in (self, *self.twins)]).counted.sum()

    @property
    def factor(self) -> Tensor | None:
        """Gradient of the training objective with respect to the loss, or None."""
        return sum(self.arrived[1:], self.arrived[0]) if self.arrived else None


@dataclass(eq=False)
class OtherLoss:
    """A loss whose curvature is not known.

    Args:
        name: Name of the function.
        input: What it compares with a target, with its graph.
    """

    name: str
    input: Tensor


OTHER_LOSSES = frozenset(
    (
        F.binary_cross_entropy,
        F.l1_loss,
        F.smooth_l1_loss,
        F.huber_loss,
        F.kl_div,
        F.ctc_loss,
        F.gaussian_nll_loss,
        F.poisson_nll_loss,
        F.multi_margin_loss,
        F.multilabel_margin_loss,
        F.multilabel_soft_margin_loss,
        F.soft_margin_loss,
        F.margin_ranking_loss,
        F.triplet_margin_loss,
        F.triplet_margin_with_distance_loss,
        F.cosine_embedding_loss,
        F.hinge_embedding_loss,
        *(getattr(F, name) for name in ("linear_cross_entropy",) if hasattr(F, name)),  # fuses a head and its softmax
    )
)


SOFTMAX_LOSSES = (F.cross_entropy, F.nll_loss)
_SIGNATURES = {function: inspect.signature(function) for function in SOFTMAX_LOSSES}


class SoftmaxFacts(NamedTuple):
    """What a call of a softmax loss compares.

    Args:
        given: All its arguments by name, defaults among them.
        class_dim: Dimension of the classes.
        counted: Which loss positions count: bool, the logits' shape without the classes.
    """

    given: dict[str, Any]
    class_dim: int
    counted: Tensor


def softmax_facts(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> SoftmaxFacts:
    """Return what one call of ``F.cross_entropy`` or ``F.nll_loss`` with some arguments compares."""
    bound = _SIGNATURES[function].bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    target, weight = given["target"], given["weight"]
    class_dim = 1 if given["input"].dim() > 1 else 0
    if target.is_floating_point():  # class probabilities; a row of zeros weighs nothing
        counted = target.detach().movedim(class_dim, -1).ne(0).any(-1)
    else:
        counted = target != given["ignore_index"]
        if weight is not None:  # a class of weight zero is not trained on
            counted = counted & (weight[target.where(counted, 0)] != 0)
    return SoftmaxFacts(given, class_dim, counted)


def read_loss(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> OutputLoss | None:
    """Return what one call of a softmax loss says about its logits; None if no gradient passes it (a metric).

    Args:
        function: ``F.cross_entropy`` or ``F.nll_loss``.
        args: Its arguments.
        kwargs: Its keyword arguments.
        output: What it returned.
    """
    given, class_dim, counted = softmax_facts(function, args, kwargs)
    logits, target, weight = given["input"], given["target"], given["weight"]
    if not (logits.requires_grad and output.requires_grad):
        return None
    if reduction_of(given) != "mean":
        denominator = torch.ones((), dtype=torch.int64, device=counted.device)
    elif target.is_floating_point():
        denominator = torch.tensor(counted.numel(), device=counted.device)
    else:
        labelled = target != given["ignore_index"]
        denominator = labelled.sum() if weight is None else weight[target[labelled]].sum()
    # The softmax of a log-softmax is the same softmax: the log-probabilities that nll_loss receives serve as logits.
    return OutputLoss(
        logits,
        class_dim,
        counted,
        denominator=denominator,
        output=output,
        log_probabilities=function is F.nll_loss,
        edge=get_gradient_edge(output),
        version=logits._version,
    )


def reduction_of(given: dict[str, Any]) -> str:
    """Return the reduction, also where the deprecated ``size_average`` and ``reduce`` say it."""
    if given.get("size_average") is None and given.get("reduce") is None:
        return str(given["reduction"])
    if given.get("reduce") is False:
        return "none"
    return "sum" if given.get("size_average") is False else "mean"


def every_position(logits: Tensor, class_dim: int) -> Tensor:
    """Return a bool tensor of ones, of the logits' shape without the classes."""
    rows = logits.movedim(class_dim, -1)
    return torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device)


def count_by_layer(losses: Iterable[tuple[str, Sequence[OutputLoss]]]) -> dict[str, Tensor]:
    """Return the number of loss positions behind each layer's gradients, int64 ``[]``.

    A loss counts once for a layer, however many of its calls it reaches. Layers with the same losses get one tensor.

    Args:
        losses: For each call, the name of its layer and the losses behind its gradients.
    """
    by_layer: dict[str, dict[OutputLoss, None]] = {}
    for name, behind in losses:
        by_layer.setdefault(name, {}).update(dict.fromkeys(behind))
    counts: dict[tuple[OutputLoss, ...], Tensor] = {}
    for met in map(tuple, by_layer.values()):
        if met not in counts:
            counts[met] = sum((loss.num_counted.to(met[0].counted.device) for loss in met[1:]), met[0].num_counted)
    return {name: counts[tuple(met)] for name, met in by_layer.items()}


def shapes_of(losses: Sequence[OutputLoss]) -> list[list[int]]:
    """Return the shapes of the logits of some losses, for messages."""
    return [list(loss.logits.shape) for loss in losses]


SUPPORTED_LOSSES = (
    "The curvature is defined here for F.cross_entropy, nn.CrossEntropyLoss, F.nll_loss after log_softmax, "
    "F.binary_cross_entropy_with_logits (torchvision's sigmoid_focal_loss, too) and F.mse_loss; a model that hides a "
    "softmax (a fused or compiled loss, a hand-written focal or margin loss over a softmax) names the submodule or "
    "method that returns its logits: logits='...', and class_dim= if the classes are not the last of three or more "
    "dimensions."
)
