"""The memory of a collection: how much, and on which device."""

import pytest
import torch

from lightning_curvature.collect.passes import collect
from lightning_curvature.collect.plan import DoesNotFitError, MemoryPlan, place_sums
from lightning_curvature.memory import free_memory
from tests.support import language


def test_sums_live_where_they_fit(monkeypatch, caplog):
    cuda, cpu = torch.device("cuda:0"), torch.device("cpu")
    layers = {"fc": (1000, 1000)}
    free = {"cuda": 2**30, "cpu": 2**40}
    monkeypatch.setattr("lightning_curvature.collect.plan.free_memory", lambda device: free[device.type])
    with caplog.at_level("INFO"):
        assert place_sums(layers, cuda, "auto") == place_sums(layers, cuda, "model") == cuda
        assert place_sums(layers, cuda, "cpu") == cpu
        assert place_sums(layers, torch.device("mps"), "model") == cpu
        assert place_sums({}, cuda, "auto") == cuda
        assert "do not fit" not in caplog.text
        free["cuda"] = 2**20
        assert place_sums(layers, cuda, "auto") == cpu
        assert "does not fit there: they are summed on the CPU" in caplog.text
    with pytest.raises(DoesNotFitError, match="accumulate_on='cpu'"):
        place_sums(layers, cuda, "model")
    free["cpu"] = 2**20
    with pytest.raises(DoesNotFitError, match=r"cpu has 1\.00 MiB left"):
        place_sums(layers, cuda, "auto")


def test_the_plan_adds_up(caplog):
    plan = MemoryPlan({"a": (3, 4), "b": (100, 2000)}, torch.device("cpu"))
    blocks = 512 * (512 + 1024 + 1536) + 464 * 2000  # rows up to the diagonal
    assert plan.num_bytes == 12 * (9 + 16 + 100**2) + 4 * 2000**2 + 8 * blocks
    assert "\n  a  3 x 4  0.3 KiB\n  b  100 x 2000  34.45 MiB\n" in str(plan)
    plan.check(plan.num_bytes)
    with pytest.raises(RuntimeError, match=r"cpu has .* left: that does not fit. Choose fewer layers \(layers=\), or"):
        plan.check(plan.num_bytes - 1)
    cuda = MemoryPlan({"a": (3, 4)}, torch.device("cuda"))
    with pytest.raises(RuntimeError, match=r"accumulate on the CPU \(accumulate_on='cpu'\), or collect .* --passes"):
        cuda.check(10)
    assert free_memory(torch.device("cpu")) > 2**20


def test_memory_is_told_and_checked_before_anything_is_summed(caplog, monkeypatch):
    net, rows = language.model(), language.tokens(4, 8)
    step = lambda batch: net(input_ids=batch, labels=batch).loss  # noqa: E731
    with caplog.at_level("INFO"):
        collect(net, [rows], step, layers="mlp")
    assert "Memory of the K-FAC factors of 6 layers, on cpu" in caplog.text
    monkeypatch.setattr("lightning_curvature.collect.plan.free_memory", lambda device: 1000)
    monkeypatch.setattr("lightning_curvature.collect.collector.LayerSums", pytest.fail)
    with pytest.raises(RuntimeError, match=r"cpu has 1.0 KiB left: that does not fit"):
        collect(net, [rows], step, layers="mlp")
