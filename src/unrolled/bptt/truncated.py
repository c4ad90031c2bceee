"""Truncated BPTT with overlap (k1 < k2): one forward tape, walked back block by block.

The gradients of two blocks mix in the copies that both go back through, yet stop at different places. So every piece
of the run is a graph of its own, and one autograd Function goes back through these graphs for each block anew.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unrolled.autograd_graph import leaves_behind, nodes_behind
from unrolled.bptt.parameter_aliases import ParameterAliases, held_by, own
from unrolled.bptt.segments import (
    Segment,
    SegmentRunner,
    SequenceRun,
    final,
    handed_back,
    joined,
    received,
    rows_of,
    run_cut,
    spans,
    split,
)
from unrolled.bptt.truncation import Block, Truncation
from unrolled.errors import GradientError
from unrolled.trees import Tree, flatten, leaves, map_leaves, unflatten


@dataclass
class Expiry:
    """Whether a taped run may still be differentiated.

    Attributes:
        reason: why it may not, or None as long as it may.
        tape: the taped run, while anything else holds it.
    """

    reason: str | None = None
    tape: weakref.ref[TapedRun] | None = None

    def expire(self, reason: str) -> None:
        """Free the graphs; a backward pass that needs them is refused with this reason."""
        self.reason = reason
        tape = None if self.tape is None else self.tape()
        if tape is not None:
            tape.segments.clear()
            tape.weights.clear()


@dataclass(frozen=True)
class _Piece:
    """A piece that has run, with leaves of its own: what it read, and what came out of it."""

    segment: Segment
    inputs: list[Tensor]
    entry: list[Tensor]
    outputs: list[Tensor]
    last: list[Tensor]
    place: int


class TapedRun:
    """A run in pieces, each with a graph of its own.

    Args:
        whole: the run.
        blocks: whose losses are taken together, in order. Copies before the first block are run, not shown.
        bounds: where further pieces begin, counted as the copies are walked.

    Attributes:
        states: the state that each piece hands on, without a graph.
    """

    def __init__(self, whole: SequenceRun, blocks: Sequence[Block], *, bounds: Iterable[int] = ()) -> None:
        self.blocks, self.reverse, self.expiry = blocks, whole.reverse, Expiry(tape=weakref.ref(self))
        edges = {edge for block in blocks for edge in (block.begin, block.end, block.cut)}
        walk = spans(whole.extent, {0, *edges, *bounds}, reverse=self.reverse)
        aside = ParameterAliases(whole.module)
        outputs, lasts = self._walked(partial(aside, whole.run), whole, walk)
        beside = self._read_beside(aside.aliases)
        self.weights = [*aside.aliases, *beside]
        self._given = [*leaves(whole.inputs), *leaves(whole.state), *leaves(whole.context), *aside.weights, *beside]
        shown = [n for n, span in enumerate(walk) if span.begin >= blocks[0].begin]
        with torch.no_grad():
            told = joined([outputs[n] for n in shown], [walk[n] for n in shown], reverse=self.reverse)
            self._results = told, map_leaves(Tensor.clone, final(lasts, walk))
        self.states = [map_leaves(Tensor.detach, last) for last in lasts]

    def _walked(self, run: SegmentRunner, whole: SequenceRun, walk: Sequence[Segment]) -> tuple[list[Tree], list[Tree]]:
        outputs, lasts, before, place = list[Tree](), list[Tree](), None, 0
        self.segments: list[_Piece] = []
        around = map_leaves(own, whole.context)
        self._around = leaves(around)
        for span, part in zip(walk, split(whole.inputs, walk, reverse=self.reverse), strict=True):
            steps, entry = map_leaves(own, part), map_leaves(own, received(whole.state, before, span))
            output, before = run(steps, entry, rows_of(around, span.extent), span.extent, span.start)
            outputs.append(output)
            lasts.append(before)
            self.segments.append(_Piece(span, leaves(steps), leaves(entry), leaves(output), leaves(before), place))
            place += span.count if span.begin >= self.blocks[0].begin else 0
        return outputs, lasts

    def _read_beside(self, aliases: Sequence[Tensor]) -> list[Tensor]:
        own = [tensor for piece in self.segments for tensor in (*piece.inputs, *piece.entry)]
        results = [x for piece in self.segments for x in (*piece.outputs, *piece.last)]
        return leaves_behind(results, known=[*own, *self._around, *aliases])

    def results(self) -> tuple[Tree, Tree]:
        """The outputs and the last state, with the way back; asked for once.

        A result leads to the tape, so that the tape must not keep it: neither would ever go.
        """
        (outputs, last), given = self._results, self._given
        del self._results, self._given
        if not any(self.differentiable):
            return outputs, last
        (shown, structure), (ends, kind) = flatten(outputs), flatten(last)
        found = _Truncated.apply(_Handed(self, [*shown, *ends]), *given)
        return unflatten(structure, found[: len(shown)]), unflatten(kind, found[len(shown) :])

    @property
    def differentiable(self) -> list[bool]:
        """For each leaf of the results whether a gradient flows back from it."""
        shown = [piece for piece in self.segments if piece.segment.begin >= self.blocks[0].begin]
        columns = zip(*([x.requires_grad for x in (*p.outputs, *p.last)] for p in shown), strict=True)
        return [any(column) for column in columns]

    def backward(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of what was given and of the weights, from those of the results."""
        sums: dict[int, Tensor] = {}
        begins = [piece.segment.begin for piece in self.segments]
        for block in self.blocks:
            above: list[Tensor | None] = []
            first, behind = (bisect_left(begins, at) for at in (block.cut, block.end))
            for piece in reversed(self.segments[first:behind]):
                above = self._through(piece, grads, above, sums, taken=piece.segment.begin >= block.begin)
        beside = [sums.get(id(x)) for x in (*self._around, *self.weights)]
        return [*self._of_inputs(sums), *self._of_state(sums), *beside]

    def _through(
        self,
        piece: _Piece,
        grads: Sequence[Tensor | None],
        above: Sequence[Tensor | None],
        sums: dict[int, Tensor],
        *,
        taken: bool,
    ) -> list[Tensor | None]:
        """Go back through a piece once; return the gradients of the state that it received from the one before."""
        shown, span = len(piece.outputs), piece.segment
        flowing: list[Tensor | None] = [None] * shown
        if taken:
            flowing = [_part(grad, piece.place, span.count, self.reverse) for grad in grads[:shown]]
        flowing += [
            handed_back(span, tensor, above[n] if above else None, grads[shown + n] if taken else None)
            for n, tensor in enumerate(piece.last)
        ]
        results = zip((*piece.outputs, *piece.last), flowing, strict=True)
        pairs = [(x, grad) for x, grad in results if grad is not None and x.requires_grad]
        wanted = [x for x in (*piece.entry, *piece.inputs, *self._around, *self.weights) if x.requires_grad]
        if not pairs or not wanted:
            return [None] * len(piece.entry)
        found = torch.autograd.grad(
            [x for x, _ in pairs], wanted, [grad for _, grad in pairs], retain_graph=True, allow_unused=True
        )
        by = {id(x): grad for x, grad in zip(wanted, found, strict=True) if grad is not None}
        received = [by.pop(id(x), None) for x in piece.entry]
        for x, grad in zip(piece.entry, received, strict=True):
            if grad is not None and (not span.begin or span.carried < span.extent.batch):
                by[id(x)] = grad[span.carried :] if span.begin else grad
        for name, grad in by.items():
            sums[name] = sums[name] + grad if name in sums else grad
        return received

    def _of_inputs(self, sums: dict[int, Tensor]) -> list[Tensor | None]:
        columns = zip(*(piece.inputs for piece in self.segments), strict=True)
        return [_together(column[::-1] if self.reverse else column, sums) for column in columns]

    def _of_state(self, sums: dict[int, Tensor]) -> list[Tensor | None]:
        """Of the rows that begin in each piece."""
        first, *others = self.segments
        starts = [[first.entry[n]] for n in range(len(first.entry))]
        for piece in others:
            if piece.segment.extent.ragged and piece.segment.carried < piece.segment.extent.batch:
                for n, entry in enumerate(piece.entry):
                    sums.setdefault(id(entry), torch.zeros_like(entry[piece.segment.carried :]))
                    starts[n].append(entry)
        return [_together(column, sums) for column in starts]


