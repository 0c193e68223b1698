"""What runs on a GPU only: tensor cores, side streams, one wait in a batch. Skipped where there is none."""

import contextlib
import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curvature import CurvatureEditor, KFACEditCallback, KroneckerFactors, LayerFactors
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.moments import SecondMoment
from lightning_curvature.collect.passes import collect
from lightning_curvature.collect.streams import SideStreams
from lightning_curvature.factors import basis_cache as bases
from lightning_curvature.recording.options import CollectorOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LAYERS = ["0.gate", "0.up", "0.down", "1.gate", "1.up", "1.down"]


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def network(width=64, hidden=256, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(Block(width, hidden), Block(width, hidden), nn.Linear(width, 10))
    return model.to(dtype)


def batches(count=6, rows=96, width=64, device="cpu", dtype=torch.float32):
    torch.manual_seed(1)
    made = [(torch.randn(rows, width), torch.randint(10, (rows,))) for _ in range(count)]
    return [(x.to(device, dtype), y.to(device)) for x, y in made]


def gathered(model, data, autocast=None, **options):
    def loss(batch):
        with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
            return F.cross_entropy(model(batch[0]), batch[1])

    return collect(model, data, loss, **({"layers": LAYERS, "fisher": "empirical"} | options))


def same(factors, expected, tolerance):
    assert list(factors) == list(expected)
    for name, layer in factors.items():
        assert (layer.num_inputs, layer.num_gradients) == (expected[name].num_inputs, expected[name].num_gradients)
        for factor, expected_factor in ((layer.A, expected[name].A), (layer.G, expected[name].G)):
            assert float((factor.cpu() - expected_factor.cpu()).norm() / expected_factor.norm()) < tolerance, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("home", ["cuda", "cpu"])
@pytest.mark.parametrize("dim", [48, 700, 3000])  # one block, several in one product, several products
def test_products_of_halves_are_exact(dim, home, dtype):
    rows = [torch.randn(500, dim, device="cuda").to(dtype) for _ in range(6)]
    moment = SecondMoment(dim, home)
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        moment.add(first, first[:0], second, count=1000, scale=0.3)
    joined = torch.cat(rows).double()
    expected = (0.3 * joined.T @ joined / len(joined)).float()
    assert moment.mean().dtype == torch.float32
    assert moment.mean().device.type == home
    assert float((moment.mean().cuda() - expected).norm() / expected.norm()) < 4e-6


def test_tf32_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    rows, model = torch.randn(4096, 300, device="cuda"), nn.Sequential(nn.Linear(300, 8), nn.Linear(8, 2)).cuda()
    labels = torch.zeros(4096, dtype=torch.int64, device="cuda")
    factors = collect(model, [rows], lambda x: F.cross_entropy(model(x), labels), layers=["0"], positions="all")
    expected = (rows.double().T @ rows.double() / len(rows)).float()
    assert float((factors["0"].A - expected).norm() / expected.norm()) < 1e-6
    assert torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("accumulate_on", ["auto", "cpu"])
def test_the_same_as_on_the_cpu(fisher, accumulate_on):
    expected = gathered(network(), batches(), fisher=fisher)
    on_gpu = gathered(network().cuda(), batches(device="cuda"), fisher=fisher, accumulate_on=accumulate_on)
    same(on_gpu, expected, 1e-4)
    assert on_gpu["0.gate"].A is on_gpu["0.up"].A
    assert on_gpu["0.gate"].A.device.type == ("cpu" if accumulate_on == "cpu" else "cuda")


@pytest.mark.parametrize("fisher", ["sketched", "sampled"])
def test_drawn_gradients_leave_the_random_state(fisher):
    model, data = network().cuda(), batches(device="cuda")
    before = torch.cuda.get_rng_state()
    factors = gathered(model, data, fisher=fisher, draws=64)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    same(factors, gathered(model, data, fisher="exact"), 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    factors = gathered(network().cuda(), batches(device="cuda"), autocast=dtype)
    same(factors, gathered(network(), batches()), 0.02)


def test_products_beside_training_read_what_training_wrote(monkeypatch):
    """Memory that the side stream still reads must not be used again; a race would show in large batches."""
    data = batches(20, 8192, 512, "cuda")

    def train():
        model = network(512, 2048).cuda()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        collector = Collector(model, CollectorOptions(layers=LAYERS, fisher="empirical"))
        for x, y in data:
            recording = collector.step()
            recording.open()
            loss = F.cross_entropy(model(x), y)
            recording.before_backward(loss)
            loss.backward()
            recording.close()
            optimizer.step()
            optimizer.zero_grad()
            torch.full((64, 1024, 1024), 7.0, device="cuda")  # takes freed memory and overwrites it
        return collector.factors()

    factors = train()
    monkeypatch.setattr(SideStreams, "beside", lambda self, _: contextlib.nullcontext())
    same(factors, train(), 1e-5)


def test_a_batch_waits_once():
    model, (batch, *_) = network().cuda(), batches(device="cuda")
    collector = Collector(model, CollectorOptions(layers=LAYERS, fisher="empirical"))

    def step():
        recording = collector.step()
        recording.open()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        recording.before_backward(loss)
        loss.backward()
        recording.close()

    step()  # the first one plans
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing CUDA operation") as seen:
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in seen if "synchronizing" in str(warning.message)]) == 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("fisher", ["sketched", "empirical"])
def test_training_is_the_same_with_the_callback(tmp_path, precision, fisher):
    class Lit(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch):
            return F.cross_entropy(self.net(batch[0].to(self.net[2].weight.dtype)), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)

    def fit(*callbacks):
        pl.seed_everything(3)
        model = Lit()
        trainer = pl.Trainer(
            accelerator="gpu",
            devices=1,
            max_epochs=2,
            precision=precision,
            logger=False,
            callbacks=[*callbacks],
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            enable_checkpointing=False,
        )
        trainer.fit(model, torch.utils.data.DataLoader(batches(8), batch_size=None))
        return model

    callback = KFACEditCallback(layers=["net.*.gate", "net.*.up", "net.*.down"], fisher=fisher, every=1)
    with_it = fit(callback).state_dict()
    without = fit().state_dict()
    assert all(torch.equal(value, without[name]) for name, value in with_it.items())
    assert all(float(layer.G.trace()) > 0 for layer in callback.factors.values())


