"""What a choice of layers may take, and what it takes once one batch was seen."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from torch import nn

from lightning_curvature._checks import listing
from lightning_curvature.layers.copies import is_idle_copy
from lightning_curvature.layers.roles import is_gate


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
            if preset == "last-mlp" and kept and not (kept := frozenset(_last(kept, order, live))):
                raise _never(sorted(pool), order)
            chosen |= kept
        if not chosen:
            raise RuntimeError(
                f"Layers {listing(self.pools)}: nothing to edit besides the output head ({listing(heads)}). "
                "Name the layers, for example layers=['features.*']; the head is taken only when a pattern names it."
            )
        silent = sorted(chosen - set(order))
        never = [name for name in silent if name in uncalled]
        if never or len(silent) == len(chosen):
            raise _never(never or silent, order)
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
                raise RuntimeError(incomplete(preset, lost, self.refused))
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
        from lightning.pytorch.utilities import rank_zero_info  # the command line looks at presets without Lightning

        for names, reason in (
            (left_out & uncalled, "the modules that hold them ran and did not call them"),
            (left_out - uncalled, "they belong to a copy of the network, or to a teacher, that is not trained"),
        ):
            if names:
                rank_zero_info(f"layers={listing(self.pools)} leaves out {listing(sorted(names))}: {reason}.")


def incomplete(preset: str, lost: Sequence[str], refused: Mapping[str, str]) -> str:
    """Return the words of the error that a preset would have holes.

    Args:
        preset: Its name.
        lost: Layers that it stands for and cannot take.
        refused: Why not, by layer.
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
    """Return the layer of a pool that ran last: of those with a graph if there are any, gates and routers aside."""
    ran = [name for name in fired if name in pool]
    ran = [name for name in ran if name in live] or ran
    return set(([name for name in ran if not is_gate(name)] or ran)[-1:])


def _never(silent: Iterable[str], ran: Iterable[str]) -> RuntimeError:
    return RuntimeError(
        f"Chosen layers {listing(silent)} never ran in the first collected batch (with gradients), so they have no "
        "factors. (nn.MultiheadAttention reads the weight of its out_proj without calling it; torchvision's Swin and "
        f"the kernels of state-space mixers do the like.) Choose among the layers that ran: {listing(ran)}."
    )
