"""How a language model continues a prefix: teacher-forced passes and greedy decoding.

Plain greedy decoding reproduces a suffix exactly if and only if the teacher-forced argmax agrees with it at every
position: as long as all tokens so far agree, both see the same context. One forward pass thus decides strict
recitation. Only a sequence that is not recited needs generation, to see what comes instead. The argument fails where
greedy decoding does not take the argmax of these logits. Generation decides in these cases:

- an end-of-text token inside the suffix (decoding stops at it);
- two tokens so close that the rounding of another batch or of the key-value cache can swap them;
- a generation config that changes the logits (repetition penalty, forbidden n-grams, suppressed tokens, ...).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature.text.sequences import PromptedSequence, batches, check_fit

NO_TOKEN = -1
"""Fills a continuation that stopped early; no tokenizer has this id."""

# Fields of a generation config that change the logits of greedy decoding, with the values that leave them as they are.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "sequence_bias": (None, {}),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0),
    "num_beams": (None, 1),
}


@dataclass(frozen=True)
class Continuations:
    """What a model says about a batch of sequences of equal lengths.

    Args:
        indices: Indices of the sequences in the list of all sequences.
        target: Their suffixes, int64 ``[n, L]``.
        forced: Teacher-forced argmax at each position of the suffix, int64 ``[n, L]``.
        logits: Teacher-forced logits, ``[n, L, V]``.
        greedy: Greedy continuation of the prefix, int64 ``[n, L]``, ``NO_TOKEN`` after an early end.
        generated: Whether a row of ``greedy`` was generated, or decided by the forward pass, bool ``[n]``.
    """

    indices: list[int]
    target: Tensor
    forced: Tensor
    logits: Tensor
    greedy: Tensor
    generated: Tensor


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of token embeddings of a transformers model."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.weight.shape[0])


def context_length(model: nn.Module) -> int:
    """Return the longest input that a transformers model takes, in tokens."""
    config: Any = model.config
    return config_length(config)


def config_length(config: Any) -> int:
    """Return the longest input that the model of a configuration takes, in tokens."""
    text = config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 2**31)


def token_batches(
    model: nn.Module, sequences: Sequence[PromptedSequence], batch_size: int
) -> Iterator[tuple[list[int], Tensor, int]]:
    """Yield batches of sequences of equal lengths, on the device of a model.

    Yields:
        Indices of the sequences; their token ids, int64 ``[n, T]``; the position at which the suffixes start.

    Raises:
        ValueError: If a sequence does not fit the model.
    """
    check_fit(sequences, vocabulary_size(model), context_length(model))
    device = next(model.parameters()).device
    for indices in batches(sequences, batch_size):
        ids = torch.tensor([sequences[index].ids for index in indices], device=device)
        yield indices, ids, len(sequences[indices[0]].prefix_ids)


def continuations(
    model: nn.Module, sequences: Sequence[PromptedSequence], batch_size: int = 32, strict_only: bool = False
) -> Iterator[Continuations]:
    """Ask a model how it continues prefixes.

    Args:
        model: A transformers causal LM; it should be in eval mode.
        sequences: Prefixes and true suffixes.
        batch_size: Sequences per forward pass.
        strict_only: Generate only where the result may be the suffix. Elsewhere ``greedy`` is the teacher-forced
            argmax, which is not the suffix: it serves to decide strict recitation, and nothing else.

    Yields:
        One :class:`Continuations` per batch.

    Raises:
        ValueError: If a sequence does not fit the model.
    """
    for indices, ids, start in token_batches(model, sequences, batch_size):
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids[:, :-1], use_cache=False).logits[:, start - 1 :]
        target, forced = ids[:, start:], logits.argmax(-1)
        greedy = forced.clone()
        plain = _is_plain(model)
        generated = ~(_certain(model, logits, forced, target) & plain)
        if strict_only and plain:
            generated &= (forced == target).all(1)
        if bool(generated.any()):
            greedy[generated] = greedy_continuation(model, ids[generated, :start], target.shape[1])
        yield Continuations(indices, target, forced, logits, greedy, generated)


def greedy_continuation(model: nn.Module, prompts: Tensor, length: int, attention_mask: Tensor | None = None) -> Tensor:
    """Decode greedily.

    Args:
        model: A transformers causal LM.
        prompts: Token ids, int64 ``[n, P]``, padded on the left if at all.
        length: Tokens to decode, ``L``.
        attention_mask: 1 at tokens, 0 at padding, ``[n, P]``; all tokens by default.

    Returns:
        int64 ``[n, L]``. An end-of-text token is kept; ``NO_TOKEN`` follows it.
    """
    mask = torch.ones_like(prompts) if attention_mask is None else attention_mask
    ends = _end_tokens(model)
    generation: Any = model.generate
    output: Tensor = generation(
        input_ids=prompts,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=length,
        pad_token_id=ends[0] if ends else 0,
        num_return_sequences=1,
        return_dict_in_generate=False,
        stop_strings=None,
        prompt_lookup_num_tokens=None,
        # Sampling arguments in the generation config of the model would cause a warning.
        temperature=None,
        top_p=None,
        top_k=None,
    )
    decoded = output[:, prompts.shape[1] :]
    if decoded.shape[1] < length:
        decoded = torch.nn.functional.pad(decoded, (0, length - decoded.shape[1]), value=NO_TOKEN)
    ended = torch.isin(decoded, decoded.new_tensor(ends)) if ends else torch.zeros_like(decoded, dtype=torch.bool)
    after = ended.long().cumsum(1) - ended.long() > 0
    return decoded.masked_fill(after, NO_TOKEN)


def _end_tokens(model: nn.Module) -> list[int]:
    ends: Any = model.generation_config.eos_token_id  # type: ignore[union-attr]
    return [] if ends is None else [int(ends)] if isinstance(ends, int) else [int(end) for end in ends]


def _is_plain(model: nn.Module) -> bool:
    """Tell whether greedy decoding takes the argmax of the logits as they are."""
    return all(getattr(model.generation_config, name, None) in neutral for name, neutral in _NEUTRAL.items())


def _certain(model: nn.Module, logits: Tensor, forced: Tensor, target: Tensor) -> Tensor:
    """Tell which rows plain greedy decoding recites for certain."""
    first, second = logits.topk(2, dim=-1).values.float().unbind(-1)
    rounding = 16 * torch.finfo(logits.dtype).eps * torch.maximum(first.abs(), second.abs())
    certain = ((forced == target) & (first - second > rounding)).all(1)
    ends = _end_tokens(model)
    if ends:
        certain &= ~torch.isin(target[:, :-1], target.new_tensor(ends)).any(1)
    return certain
