"""The product of three tensors that `torch.nn.Bilinear` is, and its derivatives: an outer product times a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from unrolled.operations.operation import Operation, declare
from unrolled.operations.row_rules import Place, Rows


def _rows(rows: Rows) -> list[Place]:
    first, second, third = rows.op.args[:3]
    of_none, summed = rows.arg(4), rows.arg(6)
    spread = {0}.intersection((*rows.arg(3), *rows.arg(5)))
    if (rows.place(first), rows.place(second), rows.place(third)) != (0, None, 0) or spread or 0 in summed:
        raise rows.refusal("multiplies rows with rows")
    if 0 not in of_none:
        raise rows.refusal("has weights for each row")
    return [0]


def trilinear(
    first: Tensor,
    second: Tensor,
    third: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Any:
    """`aten._trilinear`: each is given dimensions of length 1, and the product is added up along some.

    As the matrix of the first one times the third times that of the second, if they share no dimension that is left.
    """
    rank = first.dim() + len(expand1)
    of_outer = [d for d in range(rank) if not (d in expand1 and d in expand3)]
    of_second = [d for d in range(rank) if d not in expand2]
    left, right = ([d for d in dims if d not in sumdim] for dims in (of_outer, of_second))
    if set(left) & set(right) or not set(sumdim) <= set(of_outer) & set(of_second):
        return NotImplemented
    outer, second = _unsqueezed(first, expand1) * _unsqueezed(third, expand3), _unsqueezed(second, expand2)
    sizes = {d: outer.shape[d] if d in of_outer else second.shape[d] for d in range(rank)}
    length = prod(sizes[d] for d in sumdim)
    rows = outer.permute([*left, *sumdim, *right]).reshape([prod(sizes[d] for d in left), length])
    matrix = second.permute([*sumdim, *right, *left]).reshape([length, prod(sizes[d] for d in right)])
    dims = [*left, *right]
    product = torch.bmm(rows.unsqueeze(0), matrix.unsqueeze(0)).view([sizes[d] for d in dims])
    return product if dims == sorted(dims) else product.permute([dims.index(d) for d in sorted(dims)])


def _unsqueezed(x: Tensor, dims: Sequence[int]) -> Tensor:
    for d in sorted(dims):
        x = x.unsqueeze(d)
    return x


declare({"_trilinear": Operation(_rows, formula=trilinear)})
