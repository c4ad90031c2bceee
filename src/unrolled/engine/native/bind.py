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

from unrolled.bptt.walk import Walk, shifted
from unrolled.engine.native.build import library, machine_lines
from unrolled.engine.native.emit import Source, one_file
from unrolled.engine.native.layout import Layout
from unrolled.engine.native.memory import fresh, readable
from unrolled.engine.native.products import packed_matrix, product_library
from unrolled.engine.native.threads import team
from unrolled.plan.loops import LoopProgram

__all__ = ["NativeLoop", "built"]

_WORTH_A_TEAM = 2_000_000  # floating-point operations
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
    loaded.ur_loop.argtypes = [c_void_p] * 8 + [c_int64] * 7 + [c_void_p]
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
        self._next = [loop.emitted.index(value) for value in loop.next_states]
        self._sizes = lru_cache(maxsize=16)(self._sizes_for)

    def __call__(
        self,
        sequences: Sequence[Tensor],
        fixed: Sequence[Tensor],
        states: Sequence[Tensor],
        *,
        steps: int,
        batch: int,
        reverse: bool,
    ) -> Walk:
        """Walk through time; see `bptt.walk.LoopRunner`."""
        sizes = self._sizes(steps, batch)
        given = [readable(tensor) for tensor in (*sequences, *fixed, *states)]
        self._check(given, sizes)
        fixed = given[len(sequences) : len(sequences) + len(fixed)]
        leaves, by_step, by_row = self._leaves(given, sizes, batch)
        emitted, received = self._emitted(states, steps, sizes, reverse=reverse)
        packed = [packed_matrix(fixed[position]) for position in self.source.matrices]
        scratch = torch.empty(self.source.scratch * batch + 64, dtype=torch.uint8)
        threads = self._threads(steps, batch)
        totals = [self._zeros(v, threads) for v, _ in self.loop.totals]
        arguments = (
            _pointers(leaves),
            (c_int64 * len(leaves))(*by_step),
            (c_int64 * len(leaves))(*by_row),
            _pointers(emitted),
            _pointers(totals),
            _pointers(packed),
            -(-scratch.data_ptr() // 64) * 64,
            self.source.scratch,
            steps,
            batch,
            int(reverse),
        )
        self._walk(arguments, steps, batch, threads)
        emitted = [at.as_torch_has_it(room, 1) for at, room in zip(self._layouts[1], emitted, strict=True)]
        last = 0 if reverse else steps - 1
        ends = [emitted[place][last].clone() for place in self._next]
        return Walk(emitted, ends, received, [total.sum(0) if threads > 1 else total[0] for total in totals])

    def _sizes_for(self, steps: int, batch: int) -> _Sizes:
        values, a = self.loop.program.values, self.loop.counts[0]
        known, layouts = [values[v] for v in self.loop.program.inputs], self._layouts[0]
        shapes = [(steps, *v.sizes(batch)) if i < a else v.sizes(batch) for i, v in enumerate(known)]
        by_row = [0 if at.place is None else prod(at.dims) for at in layouts]
        by_step = [(prod(at.dims) * (1 if at.place is None else batch)) if i < a else 0 for i, at in enumerate(layouts)]
        rooms = [
            ((steps + (place in self._next), batch, *self._layouts[1][place].dims), values[v].dtype)
            for place, v in enumerate(self.loop.emitted)
        ]
        return _Sizes(tuple(shapes), tuple(v.dtype for v in known), tuple(by_step), tuple(by_row), tuple(rooms))

    def _leaves(self, given: Sequence[Tensor], sizes: _Sizes, batch: int) -> tuple[list[Tensor], list[int], list[int]]:
        """The inputs, and their strides; copied are those in which a row's entries do not lie one after the other."""
        a, b, _ = self.loop.counts
        leaves, by_step, by_row = list(given), list(sizes.by_step), list(sizes.by_row)
        for i, at in enumerate(self._layouts[0]):
            tensor = given[i] if at.plain else at.rows_first(given[i], int(i < a), batch)
            if tensor.is_contiguous():
                leaves[i] = tensor
            elif a <= i < a + b:
                leaves[i] = tensor.contiguous()
            else:
                leaves[i] = dense = _dense(tensor, 2 if i < a else 1)
                by_step[i] = dense.stride(0) if i < a else 0
                by_row[i] = dense.stride(int(i < a))
        return leaves, by_step, by_row

    def _threads(self, steps: int, batch: int) -> int:
        return min(torch.get_num_threads(), batch) if batch * self.source.flops * steps > _WORTH_A_TEAM else 1

    def _zeros(self, value: int, threads: int) -> Tensor:
        """One running total for each thread."""
        known = self.loop.program.values[value]
        return torch.zeros((threads, *known.sizes(1)[1:]), dtype=known.dtype)

    def _walk(self, arguments: tuple[object, ...], steps: int, batch: int, threads: int) -> None:
        done = 0
        while done < steps:
            many = max(1, int(_LONGEST_CALL / (self._seconds_per_row * batch)))
            until = min(steps, done + many)
            started = time.perf_counter()
            self._entry(*arguments, done, until, threads, team())
            self._seconds_per_row = max((time.perf_counter() - started) / (until - done) / batch, 1e-10)
            done = until

    def _emitted(
        self, states: Sequence[Tensor], steps: int, sizes: _Sizes, *, reverse: bool
    ) -> tuple[list[Tensor], Callable[[int], Tensor]]:
        """Memory for what is emitted, and what every step receives.

        A next state's memory has room for the first one too: what the steps receive is then the same memory, one
        place aside.
        """
        first = dict(zip(self._next, states, strict=True))
        rooms = [fresh(shape, dtype) for shape, dtype in sizes.rooms]
        for place, state in first.items():
            rooms[place][-1 if reverse else 0] = state
        early, late = slice(0, steps), slice(1, steps + 1)
        emitted = [room[early if reverse else late] if place in first else room for place, room in enumerate(rooms)]
        aside = late if reverse else early

        def received(number: int) -> Tensor:
            place = self._next[number]
            if first[place] is states[number]:
                return rooms[place][aside]
            # Two states that become the same value do not begin as the same one.
            return shifted(states[number], emitted[place], reverse=reverse)

        return emitted, received

    def _check(self, given: Sequence[Tensor], sizes: _Sizes) -> None:
        for tensor, shape, dtype in zip(given, sizes.shapes, sizes.dtypes, strict=True):
            if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
                raise ValueError(
                    f"a loop's input must be {dtype} {list(shape)} on the CPU, "
                    f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                )


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
