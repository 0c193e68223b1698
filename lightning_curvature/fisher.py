r"""Which gradients the factor G is made of.

For a softmax cross-entropy over logits ``z`` with ``p = softmax(z)`` the Fisher information of one loss position with
respect to its logits is ``H = diag(p) - p p^T``. Each kind of Fisher is a way to draw vectors ``v`` with
``E[v v^T] = H`` (or, for ``empirical``, another matrix) and to backpropagate them to the layers' outputs:

============  =========================================  ===========================================
kind          v                                          backward passes per batch
============  =========================================  ===========================================
sketched      ``sqrt(p) * e - p (sqrt(p) . e)``,         one per draw
              ``e`` random signs
sampled       ``p - onehot(y)``, ``y ~ p``               one per draw
exact         ``sqrt(p_c) (p - onehot(c))``, each c      classes (x loss positions per sequence)
empirical     ``p - onehot(label of the data)``          none: the training's own
============  =========================================  ===========================================

For the sketch, with ``s = sqrt(p)`` (so ``s . s = 1``) and ``v = (diag(s) - p s^T) e``::

    E[v v^T] = (diag(s) - p s^T)(diag(s) - s p^T) = diag(p) - p p^T - p p^T + p p^T = H

exactly, and the size of ``v`` does not depend on rare events: on a saturated model a sampled label almost always gives
a gradient near zero and once in a while a huge one. The first three kinds describe the model's own distribution:
class weights and label smoothing do not enter.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_curvature._checks import listing
from lightning_curvature.losses import SoftmaxLoss
from lightning_curvature.ranks import spread_like, whole
from lightning_curvature.taps import LayerCall, Taps, ancestors, reaches

FISHER_KINDS = ("sketched", "sampled", "exact", "empirical")
EXACT_LIMIT = 4096
"""Backward passes per batch above which ``exact`` is refused."""

Gradients = list[Tensor | None]
"""The gradient at the output of each call; None where the logits do not depend on it."""


def find_loss(taps: Taps, objective: Tensor | None) -> SoftmaxLoss:
    """Return the one softmax loss whose logits count.

    Args:
        taps: What the step recorded.
        objective: The scalar that the training is about to backpropagate; None if there is none.

    Raises:
        RuntimeError: If no softmax loss was seen, if several reach the objective, or if ``nll_loss`` received something
            else than log-probabilities.
    """
    losses = [
        loss
        for loss in taps.losses
        if loss.output is None or objective is None or reaches(objective.grad_fn, {_node(loss.output)})
    ]
    if len(losses) == 1:
        loss = losses[0]
        if loss.log_probabilities:
            rows = whole(loss.logits.detach()).movedim(loss.class_dim, -1)[loss.counted]
            if not bool((rows.float().logsumexp(-1).abs() < 0.05).all()):
                raise RuntimeError(
                    "F.nll_loss received values that are not log-probabilities (their exponentials do not sum to 1). "
                    "Apply log_softmax first, use F.cross_entropy, or name the logits with logits='...'."
                )
        return loss
    if losses:
        shapes = [list(loss.logits.shape) for loss in losses]
        raise RuntimeError(
            f"{len(losses)} softmax losses reach the training loss (logits of shapes {shapes}); the curvature of one "
            "model output is meant. Name the submodule or method that returns its logits: logits='...'; a validation "
            "step may also return the loss that counts."
        )
    seen = f" It computes {listing(sorted(set(taps.other_losses)))}." if taps.other_losses else ""
    if taps.without_gradients:
        seen += " It computes a cross-entropy without gradients: take torch.no_grad() or detach() away from it."
    raise RuntimeError(
        f"No softmax cross-entropy reaches the training loss.{seen} The curvature is defined here for "
        "F.cross_entropy, nn.CrossEntropyLoss, and F.nll_loss after log_softmax; a model that hides it (a fused or "
        "compiled loss) names the submodule or method that returns its logits: logits='...'."
    )


def count_passes(kind: str, loss: SoftmaxLoss, calls: Sequence[LayerCall], draws: int) -> int:
    """Return the number of backward passes that a batch costs."""
    if kind == "empirical":
        return 0
    if kind != "exact":
        return draws
    return loss.logits.shape[loss.class_dim] * (int(_groups(loss, calls).max()) + 1)


def gradient_passes(
    kind: str, loss: SoftmaxLoss, calls: Sequence[LayerCall], draws: int, generator: torch.Generator
) -> Iterator[Gradients]:
    """Yield, for each backward pass, the gradients at the outputs of the calls, at unit scale.

    The sum over passes of ``g g^T`` (divided by ``draws`` for the random kinds) is the Fisher's.

    Args:
        kind: ``"sketched"``, ``"sampled"`` or ``"exact"``.
        loss: The softmax loss.
        calls: The layer calls; each has an edge.
        draws: Random vectors (or labels) per loss position.
        generator: Source of randomness, on the device of the logits; the global random state is not touched.
    """
    for v in _seeds(kind, loss, calls, draws, generator):
        yield _backward(loss, v.movedim(-1, loss.class_dim), calls)


def _seeds(
    kind: str, loss: SoftmaxLoss, calls: Sequence[LayerCall], draws: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield the vectors v, classes last. Logits may be the largest tensor of a step: nothing of their size stays."""
    if kind == "exact":
        p, counted, groups = _probabilities(loss), loss.counted[..., None], _groups(loss, calls)
        for group in range(int(groups.max()) + 1):
            here = counted & (groups == group)[..., None]
            for label in range(p.shape[-1]):
                yield torch.where(here, p[..., label, None].sqrt() * _minus_onehot(p, label), 0.0)
        return
    draw = _sketch if kind == "sketched" else _minus_sampled
    for _ in range(draws):
        yield draw(_probabilities(loss), loss.counted[..., None], generator)


