"""Loading a saved Hugging Face causal LM and its tokenizer; errors say what does not fit."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.utils import logging as transformers_logging

from lightning_curvature._checks import listing
from lightning_curvature.checkpoints.loading import load_weights, read_weights
from lightning_curvature.factors.files import is_factor_file
from lightning_curvature.text.decoding import context_length, vocabulary_size

_REMEDY = "Name the folder of a causal language model, one whose layers see what came before alone."


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """Load the tokenizer of a model folder.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no tokenizer.
    """
    path = _existing(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer("a")
    except Exception as error:  # transformers fails in many ways where files are missing or broken
        raise ValueError(
            f"{folder} holds no tokenizer that transformers can load ({_first_line(error)}). Save the model's own into "
            "it (tokenizer.save_pretrained)."
        ) from error
    return tokenizer


def read_config(folder: str | os.PathLike[str]) -> Any:
    """Read the configuration of a model folder, and check that it is one of a causal LM.

    Raises:
        FileNotFoundError: If there is no such folder, or no configuration in it.
        ValueError: If the configuration is broken, or describes another kind of model.
    """
    path = _existing(folder)
    if not Path(path, "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no config.json; expected a folder written by save_pretrained. An adapter is merged into "
            "its model first (merge_and_unload)."
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder}: its config.json describes no model that transformers knows ({_first_line(error)})."
        ) from error
    causal = _names(MODEL_FOR_CAUSAL_LM_MAPPING, config)
    named = list(config.architectures or [])
    # A name that transformers does not know is a class of the user: its weights show whether it fits.
    known = [name for name in named if isinstance(getattr(transformers, name, None), type)]
    fitting = {*causal, *_names(MODEL_MAPPING, config)}
    if not causal or (known and not any(name in fitting or name.endswith("LMHeadModel") for name in known)):
        raise ValueError(
            f"{folder} holds no causal language model but a {', '.join(named) or config.model_type}. {_REMEDY}"
        )
    return config


def check_checkpoint(checkpoint: str | os.PathLike[str]) -> None:
    """Check what lies at the path of a checkpoint.

    Raises:
        FileNotFoundError: If there is nothing, or a folder without a configuration.
        ValueError: If it holds factors instead of weights, or the configuration is not that of a causal LM.
    """
    path = Path(checkpoint)
    if path.is_dir():
        read_config(path)
    elif not path.is_file():
        raise FileNotFoundError(
            f"{checkpoint} is no file; a checkpoint is a .ckpt, .pt or .safetensors file, or a folder written by "
            "save_pretrained."
        )
    elif path.suffix == ".safetensors" and is_factor_file(path):
        raise ValueError(f"{checkpoint} holds K-FAC factors, not weights. Name the model's checkpoint.")


def load_model(
    folder: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
    allow_globals: Sequence[str] = (),
) -> Any:
    """Load a causal LM in eval mode, on a GPU where there is one.

    Args:
        folder: What ``save_pretrained`` wrote.
        checkpoint: Where to take the weights from instead: a Lightning ``.ckpt`` whose module holds the model as a
            submodule, a state dict (``.pt``, ``.safetensors``), or another folder.
        allow_globals: Classes that a file may hold besides tensors and primitives.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If the folder holds no causal LM with all its weights, or the weights of the checkpoint are not
            exactly those of this model.
    """
    model = _pretrained(folder, complete=checkpoint is None)
    if checkpoint is not None:
        put_weights(model, checkpoint, allow_globals)
    model.eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    _check_causal(model, folder)
    return model


def put_weights(model: Any, checkpoint: str | os.PathLike[str], allow_globals: Sequence[str] = ()) -> None:
    """Put the weights of a file or a folder into a model; other arguments and errors as :func:`load_model`."""
    check_checkpoint(checkpoint)
    if Path(checkpoint).is_dir():
        weights = _pretrained(checkpoint, complete=True, bar=False).state_dict()
    else:
        weights = read_weights(Path(checkpoint), allow_globals)
    load_weights(model, weights, checkpoint)


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Check that a model knows the tokens of a tokenizer.

    Raises:
        ValueError: If the tokenizer has more tokens than the model's embedding has rows.
    """
    rows = vocabulary_size(model)
    if len(tokenizer) > rows:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, the model's vocabulary {rows}: it belongs to another model. "
            "Save the model's own tokenizer into its folder (tokenizer.save_pretrained)."
        )


def _pretrained(folder: str | os.PathLike[str], complete: bool, bar: bool = True) -> Any:
    """Load what is in a folder.

    Args:
        folder: The folder.
        complete: Whether it must hold every weight.
        bar: Whether to show a progress bar on a terminal.
    """
    read_config(folder)
    try:
        with _bars(bar and sys.stderr.isatty()):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                os.fspath(folder), dtype="auto", output_loading_info=True, trust_remote_code=False
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{folder}: its weights cannot be loaded ({_first_line(error)}). Copy or save the folder again."
        ) from error
    model, facts = loaded
    missing = sorted(facts["missing_keys"])
    if missing and complete:
        raise ValueError(
            f"{folder} lacks weights of a {type(model).__name__}: {listing(missing, 4)}. They would be random numbers. "
            "Save the whole language model (save_pretrained), or name a checkpoint that holds it."
        )
    return model


def _check_causal(model: Any, folder: str | os.PathLike[str]) -> None:
    """Raise ``ValueError`` if later tokens change what a model predicts at earlier positions."""
    length, size = min(8, context_length(model)), vocabulary_size(model)
    first = (torch.arange(length, device=next(model.parameters()).device) * 7 + 3) % size
    later = first.clone()
    later[length // 2 :] = (later[length // 2 :] + 1) % size
    with torch.no_grad():
        logits = model(input_ids=torch.stack([first, later]), use_cache=False).logits[:, : length // 2]
    change = (logits[0] - logits[1]).abs().max() if logits.numel() else logits.new_zeros(())
    if float(change) > torch.finfo(logits.dtype).eps ** 0.5 * float(logits.abs().max()):
        raise ValueError(
            f"{folder}: what its {type(model).__name__} predicts depends on the tokens that come later, as in a masked "
            f"language model. {_REMEDY}"
        )


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Let transformers show its progress bars, or not."""
    logging: Any = transformers_logging
    were_shown = logging.is_progress_bar_enabled()
    if not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()


def _names(mapping: Any, config: Any) -> list[str]:
    """Return the names of the classes that transformers makes of a configuration."""
    if type(config) not in mapping:
        return []
    kinds = mapping[type(config)]
    return [kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,))]


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, without its full stop, or the name of its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")[:200]


def _existing(folder: str | os.PathLike[str]) -> str:
    """Return a folder as text; raise ``FileNotFoundError`` if it does not exist."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is no folder; expected one written by save_pretrained.")
    return os.fspath(folder)
