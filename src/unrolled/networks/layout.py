"""What a caller gives, as engines take it, and what they return as the caller has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unrolled import sequence
from unrolled.errors import InputError
from unrolled.lengths import Extent, Lengths, Ragged, checked_lengths
from unrolled.trees import Tree, map_leaves


class BatchLayout:
    """A batch of rows of one length, `[T, B, ...]` or `[B, T, ...]`; what follows from it for other batches.

    Args:
        extent: how far it reaches, as engines see it.
        batch: B, as the caller sees it.
        batch_first: whether the caller has `[B, T, ...]`.
        by_length: whether the caller says how long each row is, be they all of one length.

    Attributes:
        steps: T, as the caller sees it.
    """

    def __init__(self, extent: Extent, batch: int, *, batch_first: bool = False, by_length: bool = False) -> None:
        self.extent, self.batch, self.batch_first = extent, batch, batch_first
        self.steps, self.by_length = extent.steps, by_length

    def sequences(self, tree: Tree) -> Tree:
        """Sequences of the caller's as engines take them."""
        return sequence.swap_time_and_batch(tree) if self.batch_first else tree

    def outputs(self, tree: Tree) -> Tree:
        """Sequences of an engine's as the caller has them."""
        return sequence.swap_time_and_batch(tree) if self.batch_first else tree

    def rows(self, tree: Tree) -> Tree:
        """A state or a context, `[B, ...]`, with its rows as engines see them."""
        return tree

    def resets(self, resets: Tensor, *, reverse: bool) -> Tensor:
        """A checked mask of the rows that start afresh just before a step, in the order in which steps are walked.

        Raises:
            InputError: if it is no bool of T and B.
        """
        steps, layout = self.steps, "[B, T]" if self.batch_first else "[T, B]"
        shape = (self.batch, steps) if self.batch_first else (steps, self.batch)
        if not isinstance(resets, Tensor) or resets.dtype != torch.bool or resets.shape != shape:
            got = f"{resets.dtype} {list(resets.shape)}" if isinstance(resets, Tensor) else type(resets).__name__
            mask = isinstance(resets, Tensor) and resets.dtype == torch.bool
            remedy = "it has one entry for each row and step" if mask else "compare: resets != 0"
            raise InputError(f"resets must be a bool tensor {layout} = {list(shape)}, got {got}; {remedy}")
        if not reverse:
            return resets
        # What starts afresh before step t, walked backwards, is what comes after it: step t - 1. A row's first step
        # walked comes after none of its own.
        time = int(self.batch_first)
        none = torch.zeros_like(resets.narrow(time, 0, 1))
        return torch.cat([resets.narrow(time, 1, steps - 1), none], time)

    def last(self, tree: Tree, first: Tree) -> Tree:
        """An engine's last state as the caller has it; rows without a step keep the first one."""
        return tree

    def fresh(self, network: nn.Module) -> Tree:
        """The state that rows of a network start afresh from, if that is decided already; else None."""
        return None


class SegmentLayout(BatchLayout):
    """A portion of a batch, laid out as engines take it already; so are its resets.

    Args:
        extent: how far it reaches.
        fresh: for each network the state that its rows start afresh from, which all portions share.
    """

    def __init__(self, extent: Extent, fresh: Mapping[nn.Module, Tree]) -> None:
        super().__init__(extent, extent.batch)
        self._fresh = fresh

    def fresh(self, network: nn.Module) -> Tree:
        """The states that rows start from afresh, as `network` takes them."""
        return self._fresh[network]

    def resets(self, resets: Tensor, *, reverse: bool) -> Tensor:
        """`resets`, which are laid out already."""
        return resets


class _PaddedLayout(BatchLayout):
    """A padded batch whose rows end at different times."""

    def __init__(self, ragged: Ragged, *, batch_first: bool = False) -> None:
        super().__init__(ragged.extent, len(ragged.lengths), batch_first=batch_first, by_length=True)
        self.ragged = ragged
        self.steps = ragged.steps

    def sequences(self, tree: Tree) -> Tree:
        return map_leaves(self.ragged.packed, super().sequences(tree))

    def outputs(self, tree: Tree) -> Tree:
        return super().outputs(map_leaves(self.ragged.padded, tree))

    def rows(self, tree: Tree) -> Tree:
        return None if tree is None else map_leaves(self.ragged.running, tree)

    def resets(self, resets: Tensor, *, reverse: bool) -> Tensor:
        found = super().resets(resets, reverse=reverse)
        if not reverse:
            return found
        # A row begins, backwards, at its own end: what comes before that is padding.
        inside = torch.arange(self.steps).unsqueeze(1) < self.ragged.lengths - 1
        return found & (inside.T if self.batch_first else inside).to(found.device)

    def last(self, tree: Tree, first: Tree) -> Tree:
        return map_leaves(self.ragged.restored, tree, first)


