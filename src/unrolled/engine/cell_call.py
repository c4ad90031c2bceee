"""A cell called over a sequence, as engines take it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from unrolled.lengths import Extent
from unrolled.trees import Tree, TreeSpec, leaves, map_leaves


@dataclass(frozen=True)
class CellCall:
    """What the copies of one cell run on.

    Attributes:
        cell: the cell.
        inputs: `[T, B, ...]`; `[N, ...]` where rows end at different times.
        state: what each row's first copy receives, `[B, ...]`.
        context: what is the same at every step, `[B, ...]`, or None.
        extent: how far the inputs reach.
        requires_grad: for each leaf of inputs and context whether the caller wants its gradient.
    """

    cell: nn.Module
    inputs: Tree
    state: Tree
    context: Tree
    extent: Extent
    requires_grad: tuple[bool, ...]

    @classmethod
    def of(cls, cell: nn.Module, inputs: Tree, state: Tree, context: Tree, extent: Extent | None = None) -> CellCall:
        """A caller's call; without an extent its inputs are `[T, B, ...]`."""
        requires_grad = tuple([leaf.requires_grad for tree in (inputs, context) for leaf in leaves(tree)])
        extent = extent or Extent(*leaves(inputs)[0].shape[:2])
        return cls(cell, inputs, state, context, extent, requires_grad)

    @cached_property
    def kind(self) -> tuple[Any, ...]:
        """What of the arguments a plan depends on.

        A step may do something else for some batch sizes, which a recording at two others does not show.
        """
        specs = (
            TreeSpec.of(self.inputs, 2 - self.extent.ragged),
            TreeSpec.of(self.state, 1),
            TreeSpec.of(self.context, 1),
        )
        return (*specs, self.extent.batch, self.requires_grad)

    @property
    def lies_in_order(self) -> bool:
        """Whether each step's input, state and context lie in memory as they are read, as those that were recorded."""
        leading = 0 if self.extent.ragged else 1
        layouts = [(x.shape[leading:], x.stride()[leading:]) for x in leaves(self.inputs)]
        layouts += [(x.shape, x.stride()) for x in (*leaves(self.state), *leaves(self.context))]
        return all(_descend(sizes, strides) for sizes, strides in layouts)

    def arguments(self) -> Iterator[Tensor]:
        """The leaves of inputs, state and context."""
        for tree in (self.inputs, self.state, self.context):
            yield from leaves(tree)

    def at(self, t: int) -> CellCall:
        """The call of copy t and the next one alone; of copy t alone where the next one has fewer rows.

        The state is the first copy's: it stands for any.
        """
        if not self.extent.ragged:
            inputs = map_leaves(lambda x: x[t : t + 2], self.inputs)
            return replace(self, inputs=inputs, extent=Extent(len(leaves(inputs)[0]), self.extent.batch))
        start, rows = self.extent.offsets[t], self.extent.sizes[t]
        inputs = map_leaves(lambda x: x[start : start + rows].unsqueeze(0), self.inputs)
        state, context = (map_leaves(lambda x: x[:rows] if x.dim() else x, tree) for tree in (self.state, self.context))
        return replace(self, inputs=inputs, state=state, context=context, extent=Extent(1, rows))

    @property
    def first_step(self) -> tuple[Tree, Tree, Tree]:
        """Input, state and context of copy 0."""
        call = self.at(0)
        return map_leaves(lambda x: x[0], call.inputs), call.state, call.context


def _descend(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether no later dimension has the larger step; those that are repeated, or have one entry, do not matter."""
    steps = [stride for size, stride in zip(sizes, strides, strict=True) if size > 1 and stride]
    return all(a >= b for a, b in pairwise(steps))
