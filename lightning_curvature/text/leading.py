"""The special tokens that a tokenizer puts in front of every text, such as Gemma's and Llama's ``<bos>``.

Models of these families never saw a text without such tokens, and read it badly. Every window and every prompt that
this package makes therefore begins with them:

- They count as tokens of a window: a window of ``context`` tokens fits into a model's context of as many.
- They are not scored: no loss, no perplexity and no score of recitation is about a token in front. The first token of
  the text is predicted from them, and is scored.
- In K-FAC factors their positions count like the positions of other tokens: what the model computes there reaches the
  loss of the text. A position is left out only if its gradient is exactly zero.
- Documents are packed: the tokens stand once, at the beginning of a window.

The tokenizer tells which tokens these are. Some tokenizers put none (OLMo-2, GPT-2, Qwen): windows and prompts are then
text alone.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

_PROBES = ("a", "The 3 quick foxes.", "x = [1, 2]\n")
_WORDS = 8


def leading_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Return the token ids that a tokenizer puts in front of a text; tokens that it puts behind one do not count.

    Args:
        tokenizer: A transformers tokenizer.

    Raises:
        ValueError: If it does not put the same tokens in front of every text.
    """
    seen: dict[str, list[int]] = {}
    fronts: set[tuple[int, ...]] | None = None
    for number, text in enumerate(_probes(tokenizer)):
        if number >= len(_PROBES) and fronts is not None and len(fronts) == 1:
            break
        plain = encode(tokenizer, text)
        if not plain:
            continue
        seen[text] = whole = list(tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])
        places = range(len(whole) - len(plain) + 1)
        possible = {tuple(whole[:place]) for place in places if whole[place : place + len(plain)] == plain}
        fronts = possible if fronts is None else fronts & possible
    if fronts is None or len(fronts) != 1:
        raise ValueError(
            f"What this {type(tokenizer).__name__} puts in front of a text cannot be told: it makes {seen!r:.200}. It "
            "must put the same special tokens in front of every text, and leave the text's own tokens as they are."
        )
    return next(iter(fronts))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text, without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return list(ids)


def next_token_loss(model: Any, ids: Tensor, num_leading: int) -> Tensor:
    """Return the mean cross-entropy of the next tokens of windows; tokens in front of the text do not count.

    Args:
        model: A transformers causal LM.
        ids: Windows, int64 ``[n, T]``.
        num_leading: Tokens in front of the text of each window.
    """
    labels = ids
    if num_leading > 1:  # the first token is never predicted
        labels = ids.clone()
        labels[:, :num_leading] = -100
    loss: Tensor = model(input_ids=ids, labels=labels, use_cache=False).loss
    return loss


def _probes(tokenizer: Any) -> Iterator[str]:
    """Yield fixed texts to try, then words of the vocabulary: a tokenizer may know nothing of the fixed texts."""
    yield from _PROBES
    special = set(tokenizer.all_special_ids)
    ordinary = [index for index in range(len(tokenizer)) if index not in special]
    yield from (tokenizer.decode([index]) for index in ordinary[:_WORDS])
