"""Small ViTs that recite wrong labels: their data, and their training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from lightning_curvature.demos.digits import EPOCHS, NoisyDigits, build_model
from lightning_curvature.demos.noise import NoisyLabels
from lightning_curvature.demos.vit import LitViT


def digits(seed: int, **noise: Any) -> tuple[NoisyLabels, LitViT, int]:
    """Return the digits demo's data, with other noise if it is given, model and epochs."""
    return NoisyDigits(seed=seed, **noise), build_model(), EPOCHS


def mnist(
    seed: int, root: Path, decay: float = 0.5, attention: float = 5.0, **noise: Any
) -> tuple[NoisyLabels, LitViT, int]:
    """Return 4000 training and 2000 validation images of MNIST, a model for them, and epochs."""
    from torchvision.datasets import MNIST

    data = MNIST(root)
    # Some copies of the files are sorted by class: the first images are no sample of it.
    sample = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(seed))[:6000]
    images, labels = data.data[sample].float() / 255 - 0.5, data.targets[sample]
    model = LitViT(image_size=28, patch=7, weight_decay=decay, attention_decay=attention)
    return NoisyLabels(images, labels, 4000, seed=seed, **noise), model, 80


def cifar10(seed: int, root: Path, **noise: Any) -> tuple[NoisyLabels, LitViT, int]:
    """Return 8000 training and 2000 validation images of CIFAR-10, an ordinary ViT for them, and epochs.

    Args:
        seed: Seed of the choice of images, the split and the noise.
        root: Folder with torchvision's CIFAR-10, or with ``CIFAR10/cifar10_10000.npz``: ``images`` and ``labels``.
        noise: Other arguments of :class:`NoisyLabels`.
    """
    file = root / "CIFAR10" / "cifar10_10000.npz"
    if file.exists():
        content = np.load(file)
        images, labels = content["images"], content["labels"]
    else:
        from torchvision.datasets import CIFAR10

        data = CIFAR10(root)
        images, labels = data.data, np.asarray(data.targets)
    sample = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:10_000]
    pixels = torch.from_numpy(images)[sample].permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True)
    model = LitViT(
        image_size=32,
        patch=4,
        channels=3,
        width=128,
        depth=3,
        heads=4,
        inner=128,
        mlp_ratio=4,
        weight_decay=0.05,
        attention_decay=1.0,
    )
    return NoisyLabels(pixels, torch.from_numpy(labels)[sample].long(), 8000, seed=seed, **noise), model, 30


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
