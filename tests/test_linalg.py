"""Linear algebra on the path: a matrix for each row, with rows that end at different times."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, linalg, nn

import unrolled as ur
from matching import assert_match
from problems import uneven_loss

F64 = torch.float64
N = 3

WITH_A_MATRIX: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "solve": lambda A, v: linalg.solve(A, v).unsqueeze(-1),
    "inv": lambda A, v: linalg.inv(A) @ v.unsqueeze(-1),
    "pinv": lambda A, v: linalg.pinv(A) @ v.unsqueeze(-1),
    "lu": lambda A, v: linalg.lu_solve(*linalg.lu_factor(A), v.unsqueeze(-1)),
    "triangular": lambda A, v: linalg.solve_triangular(A, v.unsqueeze(-1), upper=False),
    "cholesky": lambda A, v: torch.cholesky_solve(v.unsqueeze(-1), linalg.cholesky(A)),
    "matrix_exp": lambda A, v: linalg.matrix_exp(0.1 * A) @ v.unsqueeze(-1),
    "qr": lambda A, v: linalg.qr(A)[1] @ v.unsqueeze(-1),
    "eigvalsh": lambda A, v: (linalg.eigvalsh(A) * v).unsqueeze(-1),
    "svdvals": lambda A, v: (linalg.svdvals(A) * v).unsqueeze(-1),
}


class MatrixCell(nn.Module):
    """Makes a positive definite matrix of input and state, and does something with it and the state."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.use, self.weight = use, nn.Parameter(0.3 * torch.randn(N, N, dtype=F64))
        self.register_buffer("diagonal", torch.diag(torch.arange(1, N + 1, dtype=F64)))

    def initial_state(self, batch_size, device=None, dtype=None):
        return torch.zeros(batch_size, N, device=device, dtype=dtype)

    def forward(self, x, h):
        root = 0.1 * x.unsqueeze(2) * h.unsqueeze(1) + self.weight
        h = torch.tanh(0.3 * self.use(root @ root.mT + self.diagonal, h).squeeze(-1) + x)
        return h, h


@pytest.mark.parametrize("use", WITH_A_MATRIX)
def test_a_cell_with_a_matrix_for_each_row_keeps_its_plan_with_lengths(use):
    cell, inputs = MatrixCell(WITH_A_MATRIX[use]), torch.randn(5, 4, N, dtype=F64, requires_grad=True)
    found = []
    for engine in ("reference", "auto"):
        rnn = ur.unroll(cell, engine=engine)
        results = rnn(inputs, lengths=[5, 2, 0, 3])
        found.append((results, torch.autograd.grad(uneven_loss(results), [inputs, cell.weight])))
    assert_match(found[1], found[0])
    assert rnn.ran == "eager", rnn.plan(inputs, lengths=[5, 2, 0, 3])
