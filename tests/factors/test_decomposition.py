"""Whatever a finite factor holds, it is decomposed, and the result is what the definition says."""

import math
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.baselines import RandomBasisEditor, SVDEditor
from lightning_curvature.editing.bulk import BulkStepEditor
from lightning_curvature.editing.projection import relative_change
from lightning_curvature.factors.basis import select_largest, select_staircase, shrink
from lightning_curvature.factors.decomposition import FaultyLayerError, decompose
from tests import reference
from tests.support.faults import failing_eigh, layer_factors

_HOME = tempfile.TemporaryDirectory()  # removed when the tests end

set_hypothesis_home_dir(_HOME.name)

EPS = 2.0**-52
HUGE = torch.finfo(torch.float64).max


def times(tensor, exponent):
    """Multiply by a power of two that need not be a number."""
    return tensor * math.ldexp(1.0, exponent // 2) * math.ldexp(1.0, exponent - exponent // 2)


def check(factor, vectors, values):
    """Compare with the definition, scaled so that its products are numbers; halves and the like are not quite PSD."""
    d, device = len(factor), factor.device
    assert vectors.dtype == values.dtype == torch.float64
    assert vectors.device == values.device == device
    factor, vectors, values = factor.double().cpu(), vectors.cpu(), values.cpu()
    assert (values >= 0).all()
    assert (values.diff() <= 0).all()
    symmetric = factor.tril() + factor.tril(-1).T
    exponent = math.frexp(float(symmetric.abs().max()))[1]
    symmetric, values = times(symmetric, -exponent), times(values, -exponent)
    negative = max(-float(np.linalg.eigvalsh(symmetric.numpy()).min()), 0.0)
    grain = d * math.ldexp(1.0, -1074 - exponent)  # of the smallest numbers, in which eigenvalues are rounded
    tolerance = 8 * d * EPS * float(torch.linalg.matrix_norm(symmetric)) + negative + grain
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, symmetric, rtol=0, atol=tolerance)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(d, dtype=torch.float64), rtol=0, atol=(8 * d + 8) * EPS)


