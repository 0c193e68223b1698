"""The progress of a collection over a text, on disk: an interrupted run goes on where it last saved."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_curvature.collect.tied_inputs import STATE_VERSION
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.factors.merging import merge_sources
from lightning_curvature.storage.atomic import replacing

log = logging.getLogger(__name__)


def run_key(
    model: Any, tokenizer: Any, corpus: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], **settings: Any
) -> str:
    """Return a text that is the same for two runs if the second can continue the first.

    Args:
        model: A transformers causal LM; its weights count.
        tokenizer: Its tokenizer.
        corpus: Text file, or several; the place, size and time of change of each count, not its content.
        **settings: JSON values that the factors depend on.
    """
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        weights.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        weights.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    fast = getattr(tokenizer, "backend_tokenizer", None)
    words = fast.to_str() if fast is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    files = [_file_facts(path) for path in ([corpus] if isinstance(corpus, str | os.PathLike) else corpus)]
    facts = {
        "model": weights.hexdigest(),
        "tokenizer": hashlib.sha256(words.encode()).hexdigest(),
        "corpus": files[0] if len(files) == 1 else files,
        "version of the sums": STATE_VERSION,
        **settings,
    }
    return json.dumps(facts, sort_keys=True)


def _file_facts(path: str | os.PathLike[str]) -> list[str | int]:
    status = Path(path).stat()
    return [str(Path(path).resolve()), status.st_size, status.st_mtime_ns]


@dataclass(frozen=True)
class Progress:
    """Where a collection stands, in ``OUT.partial``, and the factors of its finished passes, in ``OUT.partial.N``.

    The passes over the first corpus come first, then those over the next one.

    Args:
        out: Factor file that the collection will write.
        run: What :func:`run_key` returns.
        passes: Passes over each corpus.
        weights: What each corpus counts.
    """

    out: str | os.PathLike[str]
    run: str
    passes: int
    weights: Sequence[float] = (1.0,)

    @property
    def path(self) -> Path:
        """The file that says where the collection stands."""
        return Path(f"{os.fspath(self.out)}.partial")

    @property
    def pieces(self) -> list[Path]:
        """The factor file of each pass, over all corpora."""
        return [Path(f"{self.path}.{index}") for index in range(self.passes * len(self.weights))]

    def load(self) -> dict[str, Any]:
        """Return where the run stands.

        Returns:
            ``pass``, the number of finished passes; ``batches``, the number of batches of the next pass that were
            read; and ``collector``, the state of the collector behind them, or None.

        Raises:
            ValueError: If the files are damaged, or those of another run.
        """
        if not self.path.exists():
            return {"pass": 0, "batches": 0, "collector": None}
        try:
            content: dict[str, Any] = torch.load(self.path, weights_only=True)
            old, new = json.loads(content["run"]), json.loads(self.run)
            state = {key: content[key] for key in ("pass", "batches", "collector")}
            if old == new:
                for piece in self.pieces[: state["pass"]]:
                    KroneckerFactors.open(piece)
        except Exception as error:  # a file that was cut off can fail in any way
            last = len(self.pieces) - 1
            pieces = f" and {self.path}.0 to .{last}" if last else ""
            raise ValueError(
                f"{self.path}, the progress of an interrupted collection, is damaged or not complete "
                f"({type(error).__name__}). Delete it{pieces}, and collect from the start."
            ) from error
        if old != new:
            changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            raise ValueError(
                f"{self.path} is the progress of another run: {changed} differ. Finish that run with its own "
                "arguments, or delete the file."
            )
        log.info("Going on with pass %d after %d batches (%s).", state["pass"] + 1, state["batches"], self.path)
        return state

    def save(self, index: int, batches: int, collector: dict[str, Any] | None) -> None:
        """Save where the run stands; arguments as :meth:`load` returns them."""
        with replacing(self.path) as temporary:
            torch.save({"run": self.run, "pass": index, "batches": batches, "collector": collector}, temporary)

    def finish_pass(self, index: int, factors: KroneckerFactors) -> None:
        """Save the factors of a pass, and go on to the next pass."""
        factors.save(self.pieces[index])
        self.save(index + 1, 0, None)

    def finish(self) -> KroneckerFactors:
        """Return the factors of all passes, written to ``out``, and remove the files of the progress.

        Those of several corpora are read layer by layer, and merged with the weights.
        """
        if len(self.weights) == 1:
            loaded = [KroneckerFactors.load(piece) for piece in self.pieces]
        else:
            loaded = [self._merged(index) for index in range(self.passes)]
        layers = {name: layer for piece in loaded for name, layer in piece.items()}
        factors = KroneckerFactors(layers, loaded[0].provenance)
        factors.save(self.out)
        for path in (self.path, *self.pieces):
            path.unlink()
        return factors

    def _merged(self, index: int) -> KroneckerFactors:
        """Return the factors of one group of layers, over all corpora."""
        sources = [KroneckerFactors.open(piece) for piece in self.pieces[index :: self.passes]]
        return merge_sources(sources, [{}] * len(sources), self.weights)
