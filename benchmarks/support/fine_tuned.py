"""A pretrained model that was fine-tuned until it recites: how it is made, edited and measured."""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typing_extensions import override

from lightning_curvature import KFACEditCallback, KroneckerFactors
from lightning_curvature.collect.passes import collect
from lightning_curvature.text.evaluation import perplexity, strict_rate
from support.pretrained import BATCH, FineTuned, FineTuneText, Quarters, base_folder
from support.questions import answered, questions
from support.seeds import Row

WINDOWS, SEQUENCES = 48, 64
"""Windows of 128 tokens of each text, and sequences of each set, that are measured."""
OPTIONS: dict[str, Any] = {
    "precision": "bf16-mixed",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}
Edit = Callable[[Any, KroneckerFactors], AbstractContextManager[Any]]


class Subject:
    """A fine-tuned model and what is measured on it.

    Args:
        args: Arguments of the benchmark.
        seed: Seed of data and training.
    """

    name = "smollm2"

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.start_folder = start = base_folder(args.models / "smollm2")
        self.reference: str | None = str(start)
        self.base = _load(start)
        self.data = FineTuneText(AutoTokenizer.from_pretrained(start), args.root, seed)
        self.tokenizer = AutoTokenizer.from_pretrained(start)
        self.folder = args.models / f"{self.name}-{seed}"
        if not self.folder.exists():
            pl.seed_everything(seed, verbose=False)
            self.fine_tune(_load(start))
        self.model: Any = self.load(self.folder)
        self.stream = Path(f"{self.folder}-stream.safetensors")
        self.start = args.models / "smollm2-start.safetensors"
        if not self.start.exists():
            rows = torch.split(self.data.clean[:240], BATCH)
            collect(self.base, rows, lambda b: self.base(input_ids=b, labels=b).loss, layers="linear").save(self.start)
        self.factors = KroneckerFactors.load(self.start)
        self.known = {
            name: [item for item, right in zip(asked, answered(self.base, self.tokenizer, asked), strict=True) if right]
            for name, asked in questions().items()
        }

    def load(self, folder: Path) -> Any:
        """Return a model that was fine-tuned."""
        return _load(folder)

    def as_saved(self) -> Any:
        """Return the model as who loads it gets it."""
        return self.model

    def fine_tune(self, model: Any) -> None:
        """Fine-tune the base model, and save it with checkpoints of its quarters and the factors of its steps."""
        # Its edit is made later, where the time of it is measured.
        collecting = KFACEditCallback(reference="start", budget=1e-4, save_factors=f"{self.folder}-stream.safetensors")
        self.fit(FineTuned(model), [collecting])
        model.save_pretrained(self.folder)

    def fit(self, module: FineTuned, callbacks: list[pl.Callback]) -> None:
        """Train a module for one pass over the rows."""
        trainer = pl.Trainer(
            max_epochs=1,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            callbacks=[Quarters(self.folder), *callbacks],
            **OPTIONS,
        )
        trainer.fit(module, self.data)

    def earlier(self, quarter: float) -> Edit:
        """Return the checkpoint of a quarter of the training in the place of an edit."""

        @contextmanager
        def applied(model: Any, _: KroneckerFactors) -> Iterator[None]:
            last = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            model.load_state_dict(_load(Path(f"{self.folder}-quarter-{quarter:.0f}")).state_dict())
            yield
            model.load_state_dict(last)

        return applied

    def unlearned(self, kind: Any, lr: float) -> Edit:
        """Return two passes of an unlearner over the tuning half of the sequences, beside clean text to keep."""
        forget = [
            batch
            for sequences in self.data.sequences.values()
            for batch in torch.split(torch.tensor([s.ids for s in sequences if s.half == "tuning"]), BATCH)
        ]
        return kind(forget, torch.split(self.data.clean[:240], BATCH), _example_losses, epochs=2, lr=lr).applied

    def tuning(self) -> float:
        """Return the perplexity that edits are chosen by."""
        return perplexity(self.model, self.data.held_out["wiki"]["tuning"][:WINDOWS])

    def measure(self, model: Any) -> dict[str, float]:
        """Return what is reported of a model."""
        row = {name: perplexity(model, self.data.held_out[name]["report"][:WINDOWS]) for name in ("wiki", "web")}
        for name, sequences in self.data.sequences.items():
            asked = [sequence for sequence in sequences if sequence.half == "validation"][:SEQUENCES]
            with torch.autocast("cpu", torch.bfloat16):
                row[f"recited {name}"] = strict_rate(model, asked)
        for name, known in self.known.items():
            row[name] = sum(answered(model, self.tokenizer, known)) / len(known)
        return row

    def after_callback(self, factors: Path | None) -> Row:
        """Return what the callback makes of the model, the price that it paid, and the seconds that it took.

        Args:
            factors: Factors that were collected before; None to collect from the validation loop.
        """
        module = FineTuned(self.model)
        given = None if factors is None else str(factors)
        callback = KFACEditCallback(factors=given, reference=self.reference)
        began = time.perf_counter()
        pl.Trainer(callbacks=[callback], **OPTIONS).validate(module, self.data, verbose=False)
        seconds = time.perf_counter() - began
        with callback.editor.applied(module, callback.factors) as report:
            row = self.measure(self.as_saved())
        return {**row, "predicted": report.predicted_loss or 0.0, "seconds": seconds, "price": str(callback.match)}


class AdaptedSubject(Subject):
    """The same with a LoRA adapter of rank 16 on all linear layers, trained and edited in the place of the weights."""

    name = "smollm2-lora"

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        super().__init__(args, seed)
        self.reference = None

    @override
    def load(self, folder: Path) -> Any:
        return PeftModel.from_pretrained(_load(self.start_folder), str(folder)).eval()

    @override
    def fine_tune(self, model: Any) -> None:
        adapted: Any = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        self.fit(FineTuned(adapted, lr=2e-3), [])
        adapted.save_pretrained(self.folder)

    @override
    def as_saved(self) -> Any:
        """Return the model of the base and the saved adapter, and see that the base is what it was."""
        folder = Path(f"{self.folder}-edited")
        self.model.save_pretrained(folder)
        base = self.model.get_base_model().state_dict()
        for name, weight in self.base.state_dict().items():
            held = next(base[key] for key in (name, name.replace(".weight", ".base_layer.weight")) if key in base)
            assert torch.equal(held, weight), f"{name} of the base changed"
        return self.load(folder)


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _example_losses(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood of each row of tokens."""
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
