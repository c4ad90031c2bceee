"""What the families of published cells share: sizes, an example of a cell with its inputs, and a state of zeros."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unrolled.trees import Tree, leaves, map_leaves


@dataclass(frozen=True)
class Sizes:
    """How large an example is.

    Attributes:
        T: time steps.
        B: rows of the batch.
        I: input features.
        H: hidden features, a multiple of 8.
    """

    T: int
    B: int
    I: int
    H: int

    def normal(self, *shape: int) -> Tensor:
        """A sequence `[T, B, *shape]` of normal numbers; `[T, B, I]` without a shape."""
        return torch.randn(self.T, self.B, *(shape or (self.I,)))

    def uniform(self, *shape: int) -> Tensor:
        """A sequence `[T, B, *shape]` of numbers in (0, 1), the ends left out."""
        return 0.01 + 0.98 * torch.rand(self.T, self.B, *shape)

    def tokens(self, many: int) -> Tensor:
        """A sequence `[T, B]` of numbers below `many`."""
        return torch.randint(many, (self.T, self.B))

    def flags(self, share: float) -> Tensor:
        """A sequence `[T, B]` of bools, so many of which are true."""
        return torch.rand(self.T, self.B) < share


class Example(NamedTuple):
    """A cell and what it is run on.

    Attributes:
        cell: makes it.
        inputs: makes a sequence of inputs.
        draws: whether it draws random numbers in its step.
        rows: whether its state has a row for each sequence, so that lengths can be given.
    """

    cell: Callable[[Sizes], nn.Module]
    inputs: Callable[[Sizes], Tree] = Sizes.normal
    draws: bool = False
    rows: bool = True


def loop(cell: nn.Module, inputs: Tree, dtype: torch.dtype = torch.float32) -> tuple[Tree, Tree]:
    """The loop that a user writes: the outputs `[T, B, ...]` of a cell and its last state, from its own start."""
    steps, batch = leaves(inputs)[0].shape[:2]
    state, outputs = cell.initial_state(batch, torch.device("cpu"), dtype), []
    for t in range(steps):
        output, state = cell(map_leaves(lambda x, t=t: x[t], inputs), state)
        outputs.append(output)
    return map_leaves(lambda *at_steps: torch.stack(at_steps), *outputs), state


class FromZeros(nn.Module):
    """A cell whose state is zeros of some shapes: one tensor, or a tuple."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes = shapes

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tree:
        """Zeros `[B, *shape]` of each shape."""
        zeros = tuple(torch.zeros(batch_size, *shape, device=device, dtype=dtype) for shape in self.shapes)
        return zeros if len(zeros) > 1 else zeros[0]
