"""Resets: rows that start afresh in the middle of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unrolled.cells.contract import name_of
from unrolled.trees import Tree, map_leaves


def afresh(resets: Tensor, fresh: Tree, state: Tree) -> Tree:
    """A state whose rows are those of `fresh` where `resets`, a bool `[B]`, says so."""

    def chosen(start: Tensor, leaf: Tensor) -> Tensor:
        return torch.where(resets.view(-1, *(1,) * (leaf.dim() - 1)), start, leaf)

    return map_leaves(chosen, fresh, state)


class ResettingCell(nn.Module):
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
        given, resets = input
        own, fresh = context
        received = afresh(resets, fresh, state)
        return self.cell(given, received) if own is None else self.cell(given, received, own)
