"""Matrices with numbers on a diagonal and zeros elsewhere: `torch.diag_embed`, and the derivative of a diagonal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unrolled.operations.operation import Operation, declare
from unrolled.operations.row_rules import Place, Rows


def _rows(first: int) -> Callable[[Rows], list[Place]]:
    """The last dimension becomes two, which the arguments from this one on name; the others stay in order."""

    def rule(rows: Rows) -> list[Place]:
        place, rank = rows.place(rows.arg(0)), len(rows.out())
        if place is None or place == rank - 2:
            raise rows.refusal("goes along the rows")
        new = {rows.arg(first, -2) % rank, rows.arg(first + 1, -1) % rank}
        return [[d for d in range(rank) if d not in new][place]]

    return rule


def diag_embed(x: Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
    """`aten.diag_embed`: `[..., n]` on a diagonal of square matrices."""
    size = x.shape[-1] + abs(offset)
    return _on_diagonal(x, size, size, offset, dim1, dim2)


def diagonal_backward(grad: Tensor, sizes: Sequence[int], offset: int, dim1: int, dim2: int) -> Tensor:
    """`aten.diagonal_backward`: `[..., n]` on the diagonal that was read."""
    return _on_diagonal(grad, sizes[dim1], sizes[dim2], offset, dim1, dim2)


def _on_diagonal(x: Tensor, down: int, across: int, offset: int, dim1: int, dim2: int) -> Tensor:
    """Matrices of so many rows and columns, which become the dimensions that are named."""
    above, rank = max(-offset, 0), x.dim() + 1
    long = torch.ops.aten.constant_pad_nd(x, [above, down - above - x.shape[-1]])
    lines, columns = (torch.arange(n, device=x.device) for n in (down, across))
    there = columns - lines.unsqueeze(1) == offset
    matrices = torch.where(there, long.unsqueeze(-1), 0.0)
    order = [d for d in range(rank) if d not in (dim1 % rank, dim2 % rank)]
    order += [dim1 % rank, dim2 % rank]
    return matrices.permute([order.index(d) for d in range(rank)])


declare(
    {
        "diag_embed": Operation(_rows(2), formula=diag_embed),
        "diagonal_backward": Operation(_rows(3), formula=diagonal_backward),
    }
)