class _PackedLayout(_PaddedLayout):
    """A PackedSequence: what engines take is its data."""

    def __init__(self, packed: PackedSequence, *, batch_first: bool) -> None:
        super().__init__(_ragged_of(packed), batch_first=batch_first)
        self._packed = packed

    def sequences(self, tree: Tree) -> Tree:
        return tree.data if isinstance(tree, PackedSequence) else super().sequences(tree)

    def outputs(self, tree: Tree) -> Tree:
        return map_leaves(lambda data: PackedSequence(data, *self._packed[1:]), tree)


Through: TypeAlias = Callable[[BatchLayout, Tree, Tree, Tensor | None, Tree], tuple[Tree, Tree]]
"""How a network is run over what engines see of a batch; see `Unrolled.through`."""


def given_as(inputs: Tree, lengths: Lengths, *, batch_first: bool) -> BatchLayout:
    """How a caller gives a batch.

    Args:
        inputs: a pytree of `[T, B, ...]` (`[B, T, ...]` with `batch_first`), or a PackedSequence.
        lengths: integers `[B]`, or None.
        batch_first: whether sequences are `[B, T, ...]`.

    Raises:
        InputError: for inputs without T and B, lengths that do not fit them, or a PackedSequence that is none.
    """
    if isinstance(inputs, PackedSequence):
        if lengths is not None:
            raise InputError("a PackedSequence has its lengths in it; leave lengths= out, or pass padded inputs")
        return _PackedLayout(inputs, batch_first=batch_first)
    T, B = sequence.sizes(inputs, batch_first=batch_first)
    if lengths is None:
        return BatchLayout(Extent(T, B), B, batch_first=batch_first)
    found = checked_lengths(lengths, T, B)
    if bool((found == T).all()):
        return BatchLayout(Extent(T, B), B, batch_first=batch_first, by_length=True)
    return _PaddedLayout(Ragged(found, T), batch_first=batch_first)


def is_plain(inputs: Tree, lengths: Lengths, resets: Tensor | None) -> bool:
    """Whether all rows are of one length and none starts afresh: what a compiler may see of a call."""
    return lengths is None and resets is None and not isinstance(inputs, PackedSequence)


def run_as_given(
    through: Through,
    inputs: Tree,
    state: Tree,
    lengths: Lengths,
    resets: Tensor | None,
    context: Tree,
    *,
    batch_first: bool,
) -> tuple[Tree, Tree]:
    """Run a network over what a caller gives.

    Args:
        through: how it is run over what engines see of it.
        inputs: as `given_as` takes them.
        state: `[B, ...]`, or None.
        lengths: as `given_as` takes them.
        resets: a bool `[T, B]` in the caller's layout, or None.
        context: `[B, ...]`, or None.
        batch_first: whether sequences are `[B, T, ...]`.

    Returns:
        The outputs as the caller has them, and the last state.
    """
    given = given_as(inputs, lengths, batch_first=batch_first)
    outputs, last = through(given, given.sequences(inputs), state, resets, context)
    return given.outputs(outputs), last


def _ragged_of(packed: PackedSequence) -> Ragged:
    data, sizes, order, _ = packed
    steps = sizes.tolist()
    if not steps or min(steps) < 1 or sum(steps) != len(data) or any(a < b for a, b in pairwise(steps)):
        raise InputError(
            f"a PackedSequence's batch_sizes must not grow from step to step, must be at least 1 and add up to its "
            f"{len(data)} rows of data, got {steps[:8]}{'...' if len(steps) > 8 else ''}; its rows are not sorted by "
            "length: make it with torch.nn.utils.rnn.pack_padded_sequence(..., enforce_sorted=False)"
        )
    batch = steps[0]
    ordered = (sizes.unsqueeze(1) > torch.arange(batch)).sum(0)
    order = torch.arange(batch) if order is None else order.cpu()
    if order.shape != (batch,) or not torch.equal(order.sort().values, torch.arange(batch)):
        raise InputError(
            f"a PackedSequence's sorted_indices must name each of its {batch} rows once, got {order.tolist()[:8]}; "
            "make it with torch.nn.utils.rnn.pack_padded_sequence"
        )
    lengths = torch.empty_like(ordered)
    lengths[order] = ordered
    return Ragged(lengths, len(steps), order)
