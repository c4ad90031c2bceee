"""A run that can be taken segment by segment: what each segment reads, receives and passes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor, nn

from unrolled.errors import CellError
from unrolled.lengths import Extent
from unrolled.trees import Tree, TreeSpec, flatten, leaves, map_leaves, unflatten

SegmentRunner: TypeAlias = Callable[[Tree, Tree, Tree, Extent, int], tuple[Tree, Tree]]
"""Runs a segment: `(inputs, state, context, extent, first step) -> (outputs, last state)`."""


@dataclass(frozen=True)
class Segment:
    """Consecutive copies of a longer run. Segments run one after the other; in reverse the last in time runs first.

    Attributes:
        begin: how many copies run before them.
        start: the earliest of their steps in time.
        place: where their steps begin in the sequences of the whole run.
        extent: how far they reach.
        rows_in: how many rows receive their state from the segment before; the others begin here.
        rows_out: how many rows pass their state on to the next segment; the others end here.
    """

    begin: int
    start: int
    place: int
    extent: Extent
    rows_in: int
    rows_out: int

    def __str__(self) -> str:
        return f"steps {self.start} to {self.start + self.extent.steps - 1}"

    @property
    def count(self) -> int:
        """How long its sequences are: T, or N where rows end at different times."""
        return self.extent.rows if self.extent.ragged else self.extent.steps

    @property
    def beginning(self) -> slice:
        """The rows that begin here."""
        return slice(self.rows_in if self.begin else 0, self.extent.batch)

    @property
    def ending(self) -> slice:
        """The rows that end here."""
        return slice(self.rows_out, self.extent.batch)

    def steps_of(self, sequence: Tensor, offset: int = 0) -> Tensor:
        """Its steps of a sequence of the whole run, which may lack so many at the beginning."""
        return sequence.narrow(0, self.place - offset, self.count)

    def rows_of(self, tree: Tree) -> Tree:
        """Its rows of a state or a context."""
        return map_leaves(lambda leaf: leaf[: self.extent.batch], tree) if self.extent.ragged else tree

    def received(self, first: Tree, before: Tree) -> Tree:
        """The state that it receives.

        Args:
            first: the first state of all rows.
            before: what the segment before it passed on.
        """
        if not self.begin:
            return self.rows_of(first)
        if not self.extent.ragged or self.rows_in == self.extent.batch:
            return self.rows_of(before)
        return map_leaves(lambda now, start: torch.cat([now[: self.rows_in], start[self.beginning]]), before, first)

    def grad_of_last(self, last: Tensor, following: Tensor | None, grad: Tensor | None) -> Tensor | None:
        """The gradient of its last state: some rows go on to the next segment, the others have ended.

        Args:
            last: a leaf of this state.
            following: the gradient of what the next segment received, or None.
            grad: the gradient of the run's last state, or None.
        """
        if not self.extent.ragged:
            return following if self.rows_out else grad
        parts = [(following, slice(0, self.rows_out)), (grad, self.ending)]
        if not any(part is not None and rows.start < rows.stop for part, rows in parts):
            return None
        return torch.cat([torch.zeros_like(last[rows]) if part is None else part[rows] for part, rows in parts])

    def refuse_other_outputs(self, outputs: TreeSpec, first: TreeSpec) -> None:
        """Refuse outputs that are not of the kind of those of another segment.

        Raises:
            CellError: naming the first copy of this segment.
        """
        if outputs != first:
            raise CellError(
                f"a cell's output must keep its structure, shape and dtype, but that of copy {self.start} is another "
                "than that of the copies before it; return the same kind of output at every step"
            )


@dataclass(frozen=True)
class SequenceRun:
    """A run over a sequence that may be taken segment by segment.

    Attributes:
        run: runs a segment.
        inputs: `[T, B, ...]`; `[N, ...]` where rows end at different times.
        state: what each row's first copy receives.
        context: what is the same at every step, or None.
        extent: how far the sequence reaches.
        reverse: whether the last copy comes first.
        module: what is run, whose parameters get gradients.
        pure: whether each step is known to compute from what it reads alone, and to read the same tensors.
        measured: whether only its memory counts: numbers that differ when steps run again do not matter.
        engine: the engine that runs it; of several networks each one knows its own.
        rewind: for a run that may have to begin again, what sets the random numbers back to where it began.
    """

    run: SegmentRunner
    inputs: Tree
    state: Tree
    context: Tree
    extent: Extent
    reverse: bool
    module: nn.Module
    pure: bool = False
    measured: bool = False
    engine: str = "reference"
    rewind: Callable[[], None] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All that it reads: inputs, state, context, parameters."""
        return [*leaves(self.inputs), *leaves(self.state), *leaves(self.context), *self.module.parameters()]

    def at_once(self) -> tuple[Tree, Tree]:
        """Run it as one segment."""
        return self.run(self.inputs, self.state, self.context, self.extent, 0)

    def segments(self, bounds: Iterable[int]) -> list[Segment]:
        """Its segments, in the order in which they run.

        Args:
            bounds: where segments begin, counted as the copies run, 0 and T included.
        """
        extent, pairs = self.extent, list(pairwise(sorted(set(bounds))))
        starts = [extent.steps - end if self.reverse else begin for begin, end in pairs]
        places = [extent.offsets[start] if extent.ragged else start for start in starts]
        reaches = [extent.part(start, end - begin) for start, (begin, end) in zip(starts, pairs, strict=True)]
        shared = [0, *(min(a.batch, b.batch) for a, b in pairwise(reaches)), 0]
        columns = zip(starts, places, reaches, shared, shared[1:], strict=False)
        return [Segment(begin, *column) for (begin, _), column in zip(pairs, columns, strict=True)]

    def split_inputs(self, segments: Sequence[Segment]) -> list[Tree]:
        """The inputs of each segment; one backward for all of them, which indexing would not have."""
        tensors, structure = flatten(self.inputs)
        counts = [segment.count for segment in segments]
        columns = [tensor.split(counts[::-1] if self.reverse else counts) for tensor in tensors]
        parts = [unflatten(structure, column) for column in zip(*columns, strict=True)]
        return parts[::-1] if self.reverse else parts

    def join_outputs(self, outputs: Sequence[Tree], segments: Sequence[Segment]) -> Tree:
        """The outputs of segments put together.

        Raises:
            CellError: naming the copy whose outputs are of another kind than those before it.
        """
        order = slice(None, None, -1) if self.reverse else slice(None)
        outputs, segments = outputs[order], segments[order]
        spec = TreeSpec.of(outputs[0], leading=1)
        for segment, output in zip(segments, outputs, strict=True):
            segment.refuse_other_outputs(TreeSpec.of(output, leading=1), spec)
        return map_leaves(lambda *parts: torch.cat(parts), *outputs)


def last_state(lasts: Sequence[Tree], segments: Sequence[Segment]) -> Tree:
    """The state that each row's last copy passes on, given that of each segment."""
    if not segments[0].extent.ragged:
        return lasts[-1]
    pairs = [
        (last, segment)
        for last, segment in zip(lasts, segments, strict=True)
        if segment.rows_out < segment.extent.batch
    ]
    parts = [map_leaves(lambda leaf, at=segment.ending: leaf[at], last) for last, segment in reversed(pairs)]
    return map_leaves(lambda *ended: torch.cat(ended), *parts)
