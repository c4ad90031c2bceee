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

from unrolled.engine.native.build import library, machine_lines
from unrolled.engine.native.emit import Source, one_file
from unrolled.engine.native.lower import state_homes
from unrolled.engine.native.products import packed_matrix, product_library
from unrolled.engine.native.state_buffer import StateBuffer
from unrolled.engine.native.threads import shares, team
from unrolled.execution.memory import allocate, materialized
from unrolled.execution.protocol import LoopInputs, LoopResult
from unrolled.execution.unchanged import made_once
from unrolled.lengths import Extent
from unrolled.operations.layout import Layout
from unrolled.plan.loops import LoopProgram

_WORTH_A_TEAM = 2_000_000  # floating-point operations
# Up to so many rows threads share products, if the matrices that a step reads take so many bytes: with rows of their
# own each thread would read all of them.
_WORTH_HELP = ((2, 200_000), (8, 8 << 20))
_MOST_THREADS = 64  # MOST_PARTS in kernels.c
_LONGEST_CALL = 0.25  # seconds before Python has its turn again, so that Ctrl-C works


@dataclass(frozen=True)
class _Sizes:
    """What is known of a call before it is made, for so many steps and rows.

    Attributes:
        shapes: of all inputs.
        dtypes: of all inputs.
        by_step: how far apart the steps of an input are, in entries, if it is contiguous.
        by_row: how far apart its rows are.
        rooms: shape and dtype of the memory for each emitted value; that of a next state has room for the first one.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    by_step: tuple[int, ...]
    by_row: tuple[int, ...]
    rooms: tuple[tuple[tuple[int, ...], torch.dtype], ...]


def built(sources: Mapping[LoopProgram, Source]) -> dict[LoopProgram, NativeLoop]:
    """Build loops over numbers of one dtype, all in one run of the compiler.

    Raises:
        BuildError: if there is no compiler, or it fails.
    """
    loaded = library(machine_lines() + one_file(list(sources.values())))
    loaded.ur_loop.argtypes = [c_void_p] * 10 + [c_int64] * 8 + [c_void_p]
    for source in sources.values():
        if source.matrices:
            product_library(source.real)  # a compiler that fails is to be found out now
    walks = [cast(loaded[f"ur_walk_{number}"], c_void_p) for number in range(len(sources))]
    return {
        loop: NativeLoop(loop, source, partial(loaded.ur_loop, walk))
        for (loop, source), walk in zip(sources.items(), walks, strict=True)
    }


class NativeLoop:
    """A loop that is compiled, ready to be run.

    Args:
        loop: its program.
        source: what was emitted for it.
        entry: its entry in a library.
    """

    def __init__(self, loop: LoopProgram, source: Source, entry: Callable[..., int]) -> None:
        self.loop, self.source, self._entry = loop, source, entry
        groups = (loop.program.inputs, loop.emitted)
        self._layouts = [[Layout.of(loop.program.values[v]) for v in group] for group in groups]
        self._seconds_per_row = 1e-9 * max(self.source.flops, 1)
        self._homes = state_homes(loop)
        self._sizes = lru_cache(maxsize=16)(self._sizes_for)

    def __call__(self, request: LoopInputs) -> LoopResult:
        """Walk through time; see `execution.protocol.LoopRunner`."""
        extent, given = request.extent, [materialized(tensor) for tensor in request.tensors]
        sizes = self._sizes(extent.steps, extent.batch, extent.rows, extent.ragged)
        self._check(given, sizes)
        leaves, by_step, by_row = self._leaves(given, sizes, extent)
        rooms = [allocate(shape, dtype) for shape, dtype in sizes.rooms]
        states = [StateBuffer(rooms[home], extent, request.reverse) for home in self._homes]
        for room, state in zip(states, request.states, strict=True):
            room.begin(state)
        fixed = given[len(request.sequences) :]
        packed = [made_once(packed_matrix, fixed[position]) for position in self.source.matrices]
        scratch = torch.empty(self.source.scratch * extent.batch + 64, dtype=torch.uint8)
        threads, helpers = self._threads(extent), self._helpers(extent)
        totals = [self._zeros(v, threads) for v, _ in self.loop.totals]
        offsets = _integers((*extent.offsets, extent.rows)) if extent.ragged else None
        arguments = (
            _pointers(leaves),
            _integers(by_step),
            _integers(by_row),
            _pointers(rooms),
            _pointers(totals),
            _pointers(packed),
            -(-scratch.data_ptr() // 64) * 64,
            offsets,
            _integers([0] + [extent.batch] * (1 + helpers) if helpers else shares(extent, threads)),
            self.source.scratch,
            extent.steps,
            extent.batch,
            int(request.reverse),
        )
        self._walk(arguments, extent, threads, helpers)
        made = rooms[: len(self.loop.emitted)]
        for home, room in zip(self._homes, states, strict=True):
            made[home : home + 1] = [room.handed_on()] if home < len(made) else []
        emitted = [at.as_torch_has_it(x, 1 - extent.ragged) for at, x in zip(self._layouts[1], made, strict=True)]
        totals = [total.sum(0) if threads > 1 else total[0] for total in totals]
        return LoopResult(emitted, [room.last() for room in states], lambda state: states[state].received(), totals)

    def _sizes_for(self, steps: int, batch: int, rows: int, ragged: bool) -> _Sizes:
        values, a = self.loop.program.values, self.loop.counts[0]
        known, layouts = [values[v] for v in self.loop.program.inputs], self._layouts[0]
        shapes = [
            v.sizes(batch) if i >= a else v.sizes(rows) if ragged else (steps, *v.sizes(batch))
            for i, v in enumerate(known)
        ]
        by_row = [0 if at.place is None else prod(at.dims) for at in layouts]
        by_step = [
            (prod(at.dims) * (1 if at.place is None else batch)) if i < a and not ragged else 0
            for i, at in enumerate(layouts)
        ]
        room_of = [
            *self.loop.emitted,
            *(v for v, home in zip(self.loop.next_states, self._homes, strict=True) if home >= len(self.loop.emitted)),
        ]
        steps_first = (rows,) if ragged else (steps, batch)
        rooms = [
            ((*((batch + rows,) if place in self._homes else steps_first), *Layout.of(values[v]).dims), values[v].dtype)
            for place, v in enumerate(room_of)
        ]
        return _Sizes(tuple(shapes), tuple(v.dtype for v in known), tuple(by_step), tuple(by_row), tuple(rooms))

    def _leaves(
        self, given: Sequence[Tensor], sizes: _Sizes, extent: Extent
    ) -> tuple[list[Tensor], list[int], list[int]]:
        """The inputs, and their strides; copied are those in which a row's entries do not lie one after the other."""
        a, b, _ = self.loop.counts
        leaves, by_step, by_row = list(given), list(sizes.by_step), list(sizes.by_row)
        for i, at in enumerate(self._layouts[0][: a + b]):
            timed = i < a and not extent.ragged
            rows = extent.rows if i < a and extent.ragged else extent.batch
            tensor = given[i] if at.plain else at.rows_first(given[i], int(timed), rows)
            if tensor.is_contiguous():
                leaves[i] = tensor
            elif i >= a:
                leaves[i] = tensor if i - a in self.source.only_packed else tensor.contiguous()
            else:
                leaves[i] = dense = _dense(tensor, 1 + timed)
                by_step[i] = dense.stride(0) if timed else 0
                by_row[i] = dense.stride(int(timed))
        return leaves, by_step, by_row

    def _helpers(self, extent: Extent) -> int:
        """How many threads help with the products of one or two rows: those of matrices that one alone reads slowly."""
        read = self.source.weights * self.source.real.itemsize
        worth = any(extent.batch <= rows and read >= least for rows, least in _WORTH_HELP)
        return min(torch.get_num_threads(), _MOST_THREADS) - 1 if worth else 0

    def _threads(self, extent: Extent) -> int:
        worth = extent.rows * self.source.flops > _WORTH_A_TEAM
        return min(torch.get_num_threads(), extent.batch, _MOST_THREADS) if worth else 1

    def _zeros(self, value: int, threads: int) -> Tensor:
        """One running total for each thread."""
        known = self.loop.program.values[value]
        return torch.zeros((threads, *known.sizes(1)[1:]), dtype=known.dtype)

    def _walk(self, arguments: tuple[object, ...], extent: Extent, threads: int, helpers: int) -> None:
        done, steps = 0, extent.steps
        while done < steps:
            many = max(1, int(_LONGEST_CALL / (self._seconds_per_row * extent.batch)))
            until = min(steps, done + many)
            started = time.perf_counter()
            self._entry(*arguments, done, until, helpers, helpers + 1 if helpers else threads, team())
            walked = (until - done) * extent.rows / steps
            self._seconds_per_row = max((time.perf_counter() - started) / walked, 1e-10)
            done = until

    def _check(self, given: Sequence[Tensor], sizes: _Sizes) -> None:
        for tensor, shape, dtype in zip(given, sizes.shapes, sizes.dtypes, strict=True):
            if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
                raise ValueError(
                    f"a loop's input must be {dtype} {list(shape)} on the CPU, "
                    f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                )


def _integers(numbers: Sequence[int]) -> Array[c_int64]:
    return (c_int64 * len(numbers))(*numbers)


def _dense(tensor: Tensor, leading: int) -> Tensor:
    """The tensor, copied if a row's entries do not lie one after the other; what is the same at every step, once."""
    if leading == 2 and tensor.stride(0) == 0 and tensor.shape[0] > 1:
        return _dense(tensor[0], 1).expand(tensor.shape)
    expected = 1
    for size, stride in zip(reversed(tensor.shape[leading:]), reversed(tensor.stride()[leading:]), strict=True):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def _pointers(tensors: Sequence[Tensor]) -> Array[c_void_p]:
    return (c_void_p * max(len(tensors), 1))(*(tensor.data_ptr() for tensor in tensors))
