"""A causal language model of transformers, fine-tuned on a text; the callback edits the update that this makes.

python examples/finetune.py --model org/name --train train.txt --val held-out.txt
python examples/finetune.py --model org/name --train train.txt --val held-out.txt --lora
"""

import argparse
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_curvature import KFACEditCallback


class CausalLM(L.LightningModule):
    def __init__(self, name: str, lora: bool = False, lr: float = 1e-4) -> None:
        super().__init__()
        self.model, self.lr = AutoModelForCausalLM.from_pretrained(name).train(), lr
        if lora:
            from peft import LoraConfig, get_peft_model

            self.model = get_peft_model(self.model, LoraConfig(r=16, target_modules="all-linear"))

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss, prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW([weight for weight in self.parameters() if weight.requires_grad], lr=self.lr)


def rows(text: str, tokenizer, length: int) -> torch.Tensor:
    """Return a text as rows of tokens."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)


def main(model: str, train: Path, val: Path, out: Path, lora: bool = False, length: int = 128, **options: object):
    tokenizer, module, callback = AutoTokenizer.from_pretrained(model), CausalLM(model, lora), KFACEditCallback()
    trained, held_out = (rows(path.read_text(), tokenizer, length) for path in (train, val))
    trainer = L.Trainer(callbacks=[callback], **options)
    trainer.fit(module, DataLoader(trained, 8, shuffle=True), DataLoader(held_out, 8))
    callback.editor.edit(module, callback.factors)  # in memory, to be saved in the format of transformers
    module.model.save_pretrained(out)  # of LoRA the adapter alone
    tokenizer.save_pretrained(out)
    return callback


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", required=True)
    arguments.add_argument("--train", type=Path, required=True)
    arguments.add_argument("--val", type=Path, required=True)
    arguments.add_argument("--out", type=Path, default=Path("edited"))
    arguments.add_argument("--lora", action="store_true")
    arguments.add_argument("--epochs", type=int, default=3)
    args = arguments.parse_args()
    main(args.model, args.train, args.val, args.out, args.lora, max_epochs=args.epochs)
