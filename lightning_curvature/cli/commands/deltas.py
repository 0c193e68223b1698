"""The commands ``revert`` and ``apply``: between an original and its edit, by a delta file."""

from pathlib import Path

from lightning_curvature.cli.commands.output import Output


def revert(
    checkpoint: Path, delta: Path, out: Path, overwrite: bool = False, allow_global: list[str] | None = None
) -> Output:
    """Get the exact original of an edited checkpoint back, verified by hashes.

    Example:
        lightning-curvature revert --checkpoint EDITED --delta delta.safetensors --out ORIGINAL

    Args:
        checkpoint: The edited checkpoint.
        delta: File that edit wrote with --save-delta.
        out: File or folder to write.
        overwrite: Replace what is at out.
        allow_global: Classes that a .ckpt or .pt may hold besides tensors and primitives; only for trusted files.
    """
    _apply_delta(checkpoint, delta, out, overwrite, allow_global, revert=True)
    return Output(f"The original is back at {out}", {"out": str(out)})


def apply(
    checkpoint: Path, delta: Path, out: Path, overwrite: bool = False, allow_global: list[str] | None = None
) -> Output:
    """Make the edit of a delta file on another copy of the original checkpoint.

    Example:
        lightning-curvature apply --checkpoint COPY --delta delta.safetensors --out EDITED

    Args:
        checkpoint: An unedited copy.
        delta: File that edit wrote with --save-delta.
        out: File or folder to write.
        overwrite: Replace what is at out.
        allow_global: Classes that a .ckpt or .pt may hold besides tensors and primitives; only for trusted files.
    """
    _apply_delta(checkpoint, delta, out, overwrite, allow_global, revert=False)
    return Output(f"Written to {out}", {"out": str(out)})


def _apply_delta(
    checkpoint: Path, delta: Path, out: Path, overwrite: bool, allow_global: list[str] | None, *, revert: bool
) -> None:
    from lightning_curvature.checkpoints.deltas import apply_delta

    apply_delta(checkpoint, delta, out, revert=revert, overwrite=overwrite, allow_globals=allow_global or ())
