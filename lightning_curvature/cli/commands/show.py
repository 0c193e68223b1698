"""The commands that show what is there: ``inspect`` and ``report``."""

from pathlib import Path

from lightning_curvature.cli.commands.output import Output, extra


def inspect(path: Path, allow_global: list[str] | None = None) -> Output:
    """Show what a factor file holds, or what was edited in a checkpoint.

    Example:
        lightning-curvature inspect factors.safetensors

    Args:
        path: Factor file, or checkpoint of any format.
        allow_global: Classes that a .ckpt or .pt may hold besides tensors and primitives; only for trusted files.
    """
    from lightning_curvature.report.inspection import describe, description

    facts = describe(path, allow_global or ())
    return Output(description(facts), facts)


def report(path: Path) -> Output:
    """Write one HTML page of a run, report.html, into its folder: pictures inside, no network needed.

    It is made from the other files of the folder, and made anew each time.

    Example:
        lightning-curvature report runs/text

    Args:
        path: Folder that a run wrote to: report.json, factors, edited checkpoints, analysis.json, as far as they are
            there.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder; name the one that a run wrote to.")
    with extra("plots"):
        from lightning_curvature.report.page import write_page
    page = write_page(path)
    return Output(f"Written to {page}", {"page": str(page)})
