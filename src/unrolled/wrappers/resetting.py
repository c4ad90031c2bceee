"""Resets: rows that start from a fresh state in the middle of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unrolled.cells.base import StandInCell
from unrolled.cells.contract import name_of
from unrolled.sequence import rows_where
from unrolled.trees import Tree


class ResettingCell(StandInCell):
    """A cell whose rows receive a fresh state where a mask says so.

    Its input is `(input, resets)`, resets a bool `[B]`; its context is `(context, fresh)`, fresh a state of the cell's.

    Args:
        cell: the cell.
    """

    names_start_with = "cell."

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.display_name = name_of(cell)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tree:
        """The cell's own."""
        return self.cell.initial_state(batch_size, device=device, dtype=dtype)

    def forward(self, input: tuple[Tree, Tensor], state: Tree, context: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        """Run one step on states of which some are fresh."""
        cell_input, resets = input
        cell_context, fresh = context
        received = rows_where(resets, fresh, state)
        return self.cell(cell_input, received, *([] if cell_context is None else [cell_context]))
