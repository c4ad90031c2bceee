"""Segments that have run with a graph of their own: their vector-Jacobian products, and what these add up to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

from unrolled.autograd_graph import leaves_behind, vjp
from unrolled.bptt.segments import Segment, SegmentRunner
from unrolled.execution.memory import allocate
from unrolled.internals import has_memory
from unrolled.trees import Tree, leaves


class SegmentGradients(NamedTuple):
    """The gradients of what a segment reads; None where none flows.

    Attributes:
        inputs: of the leaves of its inputs.
        entry: of the leaves of the state that it received.
        others: of the leaves of its context, and of the weights.
    """

    inputs: list[Tensor | None]
    entry: list[Tensor | None]
    others: list[Tensor | None]


class TapedSegment:
    """A segment, run on leaves of a graph of its own.

    Args:
        run: runs it.
        segment: the segment.
        inputs: its inputs.
        entry: the state that it receives.
        context: what is the same at every step, with all rows of the run.

    Attributes:
        outputs: its outputs.
        last: the state that it passes on.
    """

    def __init__(self, run: SegmentRunner, segment: Segment, inputs: Tree, entry: Tree, context: Tree) -> None:
        self.segment = segment
        self.outputs, self.last = run(inputs, entry, segment.rows_of(context), segment.extent, segment.start)
        self.inputs, self.entry, self.context = leaves(inputs), leaves(entry), leaves(context)

    @property
    def read(self) -> list[Tensor]:
        """The leaves of its graph, without weights."""
        return [*self.inputs, *self.entry, *self.context]

    @property
    def results(self) -> list[Tensor]:
        """The leaves of its outputs and of its last state."""
        return [*leaves(self.outputs), *leaves(self.last)]

    def vjp(
        self,
        grads: Sequence[Tensor | None],
        following: Sequence[Tensor | None],
        weights: Sequence[Tensor],
        offset: int = 0,
    ) -> SegmentGradients:
        """The vector-Jacobian product; the graph stays.

        Args:
            grads: the gradients of the run's outputs and of its last state, for each leaf.
            following: those of the state that the next segment received; empty if there is none.
            weights: what else the segment reads.
            offset: how many steps of the run come before those whose outputs are shown.
        """
        segment, many = self.segment, len(leaves(self.outputs))
        flowing = [None if grad is None else segment.steps_of(grad, offset) for grad in grads[:many]]
        lasts = zip(leaves(self.last), following or [None] * (len(grads) - many), grads[many:], strict=True)
        flowing += [segment.grad_of_last(leaf, after, grad) for leaf, after, grad in lasts]
        found = vjp(self.results, flowing, [*self.read, *weights], retain_graph=True)
        a, b = len(self.inputs), len(self.inputs) + len(self.entry)
        return SegmentGradients(found[:a], found[a:b], found[b:])


def unlisted_leaves(taped: Iterable[TapedSegment], weights: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that segments depend on beyond their inputs, states, contexts and weights."""
    taped = list(taped)
    results = [x for each in taped for x in each.results]
    return leaves_behind(results, known=[*(x for each in taped for x in each.read), *weights])


class GradientSums:
    """The gradients of what a run reads, added up from those of its segments.

    Args:
        segments: those of the run.
        inputs: the leaves of its inputs.
        state: the leaves of its first state.
        others: how many leaves its context has, and how many weights there are.
    """

    def __init__(
        self, segments: Sequence[Segment], inputs: Sequence[Tensor], state: Sequence[Tensor], others: int
    ) -> None:
        steps = {segment.begin: slice(segment.place, segment.place + segment.count) for segment in segments}
        starting = [segment for segment in segments if segment.beginning.start < segment.beginning.stop]
        # Where all rows are as long as each other, a leaf of the state may have no rows: it is one part.
        self._rows = {segment.begin: segment.beginning if segment.extent.ragged else ... for segment in starting}
        self._inputs = [_SumByParts(leaf, steps) for leaf in inputs]
        self._state = [_SumByParts(leaf, self._rows) for leaf in state]
        self._others: list[Tensor | None] = [None] * others

    @torch.no_grad()
    def add(self, segment: Segment, grads: SegmentGradients) -> None:
        """Add those of a segment."""
        number = segment.begin
        for total, grad in zip(self._inputs, grads.inputs, strict=True):
            if grad is not None:
                total.add(number, grad)
        if number in self._rows:
            for total, grad in zip(self._state, grads.entry, strict=True):
                if grad is not None:
                    total.add(number, grad[self._rows[number]])
        for n, grad in enumerate(grads.others):
            before = self._others[n]
            if grad is None or before is None:
                self._others[n] = before if grad is None else grad.clone()
            elif has_memory(before) and has_memory(grad):
                before.add_(grad)
            else:
                self._others[n] = before + grad

    def totals(self) -> list[Tensor | None]:
        """The gradients of inputs, state, context and weights; None where nothing came in."""
        return [*(total.total() for total in (*self._inputs, *self._state)), *self._others]


class _SumByParts:
    """A gradient that comes in part by part, each part any number of times.

    Args:
        leaf: whose gradient it is.
        parts: where each part stands in it.
    """

    def __init__(self, leaf: Tensor, parts: Mapping[int, slice | EllipsisType]) -> None:
        self._leaf, self._parts = leaf, parts
        self._missing = set(parts)
        self._memory: Tensor | None = None

    def add(self, number: int, grad: Tensor) -> None:
        """Add the gradient of a part."""
        if self._memory is None:
            shape, dtype, device = self._leaf.shape, self._leaf.dtype, self._leaf.device
            # Many gradients at once, as `vmap` has them, go only into memory of their own kind.
            self._memory = allocate(shape, dtype, device) if has_memory(grad) else grad.new_empty(shape)
        part = self._memory[self._parts[number]]
        if number in self._missing:
            part.copy_(grad)
        else:
            part.add_(grad)
        self._missing.discard(number)

    def total(self) -> Tensor | None:
        """The sum; zeros in parts that no gradient came in for, None if none came in at all."""
        if self._memory is not None:
            for number in self._missing:
                self._memory[self._parts[number]] = 0
        return self._memory
