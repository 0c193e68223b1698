"""Commands that show: report, detect."""

import csv
from pathlib import Path

from tabulate import tabulate

from lightning_curvature.checkpoints.atomic import replacing
from lightning_curvature.commands.output import Output, extra
from lightning_curvature.factors import KroneckerFactors


def report(path: Path) -> Output:
    """Write one HTML page of a run, report.html, into its folder: pictures inside, no network needed.

    Example:
        lightning-curvature report runs/text

    Args:
        path: Folder that a run wrote to: report.json, factors, edited checkpoints, analysis.json, as far as they are
            there.
    """
    with extra("plots"):
        from lightning_curvature.page import write_page
    page = write_page(path)
    return Output(f"Written to {page}", {"page": str(page)})


def detect(
    model: Path,
    factors: Path,
    out: Path,
    sequences: Path | None = None,
    corpus: Path | None = None,
    layer: str | None = None,
    checkpoint: Path | None = None,
    tokens: int = 100_000,
    context: int = 64,
    batch_size: int = 32,
) -> Output:
    """Rank windows of text by how memorized they look to a saved causal LM, without labels, and write CSV.

    The score is the share of a window's activation energy in the flat half of a layer's curvature basis.

    Example:
        lightning-curvature detect --model MODEL --factors F.safetensors --corpus text.jsonl --out ranked.csv

    Args:
        model: Folder written by save_pretrained, with its tokenizer.
        factors: Factor file of the model (.safetensors).
        out: CSV file to write: rank, score, likelihood, margin, min-k, number of the window, text.
        sequences: JSON lines with prefix_ids and suffix_ids, all of one length, to rank.
        corpus: Text file, or JSON lines with a field "text", of which windows are ranked.
        layer: The layer whose inputs count; by default the last one of the factor file.
        checkpoint: Take the weights from this checkpoint (.ckpt, .pt, .safetensors) instead.
        tokens: Tokens of the corpus to read at most.
        context: Tokens of a window of the corpus.
        batch_size: Windows per forward pass.
    """
    with extra("text"):
        from lightning_curvature.text.ranking import rank_windows
    rows = rank_windows(
        model, checkpoint, KroneckerFactors.load(factors), sequences=sequences, corpus=corpus, layer=layer,
        tokens=tokens, context=context, batch_size=batch_size,
    )  # fmt: skip
    with replacing(out) as temporary, Path(temporary).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    shown = [[row["rank"], f"{row['score']:.4f}", f"{row['likelihood']:.3f}", " ".join(row["text"].split())[:60]]
             for row in rows[:10]]  # fmt: skip
    table = tabulate(shown, ["rank", "score", "likelihood", "text"], disable_numparse=True)
    return Output(f"{table}\n{len(rows)} windows written to {out}", {"out": str(out), "rows": rows})
