"""Norms and quartiles of measured numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def norm(tensor: Tensor) -> float:
    """The Euclidean norm, taken in float64: the square of a small float32 is zero."""
    return float(torch.linalg.vector_norm(tensor.abs(), dtype=torch.float64))


def row_norms(tensors: Sequence[Tensor], rows: int) -> Tensor:
    """The norm of each row over all leaves `[P, n, ...]`, as `[P, n]` float64; leaves without rows are left out."""
    by_row = [x for x in tensors if x.dim() > 1 and x.shape[1] == rows]
    sizes = [x.abs() if x.is_complex() else x for x in by_row]
    norms = [
        torch.linalg.vector_norm(x.flatten(2) if x.dim() > 2 else x[..., None], dim=-1, dtype=torch.float64)
        for x in sizes
    ]
    if not norms:
        return torch.zeros(len(tensors[0]) if tensors else 1, rows, dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack(norms), dim=0).cpu()


def quartiles(values: Tensor) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile of some numbers; NaN if one of them is, or of none."""
    values, shares = values.detach().flatten().double().cpu(), (0.25, 0.5, 0.75)
    if not len(values):
        return (float("nan"),) * 3
    if values.isinf().any():  # interpolating between infinities gives NaN
        ordered = values.sort().values
        lower, middle, upper = (float(ordered[round(share * (len(ordered) - 1))]) for share in shares)
    else:
        lower, middle, upper = torch.quantile(values, torch.tensor(shares, dtype=torch.float64)).tolist()
    return lower, middle, upper


def median(values: Tensor) -> float:
    """The median of some numbers; NaN if one of them is, or of none."""
    return quartiles(values)[1]