@st.composite
def factors(draw):
    """A moment of few or many rows, of which columns are dead, constant, one-hot or of wildly different scales."""
    d, n = draw(st.integers(1, 24)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    rows = torch.randn(n, d, dtype=torch.float64, generator=generator)
    kind = draw(st.sampled_from(["normal", "relu", "one-hot", "binary", "blocks", "constant", "repeated"]))
    if kind == "relu":
        rows = rows.relu()
    elif kind == "one-hot":
        rows = torch.eye(d, dtype=torch.float64)[torch.randint(d, (n,), generator=generator)]
    elif kind == "binary":
        rows = (rows > 0.5).double()
    elif kind == "blocks":
        rows *= torch.arange(d) % 3 == torch.randint(3, (n, 1), generator=generator)
    elif kind == "constant":
        rows = rows[:1].expand(n, d)
    elif kind == "repeated":
        rows = rows[torch.randint(max(n // 8, 1), (n,), generator=generator)]
    dead = torch.rand(d, generator=generator) < draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.9]))
    spread = draw(st.sampled_from([0, 0, 5, 40, 150]))
    scales = 10.0 ** (spread * (2 * torch.rand(d, dtype=torch.float64, generator=generator) - 1))
    moment = torch.where(dead, 0.0, rows) * scales
    moment = moment / moment.abs().max().clamp(min=1e-300)
    moment = moment.T @ moment / n
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    info, size = torch.finfo(dtype), draw(st.sampled_from(["ordinary", "smallest", "small", "largest"]))
    scale = {"ordinary": 1.0, "smallest": info.tiny * info.eps * 64, "small": info.tiny, "largest": info.max / 2 / d}
    moment = (moment * scale[size]).to(dtype)
    if draw(st.integers(0, 3)) == 0:  # not quite symmetric
        moment = moment + moment.triu(1) * info.eps
    return moment


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_every_finite_factor_is_decomposed(device):
    @settings(
        max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    @given(factors())
    def decomposed(factor):
        factor = factor.to(device)
        if not factor.any():
            with pytest.raises(FaultyLayerError, match="Factor A is zero"):
                decompose(factor, "Factor A")
            return
        before = factor.clone()
        check(factor, *decompose(factor, "Factor A"))
        assert torch.equal(factor, before)

    decomposed()


def ordinary(d=30, n=64, dtype=torch.float64):
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    return rows.T @ rows / n


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [8, 64])
def test_a_factor_without_zeros_is_what_the_solver_says(n, dtype):
    factor = ordinary(n=n, dtype=dtype)
    values, vectors = torch.linalg.eigh(factor.double())
    decomposition = decompose(factor, "Factor A")
    assert torch.equal(decomposition[0], vectors.flip(1))
    floor = values.max() * len(values) * EPS
    assert torch.equal(decomposition[1], torch.where(values > floor, values, 0.0).flip(0))


def taps(channels=32, positions=20):
    """The inputs of a padded 3 x 3 convolution over maps of one pixel: one of nine taps reads something."""
    x = torch.randn(positions, channels, generator=torch.Generator().manual_seed(0)).relu()
    factor = torch.zeros(9 * channels, 9 * channels)
    factor[4::9, 4::9] = x.T @ x / positions
    return factor


def solvers(monkeypatch, replaced):
    """Let solvers fail by number of the call; return the shapes that they are called with."""
    real, shapes = torch.linalg.eigh, []

    def eigh(matrix):
        shapes.append(tuple(matrix.shape))
        return replaced(len(shapes)) or real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    return shapes


def failing(*_):
    raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge.")


def test_only_live_rows_are_given_to_the_solver(monkeypatch):
    shapes = solvers(monkeypatch, lambda call: None)
    factor = taps()
    vectors, values = decompose(factor, "Factor A")
    assert shapes == [(32, 32)]
    check(factor, vectors, values)
    single = torch.zeros(5, 5)
    single[3, 3] = 2.0
    vectors, values = decompose(single, "Factor A")
    assert values.tolist() == [2.0, 0.0, 0.0, 0.0, 0.0]
    assert vectors[:, 0].abs().tolist() == [0.0, 0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("factor", [ordinary(), ordinary(n=5, dtype=torch.float32), taps(), torch.ones(7, 7)])
@pytest.mark.parametrize("working", [1, 2, 3, 4])
def test_what_a_solver_gives_up_on_is_tried_in_other_ways(factor, working, monkeypatch):
    """The device's, the CPU's, that of a reflection, and singular values."""
    shapes = solvers(monkeypatch, lambda call: failing() if call < working else None)
    check(factor, *decompose(factor, "Factor A"))
    assert len(shapes) == min(working, 3)


def test_a_solver_that_returns_nan_has_failed(monkeypatch):
    def broken(call):
        nan = torch.full((30, 30), torch.nan, dtype=torch.float64)
        return None if call > 2 else (nan[0], nan)

    solvers(monkeypatch, broken)
    check(ordinary(), *decompose(ordinary(), "Factor A"))


def test_a_solver_whose_vectors_are_not_orthonormal_has_failed(monkeypatch):
    values, vectors = torch.linalg.eigh(ordinary())
    turn = torch.eye(30, dtype=torch.float64)
    turn[3, 4] = 1e-10
    solvers(monkeypatch, lambda call: (values, vectors @ turn) if call < 3 else None)
    check(ordinary(), *decompose(ordinary(), "Factor A"))


def test_what_no_solver_decomposes_is_named(monkeypatch):
    solvers(monkeypatch, failing)
    monkeypatch.setattr(torch.linalg, "svd", failing)
    with pytest.raises(
        FaultyLayerError, match=r"Factor A could not be decomposed, neither on cpu nor on the CPU: .*conv"
    ):
        decompose(ordinary(), "Factor A")


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (torch.zeros(4, 4), "Factor A is zero"),
        (-torch.eye(4), "Factor A is zero"),
        (torch.tensor([[1.0, 0.0], [0.0, torch.nan]]), "holds NaN or infinite values"),
        (torch.full((4, 4), HUGE, dtype=torch.float64), "an eigenvalue that is too large for a float64"),
    ],
)
def test_what_is_no_factor_is_an_error(factor, message):
    with pytest.raises(FaultyLayerError, match=message):
        decompose(factor, "Factor A")


