"""Running a sequence piece by piece: what each piece reads, receives and hands on, rows of any length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor, nn

from unrolled.errors import CellError
from unrolled.lengths import Extent
from unrolled.trees import Structure, TensorSpec, Tree, flatten, leaves, map_leaves, unflatten

SegmentRunner: TypeAlias = Callable[[Tree, Tree, Tree, Extent, int], tuple[Tree, Tree]]
"""How a piece is run: `(inputs, state, context, extent, first step) -> (outputs, last state)`."""


@dataclass(frozen=True)
class SequenceRun:
    """A run that may be taken piece by piece.

    Attributes:
        run: how a piece is run.
        inputs: `[T, B, ...]`; `[N, ...]` where rows end at different times.
        state: what each row's first copy receives.
        context: what is the same at every step, or None.
        extent: how far the sequence reaches.
        reverse: whether the last copy comes first.
        module: what is run, whose parameters get gradients.
        pure: whether each step is known to compute from what it reads alone, and to read the same tensors.
        measured: whether only its memory counts, and numbers that differ when steps run again are nobody's loss.
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

    @property
    def tensors(self) -> list[Tensor]:
        """All that is given, and the parameters."""
        trees = (self.inputs, self.state, self.context)
        return [*(leaf for tree in trees for leaf in leaves(tree)), *self.module.parameters()]

    def at_once(self) -> tuple[Tree, Tree]:
        """Run it as one segment."""
        return self.run(self.inputs, self.state, self.context, self.extent, 0)


@dataclass(frozen=True)
class Segment:
    """Consecutive copies of a longer run, as they are walked.

    Attributes:
        begin: how many copies have run before them.
        start: their first step in time.
        extent: how far they reach.
        carried: how many rows receive their state from the piece before; the others begin here.
        handed: how many rows hand their state on to the next piece; the others end here.
    """

    begin: int
    start: int
    extent: Extent
    carried: int
    handed: int

    @property
    def count(self) -> int:
        """How long its sequences are: T, or N where rows end at different times."""
        return self.extent.rows if self.extent.ragged else self.extent.steps


def spans(extent: Extent, bounds: Iterable[int], *, reverse: bool) -> list[Segment]:
    """The pieces of a run, in the order in which they are walked.

    Args:
        extent: how far the run reaches.
        bounds: where pieces begin, counted as the copies are walked, 0 and T included.
        reverse: whether the last copy comes first.
    """
    pairs = list(pairwise(sorted(set(bounds))))
    starts = [extent.steps - end if reverse else begin for begin, end in pairs]
    reaches = [_part(extent, start, end - begin) for start, (begin, end) in zip(starts, pairs, strict=True)]
    shared = [0, *(min(a.batch, b.batch) for a, b in pairwise(reaches)), 0]
    rows = zip(starts, reaches, shared, shared[1:], strict=False)
    return [Segment(begin, *found) for (begin, _), found in zip(pairs, rows, strict=True)]


def _part(extent: Extent, start: int, steps: int) -> Extent:
    if extent.alive is None:
        return Extent(steps, extent.batch)
    alive = extent.alive[start : start + steps]
    return Extent(steps, alive[0], alive)


def split(inputs: Tree, walk: Sequence[Segment], *, reverse: bool) -> list[Tree]:
    """The inputs of each piece; one backward for all of them, which indexing would not have."""
    tensors, structure = flatten(inputs)
    counts = [span.count for span in walk]
    columns = [tensor.split(counts[::-1] if reverse else counts) for tensor in tensors]
    pieces = [unflatten(structure, column) for column in zip(*columns, strict=True)]
    return pieces[::-1] if reverse else pieces


def received(first: Tree, before: Tree, span: Segment) -> Tree:
    """The state that a piece receives: what the one before it handed on, and the first state of rows that begin."""
    if not span.begin:
        return rows_of(first, span.extent)
    if not span.extent.ragged or span.carried == span.extent.batch:
        return rows_of(before, span.extent)

    def beside(now: Tensor, start: Tensor) -> Tensor:
        return torch.cat([now[: span.carried], start[span.carried : span.extent.batch]])

    return map_leaves(beside, before, first)


