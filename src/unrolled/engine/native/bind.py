"""Binding: torch's tensors to an emitted loop. Sizes are checked here, before a pointer leaves Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_void_p, cast
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from unrolled.engine.native.build import library
from unrolled.engine.native.emit import Source, one_file, position_of
from unrolled.engine.native.frame import Frame, integers
from unrolled.engine.native.lower import state_buffers
from unrolled.engine.native.products import PackedMatrix
from unrolled.engine.native.runtime import runtime
from unrolled.engine.native.state_buffer import StateBuffer
from unrolled.engine.native.threads import Threads, team, threads_for
from unrolled.execution.memory import allocate, materialized
from unrolled.execution.protocol import LoopInputs, LoopResult
from unrolled.execution.unchanged import made_once
from unrolled.lengths import Extent
from unrolled.operations.layout import RowLayout
from unrolled.plan.loops import LoopProgram


def built(sources: Mapping[LoopProgram, Source]) -> dict[LoopProgram, NativeLoop]:
    """Build loops over numbers of one dtype, all in one run of the compiler.

    Raises:
        BuildError: if there is no compiler, or it fails.
    """
    (real,) = {source.real for source in sources.values()}
    loaded, entry = library(one_file(list(sources.values()))), runtime(real).ur_loop
    functions = [cast(loaded[f"loop_{number}"], c_void_p) for number in range(len(sources))]
    return {
        loop: NativeLoop(loop, source, partial(entry, function))
        for (loop, source), function in zip(sources.items(), functions, strict=True)
    }


class DeclinedError(Exception):
    """Numbers that an emitted loop has no answer for: an index out of range, a division by zero, ties in a sort."""


@dataclass(eq=False)
class _Memory:
    """All memory that compiled code reads and writes in a run. Whoever holds it keeps the pointers valid.

    Attributes:
        inputs: in each a row's entries lie one after the other; of states, what each row's first step receives.
        strides: how far apart the steps of inputs are, and how far apart their rows, as C has them.
        buffers: for what is emitted at every step, and for the states.
        totals: a running total for each thread that owns rows.
        packed: the matrices of products.
        scratch: for what one step makes.
    """

    inputs: list[Tensor]
    strides: tuple[bytes, bytes]
    buffers: list[Tensor]
    totals: list[Tensor]
    packed: list[Tensor]
    scratch: Tensor

    def arguments(self) -> tuple[object, ...]:
        """The first arguments of `ur_loop` in loops.c; scratch memory begins at a line of the cache."""
        return (
            _pointers(self.inputs),
            *self.strides,
            _pointers(self.buffers),
            _pointers(self.totals),
            _pointers(self.packed),
            -(-self.scratch.data_ptr() // 64) * 64,
        )


class NativeLoop:
    """A loop that is compiled, ready to be run.

    Args:
        loop: its program.
        source: what was emitted for it.
        entry: its entry in a library.
    """

    def __init__(self, loop: LoopProgram, source: Source, entry: Callable[..., int]) -> None:
        self.loop, self.source, self._entry = loop, source, entry
        values = loop.program.values
        self._input_layouts = [RowLayout.of(values[v]) for v in loop.program.inputs]
        self._emitted_layouts = [RowLayout.of(values[v]) for v in loop.emitted]
        self._as_they_are = all(layout.first for layout in self._emitted_layouts)
        self._state_buffers = state_buffers(loop)
        self._packed = [(PackedMatrix.of(matrix), position_of(matrix)) for matrix in source.matrices]
        self._frame = lru_cache(maxsize=16)(partial(Frame, loop))
        self._seconds_per_row = 1e-9 * max(source.flops, 1)

    def __call__(self, inputs: LoopInputs) -> LoopResult:
        """Run all steps; see `execution.protocol.LoopRunner`.

        Raises:
            DeclinedError: if torch has to run them, on these numbers.
        """
        extent, tensors = inputs.extent, [materialized(tensor) for tensor in inputs.tensors]
        frame = self._frame(extent.steps, extent.batch, extent.rows, extent.ragged)
        frame.check(tensors)
        threads = threads_for(self.source, extent)
        memory = self._memory(tensors, frame, extent, threads)
        states = [
            StateBuffer(memory.buffers[n], extent, inputs.reverse, shape)
            for n, shape in zip(self._state_buffers, frame.passed_on, strict=True)
        ]
        self._run(memory, self._begun(states, memory, frame), extent, threads, reverse=inputs.reverse)
        last = [self._of_state(n, buffer.last(owned=inputs.last_owned), 0) for n, buffer in enumerate(states)]
        totals = [total.sum(0) if threads.owners > 1 else total[0] for total in memory.totals]
        emitted = self._emitted(memory.buffers, states, extent)

        def received(state: int) -> Tensor:
            return self._of_state(state, states[state].received(), 1)

        return LoopResult(emitted, last, received, totals)

    # -- before a run

    def _memory(self, tensors: list[Tensor], frame: Frame, extent: Extent, threads: Threads) -> _Memory:
        fixed = tensors[len(self.loop.sequences) :]
        inputs, strides = self._with_adjacent_entries(tensors, frame, extent)
        return _Memory(
            inputs,
            strides,
            buffers=[allocate(shape, dtype) for shape, dtype in frame.buffers],
            totals=[self._zeros(value, threads.owners) for value, _ in self.loop.totals],
            packed=[made_once(pack, fixed[position]) for pack, position in self._packed],
            scratch=torch.empty(self.source.scratch * extent.batch + 64, dtype=torch.uint8),
        )

    def _with_adjacent_entries(
        self, tensors: list[Tensor], frame: Frame, extent: Extent
    ) -> tuple[list[Tensor], tuple[bytes, bytes]]:
        """The inputs, and how far apart their steps and rows are.

        Copied are those in which a row's entries do not lie one after the other.
        """
        a, b, _ = self.loop.counts
        inputs, by_step, by_row = list(tensors), list(frame.by_step), list(frame.by_row)
        strided = False
        for i, layout in enumerate(self._input_layouts):
            if layout.plain and tensors[i].is_contiguous():
                continue
            if i >= a + b or (i < a and layout.place is None):  # states; an entry a step for all rows
                inputs[i] = tensors[i].contiguous()
                continue
            timed = i < a and not extent.ragged
            rows = extent.rows if i < a and extent.ragged else extent.batch
            tensor = layout.rows_first(tensors[i], 1 if timed else 0, rows)
            if tensor.is_contiguous():
                inputs[i] = tensor
            elif i >= a:
                inputs[i] = tensor if i - a in self.source.only_packed else tensor.contiguous()
            else:
                strided = True
                inputs[i] = _adjacent(tensor, 2 if timed else 1)
                by_step[i] = inputs[i].stride(0) if timed else 0
                by_row[i] = inputs[i].stride(1 if timed else 0)
        return inputs, (integers(by_step), integers(by_row)) if strided else frame.whole

    def _zeros(self, value: int, owners: int) -> Tensor:
        known = self.loop.program.values[value]
        return torch.zeros((owners, *known.sizes(1)[1:]), dtype=known.dtype)

    def _begun(self, states: Sequence[StateBuffer], memory: _Memory, frame: Frame) -> bytes:
        """Put what the first step of each row receives where it reads it, or say how C is to: to, from, bytes."""
        given, starts = memory.inputs[len(memory.inputs) - len(states) :], list[int]()
        for buffer, state, size in zip(states, given, frame.start_bytes, strict=True):
            to = buffer.memory_of_start() if size else None
            if to is None:
                buffer.begin(state)
            else:
                starts += (to, state.data_ptr(), size)
        return integers(starts)

    # -- the run, and after it

    def _run(self, memory: _Memory, starts: bytes, extent: Extent, threads: Threads, *, reverse: bool) -> None:
        """Run all steps, in calls that last a moment each."""
        steps = extent.steps
        arguments = (
            *memory.arguments(),
            integers((*extent.offsets, extent.rows)) if extent.ragged else None,
            integers(threads.bounds),
            starts,
            len(starts) // 24,
            self.source.scratch,
            steps,
            extent.batch,
            int(reverse),
        )
        done = 0
        while done < steps:
            # A quarter of a second: then Python has its turn again, so that Ctrl-C works.
            many = max(1, int(0.25 / (self._seconds_per_row * extent.batch)))
            until = min(steps, done + many)
            started = time.perf_counter()
            if self._entry(*arguments, done, until, int(threads.queued), threads.count, team()):
                raise DeclinedError
            rows = (until - done) * extent.rows / steps
            self._seconds_per_row = max((time.perf_counter() - started) / rows, 1e-10)
            done = until

    def _emitted(self, buffers: Sequence[Tensor], states: Sequence[StateBuffer], extent: Extent) -> list[Tensor]:
        """What every step emitted, in torch's shapes."""
        made = list(buffers[: len(self.loop.emitted)])
        for number, state in zip(self._state_buffers, states, strict=True):
            if number < len(made):
                made[number] = state.passed_on()
        leading = 0 if extent.ragged else 1
        layouts = self._emitted_layouts
        if self._as_they_are:
            return made
        first_rows = torch.tensor(extent.offsets[: extent.steps]) if extent.ragged else None
        return [_as_torch_has_it(layout, x, leading, first_rows) for layout, x in zip(layouts, made, strict=True)]

    def _of_state(self, state: int, tensor: Tensor, leading: int) -> Tensor:
        return _as_torch_has_it(self._input_layouts[state - len(self._state_buffers)], tensor, leading)


def _as_torch_has_it(layout: RowLayout, tensor: Tensor, leading: int, first_rows: Tensor | None = None) -> Tensor:
    """A tensor `[..., B, *dims]` in torch's shape; of what has no batch all rows of a step are alike."""
    if layout.place is not None:
        return layout.as_torch_has_it(tensor, leading)
    return tensor.select(leading, 0) if first_rows is None else tensor.index_select(0, first_rows)


def _adjacent(tensor: Tensor, leading: int) -> Tensor:
    """The tensor, copied if a row's entries do not lie one after the other; what is the same at every step, once.

    Args:
        tensor: `[T, B, ...]` or `[B, ...]`.
        leading: how many dimensions come before a row's entries.
    """
    if leading == 2 and tensor.stride(0) == 0 and tensor.shape[0] > 1:
        return _adjacent(tensor[0], 1).expand(tensor.shape)
    expected = 1
    for size, stride in zip(reversed(tensor.shape[leading:]), reversed(tensor.stride()[leading:]), strict=True):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def _pointers(tensors: Sequence[Tensor]) -> bytes:
    return integers([tensor.data_ptr() for tensor in tensors])
