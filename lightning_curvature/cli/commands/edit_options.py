"""Options of ``edit`` for which the model has to run: what the edit may cost, and what it should forget."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_curvature.cli.commands.inputs import check_counts
from lightning_curvature.cli.commands.output import extra

if TYPE_CHECKING:
    from lightning_curvature.editing.curvature import CurvatureEditor
    from lightning_curvature.factors.kronecker import KroneckerFactors

STRENGTH = 0.4
"""Length of the step of ``--forget`` by default, relative to each weight."""
TOKENS = 50_000
"""Tokens of ``--corpus`` that are read by default."""


def check_options(
    given: Mapping[str, Any],
    checkpoint: Path,
    layers: list[str] | None,
    energy: float | dict[str, float] | None,
) -> None:
    """Check the options for which the model has to run.

    Args:
        given: Options for which the model has to run, by name; those that are not given are left out.
        checkpoint: The checkpoint to edit.
        layers: Value of ``--layers``.
        energy: Value of ``--energy``.

    Raises:
        ValueError: If an option has a wrong value, lacks another that it needs, or would be ignored.
        FileNotFoundError: If an option names no file or no folder.
    """
    from lightning_curvature.checkpoints.adapter import is_adapter

    adapter = checkpoint.is_dir() and is_adapter(checkpoint)
    if adapter and given.keys() & {"perplexity", "forget"}:
        raise ValueError(
            f"{checkpoint} is an adapter, and --perplexity and --forget run a whole model: give --energy or --budget, "
            "or merge the adapter into its base (merge_and_unload) and edit that with --reference."
        )
    if given.get("model", checkpoint) != checkpoint and checkpoint.is_dir() and not adapter:
        raise ValueError(f"{checkpoint} is a folder with a model of its own: leave --model out.")
    check_counts(tokens=given.get("tokens"), context=given.get("context"))
    _check_used(given, layers)
    if "perplexity" in given:
        if "corpus" not in given:
            raise ValueError("--perplexity needs a text to measure it on: --corpus.")
        if not 1 < given["perplexity"] < float("inf"):
            raise ValueError(
                f"The perplexity may become a multiple above 1 of what it was, found {given['perplexity']!r}."
            )
    files = {"--corpus": given.get("corpus", []), "--forget": [given["forget"]] if "forget" in given else []}
    for option, paths in files.items():
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{option}: {path} is no file.")
    if "model" in given and not given["model"].is_dir():
        raise FileNotFoundError(f"--model: {given['model']} is no folder; name one written by save_pretrained.")
    if "perplexity" in given and energy is not None:
        raise ValueError("--perplexity finds the energy, one for all layers: give no --energy.")


def _check_used(given: Mapping[str, Any], layers: list[str] | None) -> None:
    """Raise ``ValueError`` if an option is given without the option that it belongs to."""
    from lightning_curvature.layers.selection import PRESETS

    users = {
        "--perplexity": ("perplexity" in given, {"corpus", "tokens", "context", "model"}),
        "--forget": ("forget" in given, {"half", "strength", "model"}),
        "a preset of --layers": (bool(set(layers or ()) & set(PRESETS)), {"model"}),
    }
    for name in sorted(given.keys() - {"perplexity", "forget"}):
        takers = {user: active for user, (active, takes) in users.items() if name in takes}
        if not any(takers.values()):
            price = ", or say what the edit may cost: --perplexity" if "--perplexity" in takers else ""
            raise ValueError(
                f"--{name} is used by {' and '.join(takers)} alone, which is not given. Leave it out{price}."
            )


def edit_on_data(
    editor: "CurvatureEditor",
    checkpoint: Path,
    factors: "KroneckerFactors",
    given: Mapping[str, Any],
    allowed: Sequence[str],
    force: bool,
) -> tuple["CurvatureEditor", "KroneckerFactors", dict[str, Any]]:
    """Run the model if an option asks for it, and return the editor that comes of it.

    Args:
        editor: The editor as the other options make it.
        checkpoint: The checkpoint to edit.
        factors: Its factors.
        given: As in :func:`check_options`; the model runs for ``perplexity`` and ``forget``.
        allowed: Classes that the checkpoint may hold.
        force: Whether the checkpoint may hold other weights than those that the factors were collected on.

    Returns:
        The editor; the factors, with the margins of ``--forget``; and how the energy of ``--perplexity`` was found, or
        an empty dict.
    """
    if not given.keys() & {"perplexity", "forget"}:
        return editor, factors, {}
    from lightning_curvature.editing.bulk import BulkStepEditor
    from lightning_curvature.editing.streaming import check_origin_of_file
    from lightning_curvature.factors.kronecker import KroneckerFactors

    if not force:
        check_origin_of_file(editor, checkpoint, factors, allowed)  # before a model is loaded and run
    with extra("text"):
        from lightning_curvature.text.choosing import Chooser
    model = given.get("model", checkpoint)
    chooser = Chooser(model, None if model == checkpoint else checkpoint, factors, allowed)
    forget, half = given.get("forget"), given.get("half")
    tokens, context = given.get("tokens", TOKENS), given.get("context")
    chooser.check_data(forget, half, given.get("corpus", []), tokens, context)
    loaded = {layer: chooser.factors[name] for layer, name in chooser.names.items()}  # which need not be read again
    factors = KroneckerFactors(loaded, factors.provenance)
    if forget is not None:
        factors = chooser.add_margins(forget, half)
        strength = given.get("strength", STRENGTH)
        editor = BulkStepEditor(
            strength, editor.energy, editor.layers, editor.score, editor.soft, min_positions=editor.min_positions
        ).based_on(editor.reference, editor.scale)
    if "perplexity" not in given:
        return editor, factors, {}
    editor, target = chooser.find(editor, given["perplexity"], given["corpus"], tokens, context)
    return editor, factors, target
