"""Binding: torch's tensors to an emitted loop. Sizes are checked here, before a pointer leaves Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from ctypes import Array, c_int64, c_void_p, cast
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod

import torch
from torch import Tensor

from unrolled.engine.native.build import library
from unrolled.engine.native.emit import Source, one_file, position_of
from unrolled.engine.native.lower import state_buffers
from unrolled.engine.native.products import PackedMatrix
from unrolled.engine.native.runtime import runtime
from unrolled.engine.native.state_buffer import StateBuffer
from unrolled.engine.native.threads import shares, team
from unrolled.execution.memory import allocate, materialized
from unrolled.execution.protocol import LoopInputs, LoopResult
from unrolled.execution.unchanged import made_once
from unrolled.lengths import Extent
from unrolled.operations.layout import RowLayout
from unrolled.plan.loops import LoopProgram

_WORTH_A_TEAM = 2_000_000  # floating-point operations
# Up to so many rows threads share products, if the matrices that a step reads take so many bytes: with rows of their
# own each thread would read all of them.
_WORTH_A_QUEUE = ((2, 200_000), (8, 8 << 20))


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


@dataclass(frozen=True)
class _Sizes:
    """What is known of a run over so many steps and rows before it is made.

    Attributes:
        inputs: shape and dtype of each input.
        by_step: how far apart the steps of an input are, in entries, if it is contiguous.
        by_row: how far apart its rows are.
        buffers: shape and dtype of each buffer; those of states have room for the first one.
    """

    inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    by_step: tuple[int, ...]
    by_row: tuple[int, ...]
    buffers: tuple[tuple[tuple[int, ...], torch.dtype], ...]

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Refuse tensors of another shape, dtype or device."""
        for tensor, (shape, dtype) in zip(tensors, self.inputs, strict=True):
            if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
                raise ValueError(
                    f"a loop's input must be {dtype} {list(shape)} on the CPU, "
                    f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                )


@dataclass(frozen=True)
class _Threads:
    """How threads share a run: each owns the rows from its bound up to the next one's.

    Attributes:
        bounds: one more than there are threads.
        queued: whether the first one owns all rows, and the others help it with its products.
    """

    bounds: Sequence[int]
    queued: bool

    @property
    def count(self) -> int:
        """How many threads there are."""
        return len(self.bounds) - 1

    @property
    def owners(self) -> int:
        """How many of them own rows."""
        return 1 if self.queued else self.count


