import math
from types import SimpleNamespace

import pytest
import torch

from lightning_curvature.collect import moments
from lightning_curvature.collect.moments import SecondMoment, block_columns, packed_size
from lightning_curvature.collect.precision import full_precision


def test_a_million_small_batches_lose_nothing():
    moment = SecondMoment(1)
    moment.add(torch.full((1, 1), 4096.0))
    small = torch.full((1, 1), 2.0**-10)  # its square vanishes beside the first in float32
    step = float(small) ** 2
    for _ in range(1000):
        moment.add(small)
    for _ in range(999):  # the other 999,000 batches, a thousand at once
        moment.add(small, count=1000, scale=1000.0)
    exact = (4096.0**2 + 1e6 * step) / 1_000_001
    assert moment.count == 1_000_001
    assert abs(float(moment.double() / moment.count) - exact) < 1e-13 * exact
    assert torch.tensor(4096.0**2) + torch.tensor(step) == 4096.0**2  # the case is a real one


def test_batches_and_dtypes():
    torch.manual_seed(0)
    x = torch.randn(10, 3)
    whole, parts = SecondMoment(3), SecondMoment(3)
    whole.add(x)
    for part in x.split(3):
        parts.add(part)
    torch.testing.assert_close(whole.mean(), x.T @ x / 10)
    torch.testing.assert_close(parts.mean(), whole.mean())
    assert SecondMoment(2).mean().tolist() == [[0.0, 0.0], [0.0, 0.0]]
    half = SecondMoment(3)
    half.add(x.bfloat16())
    assert half.mean().dtype == torch.float32
    whole.add(x.double())
    assert whole.mean().dtype == torch.float64


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("in_one", [False, True])
def test_products_of_several_block_columns(monkeypatch, in_one, together):
    """What only a GPU does: one product covers all block columns of a narrow layer; sums lie on another device."""
    monkeypatch.setattr(moments, "_in_one_product", lambda rows, dim: in_one)
    monkeypatch.setattr(moments, "_lie_together", lambda block, rows: together)
    moment, rows = SecondMoment(300), [torch.randn(20, 300) for _ in range(3)]
    for part in rows:
        moment.add(part, scale=0.5)
    joined = torch.cat(rows).double()
    torch.testing.assert_close(moment.mean(), (0.5 * joined.T @ joined / 60).float())
    squares = sum((0.5 * part.T.double() @ part.double()).square().sum() for part in rows)
    moment.settle()
    counts = torch.tensor(3 * 20.0**2, dtype=torch.float64)
    torch.testing.assert_close(moment.squares, torch.stack([squares, counts]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("in_place", [True, False])  # since torch 2.10, and before
@pytest.mark.parametrize("together", [True, False])
def test_halves_on_tensor_cores(monkeypatch, in_place, together):
    """As on a GPU, whose products of halves in float32 a CPU does not have."""
    mm, addmm, full, taken = torch.mm, torch.addmm, torch.full, []

    def like_mm(left, right, *, out_dtype):
        taken.append("mm")
        return mm(left.to(out_dtype), right.to(out_dtype))

    def like_addmm(total, left, right, *, out, out_dtype=None, **options):
        assert out_dtype in (None, out.dtype)
        taken.append(out_dtype)
        return addmm(
            total, *((part.to(out_dtype) for part in (left, right)) if out_dtype else (left, right)), out=out, **options
        )

    monkeypatch.setattr(torch, "empty", lambda *shape, **options: full(shape, float("nan"), **options))
    monkeypatch.setattr(torch, "mm", like_mm)
    monkeypatch.setattr(torch, "addmm", like_addmm)
    monkeypatch.setattr(moments, "_on_tensor_cores", lambda rows: rows.dtype.itemsize == 2)
    monkeypatch.setattr(moments, "_IN_PLACE", in_place)
    monkeypatch.setattr(moments, "_lie_together", lambda block, rows: together)
    moment, rows = SecondMoment(200), [torch.randn(20, 200).bfloat16() for _ in range(4)]
    moment.add(*rows[:3], scale=0.3)
    monkeypatch.setattr(torch, "addmm", pytest.fail)
    moment.add(rows[3][:0])  # nothing to multiply
    monkeypatch.setattr(torch, "addmm", like_addmm)
    joined = torch.cat(rows[:3]).double()
    torch.testing.assert_close(moment.mean(), (0.3 * joined.T @ joined / 60).float())
    assert set(taken) == {torch.float32 if in_place else "mm"}
    taken.clear()
    moment.add(torch.zeros(1, 200).double(), count=0)
    moment.add(rows[3], count=20, scale=0.3)
    joined = torch.cat(rows).double()
    torch.testing.assert_close(moment.mean(), 0.3 * joined.T @ joined / 80, rtol=1e-5, atol=1e-7)
    assert set(taken) == {None}  # in float64


def test_groups_grow_to_eight_batches():
    torch.manual_seed(0)
    moment, batches = SecondMoment(5), [torch.randn(4, 5) for _ in range(40)]
    ends = []
    for number, rows in enumerate(batches, 1):
        moment.add(rows)
        if not moment.recent_batches:
            ends.append(number)
    assert ends == [1, 2, 4, 7, 11, 16, 22, 29, 37]
    assert (moment.groups, moment.recent_batches, moment.recent_count) == (9, 3, 12)
    joined = torch.cat(batches)
    torch.testing.assert_close(moment.mean(), joined.T @ joined / 160)
    assert (moment.groups, moment.recent_batches) == (9, 3)  # who looks at it changes nothing
    assert moment.relative_error() == moment.settled().relative_error()
    moment.settle()
    assert (moment.groups, moment.recent_batches, moment.count) == (10, 0, 160)
    assert {part.dtype for part in (moment.total, moment.rest)} == {torch.float32}
    assert float(moment.rest.abs().max()) <= 2.0**-23 * float(moment.total.abs().max())
    torch.testing.assert_close(moment.mean(), joined.T @ joined / 160)


def test_the_error_of_a_mean_goes_on_with_it():
    torch.manual_seed(0)
    first, second = SecondMoment(150), SecondMoment(150)
    for number in range(20):
        first.add(torch.randn(8, 150))
        second.add(torch.randn(8 + number, 150))
    error = first.relative_error()
    again = SecondMoment.of(first.mean(), first.count, error)
    assert again.relative_error() == pytest.approx(error, rel=1e-5)
    sums = [float(moment.mean().norm()) * moment.count for moment in (first, second)]
    expected = math.hypot(sums[0] * error, sums[1] * second.relative_error())
    again.merge_(SecondMoment.of(second.mean(), second.count, second.relative_error()))
    whole = float(again.mean().norm()) * again.count
    assert again.relative_error() == pytest.approx(expected / whole, rel=1e-5)
    again.merge_(SecondMoment.of(second.mean(), second.count))
    assert again.relative_error() is None
    empty = SecondMoment(3)  # all that counts came with one batch
    empty.add(torch.empty(0, 3))
    empty.add(torch.ones(2, 3))
    assert empty.relative_error() is None


def test_an_error_that_rounding_lost_is_not_stated():
    moment = SecondMoment(3)
    for seed in range(4):
        moment.add(torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)), scale=1e-20)
    assert moment.relative_error() is None


