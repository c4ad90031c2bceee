"""Lengths: rows of a batch that end at different times, and the order in which engines see them.

Engines see rows in order of length, the longest first. The rows that are alive at step t are then the first `alive[t]`
of them, and a sequence is kept without padding: `[N, ...]`, N the sum of lengths, step after step, as in
`torch.nn.utils.rnn.PackedSequence`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor

from unrolled.errors import InputError

Lengths: TypeAlias = Tensor | Sequence[int] | None
"""How many steps each row has, as a caller may say it; None for all of them."""


@dataclass(frozen=True)
class Extent:
    """How far a segment reaches: T steps of B rows, or of fewer and fewer rows.

    Attributes:
        steps: T.
        batch: B, the rows of step 0.
        alive: how many rows each step has, never more than the step before it and at least one; None for B at all.

    Example:
        >>> extent = Extent(3, 2, (2, 2, 1))
        >>> extent.rows, extent.offsets
        (5, (0, 2, 4))
    """

    steps: int
    batch: int
    alive: tuple[int, ...] | None = None

    @property
    def ragged(self) -> bool:
        """Whether rows end at different times."""
        return self.alive is not None

    @cached_property
    def rows(self) -> int:
        """How many rows all steps have together."""
        return self.steps * self.batch if self.alive is None else sum(self.alive)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many rows each step has."""
        return (self.batch,) * self.steps if self.alive is None else self.alive

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """How many rows the steps before each step have."""
        return tuple(accumulate((0, *self.sizes[:-1])))

    def part(self, start: int, steps: int) -> Extent:
        """How far so many of its steps reach.

        Args:
            start: the first of them.
            steps: how many there are.
        """
        if self.alive is None:
            return Extent(steps, self.batch)
        alive = self.alive[start : start + steps]
        return Extent(steps, alive[0], alive)

    @cached_property
    def time_of(self) -> Tensor:
        """The step of each of the N rows, `[N]`."""
        return torch.repeat_interleave(torch.arange(self.steps), torch.tensor(self.sizes, dtype=torch.int64))

    @cached_property
    def row_of(self) -> Tensor:
        """Which row each of the N rows is a step of, `[N]`."""
        return torch.arange(self.rows) - torch.tensor(self.offsets)[self.time_of]

    @cached_property
    def ends(self) -> Tensor:
        """Where among the N rows the last step of each row is, `[B]`."""
        lengths = self.lengths - 1
        return torch.tensor(self.offsets)[lengths] + torch.arange(self.batch)

    @cached_property
    def lengths(self) -> Tensor:
        """The length of each row, `[B]`."""
        return (torch.tensor(self.sizes).unsqueeze(1) > torch.arange(self.batch)).sum(0)

    @cached_property
    def before(self) -> Tensor:
        """Where the same row is one step earlier, for each of the N rows, if B more stand before them all: `[N]`."""
        earlier = torch.tensor((0, *(self.batch + offset for offset in self.offsets[:-1])))
        return earlier[self.time_of] + self.row_of

    @cached_property
    def after(self) -> Tensor:
        """Where the same row is one step later, for each of the N rows, if B more stand after them all: `[N]`."""
        later = torch.tensor((*self.offsets[1:], self.rows))[self.time_of] + self.row_of
        later[self.ends] = self.rows + torch.arange(self.batch)
        return later

    def last_of(self, entries: Tensor, *, reverse: bool) -> Tensor:
        """What each row's last step made, `[B, ...]`; its first step if the copies run in reverse.

        Args:
            entries: what the steps made: `[T, B, ...]`, or `[N, ...]` where rows end at different times.
            reverse: whether the last step runs first.
        """
        if self.ragged:
            return entries[: self.batch] if reverse else entries.index_select(0, self.ends.to(entries.device))
        return entries[0 if reverse else -1]

    def shifted(self, first: Tensor, entries: Tensor, *, reverse: bool) -> Tensor:
        """What each step receives if that is what the step before it made (the step after it, in reverse).

        Args:
            first: what each row's first step receives, `[B, ...]`.
            entries: what the steps made: `[T, B, ...]`, or `[N, ...]` where rows end at different times.
            reverse: whether the last step runs first.
        """
        if self.ragged:
            both = torch.cat([entries, first] if reverse else [first, entries])
            return both.index_select(0, (self.after if reverse else self.before).to(both.device))
        if reverse:
            return torch.cat([entries[1:], first.unsqueeze(0)])
        return torch.cat([first.unsqueeze(0), entries[:-1]])


