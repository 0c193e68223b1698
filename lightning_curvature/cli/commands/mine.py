"""The command ``mine``."""

from pathlib import Path

from lightning_curvature._checks import check_share
from lightning_curvature.cli.commands.inputs import check_allowed, check_counts, check_files, unless_folder
from lightning_curvature.cli.commands.output import Output, extra


def mine(
    model: Path,
    corpus: Path,
    out: Path,
    prefix: int = 64,
    suffix: int = 48,
    stride: int | None = None,
    windows: int = 10_000,
    similarity: float = 0.5,
    batch_size: int = 32,
    checkpoint: Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
    allow_global: list[str] | None = None,
) -> Output:
    """Find windows of a text that a saved Hugging Face causal LM recites, and write them as JSON lines.

    Example:
        lightning-curvature mine --model MODEL --corpus text.jsonl --out recited.jsonl --prefix 32 --suffix 24

    Args:
        model: Folder written by save_pretrained, with its tokenizer.
        corpus: Text file, or JSON lines (.jsonl) with a field "text".
        out: File to write (.jsonl).
        prefix: Tokens of the text to prompt with, after those that the tokenizer puts in front.
        suffix: Tokens to recite.
        stride: Tokens between the starts of candidate windows; by default they do not overlap.
        windows: Candidates to test at most, a random sample.
        similarity: Of two recited windows that share this part of their tokens (as a common subsequence) one is kept.
        batch_size: Windows per forward pass.
        checkpoint: Take the weights from here instead (.ckpt, .pt, .safetensors, or a folder).
        seed: Seed of the sample.
        overwrite: Replace what is at out.
        allow_global: Classes that a .ckpt or .pt may hold besides tensors and primitives; only for trusted files.
    """
    inputs = {"--corpus": corpus, "--checkpoint": unless_folder(checkpoint)}
    check_files({"--out": out}, inputs, overwrite, models=[model, checkpoint])
    allowed = check_allowed(allow_global, checkpoint)
    check_counts(prefix=prefix, suffix=suffix, stride=stride, windows=windows, batch_size=batch_size)
    check_share(similarity, "--similarity")
    with extra("text"):
        from lightning_curvature.text import mining
        from lightning_curvature.text.saved import SavedModel
        from lightning_curvature.text.sequences import HALVES, write_sequences
    saved = SavedModel(model, checkpoint, allowed)
    candidates = mining.candidates(
        saved.tokenizer, corpus, prefix=prefix, suffix=suffix, stride=stride, windows=windows, seed=seed
    )
    saved.check_fit(candidates)
    recited = mining.mine_among(saved.load(), saved.tokenizer, candidates, similarity, batch_size)
    if not recited:
        raise RuntimeError(
            "The model recites none of them; nothing was written. Try more windows, or shorter prefixes and suffixes."
        )
    write_sequences(out, recited)
    counts = {half: sum(sequence.half == half for sequence in recited) for half in HALVES}
    halves = ", ".join(f"{count} {half}" for half, count in counts.items())
    return Output(f"{len(recited)} recited sequences ({halves}) written to {out}", {"out": str(out), "recited": counts})
