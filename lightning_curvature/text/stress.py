"""The positional stress test: a model may recite a suffix from another prompt than its prefix.

The prompt is moved along the sequence. It is *extended to the left* by ordinary text, or *shifted to the right*, so
that it takes the first tokens of the suffix. For each prompt the longest exact prefix of the remaining suffix counts.
Source: arXiv:2510.24256, appendix G.
"""

from collections.abc import Sequence

from torch import nn

from lightning_curvature.metrics import LongestExactPrefix, StrictMemorization
from lightning_curvature.text.decoding import context_length, continuations
from lightning_curvature.text.sequences import PromptedSequence

SHIFTS = (-16, -4, 0, 4, 16)


def moved(
    sequence: PromptedSequence, shift: int, filler: Sequence[int] = (), leading: Sequence[int] = ()
) -> PromptedSequence | None:
    """Return a sequence whose prompt is extended to the left (shift < 0) or shifted to the right (shift > 0).

    Special tokens in front of the text stay in front.

    Args:
        sequence: Prefix and suffix.
        shift: Tokens; a right shift drops as many from the left of the prefix as it takes from the suffix.
        filler: Token ids to extend with; its last ``-shift`` are used.
        leading: Tokens that the model's tokenizer puts in front of a text; by default those that the sequence counts
            as such.

    Returns:
        The moved sequence, or None if nothing of the suffix would be left or the filler is too short.

    Example:
        >>> moved(PromptedSequence((1, 2, 3), (4, 5, 6)), 2).record()["suffix_ids"]
        [6]
        >>> moved(PromptedSequence((1, 2, 3), (4, 5, 6)), -1, (8, 9)).record()["prefix_ids"]
        [9, 1, 2, 3]
    """
    front = tuple(leading) or sequence.prefix_ids[: sequence.num_leading]
    sequence = sequence.behind(front)
    prefix = sequence.prefix_ids[len(front) :]
    if shift <= 0:
        if len(filler) < -shift:
            return None
        prefix, suffix = tuple(filler[len(filler) + shift :]) + prefix, sequence.suffix_ids
    elif shift >= len(sequence.suffix_ids):
        return None
    else:
        prefix, suffix = (prefix + sequence.suffix_ids[:shift])[shift:], sequence.suffix_ids[shift:]
    return PromptedSequence(front + prefix, suffix, num_leading=len(front))


def positional_stress(
    model: nn.Module,
    sequences: Sequence[PromptedSequence],
    shifts: Sequence[int] = SHIFTS,
    filler: Sequence[int] = (),
    batch_size: int = 32,
    leading: Sequence[int] = (),
) -> dict[int, dict[str, float]]:
    """Measure recitation from moved prompts.

    Args:
        model: A transformers causal LM in eval mode.
        sequences: Prefixes and true suffixes.
        shifts: Tokens by which the prompts are moved; negative ones extend them to the left.
        filler: Ordinary text, as token ids, to extend prompts with.
        batch_size: Sequences per forward pass.
        leading: Tokens that the model's tokenizer puts in front of a text.

    Returns:
        By shift: ``strict``, the fraction of sequences whose remaining suffix is recited exactly, and
        ``exact_prefix``, the mean number of tokens before the first wrong token. A sequence does not count for a shift
        that makes it longer than the model's context, or leaves nothing of its suffix. A shift that fits no sequence is
        left out.
    """
    results = {}
    for shift in shifts:
        prompts = [moved(sequence, shift, filler, leading) for sequence in sequences]
        asked = [prompt for prompt in prompts if prompt is not None and len(prompt.ids) <= context_length(model)]
        if not asked:
            continue
        strict, longest = StrictMemorization(), LongestExactPrefix()
        for said in continuations(model, asked, batch_size, strict_only=True):
            strict.update(said.greedy.cpu(), said.target.cpu())
            # Up to its first wrong token the teacher-forced argmax is what greedy decoding says.
            longest.update(said.greedy.cpu(), said.target.cpu())
        results[shift] = {"strict": float(strict.compute()), "exact_prefix": float(longest.compute())}
    return results