def checked_lengths(lengths: Tensor | Sequence[int], steps: int, batch: int) -> Tensor:
    """Lengths as an integer tensor `[B]` on the CPU.

    Args:
        lengths: integers, at least 0 and at most T: a tensor on any device, or a list.
        steps: T.
        batch: B.

    Raises:
        InputError: for another count, dtype or range.

    Example:
        >>> checked_lengths([3, 0], steps=3, batch=2)
        tensor([3, 0])
    """
    rule = f"lengths must be B = {batch} integers from 0 to T = {steps}"
    if not isinstance(lengths, Tensor):
        lengths = _tensor_of(lengths, rule)
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise InputError(f"{rule}, got dtype {lengths.dtype}; convert them: lengths.long()")
    if lengths.shape != (batch,):
        raise InputError(f"{rule}, got shape {list(lengths.shape)}; pass one length for each row of the batch")
    found = lengths.detach().to("cpu", torch.int64)
    wrong = ((found < 0) | (found > steps)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise InputError(f"{rule}, got {int(found[row])} for row {row}; a length counts the steps that are no padding")
    return found


def _tensor_of(lengths: Any, rule: str) -> Tensor:
    try:
        given = list(lengths)
    except TypeError as error:
        raise InputError(f"{rule}, got {lengths!r}; pass a list or a tensor [B]") from error
    wrong = [n for n in given if isinstance(n, bool) or not hasattr(n, "__index__")]
    if wrong:
        raise InputError(f"{rule}, got {wrong[0]!r} of type {type(wrong[0]).__name__}; pass int(length)")
    return torch.tensor([int(n) for n in given], dtype=torch.int64)


class Ragged:
    """A batch whose rows end at different times, and the way to what engines see of it and back.

    Args:
        lengths: `[B]`, checked.
        steps: T of the padded batch.
        order: the rows, the longest first; found if it is not given.

    Attributes:
        extent: of the rows that have any step at all, the longest first.
        order: which row of the batch each of these is.

    Example:
        >>> ragged = Ragged(torch.tensor([1, 3, 0]), steps=4)
        >>> ragged.extent.alive, ragged.order
        ((2, 1, 1), tensor([1, 0]))
        >>> ragged.packed(torch.arange(12).view(4, 3))
        tensor([1, 0, 4, 7])
    """

    def __init__(self, lengths: Tensor, steps: int, order: Tensor | None = None) -> None:
        self.lengths, self.steps = lengths, steps
        if order is None:
            order = lengths.argsort(descending=True, stable=True)
        ordered = lengths[order]
        batch = int((lengths > 0).sum())
        self.order = order[:batch]
        longest = int(ordered[0]) if batch else 0
        alive = (ordered[:batch].unsqueeze(0) > torch.arange(longest).unsqueeze(1)).sum(1)
        self.extent = Extent(longest, batch, tuple(alive.tolist()))

    @cached_property
    def _places(self) -> Tensor:
        return self.extent.time_of * len(self.lengths) + self.order[self.extent.row_of]

    @cached_property
    def _places_batch_first(self) -> Tensor:
        return self.order[self.extent.row_of] * self.steps + self.extent.time_of

    def packed(self, padded: Tensor) -> Tensor:
        """`[T, B, ...]` without its padding, `[N, ...]`, step after step."""
        if padded.transpose(0, 1).is_contiguous() and not padded.is_contiguous():
            flat, places = padded.transpose(0, 1).flatten(0, 1), self._places_batch_first
        else:
            flat, places = padded.flatten(0, 1), self._places
        taken: Tensor = _GatherRows.apply(flat, places.to(padded.device))
        return taken

    def padded(self, packed: Tensor) -> Tensor:
        """`[N, ...]` as `[T, B, ...]`, zeros where a row has ended."""
        size = self.steps * len(self.lengths)
        placed: Tensor = _ScatterRows.apply(packed, self._places.to(packed.device), size)
        return placed.unflatten(0, (self.steps, -1))

    def running(self, rows: Tensor) -> Tensor:
        """Of `[B, ...]` the rows that have any step, in the order in which engines see them."""
        return rows.index_select(0, self.order.to(rows.device))

    def restored(self, running: Tensor, others: Tensor) -> Tensor:
        """`running` the other way; rows without a step are those of `others`, `[B, ...]`."""
        if len(self.order) == len(self.lengths):
            return running.index_select(0, self.order.argsort().to(running.device))
        return others.index_copy(0, self.order.to(running.device), running.to(others.dtype))


class _GatherRows(torch.autograd.Function):
    """Some rows of a tensor, none of them twice: so what flows back is placed, not added up."""

    @staticmethod
    def forward(tensor: Tensor, places: Tensor) -> Tensor:
        return tensor.index_select(0, places)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensor, ctx.places = inputs
        ctx.size = len(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ScatterRows.apply(grad, ctx.places, ctx.size), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        taken: Tensor = _GatherRows.apply(tangent, ctx.places)
        return taken

    @staticmethod
    def vmap(info: Any, dims: tuple[int, None], tensor: Tensor, places: Tensor) -> tuple[Tensor, int]:
        return _GatherRows.apply(tensor.movedim(dims[0], 1), places), 1


class _ScatterRows(torch.autograd.Function):
    """A tensor's rows at some places among zeros."""

    @staticmethod
    def forward(tensor: Tensor, places: Tensor, size: int) -> Tensor:
        return tensor.new_zeros((size, *tensor.shape[1:])).index_copy_(0, places, tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.places, ctx.size = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _GatherRows.apply(grad, ctx.places), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        placed: Tensor = _ScatterRows.apply(tangent, ctx.places, ctx.size)
        return placed

    @staticmethod
    def vmap(info: Any, dims: tuple[int, None, None], tensor: Tensor, places: Tensor, size: int) -> tuple[Tensor, int]:
        return _ScatterRows.apply(tensor.movedim(dims[0], 1), places, size), 1
