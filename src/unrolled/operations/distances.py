"""Distances between all pairs of a row's points, and rows that are made no longer than some length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unrolled.operations.operation import Operation, declare
from unrolled.operations.row_rules import Place, Rows
from unrolled.operations.spatial import in_front


def _shortened(rows: Rows) -> list[Place]:
    """Each entry of a dimension by its own length: that of the rows."""
    place = rows.place(rows.arg(0))
    if place != rows.arg(2) % len(rows.out()):
        raise rows.refusal("takes a length over the rows")
    return [place]


def cdist(x: Tensor, y: Tensor, p: float, compute_mode: int | None) -> Any:
    """`aten._cdist_forward`: from each of `[..., P, M]` to each of `[..., R, M]`, by the norms 1 and 2."""
    if p not in (1, 2):
        return NotImplemented
    apart = x.unsqueeze(-2) - y.unsqueeze(-3)
    return apart.abs().sum(-1) if p == 1 else (apart * apart).sum(-1).sqrt()


def cdist_backward(grad: Tensor, x: Tensor, y: Tensor, p: float, distance: Tensor) -> Any:
    """`aten._cdist_backward`: the gradient of the first points; none where two are in the same place."""
    if p not in (1, 2):
        return NotImplemented
    apart = x.unsqueeze(-2) - y.unsqueeze(-3)
    if p == 1:
        return (grad.unsqueeze(-1) * apart.sign()).sum(-2)
    factor = torch.where(distance == 0, 0.0, grad / distance)
    return (factor.unsqueeze(-1) * apart).sum(-2)


declare(
    {
        "_cdist_forward": Operation(in_front, formula=cdist),
        "_cdist_backward": Operation(in_front, formula=cdist_backward),
        "renorm": Operation(_shortened, decomposed=True),
    }
)
