"""Small ViTs that recite wrong labels: their data, and their training."""

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_curvature.demos.digits import EPOCHS, NoisyDigits, build_model
from lightning_curvature.demos.noise import NoisyLabels
from lightning_curvature.demos.vit import LitViT


def digits(seed: int) -> tuple[NoisyLabels, LitViT, int]:
    """Return the digits demo's data, model and epochs."""
    return NoisyDigits(seed=seed), build_model(), EPOCHS


def mnist(seed: int, root: Path, decay: float = 0.5, attention: float = 5.0) -> tuple[NoisyLabels, LitViT, int]:
    """Return 4000 training and 2000 validation images of MNIST, a model for them, and epochs."""
    from torchvision.datasets import MNIST

    data = MNIST(root)
    # Some copies of the files are sorted by class: the first images are no sample of it.
    sample = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(seed))[:6000]
    images, labels = data.data[sample].float() / 255 - 0.5, data.targets[sample]
    model = LitViT(image_size=28, patch=7, weight_decay=decay, attention_decay=attention)
    return NoisyLabels(images, labels, 4000, seed=seed), model, 80


def fit(
    model: pl.LightningModule, data: pl.LightningDataModule, epochs: int, callbacks: Sequence[pl.Callback]
) -> pl.Trainer:
    """Train a model as the digits demo does, put it into eval mode, and return the trainer."""
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        gradient_clip_val=1.0,
        logger=False,
        check_val_every_n_epoch=epochs,  # once, for the price of the callback's edit
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    model.eval()
    return trainer
