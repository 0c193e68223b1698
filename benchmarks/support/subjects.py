"""Trained models that memorize, and what is measured on them: what the benchmarks of methods and controls compare."""

import argparse
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from lightning_curvature import KFACEditCallback, KroneckerFactors
from lightning_curvature.collect.eigenvalues import correct_eigenvalues
from lightning_curvature.collect.passes import collect
from lightning_curvature.demos.label_noise import evaluate, forget_and_retain, image_losses, predict
from lightning_curvature.demos.language_model import LitCausalLM
from lightning_curvature.demos.settings import TEXT
from lightning_curvature.demos.text_training import train_text
from lightning_curvature.demos.unlearning import text_losses, text_sets
from lightning_curvature.editing.base import Editor
from lightning_curvature.editing.bulk import add_margins
from lightning_curvature.search.energy import match_energy
from lightning_curvature.text.evaluation import Baseline, perplexity, strict_rate
from lightning_curvature.text.suffixes import Suffixes, suffix_margins

from .costs import Cost, measured
from .images import digits, fit, mnist
from .tables import Columns
from .texts import TEXTS, recited_text

WINDOWS = 100
IMAGES = ("digits", "mnist")
LAST = ["*.2.mlp.[gu]*", "*.3.mlp.[gu]*"]
TEXT_COLUMNS: Columns = {
    "setting": ("setting", 1, 2),
    "strict": ("strict", 100, 1),
    "unseen": ("unseen strict", 100, 1),
    "times": ("perplexity, times", 1, 3),
    "domain": ("domain, times", 1, 3),
    "overlap": ("ranking overlap", 100, 1),
}
IMAGE_COLUMNS: Columns = {
    "setting": ("setting", 1, 2),
    "memorized": ("memorized", 100, 1),
    "recovered": ("recovered", 100, 1),
    "clean_train": ("clean train", 100, 1),
    "val_accuracy": ("validation", 100, 1),
}
"""Title, factor and digits of each column; "times" is a multiple of what the unedited model has."""
ENERGIES = (*(k / 100 for k in range(2, 90, 2)), *(k / 200 for k in range(180, 200)), 0.998, 0.999)


class Text:
    """A small language model that recites.

    *forget* is the tuning half of the memorized sequences; everything that :meth:`measure` returns is from other data.

    Args:
        name: ``"python"`` (the demo's data) or ``"wikitext"``.
        seed: Seed of data and training.
        models: Folder for trained models.
        root: Folder with WikiText-2 and the recited Dolma texts.
    """

    limits = (1.02, 1.05, 1.10, 1.20)
    higher_is_better = False
    utility_name = "perplexity"
    layers = "mlp"
    last = LAST
    columns = TEXT_COLUMNS
    main = "unseen"

    def __init__(self, name: str, seed: int, models: Path, root: Path | None) -> None:
        self.seed = seed
        self.data = recited_text(name, seed, root)
        self.model = self._trained(models / f"{name}-{seed}")
        self.lm = self.model.model
        held = self.data.held_out
        self.tuning = held["clean"]["tuning"][:WINDOWS]
        self.domain = held["domain"]["report"][:WINDOWS]
        self.baseline = Baseline(self.lm, held["clean"]["report"][:WINDOWS])
        self.before = {
            "clean": self.baseline.evaluate(self.lm)["perplexity"],
            "domain": perplexity(self.lm, self.domain),
        }
        self.rows = torch.split(self.data.collected, 16)

    def _trained(self, folder: Path) -> LitCausalLM:
        saved = folder / "model.pt"
        if not saved.exists():
            folder.mkdir(parents=True, exist_ok=True)
            model, _, _ = train_text(folder, self.seed, TEXT, self.data)
            torch.save(model.state_dict(), saved)
        model = LitCausalLM(TEXT.vocab_size, TEXT.hidden, 4 * TEXT.hidden, TEXT.layers)
        model.load_state_dict(torch.load(saved, weights_only=True))
        return model.eval()

    def step(self, batch: Any) -> torch.Tensor:
        """Return the loss of a batch of rows."""
        return self.lm(input_ids=batch, labels=batch).loss

    def utility(self) -> float:
        """Return the perplexity of clean tuning text."""
        return perplexity(self.lm, self.tuning)

    def tuning_rate(self) -> float:
        """Return how much of the forget set is recited."""
        return strict_rate(self.lm, self.data.half("tuning"))

    def measure(self) -> dict[str, float]:
        """Measure the model as it is."""
        clean = self.baseline.evaluate(self.lm)
        return {
            "strict": strict_rate(self.lm, self.data.half("validation")),
            "unseen": strict_rate(self.lm, self.data.unseen),
            "times": clean["perplexity"] / self.before["clean"],
            "domain": perplexity(self.lm, self.domain) / self.before["domain"],
            "overlap": clean["ranking_overlap"],
        }

    def match(self, editor: Editor, factors: KroneckerFactors, limit: float, points: dict[float, float]) -> float:
        """Return the energy of the strongest edit within a limit; ``points`` is what was measured, and grows."""
        match = match_energy(editor, self.model, factors, self.utility, limit, tolerance=0.003, points=points)
        points |= match.points
        return match.energy

    @functools.cached_property
    def forget(self) -> list[Suffixes]:
        """Batches of what to forget."""
        return text_sets(self.model, self.data)[0]

    def margins(self, batch: Any) -> torch.Tensor:
        """Return the margins of a batch of the forget set."""
        return suffix_margins(self.lm, batch)

    losses = staticmethod(text_losses)

    def retain(self, domain: bool = True) -> list[Suffixes]:
        """Return batches of clean text, half of each from the domain if asked for."""
        return text_sets(self.model, self.data, domain)[1]


