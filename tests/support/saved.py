"""One model in every format of checkpoints, and its factors."""

import hashlib

import torch
from safetensors.torch import save_file

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.checkpoints import opening as formats
from lightning_curvature.cli.parser import main
from lightning_curvature.collect.passes import collect
from lightning_curvature.storage.hashes import content_hash, tensor_hashes
from tests.support import language

FORMATS = ("ckpt", "pt", "safetensors", "folder", "sharded")
EDITOR = CurvatureEditor(0.8)


def write_model(root):
    """Write one model in every format into a folder, and its factors."""
    module = language.LitLM("llama")
    module.net = module.net.bfloat16()
    rows = language.tokens(16, 12)
    step = lambda batch: module.net(input_ids=batch, labels=batch).loss  # noqa: E731
    collect(module.net, [rows], step, layers="mlp").save(root / "factors.safetensors")
    state = module.net.state_dict()
    checkpoint = {
        "state_dict": {f"net.{key}": value for key, value in state.items()},
        "epoch": 3,
        "optimizer_states": [{"x": torch.ones(3)}],
        "hyper_parameters": {"family": "llama"},
        "pytorch-lightning_version": "2.6.6",
    }
    torch.save(checkpoint, root / "model.ckpt")
    torch.save(state, root / "model.pt")
    kept = {key: value.clone() for key, value in state.items() if key != "lm_head.weight"}
    save_file(kept, root / "model.safetensors", metadata={"format": "pt", "note": "mine"})
    for name, size in (("folder", "5GB"), ("sharded", "6KB")):
        module.net.save_pretrained(root / name, max_shard_size=size)
        language.tokenizer().save_pretrained(root / name)
        (root / name / "README.md").write_text("card")


def source(folder, kind):
    return folder / (kind if kind in ("folder", "sharded") else f"model.{kind}")


def target(tmp_path, kind):
    return tmp_path / (f"out.{kind}" if kind in ("ckpt", "pt", "safetensors") else "out")


def weights(path):
    """Every tensor of a checkpoint by its plain name."""
    checkpoint = formats.open_checkpoint(path)
    return {name.removeprefix("net."): checkpoint.read(name) for name in checkpoint.shapes()}


def saved_hash(path):
    checkpoint = formats.open_checkpoint(path)
    return content_hash(tensor_hashes(checkpoint.shapes(), checkpoint.read))


def hashes(path):
    paths = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {p.name if path.is_dir() else "": hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def factors(folder):
    return KroneckerFactors.load(folder / "factors.safetensors")


def run(*args):
    main([str(arg) for arg in args])
