"""Emission: a loop as plain C, whose step calls a function for each kernel."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unrolled.engine.native.build import c_text
from unrolled.engine.native.kernel import kernel
from unrolled.engine.native.lower import lower, state_buffers
from unrolled.engine.native.memory import row_stride
from unrolled.engine.native.schedule import Kernels
from unrolled.engine.native.text import c_type
from unrolled.operations.nodes import Input, Lowered, Node, Product, View
from unrolled.plan.loops import LoopProgram


@dataclass(frozen=True)
class Source:
    """A loop in C, and what a caller has to know to call it.

    Attributes:
        kernels: C functions that a step calls; alike kernels are one.
        parts: the C of one step, in pieces that are functions.
        real: the dtype of its numbers.
        matrices: the views of fixed values that it reads packed.
        only_packed: the positions of fixed values that it reads in no other way.
        scratch: bytes of scratch memory per row.
        flops: floating-point operations per row and step, roughly.
        weights: numbers in the matrices that a step reads.
    """

    kernels: tuple[str, ...]
    parts: tuple[str, ...]
    real: torch.dtype
    matrices: tuple[View, ...]
    only_packed: frozenset[int]
    scratch: int
    flops: int
    weights: int

    def function(self, name: str) -> str:
        """The C function that runs the loop over some rows and steps."""
        # The only one becomes part of the loop again, and what it needs only once is moved out of it.
        kind = "static" if len(self.parts) == 1 else "static NOINLINE"
        parts = [_PART % {"kind": kind, "name": f"{name}_{n}", "body": part} for n, part in enumerate(self.parts)]
        calls = [f"{name}_{n}({', '.join(_STEP)});" for n in range(len(self.parts))]
        return "".join(parts) + _LOOP % {"name": name, "step": _indented(calls, 2)}


def emit(loop: LoopProgram) -> Source:
    """Write a loop as C.

    Raises:
        UnsupportedError: if it has an operation that this engine does not emit.
    """
    lowered = lower(loop)
    return _Emitter(loop, lowered).source()


def one_file(sources: Sequence[Source]) -> str:
    """Some loops over numbers of one dtype as one C file: what they have in common is compiled once.

    Their functions, `loop_0`, `loop_1`, ..., are what `ur_loop` of the runtime takes first.
    """
    (real,) = {source.real for source in sources}
    kernels = dict.fromkeys(kernel for source in sources for kernel in source.kernels)
    functions = [source.function(f"loop_{number}") for number, source in enumerate(sources)]
    return "".join(
        [c_text(real, "kernels.c", "special.c", "places.c", "ordering.c", "ordering.c"), *kernels, *functions]
    )


MOST_CALLS = 64
"""Of kernels in one part of a step: a function with all pointers of a long one takes the compiler too long."""

_STEP = "task", "number", "begin", "most", "t", "rows", "at", "skipped", "received", "passed_on"

_PART = """
%(kind)s void %(name)s(const loop_task *task, int64_t number, int64_t begin, int64_t most, int64_t t, int64_t rows,
    int64_t at, int64_t skipped, int64_t received, int64_t passed_on) {
  (void)number; (void)most; (void)t; (void)at; (void)skipped; (void)received; (void)passed_on;
%(body)s
}
"""

_LOOP = """
void %(name)s(const loop_task *task, int64_t number) {
  const int64_t batch = task->batch, begin = task->begin, most = task->end - begin, *const offsets = task->offsets;
  for (int64_t i = task->first; i < task->last; ++i) {
    const int64_t t = task->reverse ? task->steps - 1 - i : i;
    const int64_t alive = (offsets ? offsets[t + 1] - offsets[t] : batch) - begin, rows = alive < most ? alive : most;
    if (rows <= 0) continue;
    if (__atomic_load_n(task->declined, __ATOMIC_RELAXED)) break;
    const int64_t at = offsets ? offsets[t] : t * batch, skipped = offsets ? at : 0;
    /* The buffer of a state has one step more: what a step receives lies before what it passes on, or after it. */
    const int64_t early = t ? batch + (offsets ? offsets[t - 1] : at - batch) : 0, late = batch + at;
    const int64_t received = task->reverse ? late : early, passed_on = task->reverse ? early : late;
%(step)s
  }
}
"""


class _Emitter:
    def __init__(self, loop: LoopProgram, lowered: Lowered) -> None:
        self.loop, self.lowered, self.kernels = loop, lowered, Kernels(lowered)
        self.names = {node: f"n{number}" for number, node in enumerate(lowered.nodes)}
        self.functions: dict[str, None] = {}
        self.matrices: dict[View, int] = {}
        self.places: dict[Node, int] = {}
        self.scratch = 0
        self.flops = self.weights = 0
        self.state_buffers = state_buffers(loop)

    def source(self) -> Source:
        body = [self._kernel(nodes) for nodes in self.kernels.order]
        body += [self._total(number, view) for number, view in enumerate(self.lowered.totals)]
        parts = tuple(self._part(body[n : n + MOST_CALLS]) for n in range(0, len(body), MOST_CALLS))
        matrices = tuple(self.matrices), self._only_packed("\n".join(body))
        code = tuple(self.functions), parts
        return Source(*code, self.lowered.real, *matrices, self.scratch, self.flops, self.weights)

    def _only_packed(self, body: str) -> frozenset[int]:
        fixed = [node for node in self.lowered.nodes if isinstance(node, Input) and node.kind == "fixed"]
        mentioned = set(re.findall(r"\bn\d+\b", body))
        read = {node.position for node in fixed if self.names[node] in mentioned}
        return frozenset(position_of(matrix) for matrix in self.matrices) - read

    # -- memory

    def _part(self, calls: Sequence[str]) -> str:
        """Some calls, after the pointers that they mention."""
        mentioned = {int(number) for call in calls for number in re.findall(r"\bn(\d+)", call)}
        pointers = [line for number in sorted(mentioned) for line in self._pointer(self.lowered.nodes[number])]
        return _indented([*pointers, *calls], 1)

    def _pointer(self, node: Node) -> list[str]:
        """What says where the memory of a node is, and how far apart its rows are."""
        name, kind = self.names[node], c_type(node)
        if isinstance(node, Input):
            return self._input(node)
        buffer = self.kernels.stored[node]
        if buffer is None:
            return [f"{kind} *const {name} = ({kind} *)(task->scratch + {self._place_of(node)} * most);"]
        at = "passed_on" if buffer in self.state_buffers else "at"
        return [f"{kind} *const {name} = ({kind} *)task->buffers[{buffer}] + ({at} + begin) * {node.size};"]

    def _place_of(self, node: Node) -> int:
        """Where a node's scratch memory begins, in bytes per row."""
        if node not in self.places:
            self.places[node] = self.scratch
            self.scratch += -(-node.size * node.dtype.itemsize // 64) * 64
        return self.places[node]

    def _input(self, node: Input) -> list[str]:
        a, b, _ = self.loop.counts
        name, kind = self.names[node], c_type(node)
        place = {"sequence": 0, "fixed": a, "state": a + b}[node.kind] + node.position
        if node.kind == "state":
            base, start = f"task->buffers[{self.state_buffers[node.position]}]", f"(received + begin) * {node.size}"
            return [f"const {kind} *const {name} = (const {kind} *){base} + {start};"]
        start = f"begin * {name}_row"
        if node.kind == "sequence":
            start = f"t * task->by_step[{place}] + (skipped + begin) * {name}_row"
        return [
            f"const int64_t {name}_row = task->by_row[{place}];",
            f"const {kind} *const {name} = (const {kind} *)task->inputs[{place}] + {start};",
        ]

    # -- kernels

    def _kernel(self, nodes: Sequence[Node]) -> str:
        first = nodes[0]
        if isinstance(first, Product):
            return self._product(first)
        made = kernel(nodes, self.kernels, self.names, self.matrices)
        self.functions[made.text] = None
        self.flops += made.flops
        return made.call

    def _product(self, node: Product) -> str:
        *inner, N = node.matrix.dims
        K, index = math.prod(inner), self.matrices.setdefault(node.matrix, len(self.matrices))
        row, many = node.row, math.prod(node.dims[:-1])
        x = f"{self.names[row.node]} + {row.offset}"
        by_row = str(K) if len(node.dims) > 1 else row_stride(row.node, self.names)
        self.flops += 2 * many * K * N
        self.weights += K * N
        out, matrix = f"{self.names[node]}, {N}", f"task->packed[{index}], {many} * rows, {K}, {N}"
        return f"task->product(task->queue, {out}, {x}, {by_row}, {matrix});"

    def _total(self, number: int, view: View) -> str:
        (N,) = view.dims
        x, by_row = f"{self.names[view.node]} + {view.offset}", row_stride(view.node, self.names)
        return f"task->add_rows(task->totals[{number}] + number * {N}, {x}, {by_row}, rows, {N});"


def _indented(lines: Sequence[str], depth: int) -> str:
    return "\n".join("  " * depth + line for line in lines)


def position_of(matrix: View) -> int:
    """The position among the fixed values of that of which a matrix is a view."""
    assert isinstance(matrix.node, Input)
    return matrix.node.position
