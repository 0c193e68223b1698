"""The special tokens that a tokenizer puts in front of every text, such as Gemma's and Llama's ``<bos>``.

Models of these families never saw a text without them, and read one badly. So every window and every prompt that this
package makes begins with them:

- They count as tokens of a window: one of ``context`` tokens never exceeds a model's context of as many.
- They are not scored: no loss, no perplexity and no score of recitation is about a token in front. The first token of
  the text is predicted from them, and scored.
- In K-FAC factors their positions count as those of any other token: what the model computes there reaches the loss of
  the text. Only a gradient that is exactly zero leaves a position out.
- Documents are packed as ever: the tokens stand once, at the beginning of a window.

Which tokens these are is asked of the tokenizer. Where it puts none (OLMo-2, GPT-2, Qwen), nothing of this happens.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

_PROBES = ("a", "The 3 quick foxes.", "x = [1, 2]\n")
_WORDS = 8


def leading_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Return the token ids that a tokenizer puts in front of a text; those that it puts at its end do not count.

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
        found = {tuple(whole[:place]) for place in places if whole[place : place + len(plain)] == plain}
        fronts = found if fronts is None else fronts & found
    if fronts is None or len(fronts) != 1:
        raise ValueError(
            f"What this {type(tokenizer).__name__} puts in front of a text cannot be told: it makes {seen!r:.200}. It "
            "must put the same special tokens in front of every text, and leave the text's own tokens as they are."
        )
    return next(iter(fronts))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text alone."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return list(ids)


def next_token_loss(model: Any, ids: Tensor, num_leading: int) -> Tensor:
    """Return the mean cross-entropy of the next tokens of windows, those in front aside.

    Args:
        model: A transformers causal LM.
        ids: Windows, int64 ``[n, T]``.
        num_leading: Tokens in front of each.
    """
    labels = ids
    if num_leading > 1:  # the first token is never predicted
        labels = ids.clone()
        labels[:, :num_leading] = -100
    loss: Tensor = model(input_ids=ids, labels=labels, use_cache=False).loss
    return loss


def _probes(tokenizer: Any) -> Iterator[str]:
    """Yield texts to try: fixed ones, and words of the vocabulary where those say too little (it may know none)."""
    yield from _PROBES
    special = set(tokenizer.all_special_ids)
    ordinary = [index for index in range(len(tokenizer)) if index not in special]
    yield from (tokenizer.decode([index]) for index in ordinary[:_WORDS])
