"""Tensors as real numbers, and these moved in their last digit: by what results are held against each other."""

from __future__ import annotations

import torch
from torch import Tensor


def reals(tensor: Tensor) -> Tensor:
    """A tensor's numbers, the two of a complex one side by side."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def neighbours(values: Tensor) -> Tensor:
    """The next number in every entry, up and down in turn.

    Args:
        values: floating.

    Example:
        >>> neighbours(torch.ones(2)) - 1
        tensor([-5.9605e-08,  1.1921e-07])
    """
    away = torch.full_like(values, float("inf"))
    away.view(-1)[::2] = float("-inf")
    return torch.nextafter(values, away)
