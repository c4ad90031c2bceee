"""Binding: torch's tensors to an emitted loop. Sizes are checked here, before a pointer leaves Python."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unrolled.bptt.walk import Walk, shifted
from unrolled.engine.native.build import library, machine_lines
from unrolled.engine.native.emit import Source, emit
from unrolled.engine.native.layout import Layout
from unrolled.engine.native.memory import fresh
from unrolled.engine.native.threads import team
from unrolled.plan.loops import LoopProgram

__all__ = ["NativeLoop"]

_LONGEST_CALL = 0.25  # seconds before Python has its turn again, so that Ctrl-C works


class NativeLoop:
    """A loop that is compiled, ready to be run."""

    def __init__(self, loop: LoopProgram) -> None:
        self.loop = loop
        self.source: Source = emit(loop)
        groups = (loop.sequences, loop.fixed, loop.emitted)
        self._layouts = [[Layout.of(loop.program.values[v]) for v in group] for group in groups]
        self._library = library(machine_lines() + self.source.text)
        self._panel = int(self._library.ur_panel())
        self._seconds_per_row = 1e-9 * max(self.source.flops, 1)

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
        self._check([*sequences, *fixed, *states], steps, batch)
        kept, constant, _ = self._layouts
        leaves = [
            *(_dense(at.rows_first(tensor, 1, batch), 2) for at, tensor in zip(kept, sequences, strict=True)),
            *(at.rows_first(tensor, 0, batch).contiguous() for at, tensor in zip(constant, fixed, strict=True)),
            *(_dense(tensor, 1) for tensor in states),
        ]
        emitted, received = self._emitted(states, steps, batch, reverse=reverse)
        packed = [self._packed(fixed[position], K, N) for position, K, N in self.source.matrices]
        scratch = torch.empty(self.source.scratch * batch + 64, dtype=torch.uint8)
        a = len(sequences)
        by_step = [tensor.stride(0) if i < a else 0 for i, tensor in enumerate(leaves)]
        by_row = [_row_stride(tensor, i < a) for i, tensor in enumerate(leaves)]
        arguments = (
            _pointers(leaves),
            (ctypes.c_int64 * len(leaves))(*by_step),
            (ctypes.c_int64 * len(leaves))(*by_row),
            _pointers(emitted),
            _pointers(packed),
            ctypes.c_void_p(-(-scratch.data_ptr() // 64) * 64),
            ctypes.c_int64(self.source.scratch),
            ctypes.c_int64(steps),
            ctypes.c_int64(batch),
            ctypes.c_int64(int(reverse)),
        )
        self._walk(arguments, steps, batch)
        emitted = [at.as_torch_has_it(room, 1) for at, room in zip(self._layouts[2], emitted, strict=True)]
        last = 0 if reverse else steps - 1
        places = [self.loop.emitted.index(value) for value in self.loop.next_states]
        return Walk(emitted, [emitted[place][last].clone() for place in places], received)

    def _walk(self, arguments: tuple[object, ...], steps: int, batch: int) -> None:
        threads = torch.get_num_threads() if batch * self.source.flops * steps > 2_000_000 else 1
        done = 0
        while done < steps:
            many = max(1, int(_LONGEST_CALL / (self._seconds_per_row * batch)))
            until = min(steps, done + many)
            started = time.perf_counter()
            self._library.ur_loop(
                *arguments, ctypes.c_int64(done), ctypes.c_int64(until), ctypes.c_int64(threads), team()
            )
            self._seconds_per_row = max((time.perf_counter() - started) / (until - done) / batch, 1e-10)
            done = until

    def _emitted(
        self, states: Sequence[Tensor], steps: int, batch: int, *, reverse: bool
    ) -> tuple[list[Tensor], Callable[[int], Tensor]]:
        """Memory for what is emitted, and what every step receives.

        A next state's memory has room for the first one too: what the steps receive is then the same memory, one
        place aside.
        """
        values = self.loop.program.values
        first = {self.loop.emitted.index(v): state for v, state in zip(self.loop.next_states, states, strict=True)}
        rooms = [
            fresh((steps + (place in first), batch, *self._layouts[2][place].dims), values[v].dtype)
            for place, v in enumerate(self.loop.emitted)
        ]
        for place, state in first.items():
            rooms[place][-1 if reverse else 0] = state
        early, late = slice(0, steps), slice(1, steps + 1)
        emitted = [room[early if reverse else late] if place in first else room for place, room in enumerate(rooms)]
        places = [self.loop.emitted.index(v) for v in self.loop.next_states]
        aside = late if reverse else early

        def received(number: int) -> Tensor:
            place = places[number]
            if first[place] is states[number]:
                return rooms[place][aside]
            # Two states that become the same value do not begin as the same one.
            return shifted(states[number], emitted[place], reverse=reverse)

        return emitted, received

    def _packed(self, matrix: Tensor, K: int, N: int) -> Tensor:
        packed = torch.empty(-(-N // self._panel) * self._panel * K, dtype=matrix.dtype)
        self._library.ur_pack(
            ctypes.c_void_p(packed.data_ptr()),
            ctypes.c_void_p(matrix.data_ptr()),
            ctypes.c_int64(K),
            ctypes.c_int64(N),
            ctypes.c_int64(matrix.stride(0)),
            ctypes.c_int64(matrix.stride(1)),
        )
        return packed

    def _check(self, leaves: Sequence[Tensor], steps: int, batch: int) -> None:
        a = self.loop.counts[0]
        for i, (value, tensor) in enumerate(zip(self.loop.program.inputs, leaves, strict=True)):
            known = self.loop.program.values[value]
            shape = (steps, *known.sizes(batch)) if i < a else known.sizes(batch)
            if tuple(tensor.shape) != shape or tensor.dtype != known.dtype or tensor.device.type != "cpu":
                raise ValueError(
                    f"a loop's input must be {known.dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
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


def _row_stride(tensor: Tensor, sequence: bool) -> int:
    return tensor.stride(int(sequence)) if tensor.dim() > int(sequence) else 0


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * max(len(tensors), 1))(*(tensor.data_ptr() for tensor in tensors))