def test_edits_are_the_same_as_on_the_cpu(tmp_path):
    factors = gathered(network().cuda(), batches(device="cuda"))
    factors.save(tmp_path / "factors.safetensors")
    on_cpu, on_gpu = network(), network().cuda()
    CurvatureEditor(energy=0.7).edit(on_cpu, KroneckerFactors.load(tmp_path / "factors.safetensors"))
    original = copy.deepcopy(on_gpu.state_dict())
    with CurvatureEditor(energy=0.7).applied(on_gpu, factors) as report:
        for name in LAYERS:
            torch.testing.assert_close(
                on_gpu.get_submodule(name).weight.cpu(), on_cpu.get_submodule(name).weight, rtol=1e-3, atol=1e-5
            )
            assert 0 < report.layers[name].kept < report.layers[name].total
    assert all(torch.equal(value, original[name]) for name, value in on_gpu.state_dict().items())


@pytest.mark.parametrize("score", ["kfac", "saliency"])
def test_factors_of_a_file_are_decomposed_where_the_model_is(tmp_path, monkeypatch, score):
    gathered(network(), batches()).save(tmp_path / "factors.safetensors")
    factors = KroneckerFactors.load(tmp_path / "factors.safetensors")
    on_cpu, on_gpu, devices = network(), network().cuda(), []
    expected, _ = CurvatureEditor(0.7, score=score).edited_weights(on_cpu, factors)
    factors = KroneckerFactors.load(tmp_path / "factors.safetensors")
    decompose = bases.decompose
    monkeypatch.setattr(bases, "decompose", lambda A, what: devices.append(A.device.type) or decompose(A, what))
    trial = CurvatureEditor(score=score).at(1.0)
    for _ in range(2):
        new, _ = trial.at(0.7).edited_weights(on_gpu, factors)
        for name, weight in new.items():
            assert weight.is_cuda
            torch.testing.assert_close(weight.cpu(), expected[name], rtol=1e-3, atol=1e-5)
    assert set(devices) == {"cuda"}
    assert len(devices) <= 2 * len(LAYERS)
    assert factors[LAYERS[0]].basis.U_A.device.type == "cpu"


def test_a_wide_layer():
    """Decomposed in float64 on the GPU."""
    rows = torch.randn(8192, 4096, device="cuda") * torch.arange(1, 4097, device="cuda") ** -0.6
    moment = SecondMoment(4096, "cuda")
    moment.add(rows.bfloat16())
    A = moment.mean()
    layer = LayerFactors(A=A, G=A[:2048, :2048].clone(), num_inputs=8192, num_gradients=8192)
    weight = torch.randn(2048, 4096, device="cuda") * 0.02
    edited, report = CurvatureEditor(0.9).edit_weight("fc", weight, layer, 0.9, False)
    again, _ = CurvatureEditor(0.9).edit_weight("fc", edited, layer, 0.9, False)
    torch.testing.assert_close(again, edited, rtol=1e-4, atol=1e-6)
    assert 0.9 <= report.energy_kept < 0.92


def test_a_file_is_edited_on_the_gpu(tmp_path):
    model = network()
    factors = gathered(network(), batches())
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for device in ("cpu", "auto"):
        CurvatureEditor(0.7).edit_checkpoint(tmp_path / "model.pt", factors, tmp_path / f"{device}.pt", device=device)
    on_cpu, on_gpu = (torch.load(tmp_path / f"{device}.pt") for device in ("cpu", "auto"))
    for key, value in on_cpu.items():
        torch.testing.assert_close(on_gpu[key], value, rtol=1e-3, atol=1e-5)
