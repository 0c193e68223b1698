"""Saved language models and text files as Lightning classes, for configurations without code."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_curvature.text.corpus import token_windows
from lightning_curvature.text.leading import leading_tokens, next_token_loss
from lightning_curvature.text.models import load_model, load_tokenizer


class PretrainedLM(pl.LightningModule):
    """A saved Hugging Face causal LM, to validate or to train further.

    Args:
        folder: What ``save_pretrained`` wrote.
        lr: Learning rate of AdamW.
    """

    def __init__(self, folder: str, lr: float = 1e-5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = load_model(folder).cpu().train()  # the Trainer moves it, and puts it in eval mode to validate
        self.lr = lr
        self.num_leading = 0

    def setup(self, stage: str) -> None:
        """Learn from the data how many tokens stand in front of each window."""
        data = getattr(self.trainer, "datamodule", None)
        self.num_leading = data.num_leading if isinstance(data, TextWindows) else 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross-entropy of the next token of windows ``[b, length]``."""
        loss = self._loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the same loss."""
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self) -> Any:
        """AdamW with a constant learning rate."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def _loss(self, batch: Tensor) -> Tensor:
        return next_token_loss(self.model, batch, self.num_leading)


class TextWindows(pl.LightningDataModule):
    """Windows of a text file, for training and validation of a language model alike.

    Args:
        corpus: Text file, or JSON lines (``.jsonl``) with a field ``text``.
        tokenizer: Folder that holds the tokenizer.
        length: Tokens of a window, those that the tokenizer puts in front of the text among them.
        batch_size: Windows per batch.
        tokens: Tokens to read at most.
    """

    def __init__(
        self, corpus: str, tokenizer: str, length: int = 128, batch_size: int = 16, tokens: int | None = None
    ) -> None:
        super().__init__()
        self.tokenizer = load_tokenizer(tokenizer)
        self.num_leading = len(leading_tokens(self.tokenizer))
        self.windows = torch.tensor(list(token_windows(corpus, self.tokenizer, length, tokens)))
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Shuffled batches of tokens ``[b, length]``."""
        return DataLoader(self.windows, self.batch_size, shuffle=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Batches of tokens ``[b, length]``, in their order."""
        return DataLoader(self.windows, self.batch_size)  # type: ignore[arg-type]
