"""Choosing an edit of a saved language model, by its cost in perplexity or by a sweep."""

import functools
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_curvature.checkpoints.names import match_layers
from lightning_curvature.editing import bulk
from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.editing.origin import check_loaded
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.search.sweep import Row, sweep
from lightning_curvature.text.evaluation import WINDOW, perplexity, strict_rate, window_nll
from lightning_curvature.text.matching import perplexity_ratio
from lightning_curvature.text.saved import SavedModel
from lightning_curvature.text.sequences import PromptedSequence, read_sequences
from lightning_curvature.text.strength import strongest
from lightning_curvature.text.suffixes import suffix_batches, suffix_margins

ENERGIES = (0.7, 0.75, 0.8, 0.84, 0.87, 0.9, 0.93, 0.96, 0.98, 0.99)
"""Energies that a sweep tries."""
LIMITS = (1.02, 1.05, 1.10, 1.20)
"""Multiples of the perplexity within which a sweep names its best edit."""


class Chooser:
    """A saved language model and its factors, to try edits on.

    Args:
        folder: Folder of a Hugging Face causal LM and its tokenizer.
        checkpoint: File or folder to take the weights from; None for ``folder``.
        factors: Factors of the model; their layers may go by the names of a module that wraps it.
        allow_globals: Classes that a ``.ckpt`` or ``.pt`` may hold besides tensors and primitives.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the factors do not fit the model.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Path | None,
        factors: KroneckerFactors,
        allow_globals: Sequence[str] = (),
    ) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is no folder, and the model has to run: name the folder of the Hugging Face model whose "
                "weights these are (--model)."
            )
        self.saved = SavedModel(folder, checkpoint, allow_globals)
        self.leading = self.saved.leading
        self.given = factors

    @functools.cached_property
    def model(self) -> Any:
        """The model, loaded at the first use."""
        return self.saved.load()

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """The name that the model gives to each layer, by its name in the factor file."""
        return {
            layer: name.removesuffix(".weight")
            for layer, name in match_layers(self.given, self.model.state_dict()).items()
        }

    @functools.cached_property
    def factors(self) -> KroneckerFactors:
        """The factors by the names that the model gives to its layers."""
        return KroneckerFactors({self.names[layer]: self.given[layer] for layer in self.given}, self.given.provenance)

    def check_data(
        self, forget: Path | None, half: str | None, corpora: Sequence[Path], tokens: int, context: int | None
    ) -> None:
        """Check the named data before the model is loaded; raise ``ValueError`` if the model cannot read them."""
        if forget is not None:
            self._sequences(forget, half)
        for corpus in corpora:
            self._windows(corpus, tokens, context)

    def add_margins(self, forget: Path, half: str | None) -> KroneckerFactors:
        """Return the factors, by their names in the factor file, with the gradient of the margins of some sequences.

        Args:
            forget: JSON lines with sequences.
            half: Use the ``"tuning"`` or the ``"validation"`` half of them; None for all.
        """
        asked = self._sequences(forget, half)
        batches = suffix_batches(self.model, asked)
        self.factors = bulk.add_margins(
            self.model, self.factors, batches, lambda batch: suffix_margins(self.model, batch)
        )
        provenance = {**self.factors.provenance, "forget": {"file": forget.name, "half": half, "sequences": len(asked)}}
        return KroneckerFactors({layer: self.factors[name] for layer, name in self.names.items()}, provenance)

    def find(
        self, editor: CurvatureEditor, limit: float, corpora: Sequence[Path], tokens: int, context: int | None
    ) -> tuple[CurvatureEditor, dict[str, Any]]:
        """Find the strongest edit within a perplexity on every second window of each text, and measure the others.

        Args:
            editor: Its energy is searched for; of a soft edit of updates, the factor of all updates and the budget.
            limit: What the perplexity of each text may become, as a multiple of what it was.
            corpora: The texts.
            tokens: Tokens to read of each.
            context: Tokens of a window.

        Returns:
            The editor that was found. And ``energy``, or ``budget`` and ``scale``; ``perplexity``, the largest multiple
            on the windows that the edit was chosen on; ``held_out``, the largest on the other windows, with the bounds
            ``low`` and ``high`` of its 95 % interval; these numbers by text in ``corpora``; and all this as ``text``.

        Raises:
            ValueError: If the limit is not above 1, a corpus is too short or does not tell the cost, or no edit is
                within the limit.
        """
        if not 1 < limit < float("inf"):
            raise ValueError(f"The perplexity may become a multiple above 1 of what it was, found {limit!r}.")
        windows = {corpus: self._windows(corpus, tokens, context) for corpus in corpora}
        for corpus, rows in windows.items():
            if len(rows) < 4:
                raise ValueError(
                    f"{corpus} has {len(rows)} windows of {rows.shape[1]} tokens; choose on four at least."
                )
        named, editor = editor, self._renamed(editor)
        chosen_on = {corpus: self._nll(rows[::2]).mean() for corpus, rows in windows.items()}

        def multiples() -> dict[Path, float]:
            reached = {c: float((self._nll(windows[c][::2]).mean() - before).exp()) for c, before in chosen_on.items()}
            return {c: value if math.isfinite(value) else math.inf for c, value in reached.items()}

        found, strength = strongest(editor, self.model, self.factors, multiples, limit, " and ".join(map(str, corpora)))
        others = {corpus: self._nll(rows[1::2]) for corpus, rows in windows.items()}
        with found.applied(self.model, self.factors):
            reached = multiples()
            ratios = {
                corpus: perplexity_ratio(before, self._nll(windows[corpus][1::2])) for corpus, before in others.items()
            }
        lines = [
            f"{f'{corpus}: ' if len(corpora) > 1 else ''}perplexity x {reached[corpus]:.4f} on the "
            f"{len(windows[corpus][::2])} windows that it was chosen on, x {ratio.value:.4f} on {len(others[corpus])} "
            f"others (95 % interval {ratio.low:.4f} to {ratio.high:.4f})."
            for corpus, ratio in ratios.items()
        ]
        by_corpus = {
            str(corpus): {"perplexity": reached[corpus], "held_out": ratio.value, "low": ratio.low, "high": ratio.high}
            for corpus, ratio in ratios.items()
        }
        dearest = max(by_corpus.values(), key=lambda of_corpus: of_corpus["held_out"])
        text = ", ".join(f"{name} {value:.4g}" for name, value in strength.items()).capitalize()
        text += ": " + "\n".join(lines)
        values = {**strength, **dearest, "perplexity": max(reached.values()), "corpora": by_corpus, "text": text}
        return _strong_as(found, named), values

    def sweep(
        self,
        path: Path,
        sequences: Path,
        half: str | None,
        corpus: Path,
        *,
        energies: Sequence[float],
        layers: Sequence[str] | None,
        scores: Sequence[str],
        soft: bool,
        scope: str | None,
        tokens: int,
        context: int | None,
        batch_size: int,
        force: bool = False,
    ) -> list[Row]:
        """Measure ``strict`` and ``perplexity`` under many edits; see :func:`lightning_curvature.search.sweep.sweep`.

        Returns:
            The rows of the sweep, with ``times``: the perplexity as a multiple of the unedited model's.
        """
        asked, windows = self._sequences(sequences, half), self._windows(corpus, tokens, context)
        named = {}
        for score in scores:
            for choice in layers or ["*"]:
                editor = CurvatureEditor(1.0, choice.split(","), score, soft, scope=scope)
                editor.energies(self.given)  # a pattern that matches nothing is told before the model is loaded
                named[editor.method if layers is None else f"{editor.method}: {choice}"] = editor
        asked_layers = {layer for editor in named.values() for layer in editor.energies(self.given)}
        names = {layer: name for layer, name in self.names.items() if layer in asked_layers}
        check_loaded(
            self.model, names, self.given, self.saved.source, force=force, allow_globals=self.saved.allow_globals
        )
        editors = {name: self._renamed(editor) for name, editor in named.items()}

        def measure() -> dict[str, float]:
            return {
                "strict": strict_rate(self.model, asked, batch_size),
                "perplexity": perplexity(self.model, windows, num_leading=len(self.leading)),
            }

        data = hashlib.sha256(repr(([s.ids for s in asked], windows.tolist())).encode()).hexdigest()
        rows = sweep(self.model, self.factors, measure, editors, energies, path, data)
        return [{**row, "times": row["perplexity"] / rows[0]["perplexity"]} for row in rows]

    def _renamed(self, editor: CurvatureEditor) -> CurvatureEditor:
        """Return an editor whose layers go by the names that the model gives them."""
        by_file_name = KroneckerFactors({layer: self.factors[name] for layer, name in self.names.items()})
        renamed = editor.at(1.0)
        renamed.layers = [self.names[layer] for layer in editor.energies(by_file_name)]
        return renamed

    def _nll(self, windows: Tensor) -> Tensor:
        return window_nll(self.model, windows, num_leading=len(self.leading))

    def _sequences(self, path: Path, half: str | None) -> list[PromptedSequence]:
        asked = read_sequences(path, half, self.leading)
        self.saved.check_fit(asked)
        return asked

    def _windows(self, corpus: Path, tokens: int, context: int | None) -> Tensor:
        return self.saved.windows(corpus, tokens, context, WINDOW)


def _strong_as(found: CurvatureEditor, editor: CurvatureEditor) -> CurvatureEditor:
    """Return an editor with the strength of another one, which edits the layers by other names."""
    strong = editor.at(found.energy) if found.budget is None else editor.within(found.budget)
    strong.scale = found.scale
    return strong


def best_within(rows: Sequence[Row], limits: Sequence[float] = LIMITS) -> list[Row]:
    """Return, for each limit of the perplexity, the row that recites least within it; of equals, the cheapest.

    Args:
        rows: As :meth:`Chooser.sweep` returns them; the unedited model, whose ``times`` is 1, is among them.
        limits: Multiples of the perplexity of the unedited model.

    Returns:
        The rows, each with its ``limit``.
    """
    best = []
    for limit in limits:
        within = [row for row in rows if row["times"] <= limit]
        best.append({"limit": limit, **min(within, key=lambda row: (row["strict"], row["times"]))})
    return best