def rows_of(tree: Tree, extent: Extent) -> Tree:
    """Those rows of a state or a context that an extent has."""
    return map_leaves(lambda leaf: leaf[: extent.batch], tree) if extent.ragged else tree


def final(lasts: Sequence[Tree], walk: Sequence[Segment]) -> Tree:
    """The state that each row's last copy hands on, given that of each piece."""
    if not walk[0].extent.ragged:
        return lasts[-1]
    ended = [(last, span) for last, span in zip(lasts, walk, strict=True) if span.handed < span.extent.batch]
    parts = [map_leaves(lambda leaf, at=span.handed: leaf[at:], last) for last, span in reversed(ended)]
    return map_leaves(lambda *leaves: torch.cat(leaves), *parts)


def joined(outputs: Sequence[Tree], walk: Sequence[Segment], *, reverse: bool) -> Tree:
    """The outputs of pieces put together.

    Raises:
        CellError: naming the copy whose outputs are of another kind than those before it.
    """
    order = slice(None, None, -1) if reverse else slice(None)
    flat = [flatten(output) for output in outputs[order]]
    for span, found in zip(walk[order], flat, strict=True):
        refuse_other_kind(span, found, flat[0])
    return unflatten(flat[0][1], [torch.cat(column) for column in zip(*(tensors for tensors, _ in flat), strict=True)])


def refuse_other_kind(
    span: Segment, found: tuple[Sequence[Tensor], Structure], first: tuple[Sequence[Tensor], Structure]
) -> None:
    """Refuse outputs of a piece that are not like those of another.

    Raises:
        CellError: naming the piece's first copy.
    """
    specs = [(structure, [TensorSpec.of(x, 1) for x in tensors]) for tensors, structure in (found, first)]
    if specs[0] != specs[1]:
        raise CellError(
            f"a cell's output must keep its structure, shape and dtype, but that of copy {span.start} is another "
            "than that of the copies before it; return the same kind of output at every step"
        )


def starts_at(extent: Extent, span: Segment) -> int:
    """Where a piece begins in the sequences of the whole run."""
    return extent.offsets[span.start] if extent.ragged else span.start


def handed_back(span: Segment, last: Tensor, above: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """The gradient of what a piece hands on: some rows go on to the next piece, others have ended.

    Args:
        span: the piece.
        last: what it hands on.
        above: the gradient of what the next piece received, or None.
        grad: the gradient of the run's last state, or None.
    """
    if not span.extent.ragged:
        return above if span.handed else grad
    parts = [above, grad], [slice(0, span.handed), slice(span.handed, span.extent.batch)]
    flowing = [(part, rows) for part, rows in zip(*parts, strict=True) if part is not None and rows.start < rows.stop]
    if not flowing:
        return None
    full = torch.zeros_like(last)
    for part, rows in flowing:
        full[rows] = part[rows]
    return full


def run_cut(whole: SequenceRun, bounds: Iterable[int]) -> tuple[Tree, Tree]:
    """Run piece by piece, each on a state that no gradient flows back from; by ordinary autograd.

    Args:
        whole: the run.
        bounds: where pieces begin, counted as the copies are walked, 0 and T included.
    """
    walk = spans(whole.extent, bounds, reverse=whole.reverse)
    outputs, lasts, before = list[Tree](), list[Tree](), None
    for span, steps in zip(walk, split(whole.inputs, walk, reverse=whole.reverse), strict=True):
        entry = received(whole.state, before, span)
        output, last = whole.run(steps, entry, rows_of(whole.context, span.extent), span.extent, span.start)
        outputs.append(output)
        lasts.append(last)
        before = map_leaves(Tensor.detach, last)
    return joined(outputs, walk, reverse=whole.reverse), final(lasts, walk)
