"""Factors with too few positions, and a solver that fails."""

import torch

from lightning_curvature import LayerFactors


def layer_factors(d_in=3, d_out=2, **changes):
    torch.manual_seed(0)
    x, g = torch.randn(20, d_in), torch.randn(20, d_out)
    return LayerFactors(**({"A": x.T @ x / 20, "G": g.T @ g / 20, "num_inputs": 20, "num_gradients": 20} | changes))


def failing_eigh(monkeypatch, times):
    """Let the solver not converge a number of times, as LAPACK and cuSOLVER say it."""
    real, calls = torch.linalg.eigh, []

    def eigh(matrix):
        calls.append(matrix.device.type)
        if len(calls) <= times:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge.")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    return calls


def moment(positions, live, dead=0, seed=0):
    x = torch.randn(positions, live, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    whole = torch.zeros(live + dead, live + dead, dtype=torch.float64)
    whole[dead:, dead:] = x.T @ x / positions
    return whole


def spectrum(*values):
    """Return a factor with these eigenvalues and no direction that is an axis."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))[0]
    return turn @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ turn.T


FEW = {
    "rank of A": ((moment(5, 8), 5, moment(20, 4), 20), "Factor A rests on 5 positions, too few for its 8 live inputs"),
    "rank of G": (
        (moment(20, 8), 20, moment(3, 4), 3),
        "Factor G rests on 3 positions, too few for its 4 live outputs",
    ),
    "one position": ((moment(1, 8), 1, moment(1, 4), 1), "Factor A rests on 1 positions"),
    "dead inputs, too": ((moment(5, 8, 30), 5, moment(20, 4), 20), "too few for its 8 live inputs"),
    "nearly": ((spectrum(1, 1, 1.9e-3), 2, moment(9, 4), 9), "Factor A rests on 2 positions"),
    "float32": ((moment(5, 300).float(), 5, moment(20, 4), 20), "too few for its 300 live inputs"),
    "small numbers": ((1e-300 * moment(5, 8), 5, moment(20, 4), 20), "too few for its 8 live inputs"),
}

ENOUGH = {
    "as many as live": (moment(8, 8), 8, moment(4, 4), 4),
    "dead inputs": (moment(9, 8, 30), 9, moment(9, 4, 50), 9),
    "by hand": (torch.eye(8), 3, torch.eye(4), 2),
    "no count": (moment(5, 8), 0, moment(2, 4), 0),
    "not quite of that rank": (spectrum(1, 1, 2.1e-3), 2, moment(9, 4), 9),
    "several draws of a position": (moment(20, 8), 20, moment(6, 4), 3),
}


def few(A, num_inputs, G, num_gradients):
    return LayerFactors(A=A, G=G, num_inputs=num_inputs, num_gradients=num_gradients)
