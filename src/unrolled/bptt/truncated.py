"""Truncated BPTT: gradients that flow back through a number of copies, taken block by block.

Without overlap of the blocks (k1 = k2) a sequence is run segment by segment on detached states, by ordinary autograd.
With overlap (k1 < k2) the gradients of two blocks mix in the copies that both go back through, yet stop at different
places. So every segment has a graph of its own, and the backward pass goes through these graphs once for each block.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from unrolled.bptt.own_backward import DifferentiableRun, Expiry
from unrolled.bptt.parameter_aliases import ParameterAliases, detached_leaf
from unrolled.bptt.segments import SequenceRun, last_state
from unrolled.bptt.taped import GradientSums, TapedSegment, unlisted_leaves
from unrolled.bptt.truncation import LossBlock, Truncation
from unrolled.trees import Tree, leaves, map_leaves


class TapedRun(DifferentiableRun):
    """A run in segments, each with a graph of its own.

    Args:
        run: the run.
        blocks: copies whose losses are taken together, in order. Copies before the first block are run, not shown.
        bounds: where further segments begin, counted as the copies run.

    Attributes:
        segments: the segments, in the order in which they ran.
        states: the state that each segment passes on, without a graph.
    """

    NO_GRAPH = (
        "gradients of windows, and of calls with stride < horizon, have no graph of their own; leave "
        "create_graph out, or call the network with stride = horizon"
    )

    def __init__(self, run: SequenceRun, blocks: Sequence[LossBlock], *, bounds: Iterable[int] = ()) -> None:
        self.blocks, self.expiry = blocks, Expiry(run=weakref.ref(self))
        edges = {edge for block in blocks for edge in (block.begin, block.end, block.cut)}
        segments = run.segments({0, *edges, *bounds})
        aliases, context, last = ParameterAliases(run.module), map_leaves(detached_leaf, run.context), None
        self.segments: list[TapedSegment] = []
        for segment, steps in zip(segments, run.split_inputs(segments), strict=True):
            inputs = map_leaves(detached_leaf, steps)
            entry = map_leaves(detached_leaf, segment.received(run.state, last))
            taped = TapedSegment(partial(aliases, run.run), segment, inputs, entry, context)
            self.segments.append(taped)
            last = taped.last
        unlisted = unlisted_leaves(self.segments, aliases.aliases)
        self.weights = [*aliases.aliases, *unlisted]
        self._inputs, self._state = ([x.detach() for x in leaves(tree)] for tree in (run.inputs, run.state))
        self._read = [*leaves(run.inputs), *leaves(run.state), *leaves(run.context), *aliases.weights, *unlisted]
        with torch.no_grad():
            shown = self._shown
            outputs = run.join_outputs([taped.outputs for taped in shown], [taped.segment for taped in shown])
            last = last_state([taped.last for taped in self.segments], segments)
            self._results = outputs, map_leaves(Tensor.clone, last)
        self.states = [map_leaves(Tensor.detach, taped.last) for taped in self.segments]

    @property
    def _shown(self) -> list[TapedSegment]:
        return [taped for taped in self.segments if taped.segment.begin >= self.blocks[0].begin]

    def results(self) -> tuple[Tree, Tree]:
        """The outputs and the last state, under autograd; may be called once."""
        (outputs, last), read = self._results, self._read
        del self._results, self._read
        return self.attach(outputs, last, read) if any(self.differentiable) else (outputs, last)

    @property
    def differentiable(self) -> list[bool]:
        """For each leaf of the results whether a gradient flows back from it."""
        columns = zip(*([x.requires_grad for x in taped.results] for taped in self._shown), strict=True)
        return [any(column) for column in columns]

    def release(self) -> None:
        """Free the graphs."""
        for held in (self.segments, self.weights, self._inputs, self._state):
            held.clear()

    def backward(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Go back through the segments once for each block, from its end to its cut."""
        segments = [taped.segment for taped in self.segments]
        others = len(self.segments[0].context) + len(self.weights)
        sums = GradientSums(segments, self._inputs, self._state, others)
        begins = [segment.begin for segment in segments]
        offset = min(taped.segment.place for taped in self._shown)
        for block in self.blocks:
            following: list[Tensor | None] = []
            first, behind = (bisect_left(begins, at) for at in (block.cut, block.end))
            for taped in reversed(self.segments[first:behind]):
                losses = grads if taped.segment.begin >= block.begin else [None] * len(grads)
                found = taped.vjp(losses, following, self.weights, offset)
                sums.add(taped.segment, found)
                following = found.entry
        return sums.totals()


def run_by_blocks(truncation: Truncation, run: SequenceRun) -> tuple[Tree, Tree]:
    """Truncated BPTT of a sequence that is longer than the horizon."""
    blocks = truncation.blocks(run.extent.steps)
    if truncation.stride == truncation.horizon:
        return _run_detached(run, [0, *(block.end for block in blocks)])
    return TapedRun(run, blocks).results()


def _run_detached(run: SequenceRun, bounds: Iterable[int]) -> tuple[Tree, Tree]:
    """Run each segment on a state that no gradient flows back from, by ordinary autograd."""
    segments, outputs, lasts = run.segments(bounds), list[Tree](), list[Tree]()
    before: Tree = None
    for segment, steps in zip(segments, run.split_inputs(segments), strict=True):
        entry = segment.received(run.state, before)
        output, last = run.run(steps, entry, segment.rows_of(run.context), segment.extent, segment.start)
        outputs.append(output)
        lasts.append(last)
        before = map_leaves(Tensor.detach, last)
    return run.join_outputs(outputs, segments), last_state(lasts, segments)