# Numbers of every size: neither the scale of a factor nor that of a weight changes what is kept
@pytest.mark.parametrize("exponents", [(-1000, -1000), (-900, 900), (900, 900), (-1000, 0), (0, 1000)])
@pytest.mark.parametrize("seed", range(5))
def test_a_selection_does_not_depend_on_the_scale(exponents, seed):
    generator = torch.Generator().manual_seed(seed)
    lam, mu = (torch.rand(d, generator=generator, dtype=torch.float64).sort(descending=True).values for d in (7, 9))
    large_lam, large_mu = (times(values, e) for values, e in zip((lam, mu), exponents, strict=True))
    scores = torch.outer(lam, mu)
    for energy in (1e-6, 0.3, 0.9, 0.999):
        columns, kept = select_staircase(large_lam, large_mu, energy)
        assert {(i, j) for i in range(7) for j in range(int(columns[i]))} == reference.select(lam, mu, energy)
        assert kept == select_staircase(lam, mu, energy).energy_kept
        for select in (select_largest, shrink):
            for exponent in exponents:
                selected = select(times(scores, exponent), energy)
                torch.testing.assert_close(selected[0], select(scores, energy)[0])
                assert selected[1] == pytest.approx(select(scores, energy)[1])


@pytest.mark.parametrize(
    "call", [lambda x: select_staircase(x[0], x[0], 0.5), lambda x: select_largest(x, 0.5), lambda x: shrink(x, 0.5)]
)
@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_scores_that_tell_nothing_are_an_error(call, value):
    with pytest.raises(FaultyLayerError, match="scores of the coefficients are zero or not finite"):
        call(torch.full((3, 3), value))


EDITORS = {
    "kfac": CurvatureEditor(0.7),
    "soft": CurvatureEditor(0.7, soft=True),
    "saliency": CurvatureEditor(0.7, score="saliency"),
    "soft saliency": CurvatureEditor(0.7, score="saliency", soft=True),
    "coupled": CurvatureEditor(0.7, score="coupled"),
    "ekfac": CurvatureEditor(0.7, score="ekfac"),
    "soft ekfac": CurvatureEditor(0.7, score="ekfac", soft=True),
    "activations": CurvatureEditor(0.7, score="activations"),
    "bulk": BulkStepEditor(0.3),
    "bulk and edit": BulkStepEditor(0.3, 0.7, score="saliency"),
    "svd": SVDEditor(0.7),
    "random": RandomBasisEditor(0.7),
}


@pytest.mark.parametrize("editor", EDITORS)
@pytest.mark.parametrize("exponents", [(-1000, -1000, 0), (980, 980, 0), (-900, 900, 900), (0, 0, -900), (0, 980, 900)])
def test_an_edit_does_not_depend_on_the_scale(editor, exponents):
    generator = torch.Generator().manual_seed(0)
    A, G, A_coupled, G_coupled = (
        (lambda x: x.T @ x / 50)(torch.randn(50, d, generator=generator, dtype=torch.float64)) for d in (6, 5, 6, 5)
    )
    eigenvalues, margins, weight = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64)
    eigenvalues = eigenvalues.square()

    def layer(of_A, of_G):
        tensors = {
            "A": times(A, of_A),
            "G": times(G, of_G),
            "A_coupled": times(A_coupled, of_A),
            "G_coupled": times(G_coupled, of_G),
            "eigenvalues": times(eigenvalues, of_A),
            "margins": times(margins, of_G),
        }
        return KroneckerFactors({"0": LayerFactors(num_inputs=50, num_gradients=50, **tensors)})

    of_A, of_G, of_W = exponents
    expected, report = EDITORS[editor].edit_layers({"0": weight}, layer(0, 0))
    scaled, scaled_report = EDITORS[editor].edit_layers({"0": times(weight, of_W)}, layer(of_A, of_G))
    torch.testing.assert_close(times(scaled["0"], -of_W), expected["0"])
    plain_edit, scaled_edit = report.layers["0"], scaled_report.layers["0"]
    assert (plain_edit.kept, plain_edit.relative_change) == (
        scaled_edit.kept,
        pytest.approx(scaled_edit.relative_change),
    )
    assert plain_edit.energy_kept == pytest.approx(scaled_edit.energy_kept)
    change = (expected["0"] - weight).norm() / weight.norm()
    assert plain_edit.relative_change == pytest.approx(float(change))


