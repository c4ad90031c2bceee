"""Values over a segment of copies: the same at every step, one entry for each step, or the sum over all steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from unrolled.lengths import Extent


class TimeSeries(NamedTuple):
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

    @classmethod
    def constant(cls, tensor: Tensor, extent: Extent, rows: int | None) -> TimeSeries:
        """A value that is the same at every step: without memory for it, unless rows end at different times.

        Args:
            tensor: the value.
            extent: how far the segment reaches.
            rows: the dimension of its rows, None if it has none.
        """
        if rows is None or not extent.ragged:
            return cls(tensor.expand(extent.steps, *tensor.shape), extent)
        by_row = tensor.unflatten(rows, (extent.batch, -1)).index_select(rows, extent.row_of.to(tensor.device))
        return cls(by_row.flatten(rows, rows + 1), extent, rows)

    @classmethod
    def joined(cls, steps: Sequence[Tensor], extent: Extent, rows: int | None) -> TimeSeries:
        """A value from its entries at step 0, 1, 2, ...; takes what `constant` does."""
        if rows is None or not extent.ragged:
            return cls(torch.stack(tuple(steps)), extent)
        return cls(torch.cat(tuple(steps), rows), extent, rows)

    def stacked(self) -> Tensor:
        """The value as `[T, ...]`."""
        if self.rows is None:
            return self.tensor
        if self.extent.ragged:
            raise TypeError("steps of different numbers of rows cannot be stacked")
        if not self.rows:
            rows, *sizes = self.tensor.shape
            return self.tensor.view(self.extent.steps, rows // self.extent.steps, *sizes)
        return self.tensor.unflatten(self.rows, (self.extent.steps, -1)).movedim(self.rows, 0)

    def folded(self, rows: int) -> Tensor:
        """The value with time folded into its rows, which are in this dimension."""
        if self.rows is not None:
            return self.tensor
        return (self.tensor.movedim(0, rows) if rows else self.tensor).flatten(rows, rows + 1)

    def each(self) -> Sequence[Tensor]:
        """The value at step 0, 1, 2, ..."""
        if self.rows is None:
            return self.tensor.unbind(0)
        many = self.tensor.shape[self.rows] // self.extent.rows
        return self.tensor.split([many * n for n in self.extent.sizes], self.rows)

    def over_time(self) -> Tensor:
        """As loops and callers take it: `[T, ...]`, or folded where rows end at different times."""
        return self.tensor if self.extent.ragged else self.stacked()

    def total(self) -> Tensor:
        """The sum over all steps; what has rows keeps them."""
        if self.rows is None or not self.extent.ragged:
            return self.stacked().sum(0)
        by_row = self.tensor.unflatten(self.rows, (self.extent.rows, -1))
        shape = list(by_row.shape)
        shape[self.rows] = self.extent.batch
        added = by_row.new_zeros(shape).index_add(self.rows, self.extent.row_of.to(by_row.device), by_row)
        return added.flatten(self.rows, self.rows + 1)


class Total(NamedTuple):
    """The sum of a value over all steps: only operations that are linear in it may read it."""

    tensor: Tensor


Entry: TypeAlias = Tensor | TimeSeries | Total
"""What is known of a value over a segment: a tensor where it is the same at every step."""
