"""The data and the model of the text demo, and how it is trained."""

import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger

from lightning_curvature.demos.language_model import LitCausalLM
from lightning_curvature.demos.python_text import read_texts
from lightning_curvature.demos.recitation import RecitedText
from lightning_curvature.demos.settings import TextSettings
from lightning_curvature.trainer.callback import KFACEditCallback


def make_data(seed: int, settings: TextSettings) -> RecitedText:
    """Return the data of the demo.

    Docstrings are the clean text, the language reference is the domain, and comments are the third kind of text.
    """
    texts = read_texts()
    return RecitedText(
        texts["docstrings"],
        texts["reference"],
        texts["comments"],
        num_sequences=settings.sequences,
        steps=settings.steps,
        exposures=settings.exposures,
        collected=settings.collected,
        vocab_size=settings.vocab_size,
        seed=seed,
    )


def train_text(
    out: Path, seed: int, settings: TextSettings, data: RecitedText
) -> tuple[LitCausalLM, KFACEditCallback, pl.Trainer]:
    """Train the model of the demo; the validation at the end collects the factors, on clean text of the training set.

    Args:
        out: Folder for the logs.
        seed: Seed of the weights and of the callback.
        settings: Sizes of the model.
        data: What it is trained on.

    Returns:
        The model in eval mode, the callback that holds its factors, and the Trainer.
    """
    pl.seed_everything(seed, verbose=False)
    model = LitCausalLM(
        settings.vocab_size,
        settings.hidden,
        4 * settings.hidden,
        settings.layers,
        decay=0.5 * (len(data.batches) - settings.steps) / len(data.batches),  # the second half of the repetitions
    )
    callback = KFACEditCallback(layers="mlp", loop="validation", seed=seed)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="bf16-mixed",
        callbacks=[callback],
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        log_every_n_steps=20,
        logger=CSVLogger(out, name="", version="logs"),
        enable_checkpointing=False,  # the demo saves the checkpoint itself, under a name of its own
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")  # the data are in memory
        trainer.fit(model, data)
    model.eval()
    return model, callback, trainer
