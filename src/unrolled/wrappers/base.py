"""What every wrapper is: a cell around a cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from unrolled.cells.adapted import as_cell
from unrolled.trees import Tree


class CellWrapper(nn.Module):
    """A cell around a cell, with the same state unless a subclass adds to it.

    Args:
        cell: a cell, or anything `as_cell` makes one of without further arguments.
    """

    def __init__(self, cell: nn.Module | Callable[..., Any]) -> None:
        super().__init__()
        self.cell = as_cell(cell)

    @property
    def wrapped(self) -> nn.Module:
        """The cell inside."""
        return self.cell

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tree:
        """The cell's own."""
        return self.cell.initial_state(batch_size, device=device, dtype=dtype)
