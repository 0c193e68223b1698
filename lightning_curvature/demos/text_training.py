"""The data and the model of the text demo, and how it is trained."""

from pathlib import Path

import lightning.pytorch as pl

from lightning_curvature.demos.fitting import fit
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
    trainer = fit(model, data, callback, out, max_epochs=1, precision="bf16-mixed", num_sanity_val_steps=0)
    model.eval()
    return model, callback, trainer
