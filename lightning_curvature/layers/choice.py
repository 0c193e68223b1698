"""The layers that may be chosen, and, after one batch was seen, the layers that are."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from torch import nn

from lightning_curvature._checks import listing
from lightning_curvature.layers.copies import is_idle_copy
from lightning_curvature.layers.roles import is_gate


@dataclass(frozen=True)
class LayerChoice:
    """The candidates of a choice of layers; which of them are chosen is known after one batch.

    Args:
        modules: Candidates by module name.
        named: Candidates that a pattern asked for; they are always chosen.
        pools: For each chosen preset, sets of layers in falling order of preference; the preset takes the first one
            that holds a layer beside the output head.
        refused: Layers of the pools that cannot be edited, and are no candidates, with the reason.
        uncalled: Candidates whose weight another module reads without calling them.
        mixed: Candidates in mixers, whose weights a kernel may read without calling them.
        blocks: For candidates in a block, the name of the innermost block.
        copies: For candidates in a module of which the network holds copies, their counterparts in the copies.
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

        A preset takes its candidates that ran, and those that may run, or get gradients, in later batches. It leaves
        out candidates that never will, and says so: layers whose weight is read without a call, and layers in copies of
        the network that are not trained.

        Args:
            fired: Candidates in the order in which they first ran.
            heads: Candidates whose output is the logits.
            dead: Candidates that ran without a graph, or on which the logits do not depend. They may be in ``fired``.
            read: Candidates whose weight a function was seen to read.

        Returns:
            Their names in the order in which they ran; at the end those that have not run yet.

        Raises:
            RuntimeError: If a chosen layer never runs, or if no layer is left.
        """
        order = list(dict.fromkeys([*fired, *sorted(set(dead) - set(fired))]))
        live = {name for name in order if name not in dead}
        uncalled = self._uncalled(set(order)) | (set(read) - set(order))
        passed_over = uncalled | self._passed_over(set(order))
        avoided = passed_over | self._idle(live, dead)
        chosen, left_out = set(self.named), set[str]()
        for preset, pools in self.pools.items():
            pool = self._pool(preset, pools, heads, avoided)
            taken = (pool - avoided) or pool
            left_out |= pool - taken
            if preset == "last-mlp" and taken and not (taken := frozenset(_last(taken, order, live))):
                raise _never_ran(sorted(pool), order)
            chosen |= taken
        if not chosen:
            raise RuntimeError(
                f"Layers {listing(self.pools)}: nothing to edit besides the output head ({listing(heads)}). "
                "Name the layers, for example layers=['features.*']; the head is taken only when a pattern names it."
            )
        not_run = sorted(chosen - set(order))
        never = [name for name in not_run if name in uncalled]
        if never or len(not_run) == len(chosen):
            raise _never_ran(never or not_run, order)
        self._log_left_out(left_out - chosen, passed_over)
        return [name for name in order if name in chosen] + not_run

    def _idle(self, live: set[str], dead: Collection[str]) -> set[str]:
        """Return candidates without gradients that are copies of trained layers, or belong to a teacher."""
        no_gradient = [name for name in self.modules if name not in live]
        return {name for name in no_gradient if is_idle_copy(name, self.modules, self.copies.get(name, ()), live, dead)}

    def _pool(
        self, preset: str, pools: Sequence[frozenset[str]], heads: Collection[str], avoided: Collection[str]
    ) -> frozenset[str]:
        """Return the candidates beside the head in the first pool of a preset in which one is not avoided.

        If every pool holds avoided candidates only, return those of the first pool that has some.

        Raises:
            RuntimeError: If a layer of a pool cannot be edited; the head, which no preset takes, may be such a layer.
        """
        candidates: list[frozenset[str]] = []
        for pool in pools:
            lost = sorted(pool & set(self.refused))
            num_allowed = 0 if heads else 1  # if no candidate is the head, the lost layer may be
            if len(lost) > num_allowed:
                raise RuntimeError(incomplete_message(preset, lost, self.refused))
            candidates.append(pool - set(heads) - set(lost))
            if candidates[-1] - set(avoided):
                return candidates[-1]
        return next(filter(None, candidates), frozenset())

    def _uncalled(self, ran: set[str]) -> Set[str]:
        """Return candidates that will not be called: the known ones, and those in a mixer of which other layers ran."""
        parents = {name.rpartition(".")[0] for name in ran}
        in_kernels = {name for name in self.mixed - ran if name.rpartition(".")[0] in parents}
        return (self.uncalled - ran) | in_kernels

    def _passed_over(self, ran: set[str]) -> Set[str]:
        """Return candidates that ran in none of several repeated blocks although each of the blocks ran."""
        groups: dict[str, list[str]] = {}  # layers whose names differ in numbers alone
        for name in self.modules:
            groups.setdefault(re.sub(r"\d+", "#", name), []).append(name)
        blocks_that_ran = {self.blocks[name] for name in ran if name in self.blocks}
        passed_over: set[str] = set()
        for group in groups.values():
            is_silent = len(group) > 1 and not ran.intersection(group)
            if is_silent and all(self.blocks.get(name) in blocks_that_ran for name in group):
                passed_over.update(group)
        return passed_over

    def _log_left_out(self, left_out: Set[str], uncalled: Set[str]) -> None:
        """Log which candidates of a preset are left out, and why."""
        from lightning.pytorch.utilities import rank_zero_info  # the command line looks at presets without Lightning

        for names, reason in (
            (left_out & uncalled, "the modules that hold them ran and did not call them"),
            (left_out - uncalled, "they belong to a copy of the network, or to a teacher, that is not trained"),
        ):
            if names:
                rank_zero_info(f"layers={listing(self.pools)} leaves out {listing(sorted(names))}: {reason}.")


def incomplete_message(preset: str, lost: Sequence[str], refused: Mapping[str, str]) -> str:
    """Return the message that a preset would leave out layers that cannot be edited.

    Args:
        preset: The preset.
        lost: Its layers that cannot be edited.
        refused: The reason, by layer.
    """
    reason = refused[lost[0]]
    packed = "packed or quantized" in reason
    what = "whose weights are packed (quantized)" if packed else "that cannot be edited"
    remedy = (
        "Load the model in full precision, edit it, and quantize it afterwards"
        if packed
        else "Or name the layers that you want instead"
    )
    return f"Preset {preset!r} would leave out layers {what}: {listing(lost, 3)} ({reason}). {remedy}."


def _last(pool: Collection[str], fired: Sequence[str], live: Collection[str]) -> set[str]:
    """Return the layer of a pool that ran last; if possible one with a graph, and no gate or router."""
    ran = [name for name in fired if name in pool]
    ran = [name for name in ran if name in live] or ran
    ran = [name for name in ran if not is_gate(name)] or ran
    return set(ran[-1:])


def _never_ran(silent: Iterable[str], ran: Iterable[str]) -> RuntimeError:
    return RuntimeError(
        f"Chosen layers {listing(silent)} never ran in the first collected batch (with gradients), so they have no "
        "factors. (nn.MultiheadAttention reads the weight of its out_proj without calling it; torchvision's Swin and "
        f"the kernels of state-space mixers do the like.) Choose among the layers that ran: {listing(ran)}."
    )
