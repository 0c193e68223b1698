"""Files that version 0.1.0 wrote are read, edited, reverted and gone on from as when they were written."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import CurvatureEditor, KFACEditCallback, KroneckerFactors
from lightning_curvature.checkpoints.deltas import apply_delta
from lightning_curvature.report.inspection import describe

DATA = Path(__file__).parents[1] / "data"
ROWS = 96  # of each epoch


class Rows(pl.LightningModule):
    """A classifier of rows of twelve numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def rows():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(ROWS, 12, generator=generator), torch.randint(5, (ROWS,), generator=generator))


def fit(epochs, folder, **options):
    """Train and collect until an epoch has ended; return the Trainer and the callback."""
    torch.manual_seed(0)
    callback = KFACEditCallback("linear", 0.85, window=10_000, every=1, positions="all", min_positions=0)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Rows(), DataLoader(rows(), 16), **options)
    return trainer, callback


def write(folder):
    """Write what ``tests/data`` holds, but for the delta."""
    trainer, callback = fit(3, folder)
    trainer.save_checkpoint(folder / "run.ckpt")
    callback.factors.save(folder / "factors.safetensors")


@pytest.mark.parametrize("name", ["factors.safetensors", "run-edited-factors.safetensors"])
def test_factors_have_the_same_numbers(name):
    x, _ = rows().tensors
    factors = KroneckerFactors.load(DATA / name)
    assert factors.counts() == {"net.0": 3 * ROWS, "net.2": 3 * ROWS}
    torch.testing.assert_close(factors["net.0"].A, x.T @ x / ROWS)
    assert factors.digest() == describe(DATA / "run-edited.ckpt")["edit"]["factors"]
    assert KroneckerFactors.open(DATA / name).digest() == factors.digest()
    assert [layer.num_losses for layer in factors.values()] == [3 * ROWS, 3 * ROWS]  # one for each position


@pytest.mark.parametrize("name", sorted(path.name for path in DATA.iterdir() if path.suffix != ".md"))
def test_each_file_is_inspected(name):
    facts = describe(DATA / name)
    if name == "run.ckpt":
        assert facts["edit"] is None
    elif "factors" in name:
        assert [layer["num_inputs"] for layer in facts["layers"].values()] == [288, 288]
    else:
        assert list(facts["edit"]["layers"]) == ["net.0", "net.2"]


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize(("start", "end"), [("run-edited.ckpt", "run.ckpt"), ("run.ckpt", "run-edited.ckpt")])
def test_a_delta_takes_an_edit_back_and_makes_it_again_exactly(start, end, tmp_path):
    apply_delta(DATA / start, DATA / "delta.safetensors", tmp_path / end, revert=end == "run.ckpt")
    expected = weights(DATA / end)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(tmp_path / end).items())


def test_an_edit_gives_the_same_weights(tmp_path):
    factors = KroneckerFactors.open(DATA / "factors.safetensors")
    CurvatureEditor(0.85, min_positions=0).edit_checkpoint(DATA / "run.ckpt", factors, tmp_path / "edited.ckpt")
    edited, original = weights(tmp_path / "edited.ckpt"), weights(DATA / "run.ckpt")
    for name, weight in weights(DATA / "run-edited.ckpt").items():
        torch.testing.assert_close(edited[name], weight)
        assert torch.equal(weight, original[name]) == (name not in ("net.0.weight", "net.2.weight"))


def test_a_resumed_run_goes_on_collecting(tmp_path):
    """The first layer reads the same rows in each epoch, so that its A stays; what it counts grows."""
    # A collection that starts anew says so in a warning, which is an error here.
    trainer, callback = fit(5, tmp_path, ckpt_path=DATA / "run.ckpt", weights_only=True)
    assert trainer.global_step == 30
    assert callback.factors.counts() == {"net.0": 5 * ROWS, "net.2": 5 * ROWS}
    assert [layer.num_losses for layer in callback.factors.values()] == [5 * ROWS, 5 * ROWS]
    old = KroneckerFactors.load(DATA / "factors.safetensors")
    torch.testing.assert_close(callback.factors["net.0"].A, old["net.0"].A)
    assert not torch.equal(callback.factors["net.2"].A, old["net.2"].A)
