"""LoRA adapters: which tensors they are, and the folders that ``PeftModel.save_pretrained`` writes."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning_curvature.checkpoints.huggingface import INDEX, SINGLE, HuggingFaceFolder
from lightning_curvature.checkpoints.safetensors import SafetensorsFile
from lightning_curvature.storage.outputs import ADAPTER
from lightning_curvature.storage.tree import COPY_AGAIN, parse_json

WEIGHTS = "adapter_model.safetensors"
_BIN = "adapter_model.bin"
_OUTER = "base_model.model."  # what peft puts before the names of the base
_MERGE = (
    "Merge it into its base (merge_and_unload), save that, and edit it with the base as the reference "
    "(reference=, --reference)."
)
_VARIANTS = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA with a bias (lora_bias)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "target_parameters": "LoRA of parameters (target_parameters)",
}
"""Entries of a configuration that make more of an adapter than ``scaling * B @ A``."""
_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Beginnings of ``init_lora_weights`` after which the base is not what the adapter is an update of."""


class Adapter(NamedTuple):
    """The LoRA adapter of a layer, whose update is ``scaling * B @ A``.

    Args:
        A: Name of the tensor A, ``[r, d_in]``.
        B: Name of the tensor B, ``[d_out, r]``.
        scaling: ``lora_alpha / r``, or, for rsLoRA, ``lora_alpha / sqrt(r)``.
    """

    A: str
    B: str
    scaling: float

    @property
    def tensors(self) -> str:
        """The names of both tensors, for people."""
        return f"{self.A}, {self.B}"


def check_kind(config: Mapping[str, Any], what: str) -> None:
    """Raise ``ValueError`` if an adapter is no update ``scaling * B @ A`` of its base.

    Args:
        config: What peft writes into ``adapter_config.json``.
        what: The adapter, for the error.
    """
    kind = config.get("peft_type")
    if getattr(kind, "value", kind) != "LORA":
        raise refusal(what, f"{getattr(kind, 'value', kind)}")
    for entry, name in _VARIANTS.items():
        if config.get(entry):
            raise refusal(what, name)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVE_THE_BASE):
        raise refusal(what, f"LoRA that began as a part of its base (init_lora_weights={start!r})")


def refusal(what: str, kind: str) -> ValueError:
    """Return the error that an adapter is of a kind that cannot be edited."""
    return ValueError(f"{what} is of the kind {kind}; only plain LoRA adapters can be edited. {_MERGE}")


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder holds an adapter, and no model."""
    folder = Path(folder)
    return (folder / ADAPTER).is_file() and not (folder / SINGLE).exists() and not (folder / INDEX).exists()


class AdapterFolder(HuggingFaceFolder):
    """A folder with a LoRA adapter, as ``PeftModel.save_pretrained`` writes it.

    Args:
        path: Folder.

    Attributes:
        adapters: The adapter of each adapted layer, by the layer's name.

    Raises:
        ValueError: If the adapter is of another kind than LoRA, or no safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        config = parse_json((self.path / ADAPTER).read_bytes(), f"{self.path / ADAPTER}")
        check_kind(config, f"The adapter in {path}")
        if not (self.path / WEIGHTS).exists():
            found = f"{_BIN}, which would have to be unpickled" if (self.path / _BIN).exists() else "no weights"
            raise ValueError(
                f"{path} holds no {WEIGHTS} but {found}. Load the adapter with peft, and save it again with "
                "save_pretrained, which writes safetensors."
            )
        self._check_inside(WEIGHTS)
        self.shards = {WEIGHTS: SafetensorsFile(self.path / WEIGHTS)}
        self.file_of = dict.fromkeys(self.shards[WEIGHTS].header, WEIGHTS)
        shapes = self.shapes()
        try:
            self.adapters = {
                layer: _adapter(layer, config, shapes)
                for layer in (name.removesuffix(".lora_A.weight") for name in shapes if name.endswith(".lora_A.weight"))
            }
        except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
            raise ValueError(f"{path}: {ADAPTER} does not fit {WEIGHTS} ({error}). {COPY_AGAIN}") from error

    def module_names(self) -> dict[str, str]:
        """Return nothing: no library renames the tensors of an adapter."""
        return {}


def _adapter(layer: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Return the adapter of a layer; raise if the configuration and the tensors disagree."""
    A, B = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
    name, rank = layer.removeprefix(_OUTER), shapes[A][0]
    if _of(name, config.get("rank_pattern"), config["r"]) != rank or shapes[B][1] != rank:
        raise ValueError(f"{layer} has another rank than {list(shapes[A])} and {list(shapes[B])}")
    alpha = _of(name, config.get("alpha_pattern"), config["lora_alpha"])
    return Adapter(A, B, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of(layer: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a layer's name, as peft does."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(found, default)