def test_precision_before_torch_2_9(monkeypatch):
    """Those releases have one setting for all backends, and no ``fp32_precision`` of each."""
    chosen = ["medium"]
    monkeypatch.setattr(torch.backends, "mkldnn", SimpleNamespace())
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace())
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    with full_precision([]):
        assert chosen[-1] == "highest"
    assert chosen == ["medium", "highest", "medium"]


@pytest.mark.parametrize("dim", [1, 5, 127, 128, 129, 300, 2049, 5000])
def test_block_columns_hold_the_upper_triangle_once(dim):
    rows = torch.randn(7, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moment = SecondMoment(dim)
    moment.add(rows)
    torch.testing.assert_close(moment.mean(), rows.T @ rows / 7)
    assert block_columns(dim)[0][0] == 0
    assert block_columns(dim)[-1][1] == dim
    assert len(block_columns(dim)) <= max(4, -(-dim // 1024))
    assert len(moment.total) == packed_size(dim) <= dim**2
    assert dim < 300 or packed_size(dim) <= (0.61 if dim == 5000 else 0.7) * dim**2
    again = SecondMoment.of(moment.mean(), moment.count)
    torch.testing.assert_close(again.total, moment.total)


def test_a_mean_is_one_tensor_as_long_as_it_is_used():
    moment = SecondMoment(3)
    moment.add(torch.ones(2, 3))
    mean = moment.mean()
    assert moment.mean() is mean
    moment.add(torch.zeros(2, 3))
    assert moment.mean() is not mean
    assert torch.equal(moment.mean(), mean / 2)
    assert moment.copy().mean() is not moment.mean()


def test_several_sets_of_rows_and_scales():
    first, second = torch.randn(4, 3), torch.randn(4, 3)
    moment = SecondMoment(3)
    moment.add(first, second, count=4, scale=0.5)
    torch.testing.assert_close(moment.mean(), (first.T @ first + second.T @ second) / 8)
    in_parts = SecondMoment(3)
    in_parts.add(first, torch.zeros(0, 3), second, count=4, scale=0.5)
    assert torch.equal(in_parts.total, moment.total)
    in_parts.add(count=4)  # positions at which nothing arrived
    torch.testing.assert_close(in_parts.mean(), moment.mean() / 2)


def test_the_standard_error_is_that_of_repeated_collections():
    torch.manual_seed(0)
    scales = torch.arange(1, 151) ** -0.5

    def collected():
        moment = SecondMoment(150)
        for _ in range(40):
            shared = torch.randn(1, 150)  # rows of a batch resemble one another
            moment.add((0.5 * shared + torch.randn(8, 150)) * scales)
        return moment

    moments = [collected() for _ in range(60)]
    means = torch.stack([moment.mean() for moment in moments])
    truth = means.mean(0)
    spread = float(((means - truth).square().sum((1, 2)).mean() * 60 / 59).sqrt() / truth.norm())
    told = sum(moment.relative_error() for moment in moments) / len(moments)
    assert 0.85 * spread < told < 1.15 * spread
    assert SecondMoment(2).relative_error() is None
    single = SecondMoment(2)
    single.add(torch.ones(1, 2))
    assert single.relative_error() is None
