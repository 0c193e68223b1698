"""A saved language model: whatever can be checked without its weights is checked before they are loaded."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_curvature._checks import check_count
from lightning_curvature.checkpoints.empty_model import fill
from lightning_curvature.layers.selection import choose_layers
from lightning_curvature.text.corpus import token_windows
from lightning_curvature.text.decoding import config_length
from lightning_curvature.text.leading import leading_tokens
from lightning_curvature.text.models import (
    check_checkpoint,
    check_vocabulary,
    load_model,
    load_tokenizer,
    read_config,
)
from lightning_curvature.text.sequences import PromptedSequence, check_fit


class SavedModel:
    """A saved causal LM: its folder is read and checked at once, its weights when :meth:`load` is called.

    Args:
        folder: What ``save_pretrained`` wrote, with the tokenizer.
        checkpoint: File or folder to take the weights from, see :func:`load_model`; by default ``folder``.
        allow_globals: Classes that a file may hold besides tensors and primitives.

    Attributes:
        tokenizer: Its tokenizer.
        leading: The tokens that the tokenizer puts in front of a text.
        context: The longest input that the model takes, in tokens.
        vocabulary: Rows of its embedding.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If the folder holds no causal language model or no tokenizer, or the checkpoint no weights.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        checkpoint: str | os.PathLike[str] | None = None,
        allow_globals: Sequence[str] = (),
    ) -> None:
        self.folder, self.checkpoint, self.allow_globals = folder, checkpoint, allow_globals
        self.config = read_config(folder)
        self.tokenizer = load_tokenizer(folder)
        self.leading = leading_tokens(self.tokenizer)
        self.context = config_length(self.config)
        self.vocabulary = int(self.config.get_text_config().vocab_size)
        if checkpoint is not None:
            check_checkpoint(checkpoint)

    @property
    def source(self) -> str | os.PathLike[str]:
        """Where the weights come from: the checkpoint, or else the folder."""
        return self.folder if self.checkpoint is None else self.checkpoint

    def window(self, asked: int | None, default: int, spare: int = 0) -> int:
        """Return how many tokens a window has.

        Args:
            asked: Tokens that are asked for; None for the default.
            default: Tokens where none are asked for, or as many as the model takes if that is less.
            spare: Tokens that a window may have beyond the context of the model. For perplexity it may have one, since
                its last token is predicted and not read.

        Raises:
            ValueError: If the model's context is shorter.
        """
        if asked is None:
            return min(default, self.context)
        if check_count(asked, "context") > self.context + spare:
            raise ValueError(
                f"Windows of {asked} tokens are longer than the model's context, {self.context}. Use shorter ones "
                "(--context)."
            )
        return asked

    def windows(self, corpus: str | os.PathLike[str], tokens: int, asked: int | None, default: int) -> Tensor:
        """Return windows of a text for perplexity, int64 ``[n, context]``.

        Args:
            corpus: Text or JSON lines, see :mod:`lightning_curvature.text.corpus`.
            tokens: Tokens to read at most.
            asked: As in :meth:`window`.
            default: As in :meth:`window`.

        Raises:
            ValueError: If the text is too short, or the windows do not suit the model.
        """
        context = self.window(asked, default) if asked is None else check_count(asked, "context")
        windows = torch.tensor(list(token_windows(corpus, self.tokenizer, context, tokens)))
        self.window(context, default, 1)
        self.check_predicts(context)
        return windows

    def check_predicts(self, context: int) -> None:
        """Raise ``ValueError`` if no token of a window of ``context`` tokens is predicted."""
        if context - max(len(self.leading), 1) < 1:
            raise ValueError(
                f"In a window of {context} tokens there is nothing to predict. Use a longer one (--context)."
            )

    def check_fit(self, sequences: Sequence[PromptedSequence]) -> None:
        """Raise ``ValueError`` if the model cannot read some sequences."""
        check_fit(sequences, self.vocabulary, self.context)

    def check_layers(self, layers: str | Sequence[str] | None) -> None:
        """Raise ``ValueError`` if presets or patterns match no layer of the model; see :func:`choose_layers`."""
        with torch.device("meta"):
            kind: Any = AutoModelForCausalLM
            model = kind.from_config(self.config)
        fill(model)  # layers without values cannot be chosen
        choose_layers(model, layers)

    def load(self) -> Any:
        """Load the model, in eval mode."""
        model = load_model(self.folder, self.checkpoint, self.allow_globals)
        check_vocabulary(model, self.tokenizer)
        return model