@dataclass(eq=False)
class _Memory:
    """All memory that compiled code reads and writes in a run. Whoever holds it keeps the pointers valid.

    Attributes:
        inputs: in each a row's entries lie one after the other.
        by_step: how far apart the steps of an input are, in entries.
        by_row: how far apart its rows are.
        buffers: for what is emitted at every step, and for the states.
        totals: a running total for each thread that owns rows.
        packed: the matrices of products.
        scratch: for what one step makes.
    """

    inputs: list[Tensor]
    by_step: list[int]
    by_row: list[int]
    buffers: list[Tensor]
    totals: list[Tensor]
    packed: list[Tensor]
    scratch: Tensor

    def arguments(self) -> tuple[object, ...]:
        """The first arguments of `ur_loop` in loops.c; scratch memory begins at a line of the cache."""
        return (
            _pointers(self.inputs),
            _integers(self.by_step),
            _integers(self.by_row),
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
        self._state_buffers = state_buffers(loop)
        self._sizes = lru_cache(maxsize=16)(self._sizes_for)
        self._seconds_per_row = 1e-9 * max(self.source.flops, 1)

    def __call__(self, inputs: LoopInputs) -> LoopResult:
        """Run all steps; see `execution.protocol.LoopRunner`.

        Raises:
            DeclinedError: if torch has to run them, on these numbers.
        """
        extent, tensors = inputs.extent, [materialized(tensor) for tensor in inputs.tensors]
        sizes = self._sizes(extent.steps, extent.batch, extent.rows, extent.ragged)
        sizes.check(tensors)
        threads = self._threads(extent)
        memory = self._memory(tensors, sizes, extent, threads)
        states = [StateBuffer(memory.buffers[n], extent, inputs.reverse) for n in self._state_buffers]
        for buffer, state in zip(states, inputs.states, strict=True):
            buffer.begin(state)
        self._run(memory, extent, threads, reverse=inputs.reverse)
        last = [self._of_state(n, buffer.last(), 0) for n, buffer in enumerate(states)]
        totals = [total.sum(0) if threads.owners > 1 else total[0] for total in memory.totals]
        emitted = self._emitted(memory.buffers, states, extent)

        def received(state: int) -> Tensor:
            return self._of_state(state, states[state].received(), 1)

        return LoopResult(emitted, last, received, totals)

    # -- before a run

    def _sizes_for(self, steps: int, batch: int, rows: int, ragged: bool) -> _Sizes:
        loop, values = self.loop, self.loop.program.values
        folded = [ragged and layout.place is not None for layout in self._input_layouts]
        shapes = [
            values[v].sizes(rows) if one_after_the_other else (steps, *values[v].sizes(batch))
            for v, one_after_the_other in zip(loop.sequences, folded, strict=False)
        ]
        shapes += [values[v].sizes(batch) for v in (*loop.fixed, *loop.states)]
        dtypes = [values[v].dtype for v in loop.program.inputs]
        by_row = [0 if layout.place is None else prod(layout.dims) for layout in self._input_layouts]
        by_step = [0] * len(shapes)
        for i, layout in enumerate(self._input_layouts[: len(loop.sequences)]):
            if not folded[i]:
                by_step[i] = prod(layout.dims) * (1 if layout.place is None else batch)
        stored = [*loop.emitted, *(v for v, n in self._states() if n >= len(loop.emitted))]
        steps_first = (rows,) if ragged else (steps, batch)
        leading = [(batch + rows,) if n in self._state_buffers else steps_first for n in range(len(stored))]
        buffers = [
            ((*first, *RowLayout.of(values[v]).dims), values[v].dtype) for first, v in zip(leading, stored, strict=True)
        ]
        return _Sizes(tuple(zip(shapes, dtypes, strict=True)), tuple(by_step), tuple(by_row), tuple(buffers))

    def _states(self) -> list[tuple[int, int]]:
        """For each state the value that replaces it, and the number of its buffer."""
        return list(zip(self.loop.next_states, self._state_buffers, strict=True))

    def _threads(self, extent: Extent) -> _Threads:
        most = min(torch.get_num_threads(), 64)  # MOST_PARTS in threads.c
        read = self.source.weights * self.source.real.itemsize
        if most > 1 and any(extent.batch <= rows and read >= least for rows, least in _WORTH_A_QUEUE):
            return _Threads([0] + [extent.batch] * most, queued=True)
        worth = extent.rows * self.source.flops > _WORTH_A_TEAM
        return _Threads(shares(extent, min(most, extent.batch) if worth else 1), queued=False)

    def _memory(self, tensors: list[Tensor], sizes: _Sizes, extent: Extent, threads: _Threads) -> _Memory:
        fixed = tensors[len(self.loop.sequences) :]
        return _Memory(
            *self._with_adjacent_entries(tensors, sizes, extent),
            buffers=[allocate(shape, dtype) for shape, dtype in sizes.buffers],
            totals=[self._zeros(value, threads.owners) for value, _ in self.loop.totals],
            packed=[made_once(PackedMatrix.of(matrix), fixed[position_of(matrix)]) for matrix in self.source.matrices],
            scratch=torch.empty(self.source.scratch * extent.batch + 64, dtype=torch.uint8),
        )

    def _with_adjacent_entries(
        self, tensors: list[Tensor], sizes: _Sizes, extent: Extent
    ) -> tuple[list[Tensor], list[int], list[int]]:
        """The inputs, and how far apart their steps and rows are.

        Copied are those in which a row's entries do not lie one after the other.
        """
        a, b, _ = self.loop.counts
        inputs, by_step, by_row = list(tensors), list(sizes.by_step), list(sizes.by_row)
        for i, layout in enumerate(self._input_layouts[: a + b]):
            if i < a and layout.place is None:  # an entry a step for all rows
                inputs[i] = tensors[i].contiguous()
                continue
            timed = i < a and not extent.ragged
            rows = extent.rows if i < a and extent.ragged else extent.batch
            tensor = layout.rows_first(tensors[i], 1 if timed else 0, rows)
            if tensor.is_contiguous():
                inputs[i] = tensor
            elif i >= a:
                inputs[i] = tensor if i - a in self.source.only_packed else tensor.contiguous()
            elif timed:
                inputs[i] = _adjacent(tensor, 2)
                by_step[i], by_row[i] = inputs[i].stride()[:2]
            else:
                inputs[i] = _adjacent(tensor, 1)
                by_step[i], by_row[i] = 0, inputs[i].stride(0)
        return inputs, by_step, by_row

    def _zeros(self, value: int, owners: int) -> Tensor:
        known = self.loop.program.values[value]
        return torch.zeros((owners, *known.sizes(1)[1:]), dtype=known.dtype)

    # -- the run, and after it

    def _run(self, memory: _Memory, extent: Extent, threads: _Threads, *, reverse: bool) -> None:
        """Run all steps, in calls that last a moment each."""
        steps = extent.steps
        arguments = (
            *memory.arguments(),
            _integers((*extent.offsets, extent.rows)) if extent.ragged else None,
            _integers(threads.bounds),
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


def _integers(numbers: Sequence[int]) -> Array[c_int64]:
    return (c_int64 * len(numbers))(*numbers)


def _pointers(tensors: Sequence[Tensor]) -> Array[c_void_p]:
    return (c_void_p * max(len(tensors), 1))(*(tensor.data_ptr() for tensor in tensors))
