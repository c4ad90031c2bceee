"""A call as engines take it: how the caller laid the batch out, and what comes with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

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

    @staticmethod
    def of(inputs: Tree, lengths: Lengths, *, batch_first: bool) -> BatchLayout:
        """How a caller laid a batch out.

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

    def sequences(self, tree: Tree) -> Tree:
        """The caller's sequences as engines take them."""
        return sequence.swap_time_and_batch(tree) if self.batch_first else tree

    def outputs(self, tree: Tree) -> Tree:
        """An engine's sequences as the caller has them."""
        return sequence.swap_time_and_batch(tree) if self.batch_first else tree

    def rows(self, tree: Tree) -> Tree:
        """A state or a context, `[B, ...]`, with its rows as engines see them."""
        return tree

    def mask(self, resets: Tensor) -> Tensor:
        """The caller's mask of the rows that start afresh just before a step, laid out as engines take sequences.

        Raises:
            InputError: if it is no bool of T and B.
        """
        layout = "[B, T]" if self.batch_first else "[T, B]"
        shape = (self.batch, self.steps) if self.batch_first else (self.steps, self.batch)
        if not isinstance(resets, Tensor) or resets.dtype != torch.bool or resets.shape != shape:
            got = f"{resets.dtype} {list(resets.shape)}" if isinstance(resets, Tensor) else type(resets).__name__
            is_mask = isinstance(resets, Tensor) and resets.dtype == torch.bool
            remedy = "it has one entry for each row and step" if is_mask else "compare: resets != 0"
            raise InputError(f"resets must be a bool tensor {layout} = {list(shape)}, got {got}; {remedy}")
        mask: Tensor = self.sequences(resets)
        return mask

    def restarts(self, mask: Tensor, *, reverse: bool) -> Tensor:
        """A mask that is laid out so, for copies that run in this direction.

        What starts afresh before step t comes, backwards, after it: before step t - 1. A row's last step, which is
        the first one backwards, comes after none of its own.
        """
        return self.extent.shifted(mask.new_zeros(self.extent.batch), mask, reverse=True) if reverse else mask

    def last(self, tree: Tree, first: Tree) -> Tree:
        """An engine's last state as the caller has it; rows without a step keep the first one."""
        return tree


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


@dataclass(frozen=True)
class Call:
    """One call of a network, made once where the caller comes in and passed down to every part.

    Attributes:
        layout: how the caller laid the batch out.
        steps: the inputs as engines take them: `[T, B, ...]`; `[N, ...]` where rows end at different times.
        state: what each row's first copy receives, `[B, ...]` with the caller's rows; None for the cell's own.
        resets: which rows start afresh just before a step, a bool laid out as the steps; None for none.
        context: what is the same at every step, `[B, ...]` with the caller's rows; or None.
        fresh: by network, the state from which its rows start afresh, where another call has decided that.
    """

    layout: BatchLayout
    steps: Tree
    state: Tree = None
    resets: Tensor | None = None
    context: Tree = None
    fresh: Mapping[nn.Module, Tree] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        inputs: Tree,
        state: Tree = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        context: Tree = None,
        batch_first: bool = False,
    ) -> Call:
        """The call that a caller makes, who passes what `Network.forward` takes.

        Raises:
            InputError: for inputs without T and B, or lengths or resets that do not fit them.
        """
        layout = BatchLayout.of(inputs, lengths, batch_first=batch_first)
        mask = None if resets is None else layout.mask(resets)
        return cls(layout, layout.sequences(inputs), state, mask, context)

    @property
    def extent(self) -> Extent:
        """How far the steps reach."""
        return self.layout.extent


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
