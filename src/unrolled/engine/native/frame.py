"""Frames: what is known of a run of a loop before it is made, for so many steps and rows; worked out once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from struct import Struct

import torch
from torch import Tensor

from unrolled.engine.native.emit import Source
from unrolled.engine.native.lower import state_buffers
from unrolled.execution.memory import allocate
from unrolled.lengths import Extent
from unrolled.operations.layout import RowLayout
from unrolled.plan.loops import LoopProgram

CPU = torch.device("cpu")
_LARGE = 4 << 20  # bytes, from which on large pages are asked for


def integers(numbers: Sequence[int]) -> bytes:
    """Numbers as C has an array of int64_t, or of pointers."""
    return Struct(f"{len(numbers)}q").pack(*numbers)


class Frame:
    """What is known of a run over so many steps and rows.

    Args:
        loop: the loop's program.
        source: what was emitted for it.
        extent: how far it reaches.

    Attributes:
        ragged: whether rows end at different times.
        scratch: bytes of scratch memory per row.
        by_step: how far apart the steps of an input are, in entries, if it is contiguous.
        by_row: how far apart its rows are.
        buffers: shape, dtype and bytes of each buffer; those of states have room for the first one.
        totals: shape and dtype of each total.
        passed_on: for each state the shape of what all its steps pass on.
    """

    def __init__(self, loop: LoopProgram, source: Source, extent: Extent) -> None:
        self.steps, self.batch, self.rows, self.ragged = extent.steps, extent.batch, extent.rows, extent.ragged
        self.scratch = source.scratch
        self._set_inputs(loop)
        self._set_buffers(loop)
        values = loop.program.values
        self.totals = [(values[v].sizes(1)[1:], values[v].dtype) for v, _ in loop.totals]

    def _set_inputs(self, loop: LoopProgram) -> None:
        values = loop.program.values
        layouts = [RowLayout.of(values[v]) for v in loop.program.inputs]
        folded = [self.ragged and layout.place is not None for layout in layouts]
        shapes = [
            values[v].sizes(self.rows) if one_after_the_other else (self.steps, *values[v].sizes(self.batch))
            for v, one_after_the_other in zip(loop.sequences, folded, strict=False)
        ]
        shapes += [values[v].sizes(self.batch) for v in (*loop.fixed, *loop.states)]
        self._inputs = [
            (torch.Size(shape), values[v].dtype) for shape, v in zip(shapes, loop.program.inputs, strict=True)
        ]
        self.by_row = [0 if layout.place is None else prod(layout.dims) for layout in layouts]
        self.by_step = [0] * len(shapes)
        for i, layout in enumerate(layouts[: len(loop.sequences)]):
            if not folded[i]:
                self.by_step[i] = prod(layout.dims) * (1 if layout.place is None else self.batch)

    def _set_buffers(self, loop: LoopProgram) -> None:
        values, of_states = loop.program.values, state_buffers(loop)
        further = [v for v, n in zip(loop.next_states, of_states, strict=True) if n >= len(loop.emitted)]
        kept = [(RowLayout.of(values[v]).dims, values[v].dtype) for v in (*loop.emitted, *further)]
        in_steps: tuple[int, ...] = (self.rows,) if self.ragged else (self.steps, self.batch)
        leading = [(self.batch + self.rows,) if n in of_states else in_steps for n in range(len(kept))]
        shapes = [((*first, *dims), dtype) for first, (dims, dtype) in zip(leading, kept, strict=True)]
        self.buffers = [(shape, dtype, prod(shape) * dtype.itemsize) for shape, dtype in shapes]
        self.passed_on = [(*in_steps, *kept[n][0]) for n in of_states]
        self._states = [
            (n, self.buffers[n], RowLayout.of(values[v]).first) for v, n in zip(loop.states, of_states, strict=True)
        ]

    def places(self, *, reverse: bool) -> list[tuple[int, int, int, int]]:
        """For each state its buffer, where in it the first step's and the last one's are, and how large, in bytes.

        Of no bytes are those that have to be spread over rows: where all rows have one state, or, in reverse, end at
        different times.
        """
        found = []
        for number, (shape, dtype, _), first in self._states:
            row = prod(shape[1:]) * dtype.itemsize
            late = self.rows * row
            size = self.batch * row if first and not (reverse and self.ragged) else 0
            found.append((number, late if reverse else 0, 0 if reverse else late, size))
        return found

    def memory(self, owners: int, last: Sequence[bool]) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        """Memory for a run: buffers, totals for each thread that owns rows, and what those states end with.

        Args:
            owners: how many threads own rows.
            last: which states.
        """
        buffers = [
            torch.empty(shape, dtype=dtype, device=CPU) if size < _LARGE else allocate(shape, dtype, CPU)
            for shape, dtype, size in self.buffers
        ]
        totals = [torch.zeros((owners, *shape), dtype=dtype, device=CPU) for shape, dtype in self.totals]
        states = [
            torch.empty((self.batch, *shape[1:]), dtype=dtype, device=CPU) if wanted else None
            for wanted, (_, (shape, dtype, _), _) in zip(last, self._states, strict=True)
        ]
        return buffers, totals, states

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Refuse tensors of another shape, dtype or device."""
        for tensor, (shape, dtype) in zip(tensors, self._inputs, strict=True):
            if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu:
                raise ValueError(
                    f"a loop's input must be {dtype} {list(shape)} on the CPU, "
                    f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                )
