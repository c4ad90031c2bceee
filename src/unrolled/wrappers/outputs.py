"""Wrappers that change what a cell gives out, and leave its state alone: a residual connection, a projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.cells.contract import name_of
from unrolled.cells.gates import check_sizes
from unrolled.errors import CellError
from unrolled.trees import Tree
from unrolled.wrappers.base import CellWrapper


class ResidualCell(CellWrapper):
    """A cell whose output is added to its input, so that a stack of them passes on what it does not change.

    The state is the cell's own: what it passes on is not added to. The input must be one tensor of the output's shape.

    Args:
        cell: a cell, or anything `as_cell` makes one of without further arguments.

    Raises:
        CellError: on the first call, for an output that is not like the input.

    Source: Y. Wu et al., "Google's neural machine translation system" (2016), section 3.1.

    Example:
        >>> import torch, unrolled as ur
        >>> rnn = ur.stack([ur.ResidualCell(ur.GRUCell(4, 4)) for _ in range(3)])
        >>> rnn(torch.randn(5, 2, 4))[0].shape
        torch.Size([5, 2, 4])
    """

    def forward(self, input: Tensor, state: Tree, *context: Tree) -> tuple[Tensor, Tree]:
        """Run one step: input `[B, I]`, the cell's own state; the output is `[B, I]`."""
        output, next_state = self.cell(input, state, *context)
        if not isinstance(output, Tensor) or not isinstance(input, Tensor) or output.shape != input.shape:
            made = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            read = list(input.shape) if isinstance(input, Tensor) else type(input).__name__
            raise CellError(
                f"a residual connection adds the output to the input, but {name_of(self.cell)} reads {read} and gives "
                f"out {made}; make them alike: ProjectedCell(cell, hidden_size, input_size) inside of it"
            )
        return output + input, next_state


class ProjectedCell(CellWrapper):
    """A cell whose output is projected to another size; its state stays as it is.

    No later state needs the projection, so it is one product for all copies. (`ur.LSTM(proj_size=...)` projects what is
    passed on.)

    Args:
        cell: a cell, or anything `as_cell` makes one of without further arguments.
        hidden_size: H, features of the cell's output.
        output_size: features of the projected one.
        bias: whether the projection has a bias.
        device: where its parameters live.
        dtype: their dtype.

    Raises:
        OptionError: for a size that is no positive integer.

    Example:
        >>> import torch, unrolled as ur
        >>> rnn = ur.unroll(ur.ProjectedCell(ur.LSTMCell(3, 8), 8, 4))
        >>> outputs, (h, c) = rnn(torch.randn(5, 2, 3))
        >>> outputs.shape, h.shape
        (torch.Size([5, 2, 4]), torch.Size([2, 8]))
    """

    def __init__(
        self,
        cell: nn.Module | Callable[..., Any],
        hidden_size: int,
        output_size: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(cell)
        check_sizes(hidden_size=hidden_size, output_size=output_size)
        self.projection = nn.Linear(hidden_size, output_size, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tree, state: Tree, *context: Tree) -> tuple[Tensor, Tree]:
        """Run one step: input and state as the cell's own; the output is `[B, output_size]`."""
        output, next_state = self.cell(input, state, *context)
        return self.projection(output), next_state