class Images:
    """A small ViT that recites noised labels.

    *forget* is the noised half of the tuning part; everything that :meth:`measure` returns is from the report part.

    Args:
        name: ``"digits"`` or ``"mnist"``.
        seed: Seed of data and training.
        models: Folder for trained models.
        root: Folder that holds ``MNIST/raw``.
    """

    limits = (1.0, 0.99, 0.97)
    higher_is_better = True
    utility_name = "validation accuracy"
    layers = "last-mlp"
    last = None
    columns = IMAGE_COLUMNS
    main = "memorized"

    def __init__(self, name: str, seed: int, models: Path, root: Path | None) -> None:
        self.seed = seed
        pl.seed_everything(seed, verbose=False)
        self.data, self.model, epochs = digits(seed) if name == "digits" else mnist(seed, root)
        saved = models / f"{name}-{seed}" / "model.pt"
        if not saved.exists():
            saved.parent.mkdir(parents=True, exist_ok=True)
            fit(self.model, self.data, epochs, [KFACEditCallback()])
            torch.save(self.model.state_dict(), saved)
        self.model.load_state_dict(torch.load(saved, weights_only=True))
        self.model.eval()
        self.halves = self.data.halves()
        self.rows = [tuple(rows) for rows in zip(*(torch.split(t, 64) for t in self.data.train.tensors), strict=True)]

    def step(self, batch: Any) -> torch.Tensor:
        """Return the loss of a batch."""
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def utility(self) -> float:
        """Return the accuracy on the tuning part of the validation images."""
        images, labels = self.halves["tuning"][1].tensors
        return float((predict(self.model, TensorDataset(images)).argmax(1) == labels).double().mean())

    def tuning_rate(self) -> float:
        """Return how much of the forget set is recited."""
        return evaluate(self.model, *self.halves["tuning"])["memorized"]

    def measure(self) -> dict[str, float]:
        """Measure the model as it is."""
        return evaluate(self.model, *self.halves["report"])

    def match(self, editor: Editor, factors: KroneckerFactors, limit: float, points: dict[float, float]) -> float:
        """Return the energy of the strongest edit within a limit, of a grid: accuracies have steps and wiggle."""
        if not points:
            before = self.utility()
            for energy in ENERGIES:
                with editor.at(energy).applied(self.model, factors):
                    points[energy] = self.utility() / before
            points[1.0] = 1.0
        return min(energy for energy, value in points.items() if value >= limit)

    @functools.cached_property
    def forget(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of what to forget."""
        return forget_and_retain(self.data)[0]

    def margins(self, batch: Any) -> torch.Tensor:
        """Return the margins of a batch of the forget set."""
        logits = self.model(batch[0])
        given = logits.gather(1, batch[1][:, None])
        return given - logits.scatter(1, batch[1][:, None], -torch.inf).amax(1, keepdim=True)

    losses = staticmethod(image_losses)

    def retain(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return batches of training images of the tuning part whose labels are right."""
        return forget_and_retain(self.data)[1]


Subject = Text | Images


def collected(subject: Subject) -> tuple[KroneckerFactors, dict[str, Cost]]:
    """Collect factors with everything that a method may need, and return what each part cost."""
    parts = {}
    options: Mapping[str, Any] = {"layers": subject.layers, "seed": subject.seed}
    with measured() as parts["collect"]:
        collect(subject.model, subject.rows, subject.step, **options)
    with measured() as parts["coupled"]:
        factors = collect(subject.model, subject.rows, subject.step, coupled=True, **options)
    with measured() as parts["decompose"]:
        for layer in factors.values():
            _ = layer.basis
    with measured() as parts["correct"]:
        factors = correct_eigenvalues(subject.model, factors, subject.rows, subject.step, seed=subject.seed + 1)
    with measured() as parts["margins"]:
        factors = add_margins(subject.model, factors, subject.forget, subject.margins)
    for layer in factors.values():
        _ = layer.basis
    return factors, parts


def columns(name: str, *without: str) -> Columns:
    """Return what is measured on a data set, without some of the columns."""
    measures = TEXT_COLUMNS if name in TEXTS else IMAGE_COLUMNS
    return {key: column for key, column in measures.items() if key not in without}


def subject(name: str, seed: int, args: argparse.Namespace) -> Subject:
    """Return the model of a seed, trained unless it is there already."""
    return (Text if name in TEXTS else Images)(name, seed, args.models, args.root)
