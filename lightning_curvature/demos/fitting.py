"""The Trainer of the demos."""

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger

from lightning_curvature.trainer.callback import KFACEditCallback


def fit(
    model: pl.LightningModule, data: pl.LightningDataModule, callback: KFACEditCallback, out: Path, **options: Any
) -> pl.Trainer:
    """Train a model with the callback on the CPU.

    Args:
        model: The model.
        data: Its data.
        callback: Collects; it holds the factors afterwards.
        out: Folder for the logs.
        **options: Further arguments of the Trainer.

    Returns:
        The Trainer, which can save the model.
    """
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[callback],
        gradient_clip_val=1.0,
        log_every_n_steps=20,
        logger=CSVLogger(out, name="", version="logs"),
        enable_checkpointing=False,  # the demo saves the checkpoint itself, under a name of its own
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        **options,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")  # the data are in memory
        trainer.fit(model, data)
    return trainer
