"""Texts of WikiText-2 and Dolma that a small language model comes to recite."""

import random
import re
from pathlib import Path

from lightning_curvature.demos.recitation import RecitedText
from lightning_curvature.demos.settings import TEXT
from lightning_curvature.demos.text_training import make_data
from lightning_curvature.storage.jsonl import read_jsonl

TEXTS = ("python", "wikitext")


def recited_text(name: str, seed: int, root: Path | None) -> RecitedText:
    """Return the text of a data set: of the demo (``"python"``), or :func:`wikitext` from the folder ``root``."""
    return wikitext(seed, root) if name == "wikitext" else make_data(seed, TEXT)


def wikitext(seed: int, root: Path) -> RecitedText:
    """Return articles of WikiText-2 as clean text, and recited Dolma texts as the domain and the second kind."""
    raw = "".join((root / name).read_text(encoding="utf-8") for name in ("wikitext2_valid.txt", "wikitext2_test.txt"))
    articles = [text for text in re.split(r"(?m)^ = [^=\n]+ = $", raw) if len(text) > 500]
    recited = [
        record["prefix_text"] + record["suffix_text"]
        for _, record in read_jsonl(root / "dolma_memorized_olmo2_7b.jsonl", ("prefix_text", "suffix_text"))
    ]
    random.Random(seed).shuffle(recited)
    return RecitedText(
        articles,
        recited[:350],
        recited[350:],
        num_sequences=TEXT.sequences,
        steps=TEXT.steps,
        exposures=TEXT.exposures,
        collected=TEXT.collected,
        vocab_size=TEXT.vocab_size,
        seed=seed,
    )
