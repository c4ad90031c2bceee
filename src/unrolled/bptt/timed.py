"""Values over a segment of copies: one entry for each time step, folded into the rows or stacked before them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Summed", "Timed", "spread"]


@dataclass(frozen=True)
class Timed:
    """A value at every step of a segment.

    Attributes:
        tensor: if folded, dimension `rows` is T x B long, time first; if stacked, the tensor is `[T, ...]`.
        steps: T.
        rows: the dimension of the rows if folded, None if stacked.
    """

    tensor: Tensor
    steps: int
    rows: int | None = None

    def stacked(self) -> Tensor:
        """The value as `[T, ...]`."""
        if self.rows is None:
            return self.tensor
        return self.tensor.unflatten(self.rows, (self.steps, -1)).movedim(self.rows, 0)

    def folded(self, rows: int) -> Tensor:
        """The value with time folded into its rows, which are in this dimension."""
        if self.rows is not None:
            return self.tensor
        return self.tensor.movedim(0, rows).flatten(rows, rows + 1)


@dataclass(frozen=True)
class Summed:
    """A value that was added up over all steps: only what is linear in it may follow."""

    tensor: Tensor


def spread(tensor: Tensor, steps: int) -> Tensor:
    """A value that is the same at every step, as `[T, ...]`, without memory for it."""
    return tensor.expand(steps, *tensor.shape)
