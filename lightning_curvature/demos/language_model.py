"""Causal language models as LightningModules: the steps of all of them, and a small OLMo-2."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import Olmo2Config, Olmo2ForCausalLM


class CausalLM(pl.LightningModule):
    """The steps of a causal language model of transformers, its attribute ``model``."""

    model: Any

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross-entropy of the next token."""
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the same loss."""
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss)


class LitCausalLM(CausalLM):
    """Trains a small ``Olmo2ForCausalLM`` from scratch.

    Args:
        vocab_size: Tokens.
        hidden: Model width.
        intermediate: Hidden width of the MLPs.
        layers: Blocks.
        heads: Attention heads.
        context: Longest input, in tokens.
        lr: Peak learning rate of AdamW, reached after ``warmup`` steps.
        decay: Fraction of the steps, at the end, over which the learning rate falls to zero in a line. A model recites
            what it saw while the rate falls.
        weight_decay: Weight decay of all matrices.
        warmup: Steps of warm-up.
    """

    def __init__(
        self,
        vocab_size: int = 2048,
        hidden: int = 256,
        intermediate: int = 1024,
        layers: int = 4,
        heads: int = 4,
        context: int = 256,
        lr: float = 2e-3,
        decay: float = 0.4,
        weight_decay: float = 0.1,
        warmup: int = 50,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.decay, self.weight_decay, self.warmup = lr, decay, weight_decay, warmup
        self.model = Olmo2ForCausalLM(
            Olmo2Config(
                vocab_size=vocab_size,
                hidden_size=hidden,
                intermediate_size=intermediate,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=context,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=0,
                pad_token_id=0,
                use_cache=False,
            )
        )

    def configure_optimizers(self) -> Any:
        """AdamW; warm-up, a constant learning rate, and a linear decay to zero."""
        matrices = [parameter for parameter in self.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in self.parameters() if parameter.dim() < 2]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=self.lr,
            betas=(0.9, 0.95),
        )
        steps = int(self.trainer.estimated_stepping_batches)

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / self.warmup) * min(1.0, (steps - step) / (self.decay * steps))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
