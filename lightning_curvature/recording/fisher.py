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

Two losses are sums over single outputs ``z``, whose ``H`` is diagonal. A sigmoid with ``p = sigmoid(z)``, for binary
and multi-label classification, has ``H = diag(p (1 - p))``: the sketch is ``sqrt(p (1 - p)) * e``, a sampled gradient
``p - y`` with ``y ~ p``. Half the squared difference to a target, the likelihood of a normal distribution of variance
1, has ``H = I``: the sketch is ``e``, a sampled gradient a normal number. The exact ones have one pass for each output
of a position. A generalized Gauss-Newton matrix is the same as the Fisher information here (Martens 2020, JMLR 21:146).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_curvature.distributed import spread_like, whole
from lightning_curvature.recording.calls import LayerCall
from lightning_curvature.recording.losses import OutputLoss

FISHER_KINDS = ("sketched", "sampled", "exact", "empirical")
EXACT_LIMIT = 4096
"""Backward passes per batch above which ``exact`` is refused."""

Gradients = list[Tensor | None]
"""The gradient at the output of each call; None where the logits do not depend on it."""


def count_passes(kind: str, losses: Sequence[OutputLoss], groups: Sequence[Tensor], draws: int) -> int:
    """Return the number of backward passes that a batch costs.

    Args:
        kind: Kind of Fisher.
        losses: The parts of its softmax loss.
        groups: For ``"exact"``, the numbers of the loss positions of each, see :func:`independent_groups`.
        draws: Random vectors (or labels) per loss position.
    """
    if kind == "empirical":
        return 0
    if kind != "exact":
        return draws
    return sum(loss.num_classes * _num_groups(group) for loss, group in zip(losses, groups, strict=True))


def gradient_passes(
    kind: str,
    losses: Sequence[OutputLoss],
    calls: Sequence[LayerCall],
    draws: int,
    generator: torch.Generator,
    groups: Sequence[Tensor] = (),
) -> Iterator[Gradients]:
    """Yield, for each backward pass, the gradients at the outputs of the calls, at unit scale.

    The sum over passes of ``g g^T`` (divided by ``draws`` for the random kinds) is the Fisher's.

    Args:
        kind: ``"sketched"``, ``"sampled"`` or ``"exact"``.
        losses: The softmax loss, in parts that are independent given the inputs.
        calls: The layer calls; each has an edge.
        draws: Random vectors (or labels) per loss position.
        generator: Source of randomness, on the device of the logits; the global random state is not touched.
        groups: For ``"exact"``, see :func:`count_passes`.
    """
    if kind == "exact":
        for loss, group in zip(losses, groups, strict=True):
            for v in fisher_vectors(kind, loss, calls, draws, generator, group):
                yield backpropagate(loss, v.movedim(-1, loss.class_dim), calls)
        return
    for seeds in zip(*(fisher_vectors(kind, loss, calls, draws, generator) for loss in losses), strict=True):
        vectors = [v.movedim(-1, loss.class_dim) for v, loss in zip(seeds, losses, strict=True)]
        yield (
            backpropagate(losses[0], vectors[0], calls)
            if len(losses) == 1
            else _backpropagate_all(losses, vectors, calls)
        )


