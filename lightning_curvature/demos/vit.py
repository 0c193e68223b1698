"""A small Vision Transformer that memorizes noised labels in its MLPs, as a LightningModule."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention with a narrow inner width, so that little can be memorized in it."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * inner)
        self.proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over tokens ``[b, t, width]``."""
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        mixed: Tensor = self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))
        return mixed


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, inner: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, inner, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, mlp_ratio * width)
        self.fc2 = nn.Linear(mlp_ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens ``[b, t, width]``."""
        x = x + self.attention(self.norm1(x))
        update: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + update


class ViT(nn.Module):
    """Vision Transformer with a class token, for square images."""

    def __init__(
        self,
        image_size: int,
        patch: int,
        classes: int,
        width: int,
        depth: int,
        heads: int,
        inner: int,
        mlp_ratio: int,
        channels: int = 1,
    ) -> None:
        super().__init__()
        self.patch, self.channels = patch, channels
        self.embed = nn.Linear(channels * patch * patch, width)
        self.cls = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(0.02 * torch.randn((image_size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, inner, heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images ``[b, h, w]`` of one channel, or ``[b, c, h, w]``."""
        images = images.view(len(images), self.channels, *images.shape[-2:])
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        cls = repeat(self.cls, "d -> b 1 d", b=len(images))
        x = torch.cat([cls, self.embed(patches)], 1) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


class LitViT(pl.LightningModule):
    """Trains :class:`ViT` until it has memorized its training labels.

    Weight decay decides where the labels are memorized: all over the network if it is too weak, nowhere if it is too
    strong. Here it is strong, and several times stronger on attention, so that the MLPs hold them.

    Args:
        image_size: Side of the square images, in pixels.
        patch: Side of a patch.
        classes: Number of classes.
        width: Model width.
        depth: Blocks.
        heads: Attention heads.
        inner: Total width of the heads.
        mlp_ratio: Hidden width of the MLPs over model width.
        lr: Peak learning rate of AdamW, after 5 % of warm-up, decayed by a cosine.
        weight_decay: Decay of all matrices outside attention.
        attention_decay: Decay of attention matrices, as a multiple of ``weight_decay``.
        channels: Channels of the images.
    """

    def __init__(
        self,
        image_size: int = 8,
        patch: int = 2,
        classes: int = 10,
        width: int = 64,
        depth: int = 2,
        heads: int = 2,
        inner: int = 16,
        mlp_ratio: int = 8,
        lr: float = 1e-3,
        weight_decay: float = 1.0,
        attention_decay: float = 6.0,
        channels: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.decays = {"attention": weight_decay * attention_decay, "matrix": weight_decay, "vector": 0.0}
        self.model = ViT(image_size, patch, classes, width, depth, heads, inner, mlp_ratio, channels)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[b, classes]``."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Cross-entropy on the labels as they are, noised or not."""
        images, labels, *_ = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Log loss and accuracy."""
        images, labels, *_ = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> Any:
        """AdamW with three groups of weight decay; warm-up, then a cosine."""
        groups: dict[str, list[nn.Parameter]] = {"attention": [], "matrix": [], "vector": []}
        for name, parameter in self.named_parameters():
            kind = "vector" if parameter.dim() < 2 else "attention" if ".attention." in name else "matrix"
            groups[kind].append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": parameters, "weight_decay": self.decays[kind]} for kind, parameters in groups.items()],
            lr=self.lr,
            betas=(0.9, 0.98),
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            self.lr,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=0.05,
            cycle_momentum=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