def test_the_change_of_a_weight_of_extreme_numbers():
    old = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    for exponent in (-1070, -600, 600, 1020):
        large = times(old, exponent)
        assert relative_change(large * 2, large) == pytest.approx(1.0)
        assert relative_change(-large, large) == pytest.approx(2.0)
    assert relative_change(-torch.full((2, 2), 60000.0).half(), torch.full((2, 2), 60000.0).half()) == 2.0
    assert relative_change(torch.zeros(2, 2), torch.zeros(2, 2)) == 0.0


@pytest.mark.parametrize("editor", ["kfac", "soft", "svd", "random", "bulk"])
def test_a_weight_of_zeros_stays_and_has_numbers(editor):
    A = ordinary(6)
    layer = LayerFactors(A=A, G=A[:5, :5], num_inputs=64, num_gradients=64, margins=A[:5])
    new, report = EDITORS[editor].edit_layers({"0": torch.zeros(5, 6)}, KroneckerFactors({"0": layer}))
    assert not new["0"].any()
    edit = report.layers["0"]
    assert edit.relative_change == edit.changed == 0
    assert math.isfinite(edit.energy_kept)


def test_a_saliency_of_zeros_is_one_layer_that_can_be_left_out():
    layer = LayerFactors(A=ordinary(6), G=ordinary(5), num_inputs=64, num_gradients=64)
    factors = KroneckerFactors({"0": layer, "1": layer})
    weights = {"0": torch.zeros(5, 6), "1": torch.ones(5, 6)}
    with pytest.warns(UserWarning, match="Not edited: Layer '0': The scores"):
        new, _ = CurvatureEditor(0.7, score="saliency", skip_faulty=True).edit_layers(weights, factors)
    assert list(new) == ["1"]


def test_an_edited_weight_that_its_dtype_cannot_hold_is_an_error():
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    A = turn @ torch.diag(torch.tensor([8.0, 1.0, 1.0, 1.0], dtype=torch.float64)) @ turn.T
    weight = 6e4 * (turn[:, 0] / turn[:, 0].abs().max()).sign().half()[None]  # grows where it is projected
    factors = KroneckerFactors({"0": LayerFactors(A=A, G=torch.ones(1, 1), num_inputs=9, num_gradients=9)})
    expected = weight.double() @ turn[:, :1] @ turn[:, :1].T
    assert expected.abs().max() > torch.finfo(torch.float16).max
    with pytest.raises(FaultyLayerError, match=r"Layer '0': its edited weight is too large for torch.float16"):
        CurvatureEditor(0.5).edit_layers({"0": weight}, factors)


def test_factors_made_in_inference_mode_are_decomposed_and_kept(monkeypatch):
    shapes = solvers(monkeypatch, lambda call: None)
    with torch.inference_mode():
        layer = LayerFactors(A=ordinary(6), G=ordinary(5), num_inputs=64, num_gradients=64)
    weight = torch.randn(5, 6, requires_grad=True)
    for mode in (False, True, False):
        with torch.inference_mode(mode):
            new, _ = CurvatureEditor(0.7).edit_layers({"0": weight}, KroneckerFactors({"0": layer}))
    assert len(shapes) == 2
    expected = reference.edit(weight.detach().double(), ordinary(6), ordinary(5), 0.7)
    torch.testing.assert_close(new["0"].double(), expected, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        layer.A.mul_(torch.arange(1.0, 7.0)[:, None] * torch.arange(1.0, 7.0))
    check(layer.A, layer.basis.U_A, layer.basis.mu)


def test_a_solver_that_does_not_converge_is_tried_again_on_the_cpu(monkeypatch):
    A = layer_factors().A
    expected = decompose(A, "Factor A")
    calls = failing_eigh(monkeypatch, 1)
    for tensor, expected_tensor in zip(decompose(A, "Factor A"), expected, strict=True):
        assert torch.equal(tensor, expected_tensor)
    assert calls == ["cpu", "cpu"]


def test_a_full_gpu_is_no_fault_of_the_factor(monkeypatch):
    def full(_):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(torch.linalg, "eigh", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        decompose(torch.eye(2), "Factor A")