def fisher_vectors(
    kind: str,
    loss: OutputLoss,
    calls: Sequence[LayerCall],
    draws: int,
    generator: torch.Generator,
    groups: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the vectors v, classes last. Logits may be the largest tensor of a step: nothing of their size stays."""
    if loss.kind != "softmax":
        yield from _entry_vectors(kind, loss, calls, draws, generator, groups)
        return
    if kind == "exact":
        p, counted = _probabilities(loss), loss.counted[..., None]
        groups = independent_groups(loss, calls) if groups is None else groups
        for group in range(_num_groups(groups)):
            here = counted & (groups == group)[..., None]
            for label in range(p.shape[-1]):
                yield torch.where(here, p[..., label, None].sqrt() * _minus_onehot(p, label), 0.0)
        return
    draw = _sketch if kind == "sketched" else _minus_sampled
    for _ in range(draws):
        yield draw(_probabilities(loss), loss.counted[..., None], generator)


def _entry_vectors(
    kind: str,
    loss: OutputLoss,
    calls: Sequence[LayerCall],
    draws: int,
    generator: torch.Generator,
    groups: Tensor | None,
) -> Iterator[Tensor]:
    """Yield the vectors v of a loss that is a sum over single outputs; arguments as of :func:`fisher_vectors`."""
    logits = whole(loss.logits.detach()).movedim(loss.class_dim, -1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = loss.counted[..., None] if loss.entries is None else loss.entries
    p = logits.sigmoid()
    s = ((p * (1 - p)).sqrt() if loss.kind == "binary" else torch.ones_like(logits)) * counted
    if kind == "exact":
        groups = independent_groups(loss, calls) if groups is None else groups
        for group in range(_num_groups(groups)):
            here = torch.where((groups == group)[..., None], s, 0.0)
            for entry in torch.eye(s.shape[-1], dtype=s.dtype, device=s.device):
                yield here * entry
        return
    for _ in range(draws):
        if kind == "sketched":
            yield with_random_signs(s, generator)
        elif loss.kind == "binary":
            yield (p - (torch.rand(p.shape, generator=generator, dtype=p.dtype, device=p.device) < p).to(p)) * counted
        else:
            yield torch.randn(s.shape, generator=generator, dtype=s.dtype, device=s.device) * counted


def _probabilities(loss: OutputLoss) -> Tensor:
    """Return the softmax, classes last; zeros where the loss does not count."""
    logits = whole(loss.logits.detach()).movedim(loss.class_dim, -1)
    return logits.softmax(-1, torch.promote_types(logits.dtype, torch.float32)).mul_(loss.counted[..., None])


def _sketch(p: Tensor, _counted: Tensor, generator: torch.Generator) -> Tensor:
    s = p.sqrt_()
    v = with_random_signs(s, generator)
    return v.addcmul_(s.square_(), v.sum(-1, keepdim=True), value=-1)


def with_random_signs(s: Tensor, generator: torch.Generator) -> Tensor:
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
    labels = (draw_by_sums if p.is_cpu else draw_by_race)(p, generator)
    return p.scatter_add_(-1, labels, -counted.to(p.dtype))


def draw_by_race(p: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a class for each position, ``[..., 1]``: the one whose waiting time, of rate p, is the shortest."""
    times = torch.empty_like(p).exponential_(generator=generator)
    return torch.div(p, times, out=times).argmax(-1, keepdim=True)


def draw_by_sums(p: Tensor, generator: torch.Generator) -> Tensor:
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


def independent_groups(loss: OutputLoss, calls: Sequence[LayerCall]) -> Tensor:
    """Number the loss positions; positions with one number belong to examples that do not depend on each other.

    Examples lie along the first dimension of the layers' outputs. It is checked that no example depends on another:
    the gradient of some examples' logits must be zero at all other examples. These sets of examples are formed by each
    bit of the examples' numbers, so that every pair is separated by one of ``2 log2(examples)`` backward passes. Where
    the check fails (tokens flattened into the first dimension, batch normalisation, a graph of nodes), each loss
    position is a group of its own.

    Returns:
        int64, the logits' shape without the classes.
    """
    counted, numbers = loss.counted, alone(loss)
    sizes = {call.output_shape[0] for call in calls}
    batch = sizes.pop() if len(sizes) == 1 else 0
    if not batch or counted.numel() % batch:
        return numbers
    positions = max(counted.numel() // batch, 1)
    example = numbers // positions
    for bit in range((batch - 1).bit_length()):
        for value in (0, 1):
            if not _stays_inside(loss, calls, example, (bit, value)):
                return numbers
    return numbers % positions


def alone(loss: OutputLoss) -> Tensor:
    """Number the loss positions, each as a group of its own: int64, the logits' shape without the classes."""
    return torch.arange(loss.counted.numel(), device=loss.counted.device).view(loss.counted.shape)


def _num_groups(groups: Tensor) -> int:
    return int(groups.max()) + 1 if groups.numel() else 0


def _stays_inside(loss: OutputLoss, calls: Sequence[LayerCall], example: Tensor, members: tuple[int, int]) -> bool:
    """Tell whether the gradients of some examples' logits are zero at all others; members share a bit's value."""
    bit, value = members
    generator = torch.Generator(example.device).manual_seed(bit)
    shape = (*example.shape, loss.num_classes)
    dtype = torch.promote_types(loss.logits.dtype, torch.float32)
    seed = torch.randn(shape, generator=generator, device=example.device, dtype=dtype)
    seed = seed * ((example >> bit & 1) == value)[..., None]
    for gradient in backpropagate(loss, seed.movedim(-1, loss.class_dim), calls):
        if gradient is not None:
            gradient = whole(gradient)
            inside = (torch.arange(gradient.shape[0], device=gradient.device) >> bit & 1) == value
            if bool(gradient[~inside].any()):
                return False
    return True


def backpropagate(loss: OutputLoss, v: Tensor, calls: Sequence[LayerCall]) -> Gradients:
    """Return the gradients at the outputs of calls, given the gradient ``v`` at the logits; the graph stays."""
    return _backpropagate_all([loss], [v], calls)


def _backpropagate_all(losses: Sequence[OutputLoss], seeds: Sequence[Tensor], calls: Sequence[LayerCall]) -> Gradients:
    """Backpropagate a vector from the logits of each loss, all in one pass; see :func:`backpropagate`."""
    # float16 cannot hold the small gradients of a unit loss: the pass is scaled by a power of two, the largest that
    # does not overflow, and divided by it again, which is exact.
    dtypes = {call.output_dtype for call in calls} | {loss.logits.dtype for loss in losses}
    half = torch.float16 in dtypes
    edges = [call.edge for call in calls if call.edge is not None]
    logits = [loss.logits for loss in losses]
    for scale in (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0) if half else (1.0,):
        vectors = [spread_like((v * scale).to(z.dtype), z) for v, z in zip(seeds, logits, strict=True)]
        with torch.autocast(seeds[0].device.type, enabled=False):  # as in training, whose backward runs outside of it
            sent = torch.autograd.grad(logits, edges, grad_outputs=vectors, retain_graph=True, allow_unused=True)
        gradients: Gradients = [None if g is None else g.float() / scale if half else g for g in sent]
        if not half or all(g is None or bool(torch.isfinite(whole(g)).all()) for g in gradients):
            break
    return gradients
