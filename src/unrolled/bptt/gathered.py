"""What pieces of a run add up to: their results, written where they belong, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unrolled.bptt.segments import Segment, refuse_other_kind, starts_at
from unrolled.execution.memory import allocate
from unrolled.lengths import Extent
from unrolled.trees import Structure, Tree, flatten, map_leaves, unflatten


class Results:
    """Outputs and last states of a run in pieces, in memory of their own that is made once.

    Args:
        walk: the pieces, in the order in which they are walked.
        extent: of the whole run.
    """

    def __init__(self, walk: Sequence[Segment], extent: Extent) -> None:
        self.walk, self.extent = walk, extent
        self._kind: tuple[Structure, list[Tensor]] | None = None
        self._last: Tree = None

    @property
    def outputs(self) -> Tree:
        """`[T, B, ...]`; `[N, ...]` where rows end at different times."""
        assert self._kind is not None  # a run has at least one piece
        return unflatten(*self._kind)

    @property
    def last(self) -> Tree:
        """The state that each row's last copy hands on."""
        return self._last

    @torch.no_grad()
    def write(self, span: Segment, outputs: Tree, last: Tree) -> None:
        """Put a piece's results where they belong.

        Raises:
            CellError: if its outputs are of another kind than those before it.
        """
        tensors, structure = flatten(outputs)
        many = self.extent.rows if self.extent.ragged else self.extent.steps
        if self._kind is None:
            self._kind = structure, [allocate((many, *x.shape[1:]), x.dtype, x.device) for x in tensors]
        refuse_other_kind(span, (tensors, structure), (self._kind[1], self._kind[0]))
        for memory, tensor in zip(self._kind[1], tensors, strict=True):
            memory.narrow(0, starts_at(self.extent, span), span.count).copy_(tensor)
        if not self.extent.ragged:
            self._last = map_leaves(Tensor.clone, last) if span is self.walk[-1] else None
            return
        if self._last is None:
            self._last = map_leaves(lambda leaf: leaf.new_empty((self.extent.batch, *leaf.shape[1:])), last)
        ended = slice(span.handed, span.extent.batch)
        map_leaves(lambda memory, leaf: memory[ended].copy_(leaf[ended]), self._last, last)


class GradientSums:
    """Gradients of what a run was given, as they come in from its pieces.

    Args:
        extent: of the whole run.
        inputs: the leaves of its inputs.
        state: the leaves of its first state.
        context: the leaves of its context.
        weights: what else it reads.
    """

    def __init__(
        self,
        extent: Extent,
        inputs: Sequence[Tensor],
        state: Sequence[Tensor],
        context: Sequence[Tensor],
        weights: Sequence[Tensor],
    ) -> None:
        self.extent, self.inputs, self.state = extent, inputs, state
        self._inputs: list[Tensor | None] = [None] * len(inputs)
        self._without: list[list[tuple[int, int]]] = [[] for _ in inputs]
        self._state: list[Tensor | None] = [None] * len(state)
        self._others: list[Tensor | None] = [None] * (len(context) + len(weights))

    @torch.no_grad()
    def add(
        self,
        span: Segment,
        inputs: Sequence[Tensor | None],
        entry: Sequence[Tensor | None],
        others: Sequence[Tensor | None],
    ) -> None:
        """Add those of a piece: of its inputs, of the state that it received, of context and weights."""
        begins = slice(span.carried if span.begin else 0, span.extent.batch)
        place = starts_at(self.extent, span)
        for n, (grad, leaf) in enumerate(zip(inputs, self.inputs, strict=True)):
            into = self._inputs[n]
            if grad is None:
                self._without[n].append((place, span.count))
                continue
            if into is None:
                into = self._inputs[n] = allocate(leaf.shape, leaf.dtype, leaf.device)
            into.narrow(0, place, span.count).copy_(grad)
        for n, grad in enumerate(entry):
            if grad is not None and not span.begin and not self.extent.ragged:
                self._state[n] = grad
            elif grad is not None and begins.start < begins.stop:
                into = self._state[n] = _zeros(self._state[n], self.state[n])
                into[begins].copy_(grad[begins])
        for n, grad in enumerate(others):
            if grad is not None:
                before = self._others[n]
                self._others[n] = grad.clone() if before is None else before.add_(grad)

    def found(self) -> list[Tensor | None]:
        """The gradients of inputs, state, context and weights; None where nothing came in."""
        for memory, without in zip(self._inputs, self._without, strict=True):
            if memory is not None:
                for place, count in without:
                    memory[place : place + count] = 0
        return [*self._inputs, *self._state, *self._others]


def _zeros(memory: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if memory is None else memory