def _probabilities(loss: SoftmaxLoss) -> Tensor:
    """Return the softmax, classes last; zeros where the loss does not count."""
    logits = whole(loss.logits.detach()).movedim(loss.class_dim, -1)
    return logits.softmax(-1, torch.promote_types(logits.dtype, torch.float32)).mul_(loss.counted[..., None])


def _sketch(p: Tensor, _counted: Tensor, generator: torch.Generator) -> Tensor:
    s = p.sqrt_()
    v = _with_random_signs(s, generator)
    return v.addcmul_(s.square_(), v.sum(-1, keepdim=True), value=-1)


def _with_random_signs(s: Tensor, generator: torch.Generator) -> Tensor:
    """Return a copy, float32 or float64, with the sign of each entry left or changed by the toss of a coin.

    Each random number tosses 32 of them: one for each entry would cost more than all the rest of a draw.
    """
    integer = torch.int32 if s.dtype == torch.float32 else torch.int64
    numbers = torch.randint(-(2**31), 2**31, (-(-s.numel() // 32), 1), generator=generator, device=s.device)
    to_the_sign = torch.arange(32, device=s.device, dtype=integer) + (torch.iinfo(integer).bits - 32)
    flips = (numbers.to(integer) << to_the_sign).bitwise_and_(torch.iinfo(integer).min)
    return flips.flatten()[: s.numel()].view(s.shape).bitwise_xor_(s.view(integer)).view(s.dtype)


def _minus_sampled(p: Tensor, counted: Tensor, generator: torch.Generator) -> Tensor:
    # torch.multinomial waits for an accelerator to check what it is given, and draws a number for each class on a CPU.
    labels = (_by_sums if p.is_cpu else _by_race)(p, generator)
    return p.scatter_add_(-1, labels, -counted.to(p.dtype))


def _by_race(p: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a class for each position, ``[..., 1]``: the one whose waiting time, of rate p, is the shortest."""
    times = torch.empty_like(p).exponential_(generator=generator)
    return torch.div(p, times, out=times).argmax(-1, keepdim=True)


def _by_sums(p: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a class for each position, ``[..., 1]``: where the sums of p pass a random number."""
    sums = p.cumsum(-1)  # whose rounding differs from run to run on a GPU
    total = sums[..., -1:]
    drawn = torch.rand(total.shape, generator=generator, dtype=p.dtype, device=p.device) * total
    # Even the largest random number gives less than the total: what is clamped are positions that do not count.
    return torch.searchsorted(sums.contiguous(), drawn.contiguous(), right=True).clamp_(max=p.shape[-1] - 1)


def _minus_onehot(p: Tensor, label: int) -> Tensor:
    moved = p.clone()
    moved[..., label] -= 1.0
    return moved


def _groups(loss: SoftmaxLoss, calls: Sequence[LayerCall]) -> Tensor:
    """Number the loss positions so that those of one number belong to examples that do not see each other.

    Examples lie along the first dimension of the layers' outputs. That they are independent is checked: the gradient
    of one example's logits must stay in its own slice of every layer. Where it does not (tokens flattened into the
    first dimension, batch normalisation), each loss position is a group of its own.
    """
    counted = loss.counted
    sizes = {call.output_shape[0] for call in calls}
    batch = sizes.pop() if len(sizes) == 1 else 0
    if batch and counted.numel() % batch == 0:
        example = torch.arange(counted.numel(), device=counted.device) // (counted.numel() // batch)
        example = example.view(counted.shape)
        if all(_stays_inside(loss, calls, example, index) for index in {0, batch - 1}):
            position = torch.arange(counted.numel(), device=counted.device) % (counted.numel() // batch)
            return position.view(counted.shape)
    return torch.arange(counted.numel(), device=counted.device).view(counted.shape)


def _stays_inside(loss: SoftmaxLoss, calls: Sequence[LayerCall], example: Tensor, index: int) -> bool:
    classes = torch.arange(1.0, loss.logits.shape[loss.class_dim] + 1, device=example.device)
    seed = (example == index)[..., None] * classes
    for gradient in _backward(loss, seed.movedim(-1, loss.class_dim), calls):
        if gradient is not None:
            gradient = whole(gradient)
            outside = torch.arange(gradient.shape[0], device=gradient.device) != index
            if bool(gradient[outside].any()):
                return False
    return True


def _backward(loss: SoftmaxLoss, v: Tensor, calls: Sequence[LayerCall]) -> Gradients:
    """Backpropagate ``v`` from the logits to the calls, and to nothing else; the graph stays for the training."""
    # float16 cannot hold the small gradients of a unit loss: the pass is scaled by a power of two, the largest that
    # does not overflow, and divided by it again, which is exact.
    half = any(call.output_dtype == torch.float16 for call in calls) or loss.logits.dtype == torch.float16
    edges = [call.edge for call in calls if call.edge is not None]
    for scale in (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0) if half else (1.0,):
        seed = spread_like((v * scale).to(loss.logits.dtype), loss.logits)
        with torch.autocast(v.device.type, enabled=False):  # as in training, whose backward runs outside of it
            found = torch.autograd.grad(loss.logits, edges, grad_outputs=seed, retain_graph=True, allow_unused=True)
        gradients: Gradients = [None if g is None else g.float() / scale if half else g for g in found]
        if not half or all(g is None or bool(torch.isfinite(whole(g)).all()) for g in gradients):
            break
    return gradients


def empirical_unit(loss: SoftmaxLoss) -> Tensor:
    """Return the factor, float64, that makes gradients of the training's backward those of the plain summed loss.

    The factor that arrived at the loss (gradient accumulation, loss scaling, a user's own weight) and the reduction's
    denominator are divided out.

    Raises:
        RuntimeError: If the loss reached the backward pass with a weight of its own for each position.
    """
    if loss.factor is None or loss.denominator is None:
        raise RuntimeError("The training's backward never reached the loss; fisher='empirical' has nothing to read.")
    arrived, denominator = whole(loss.factor), whole(loss.denominator)
    if arrived.numel() == 1:  # nothing to compare, so that an accelerator is not waited for
        return denominator.double() / torch.where(arrived == 0, 1, arrived).double().reshape(())
    factors = arrived[arrived != 0]  # with reduction="none" a weight of zero leaves a position out
    factor = factors[0] if factors.numel() else arrived.new_ones(())
    if bool((factors != factor).any()):
        raise RuntimeError(
            "fisher='empirical': the training weighs its loss positions differently, so gradients of the plain loss "
            "cannot be told from them. Use fisher='sketched', which does not depend on the training loss."
        )
    return denominator.double() / factor.double()


def check_single_path(loss: SoftmaxLoss, calls: Sequence[LayerCall], objective: Tensor | None) -> None:
    """Raise if the training loss reaches the layers on another path than through the softmax loss."""
    goals = {call.edge.node for call in calls if call.edge is not None}
    if loss.output is None or objective is None:
        raise RuntimeError("fisher='empirical' reads the training's own loss; it cannot be used with logits='...'.")
    if reaches(objective.grad_fn, goals, barrier=_node(loss.output)):
        raise RuntimeError(
            "fisher='empirical': the training loss reaches the layers on other paths than through the cross-entropy (a "
            "regularizer, an auxiliary loss), so their gradients are mixed. Use fisher='sketched' or 'sampled'."
        )


def check_unreached(calls: Sequence[LayerCall], objective: Tensor) -> None:
    """Raise if a second backward pass of the same step would reach the layers too."""
    if reaches(objective.grad_fn, {call.edge.node for call in calls if call.edge is not None}):
        raise RuntimeError(
            "fisher='empirical': a second backward pass through the same forward pass reaches the layers, and its "
            "gradients would mix with the first's. Use fisher='sketched' or 'sampled'."
        )


def check_reentrant(loss: SoftmaxLoss, taps: Taps) -> None:
    """Raise if the logits were computed under reentrant activation checkpointing, in which layers have no graph."""
    hidden = sorted(taps.without_graph - {call.name for call in taps.calls})
    if hidden and any(node.name() == "CheckpointFunctionBackward" for node in ancestors(_node(loss.logits))):
        raise RuntimeError(
            f"The model uses reentrant activation checkpointing: layers {listing(hidden)} run without a graph, so "
            "their gradients cannot be taken. Pass use_reentrant=False to torch.utils.checkpoint.checkpoint "
            "(transformers: gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}))."
        )


def output_heads(loss: SoftmaxLoss, calls: Sequence[LayerCall]) -> set[str]:
    """Return the names of layers whose output is the logits, up to views, casts and elementwise operations."""
    nodes = {call.edge.node: call.name for call in calls if call.edge is not None}
    node: torch.autograd.graph.Node | None = _node(loss.logits)
    while node is not None and node not in nodes:
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        parents = [parent for parent in parents if parent.name() != "torch::autograd::AccumulateGrad"]
        node = parents[0] if len(parents) == 1 else None
    return {nodes[node]} if node in nodes else set()


def _node(tensor: Tensor) -> torch.autograd.graph.Node:
    return torch.autograd.graph.get_gradient_edge(tensor).node
