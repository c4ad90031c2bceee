"""Quantisation that is only pretended: numbers are rounded to those of a grid, and gradients pass where it has any.

torch computes with scales of 32 bits, whatever the dtype: only numbers of as many are done by this formula. What is no
number becomes the lowest one.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from unrolled.operations.operation import Operation, declare
from unrolled.operations.row_rules import Rows


def _float(number: float) -> float:
    """The nearest number of 32 bits."""
    return float(struct.unpack("f", struct.pack("f", number))[0])


def fake_quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Any:
    """The nearest numbers of the grid, and which ones of `x` are not beyond its ends."""
    if x.dtype != torch.float32:
        return NotImplemented
    scale = _float(scale)
    grid = (x * _float(1 / scale)).round() + zero_point
    inside = torch.where(grid >= low, grid.clamp_max(high), float(low))
    return (inside - zero_point) * scale, (grid >= low) & (grid <= high)


declare({"fake_quantize_per_tensor_affine_cachemask": Operation(Rows.first, formula=fake_quantize)})
