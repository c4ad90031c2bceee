"""What a walk through time is asked for, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unrolled.lengths import Extent
from unrolled.plan.loops import LoopProgram


@dataclass(frozen=True)
class LoopInputs:
    """What an engine gets for a walk: values for a loop's inputs, in the order of its program.

    Attributes:
        sequences: `[T, ...]` each; where rows end at different times, all steps' rows one after the other.
        fixed: what is the same at every step.
        states: what each row's first step walked receives.
        extent: how far the segment reaches.
        reverse: whether to begin with the last step.
    """

    sequences: Sequence[Tensor]
    fixed: Sequence[Tensor]
    states: Sequence[Tensor]
    extent: Extent
    reverse: bool

    @property
    def given(self) -> list[Tensor]:
        """All inputs, in order."""
        return [*self.sequences, *self.fixed, *self.states]


@dataclass(frozen=True)
class LoopResult:
    """A loop's results.

    Attributes:
        emitted: the emitted values, laid out as a request's sequences.
        last: the states after each row's last step walked.
        received: for each state what every step received, laid out likewise; made when it is asked for.
        totals: the sums over all rows and steps.
    """

    emitted: Sequence[Tensor]
    last: Sequence[Tensor]
    received: Callable[[int], Tensor]
    totals: Sequence[Tensor] = ()


class LoopRunner(Protocol):
    """What an engine is asked for: to run one loop over a segment, and, if it can, products of large matrices."""

    def affine(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor | None:
        """`x @ y + bias` for `[M, K]`, `[K, N]`, `[N]`; None for those that are left to torch."""
        ...

    def __call__(self, loop: LoopProgram, request: LoopInputs) -> LoopResult:
        """Walk through time."""
        ...


def shifted(first: Tensor, entries: Tensor, extent: Extent, *, reverse: bool) -> Tensor:
    """What each copy receives if it is what the copy before it (after it, in reverse) made.

    Args:
        first: what each row's first step walked receives, `[B, ...]`.
        entries: what the copies made: `[T, B, ...]`, or `[N, ...]` where rows end at different times.
        extent: of the segment.
        reverse: whether the last step is walked first.
    """
    if extent.ragged:
        joined = torch.cat([entries, first] if reverse else [first, entries])
        return joined.index_select(0, (extent.after if reverse else extent.before).to(joined.device))
    if reverse:
        return torch.cat([entries[1:], first.unsqueeze(0)])
    return torch.cat([first.unsqueeze(0), entries[:-1]])


def ended(entries: Tensor, extent: Extent, *, reverse: bool) -> Tensor:
    """What each row's last step walked made, `[B, ...]`."""
    if extent.ragged:
        return entries[: extent.batch] if reverse else entries.index_select(0, extent.ends.to(entries.device))
    return entries[0 if reverse else -1]


def counted(first: Tensor, step: int, extent: Extent, *, reverse: bool) -> tuple[Tensor, Tensor]:
    """What each copy receives of a counter, and what each row's last step walked hands on.

    Args:
        first: what each row's first step walked receives, `[B, ...]` or `[]`.
        step: what every copy adds.
        extent: of the segment.
        reverse: whether the last step is walked first.
    """
    shape = (-1, *(1,) * first.dim())
    if extent.ragged:
        lengths = extent.lengths.to(first.device)
        walked = extent.time_of.to(first.device)
        rows = extent.row_of.to(first.device)
        walked = lengths[rows] - 1 - walked if reverse else walked
        counts = first[rows] + (walked * step).to(first.dtype).view(shape[: first.dim()])
        return counts, first + (lengths * step).to(first.dtype).view(shape[: first.dim()])
    counts = torch.arange(extent.steps + 1, device=first.device) * step
    found = first + counts.to(first.dtype).view(shape)
    return (found[:-1].flip(0) if reverse else found[:-1]), found[-1]