def _together(column: Sequence[Tensor], sums: dict[int, Tensor]) -> Tensor | None:
    if not any(x.requires_grad for x in column) or not any(id(x) in sums for x in column):
        return None
    return torch.cat([sums.get(id(x), torch.zeros_like(x)) for x in column]) if len(column) > 1 else sums[id(column[0])]


def _part(grad: Tensor | None, place: int, count: int, reverse: bool) -> Tensor | None:
    if grad is None:
        return None
    return grad.narrow(0, len(grad) - place - count if reverse else place, count)


@dataclass(frozen=True)
class _Handed:
    tape: TapedRun
    results: list[Tensor]


class _Truncated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handed: _Handed, *given: Tensor) -> tuple[Tensor, ...]:
        tape, shown = handed.tape, handed.results
        ctx.set_materialize_grads(False)
        ctx.expiry = tape.expiry
        # The tape hangs on a saved tensor: it goes when autograd lets go of what was saved.
        token = torch.empty(0)
        token.tape = tape
        ctx.save_for_backward(token)
        ctx.mark_non_differentiable(*(x for x, needed in zip(shown, tape.differentiable, strict=True) if not needed))
        return tuple(shown)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.expiry.reason is not None:
            raise GradientError(ctx.expiry.reason)
        if torch.is_grad_enabled():
            raise GradientError(
                "gradients of windows, and of calls with stride < horizon, have no graph of their own; leave "
                "create_graph out, or call the network with stride = horizon"
            )
        (token,) = ctx.saved_tensors
        return (None, *held_by(token, "tape").backward(grads))


def run_by_blocks(truncation: Truncation, whole: SequenceRun) -> tuple[Tree, Tree]:
    """Truncated BPTT of a sequence longer than the horizon: with overlap on a `TapedRun`, without as `run_cut`."""
    blocks = truncation.blocks(whole.extent.steps)
    if truncation.stride == truncation.horizon:
        return run_cut(whole, [0, *(block.end for block in blocks)])
    return TapedRun(whole, blocks).results()


def reason_expired(loss: Tensor) -> str | None:
    """Why a loss can no longer be differentiated, if it depends on a taped run that has expired."""
    expiries = (getattr(node, "expiry", None) for node in nodes_behind([loss]))
    return next((found.reason for found in expiries if isinstance(found, Expiry) and found.reason is not None), None)
