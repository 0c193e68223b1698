import pytest
import torch

from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.factors.basis import _columns_above, curvature_basis, project_weight, select_staircase
from lightning_curvature.factors.decomposition import decompose
from lightning_curvature.factors.layer import LayerFactors
from tests import reference


def random_spectrum(d, kind, generator):
    values = torch.rand(d, dtype=torch.float64, generator=generator).exp() ** 4
    if kind == "ties":
        values = torch.randint(1, 4, (d,), generator=generator).double()
    if kind == "zeros":
        values[torch.rand(d, generator=generator) < 0.5] = 0.0
        values[0] = 1.0
    if kind == "decay":
        values = 2.0 ** -torch.arange(d, dtype=torch.float64)
    return values.sort(descending=True).values


CASES = [(kind, seed) for kind in ("smooth", "ties", "zeros", "decay") for seed in range(15)]


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_staircase_equals_a_heap_over_all_pairs(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    m, n = (int(torch.randint(1, 12, (), generator=generator)) for _ in range(2))
    lam, mu = (random_spectrum(d, kind, generator) for d in (m, n))
    for energy in (1e-6, 0.3, 0.5, 0.75, 0.9, 0.999, 1.0):
        columns, energy_kept = select_staircase(lam, mu, energy)
        kept = {(i, j) for i in range(m) for j in range(int(columns[i]))}
        assert kept == reference.select(lam, mu, energy)
        assert energy_kept >= energy * (1 - 1e-9)
        assert (columns.diff() <= 0).all()


@pytest.mark.parametrize("energy", [0.4, 0.8, 0.99])
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_edit_equals_brute_force_also_for_rank_deficient_factors(energy, rank, seed):
    torch.manual_seed(seed)
    x, g = torch.randn(rank, 6, dtype=torch.float64), torch.randn(rank, 5, dtype=torch.float64)
    A, G, W = x.T @ x, g.T @ g, torch.randn(5, 6, dtype=torch.float64)
    factors = LayerFactors(A=A, G=G, num_inputs=rank, num_gradients=rank)
    edited = CurvatureEditor(energy).project(W, factors, energy)
    torch.testing.assert_close(edited.weight, reference.edit(W, A, G, energy))


def test_tied_eigenvalues_do_not_depend_on_the_basis_of_their_eigenspace():
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    A = rotation @ torch.diag(torch.tensor([3.0, 1, 1, 1, 1, 0.1], dtype=torch.float64)) @ rotation.T
    columns = select_staircase(torch.ones(1), curvature_basis(A, torch.eye(1)).mu, 0.6).columns
    assert columns.tolist() == [5]  # one of the four equal ones would be enough; all four are kept


def test_decomposition_is_descending_clamped_and_dense_truth():
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64)
    vectors, values = decompose(x.T @ x, "A")
    assert (values.diff() <= 0).all()
    assert (values[3:] == 0).all()
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, x.T @ x)


def test_mass_is_the_eigenvalue_of_the_dense_kronecker_matrix():
    torch.manual_seed(0)
    x, g = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    A, G = x.T @ x, g.T @ g
    basis = curvature_basis(A, G)
    direction = torch.outer(basis.U_G[:, 1], basis.U_A[:, 2]).flatten()
    dense = torch.kron(G, A)
    torch.testing.assert_close(dense @ direction, basis.lam[1] * basis.mu[2] * direction)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_factor_is_an_error(bad):
    A = torch.eye(3)
    A[0, 0] = bad
    with pytest.raises(ValueError, match=r"Factor A.*NaN or infinite"):
        curvature_basis(A, torch.eye(2))


def test_zero_factor_is_an_error():
    with pytest.raises(ValueError, match="Factor G is zero"):
        curvature_basis(torch.eye(3), torch.zeros(2, 2))


def test_project_weight_checks_shapes_and_takes_a_mask():
    basis = curvature_basis(torch.eye(3), torch.eye(2))
    weight = torch.randn(2, 3)
    torch.testing.assert_close(project_weight(weight, basis, torch.ones(2, 3)), weight)
    torch.testing.assert_close(project_weight(weight, basis, torch.full((2, 3), 0.5)), weight / 2)
    with pytest.raises(ValueError, match=r"for a weight \[2, 3\]; found weight \[3, 2\]"):
        project_weight(weight.T, basis, torch.ones(2, 3))


@pytest.mark.parametrize("kind", ["different", "equal in groups", "all equal", "zeros"])
def test_thresholds_are_compared_with_products_not_quotients(kind):
    generator = torch.Generator().manual_seed(0)
    for trial in range(40):
        lam, mu = (
            torch.rand(size, generator=generator, dtype=torch.float64).sort(descending=True).values
            for size in (1 + trial, 60 - trial)
        )
        if kind == "equal in groups":
            mu = (mu * 4).round() / 40
        elif kind == "all equal":
            lam, mu = torch.full_like(lam, 1 / 3), torch.full_like(mu, 1 / 7)
        elif kind == "zeros":
            lam, mu = (lam * 3).floor() / 3, mu * 1e-3
        masses = torch.outer(lam, mu)
        for mass in masses.flatten()[:: max(masses.numel() // 7, 1)].tolist():
            for threshold in (mass, mass * (1 + 2e-16), mass * (1 - 2e-16), 0.7 * mass):
                if threshold > 0:
                    assert (
                        _columns_above(lam.numpy(), mu.numpy(), threshold).tolist()
                        == (masses >= threshold).sum(1).tolist()
                    )
