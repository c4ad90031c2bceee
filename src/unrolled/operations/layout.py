"""Layouts: which dimension of a value is the batch, and how its tensor is viewed with the rows first.

A row's entries are what is left of a shape without the batch. The rows need not be the first dimension, and several
entries of each row may follow each other in it: `[2B, H]` is viewed as `[B, 2, H]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from torch import Tensor

from unrolled.recording.program import Size, Value


class UnsupportedError(Exception):
    """An operation that cannot be written in nodes; the message names it."""


@dataclass(frozen=True)
class RowLayout:
    """A shape and the batch in it.

    Attributes:
        shape: as torch has it.
        place: the dimension of the batch; None for a value without rows.
        many: how many entries of each row that dimension holds.
    """

    shape: tuple[int | Size, ...]
    place: int | None
    many: int

    @staticmethod
    def of(value: Value) -> RowLayout:
        """The layout of a value.

        Raises:
            UnsupportedError: if its shape depends on the batch size in another way.
        """
        sized = [(d, n) for d, n in enumerate(value.shape) if isinstance(n, Size)]
        if not sized:
            return RowLayout(value.shape, None, 1)
        (place, size), *more = sized
        if more or size.constant or size.per_row < 1:
            raise UnsupportedError(f"a value of shape {value}, whose batch is not one of its dimensions")
        return RowLayout(value.shape, place, size.per_row)

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """The shape of a row."""
        sizes = [self.many if isinstance(n, Size) else n for n in self.shape]
        if self.place is not None and self.many == 1:
            del sizes[self.place]
        return tuple(sizes)

    @property
    def before(self) -> int:
        """How many entries lie before the batch: reshaping must leave their number alone."""
        return prod(n for n in self.shape[: self.place] if not isinstance(n, Size))

    @cached_property
    def first(self) -> bool:
        """Whether the rows are the first dimension, and nothing else is in it."""
        return self.place == 0 and self.many == 1

    @cached_property
    def plain(self) -> bool:
        """Whether tensors of this layout need no other view."""
        return self.place is None or self.first

    def is_batch(self, dim: int) -> bool:
        """Whether a dimension, as torch counts, is the batch."""
        return dim % max(len(self.shape), 1) == self.place

    def dim(self, dim: int, what: str = "what works") -> int:
        """A dimension as torch counts it, among those of a row."""
        if self.is_batch(dim):
            raise UnsupportedError(f"{what} along the batch")
        dim %= max(len(self.shape), 1)
        behind = self.place is not None and dim > self.place and self.many == 1
        return dim - 1 if behind else dim

    def order(self, dims: Sequence[int]) -> list[int]:
        """An order of dimensions as torch counts them, as an order of those of a row."""
        rank = len(self.shape)
        kept = [d % rank for d in dims if not (self.is_batch(d) and self.many == 1)]
        return [d if d == self.place else self.dim(d) for d in kept]

    def rows_first(self, tensor: Tensor, leading: int, batch: int) -> Tensor:
        """A tensor of this layout, after so many other dimensions, as `[..., B, *dims]`; no copy."""
        if self.place is None or self.plain:
            return tensor
        at = leading + self.place
        return tensor.unflatten(at, (batch, self.many)).movedim(at, leading)

    def as_torch_has_it(self, tensor: Tensor, leading: int) -> Tensor:
        """The other way: `[..., B, *dims]` in torch's shape; no copy where there is one entry of each row."""
        if self.place is None or self.plain:
            return tensor
        if self.many == 1:
            return tensor.movedim(leading, leading + self.place)
        return tensor.movedim(leading, leading + self.place).flatten(leading + self.place, leading + self.place + 1)
