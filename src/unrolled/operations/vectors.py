"""The product of vectors of three numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from unrolled.operations.operation import Operation, declare
from unrolled.operations.row_rules import Place, Rows


def _rows(rows: Rows) -> list[Place]:
    places = rows.pointwise()
    if rows.keyword("dim", -1) % len(rows.out()) in places:
        raise rows.refusal("works along the rows")
    return places


def cross(a: Tensor, b: Tensor, *, dim: int = -1) -> Tensor:
    """`aten.linalg_cross`: of `[..., 3, ...]`, which broadcast."""
    x, y = ([_part(v, dim, i) for i in range(3)] for v in (a, b))
    return torch.cat([x[i - 2] * y[i - 1] - x[i - 1] * y[i - 2] for i in range(3)], dim)


def _part(x: Tensor, dim: int, place: int) -> Tensor:
    part: Tensor = torch.ops.aten.slice(x, dim, place, place + 1)
    return part


declare({"linalg_cross": Operation(_rows, formula=cross)})
