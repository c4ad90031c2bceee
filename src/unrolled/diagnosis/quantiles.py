"""Quartiles as plain floats."""

from __future__ import annotations

import torch
from torch import Tensor

_AT = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)


def quartiles(values: Tensor) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile of some numbers; NaN if one of them is, or of none."""
    values = values.detach().flatten().double().cpu()
    if not len(values):
        return (float("nan"),) * 3
    if values.isinf().any():  # interpolating between infinities gives NaN
        ordered = values.sort().values
        lower, middle, upper = (float(ordered[round(at * (len(ordered) - 1))]) for at in _AT.tolist())
        return lower, middle, upper
    lower, middle, upper = torch.quantile(values, _AT).tolist()
    return lower, middle, upper


def median(values: Tensor) -> float:
    """The median of some numbers; NaN if one of them is, or of none."""
    return quartiles(values)[1]
