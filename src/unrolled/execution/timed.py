"""Values over a segment of copies: one entry for each time step, folded into the rows or stacked before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from unrolled.lengths import Extent


@dataclass(frozen=True)
class Timed:
    """A value at every step of a segment.

    Attributes:
        tensor: if folded, dimension `rows` has the rows of all steps, one step after the other; if stacked, the tensor
            is `[T, ...]`. Where rows end at different times, all that has rows is folded.
        extent: how far the segment reaches.
        rows: the dimension of the rows if folded, None if stacked.
    """

    tensor: Tensor
    extent: Extent
    rows: int | None = None

    def stacked(self) -> Tensor:
        """The value as `[T, ...]`."""
        if self.rows is None:
            return self.tensor
        if self.extent.ragged:
            raise TypeError("steps of different numbers of rows cannot be stacked")
        return self.tensor.unflatten(self.rows, (self.extent.steps, -1)).movedim(self.rows, 0)

    def folded(self, rows: int) -> Tensor:
        """The value with time folded into its rows, which are in this dimension."""
        if self.rows is not None:
            return self.tensor
        return self.tensor.movedim(0, rows).flatten(rows, rows + 1)

    def each(self) -> Sequence[Tensor]:
        """The value at step 0, 1, 2, ..."""
        if self.rows is None:
            return self.tensor.unbind(0)
        many = self.tensor.shape[self.rows] // self.extent.rows
        return self.tensor.split([many * n for n in self.extent.sizes], self.rows)

    def over_time(self) -> Tensor:
        """As loops and callers take it: `[T, ...]`, or folded where rows end at different times."""
        return self.tensor if self.extent.ragged else self.stacked()


@dataclass(frozen=True)
class Summed:
    """A value that was added up over all steps: only what is linear in it may follow."""

    tensor: Tensor


def spread(tensor: Tensor, extent: Extent, rows: int | None) -> Timed:
    """A value that is the same at every step, as one over time: without memory for it, unless rows end early.

    Args:
        tensor: the value.
        extent: of the segment.
        rows: the dimension of its rows, None if it has none.
    """
    if rows is None or not extent.ragged:
        return Timed(tensor.expand(extent.steps, *tensor.shape), extent)
    by_row = tensor.unflatten(rows, (extent.batch, -1)).index_select(rows, extent.row_of.to(tensor.device))
    return Timed(by_row.flatten(rows, rows + 1), extent, rows)
