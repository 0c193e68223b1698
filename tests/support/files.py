"""A small file of every kind that the package reads."""

import json

import torch
from safetensors.torch import save_file

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from tests.support import language


def some_factors():
    torch.manual_seed(0)
    a, g = torch.randn(9, 3), torch.randn(9, 2)
    A, G = a.T @ a / 9, g.T @ g / 9
    full = {"A_coupled": A, "G_coupled": G, "eigenvalues": torch.ones(2, 3), "margins": torch.ones(2, 3)}
    full_layer, plain_layer = LayerFactors(A, G, 9, 9, **full), LayerFactors(G.double(), A.double(), 5, 4, 7, True)
    return KroneckerFactors({"a.fc": full_layer, "b": plain_layer}, {"fisher": "sketched", "step": 3})


STATE = {"sums": {"a.fc": {"inputs": torch.ones(3), "count": 2}}, "chosen": ["a.fc"], "random": None, "seed": 2}


def factor_file(folder):
    some_factors().save(folder / "f.safetensors", STATE)
    return folder / "f.safetensors"


def paper_file(folder):
    entry = {"A": torch.eye(3), "G": torch.eye(2), "n_tokens": 7}
    torch.save({"blk3.up": entry, "blk10.gate": entry}, folder / "paper.pt")
    return folder / "paper.pt"


def weights():
    return {
        "a.fc.weight": torch.arange(6.0).view(2, 3),
        "b.weight": torch.arange(6.0).view(2, 3).half(),
        "b.bias": torch.ones(3),
    }


def safetensors_file(folder):
    save_file(weights(), folder / "model.safetensors", {"format": "pt"})
    edited = folder / "edited.safetensors"
    CurvatureEditor(0.5, ["a.fc"]).edit_checkpoint(folder / "model.safetensors", some_factors(), edited)
    return edited


def checkpoint_file(folder):
    content = {"state_dict": weights(), "epoch": 1, "lightning_curvature": {"method": "kfac", "layers": {}}}
    torch.save(content, folder / "model.ckpt")
    return folder / "model.ckpt"


def old_archive(folder):
    torch.save(weights(), folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt"


def sharded(folder):
    """A Hugging Face folder of two shards that was edited; its index."""
    whole, model = weights(), folder / "model"
    model.mkdir()
    shards = {f"model-{i}-of-2.safetensors": names for i, names in ((1, ["a.fc.weight"]), (2, ["b.weight", "b.bias"]))}
    for file, names in shards.items():
        save_file({name: whole[name] for name in names}, model / file)
    where = {name: file for file, names in shards.items() for name in names}
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 48}, "weight_map": where})
    )
    CurvatureEditor(0.5, ["a.fc"]).edit_checkpoint(
        model, some_factors(), folder / "out", delta=folder / "d.safetensors"
    )
    return folder / "out" / "model.safetensors.index.json"


def shard(folder):
    return sharded(folder).with_name("model-1-of-2.safetensors")


def note(folder):
    return sharded(folder).with_name("curvature_edit.json")


def configuration(folder):
    language.model("llama").save_pretrained(folder / "model")
    return folder / "model" / "config.json"


def delta_of_a_folder(folder):
    sharded(folder)
    return folder / "d.safetensors"


def delta_of_a_file(folder):
    source = safetensors_file(folder)
    CurvatureEditor(0.3, ["b"]).edit_checkpoint(
        source, some_factors(), folder / "out.safetensors", delta=folder / "d.safetensors"
    )
    return folder / "d.safetensors"


RECORDS = {
    "sequences": [
        {"prefix_ids": [1, 2, i], "suffix_ids": [4, 5], "prefix_text": "w1 w2", "half": "x"} for i in range(4)
    ],
    "questions": [{"prompt": "w1 w2", "answers": ["w3", "w4"], "context": "w5"}] * 4,
    "documents": [{"text": "w1 w2 w3 é w4 w5", "id": i} for i in range(4)],
}


def lines(kind):
    def write(folder):
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS[kind]), "utf-8")
        return path

    return write


def text_file(folder):
    (folder / "text.txt").write_text("w1 w2 w3 é w4 w5\n" * 9, "utf-8")
    return folder / "text.txt"


def sweep_file(folder):
    rows = [
        "edit,energy,of,strict,perplexity",
        "unedited,1.0,9f,0.9,10.0",
        "K-FAC,0.5,ab,0.5,nan",
        "K-FAC,0.9,ab,0.6,12.5",
    ]
    (folder / "sweep.csv").write_text("\n".join(rows) + "\n")
    return folder / "sweep.csv"
