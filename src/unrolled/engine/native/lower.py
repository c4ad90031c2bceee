"""Lowering: a loop's program as nodes and views, operation by operation."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from unrolled.operations.convolutions import Convolutions
from unrolled.operations.layout import RowLayout, UnsupportedError
from unrolled.operations.losses import Losses
from unrolled.operations.nodes import Lowered
from unrolled.operations.ordering import Ordering
from unrolled.operations.special import Special
from unrolled.plan.loops import LoopProgram


class _Lowering(Losses, Special, Convolutions, Ordering):
    """Lowering by the rules of all families."""


def state_buffers(loop: LoopProgram) -> list[int]:
    """For each state the number of its buffer: that of the emitted value that becomes the next state.

    A second state that the same value replaces has a buffer of its own, after all that is emitted, since it does not
    begin as the first one does.
    """
    buffers: list[int] = []
    count = len(loop.emitted)
    for value in loop.next_states:
        buffer = loop.emitted.index(value)
        if buffer in buffers:
            buffer, count = count, count + 1
        buffers.append(buffer)
    return buffers


def lower(loop: LoopProgram) -> Lowered:
    """Lower a loop.

    Raises:
        UnsupportedError: naming the first operation, dtype or shape that this engine does not emit.
    """
    values = loop.program.values
    lowering = _Lowering(values, _real(loop))
    for kind, group in (("sequence", loop.sequences), ("fixed", loop.fixed), ("state", loop.states)):
        for position, value in enumerate(group):
            lowering.input(kind, position, value)
    for op in loop.program.ops:
        lowering.run(op)
    views = lowering.views
    for value in loop.emitted:
        known = values[value]
        layout = RowLayout.of(known)
        if (views[value].dtype, views[value].dims) != (known.dtype, layout.dims):
            raise UnsupportedError(f"to keep a {known} of every step")
    if not all(RowLayout.of(values[value]).plain for value in (*loop.states, *loop.next_states)):
        raise UnsupportedError("a state whose batch is not its first dimension")
    for value, following in zip(loop.states, loop.next_states, strict=True):
        if (values[value].shape, values[value].dtype) != (values[following].shape, values[following].dtype):
            raise UnsupportedError(f"a state that is {values[value]} and becomes {values[following]}")
    totals = [lowering.in_memory(views[v]) for v, _ in loop.totals]
    emitted, next_states = [views[v] for v in loop.emitted], [views[v] for v in loop.next_states]
    buffers = zip(next_states, state_buffers(loop), strict=True)
    emitted += [view for view, number in buffers if number >= len(loop.emitted)]
    return Lowered(lowering.nodes, emitted, next_states, totals, lowering.real)


def _real(loop: LoopProgram) -> torch.dtype:
    """The dtype of all floating-point numbers that a loop reads; any if it reads and makes integers alone."""
    made = [v for op in loop.program.ops for v in op.outputs if v >= 0]
    read, written = _floating(loop, loop.program.inputs), _floating(loop, made)
    found = read or written or {torch.float32}
    if len(found) != 1 or not found <= {torch.float32, torch.float64}:
        raise UnsupportedError(f"values of {', '.join(sorted(map(str, found)))}")
    return found.pop()


def _floating(loop: LoopProgram, values: Iterable[int]) -> set[torch.dtype]:
    dtypes = {loop.program.values[v].dtype for v in values}
    return {dtype for dtype in dtypes if dtype.is_floating_point}
