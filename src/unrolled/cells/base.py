"""The cell contract: two methods and nothing else."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from unrolled.trees import Tree


@runtime_checkable
class Cell(Protocol):
    """A recurrent network's program for one time step.

    Any module with these two methods is a cell; nothing need be inherited. Input, output and state are pytrees of
    `[B, ...]`. A cell that attends to something that is the same at every step takes it as a third argument,
    `context`.
    """

    def __call__(self, input: Tree, state: Tree, /) -> tuple[Tree, Tree]:
        """Run one step: `(input, state) -> (output, next state)`."""
        ...

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tree:
        """The state that copy 0 receives when the caller passes none."""
        ...
