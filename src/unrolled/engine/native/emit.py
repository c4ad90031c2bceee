"""Emission: the kernels of a loop as plain C."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from unrolled.engine.native.build import c_text
from unrolled.engine.native.lower import lower, state_buffers
from unrolled.engine.native.placed import placed
from unrolled.engine.native.schedule import Kernels
from unrolled.engine.native.text import c_type, index, literal, nest
from unrolled.operations.nodes import (
    Compute,
    Find,
    Input,
    Lowered,
    MatrixProduct,
    Node,
    Product,
    Put,
    Reduce,
    Scalar,
    Scan,
    Take,
    View,
    Write,
    contiguous,
)
from unrolled.operations.operation import OPERATIONS
from unrolled.plan.loops import LoopProgram


@dataclass(frozen=True)
class Source:
    """A loop in C, and what a caller has to know to call it.

    Attributes:
        setup: the C of what a run begins with.
        step: the C of one step.
        real: the dtype of its numbers.
        matrices: the positions among the fixed values of those that it reads packed.
        only_packed: those of them that it reads in no other way.
        scratch: bytes of scratch memory per row.
        flops: floating-point operations per row and step, roughly.
        weights: numbers in the matrices that a step reads.
    """

    setup: str
    step: str
    real: torch.dtype
    matrices: tuple[int, ...]
    only_packed: frozenset[int]
    scratch: int
    flops: int
    weights: int

    def function(self, name: str) -> str:
        """The C function that runs the loop over some rows and steps."""
        return _FUNCTION % {"name": name, "setup": self.setup, "step": self.step}


def emit(loop: LoopProgram) -> Source:
    """Write a loop as C.

    Raises:
        UnsupportedError: if it has an operation that this engine does not emit.
    """
    lowered = lower(loop)
    return _Emitter(loop, lowered).source()


def one_file(sources: Sequence[Source]) -> str:
    """Some loops over numbers of one dtype as one C file: what all of them need is compiled once.

    Its entry is `ur_loop`; its first argument is the address of a loop's function: `ur_loop_0`, `ur_loop_1`, ...
    """
    (real,) = {source.real for source in sources}
    functions = [source.function(f"ur_loop_{number}") for number, source in enumerate(sources)]
    return "".join([c_text(real, "kernels.c", "loops.c", "places.c", "ordering.c", "ordering.c"), *functions])


_FUNCTION = """
void %(name)s(const loop_task *task, int64_t number) {
  const int64_t batch = task->batch, begin = task->begin, most = task->end - begin, *const offsets = task->offsets;
  (void)most; (void)number;
%(setup)s
  for (int64_t i = task->first; i < task->last; ++i) {
    const int64_t t = task->reverse ? task->steps - 1 - i : i;
    const int64_t alive = (offsets ? offsets[t + 1] - offsets[t] : batch) - begin, rows = alive < most ? alive : most;
    if (rows <= 0) continue;
    if (__atomic_load_n(task->declined, __ATOMIC_RELAXED)) break;
    const int64_t at = offsets ? offsets[t] : t * batch, skipped = offsets ? at : 0;
    /* The buffer of a state has one step more: what a step receives lies before what it passes on, or after it. */
    const int64_t early = t ? batch + (offsets ? offsets[t - 1] : at - batch) : 0, late = batch + at;
    const int64_t received = task->reverse ? late : early, passed_on = task->reverse ? early : late;
    (void)at; (void)skipped; (void)received; (void)passed_on;
%(step)s
  }
}
"""


class _Emitter:
    def __init__(self, loop: LoopProgram, lowered: Lowered) -> None:
        self.loop, self.lowered, self.kernels = loop, lowered, Kernels(lowered)
        self.names = {node: f"n{number}" for number, node in enumerate(lowered.nodes)}
        self.matrices: list[int] = []
        self.scratch = 0
        self.flops = self.weights = 0
        self.state_buffers = state_buffers(loop)

    def source(self) -> Source:
        body = [line for nodes in self.kernels.order for line in self._kernel(nodes)]
        body += [self._total(number, view) for number, view in enumerate(self.lowered.totals)]
        setup, step = self._pointers()
        code = _indented(setup, 1), _indented([*step, *body], 2)
        matrices = tuple(self.matrices), self._only_packed("\n".join(body))
        return Source(*code, self.lowered.real, *matrices, self.scratch, self.flops, self.weights)

    def _only_packed(self, body: str) -> frozenset[int]:
        fixed = [node for node in self.lowered.nodes if isinstance(node, Input) and node.kind == "fixed"]
        read = {node.position for node in fixed if re.search(rf"\b{self.names[node]}\b", body)}
        return frozenset(self.matrices) - read

    # -- memory

    def _pointers(self) -> tuple[list[str], list[str]]:
        """Pointers: those for the whole run, and those that move with t."""
        setup: list[str] = []
        step: list[str] = []
        for node in self.lowered.nodes:
            name, kind = self.names[node], c_type(node)
            if isinstance(node, Input):
                self._input(node, setup, step)
            elif node in self.kernels.stored:
                buffer = self.kernels.stored[node]
                if buffer is not None:
                    at = "passed_on" if buffer in self.state_buffers else "at"
                    start = f"({kind} *)task->buffers[{buffer}] + ({at} + begin) * {node.size}"
                    step.append(f"{kind} *const {name} = {start};")
                else:
                    setup.append(f"{kind} *const {name} = ({kind} *)(task->scratch + {self.scratch} * most);")
                    self.scratch += -(-node.size * node.dtype.itemsize // 64) * 64
        return setup, step

    def _input(self, node: Input, setup: list[str], step: list[str]) -> None:
        a, b, _ = self.loop.counts
        name, kind = self.names[node], c_type(node)
        place = {"sequence": 0, "fixed": a, "state": a + b}[node.kind] + node.position
        base, rows = f"(const {kind} *)task->inputs[{place}]", f"task->by_row[{place}]"
        if node.kind == "fixed":
            at = f" + begin * {rows}" if node.rows else ""
            setup.append(f"const {kind} *const {name} = {base}{at};")
            setup.append(f"const int64_t {name}_row = {rows if node.rows else 0}; (void){name}; (void){name}_row;")
        elif node.kind == "sequence":
            setup.append(f"const int64_t {name}_row = {rows};")
            start = f"{base} + t * task->by_step[{place}] + (skipped + begin) * {name}_row"
            step.append(f"const {kind} *const {name} = {start};")
        else:
            buffer = self.state_buffers[node.position]
            start = f"(const {kind} *)task->buffers[{buffer}] + (received + begin) * {node.size}"
            step.append(f"const {kind} *const {name} = {start}; (void){name};")

    def row_stride(self, node: Node) -> str:
        """How far apart a node's rows are in memory."""
        return f"{self.names[node]}_row" if isinstance(node, Input) and node.kind != "state" else str(node.size)

    def row_of(self, view: View) -> str:
        """Where row b of a view begins."""
        return f"{self.names[view.node]} + b * {self.row_stride(view.node)} + {view.offset}"

    def pointer(self, node: Node, *, written: bool = False) -> str:
        """The name of a node's memory."""
        return self.names[node]

    def declined(self) -> str:
        """Where it is noted that the numbers are declined."""
        return "task->declined"

    # -- kernels

    def _kernel(self, nodes: Sequence[Node]) -> Iterator[str]:
        first = nodes[0]
        if isinstance(first, Product):
            yield self._product(first)
        elif isinstance(first, MatrixProduct):
            yield from self._matrix_product(first)
        elif isinstance(first, Reduce):
            yield from self._reduce(first)
        elif isinstance(first, Take | Put | Find):
            yield "for (int64_t b = 0; b < rows; ++b) {"
            yield from ("  " + line for line in placed(first, self))
            yield "}"
            self.flops += first.size
        else:
            computations = [node for node in nodes if isinstance(node, Compute)]
            yield from _EntryLoop(self, computations).lines()
            self.flops += math.prod(first.dims) * len(computations)

    def _product(self, node: Product) -> str:
        K, N = node.matrix.dims
        if node.matrix.position not in self.matrices:
            self.matrices.append(node.matrix.position)
        index = self.matrices.index(node.matrix.position)
        row, many = node.row, math.prod(node.dims[:-1])
        x = f"{self.names[row.node]} + {row.offset}"
        by_row = str(K) if len(node.dims) > 1 else self.row_stride(row.node)
        self.flops += 2 * many * K * N
        self.weights += K * N
        out, matrix = f"{self.names[node]}, {N}", f"task->packed[{index}], {many} * rows, {K}, {N}"
        return f"queued_product(task->queue, {out}, {x}, {by_row}, {matrix});"

    def _matrix_product(self, node: MatrixProduct) -> Iterator[str]:
        (*many, N, M), (*_, K) = node.dims, node.left.dims
        out = f"out + {index(contiguous(node.dims)[:-2])}"
        x, y = (
            f"{name} + {index(view.strides[:-2])}, {view.strides[-2]}, {view.strides[-1]}"
            for name, view in (("x", node.left), ("y", node.right))
        )
        yield "for (int64_t b = 0; b < rows; ++b) {"
        yield f"  const real *const x = {self.row_of(node.left)}, *const y = {self.row_of(node.right)};"
        yield f"  real *const out = {self.names[node]} + b * {node.size};"
        yield from nest(many, [f"small_product({out}, {x}, {y}, {N}, {K}, {M});"])
        yield "}"
        self.flops += 2 * K * node.size

    def _total(self, number: int, view: View) -> str:
        (N,) = view.dims
        x = f"{self.names[view.node]} + {view.offset}"
        return f"add_rows(task->totals[{number}] + number * {N}, {x}, {self.row_stride(view.node)}, rows, {N});"

    def _reduce(self, node: Reduce) -> Iterator[str]:
        view, kind = node.source, c_type(node)
        kept = len(node.dims) - 1 if isinstance(node, Scan) else len(node.dims)
        reduced = _scanned if isinstance(node, Scan) else _reduced
        reduction = reduced(node, view.dims[kept:], view.strides[kept:], index(view.strides[:kept]))
        yield "for (int64_t b = 0; b < rows; ++b) {"
        yield f"  const {kind} *x = {self.row_of(view)};"
        yield f"  {kind} *y = {self.names[node]} + b * {node.size};"
        yield from nest(node.dims[:kept], reduction)
        yield "}"
        self.flops += view.node.size


class _EntryLoop:
    """Element-wise computations of one shape, as one loop over the rows and one over their entries.

    Args:
        emitter: whose names and memory they have.
        nodes: the computations, in order.

    Attributes:
        flat: whether one loop over all entries of a row will do, whatever its shape.
        reads: for each view that is read from memory the name of the variable that it is read into.
        before: lines for each row.
        inside: lines for each entry.
    """

    def __init__(self, emitter: _Emitter, nodes: Sequence[Compute]) -> None:
        self.emitter, self.nodes, self.dims = emitter, nodes, nodes[0].dims
        self.kernels = emitter.kernels
        read = (view for node in nodes for view in node.views if not self.kernels.in_register(view, node))
        views = dict.fromkeys(read)
        self.flat = all(self._reads_flat(view) for view in views) and all(
            node.target.strides == contiguous(self.dims) for node in nodes if isinstance(node, Write)
        )
        self.reads = {view: f"a{number}" for number, view in enumerate(views)}
        self.before: list[str] = []
        self.inside: list[str] = []

    def lines(self) -> Iterator[str]:
        """The C of the loop."""
        for view, name in self.reads.items():
            self._read(view, name)
        for node in self.nodes:
            self._compute(node)
        names, sums = self.emitter.names, self.kernels.sums
        totals = {names[total]: node for node in self.nodes for total in sums.get(node, ())}
        self.before += [f"real {name}_sum = 0;" for name in totals]
        self.inside += [f"{name}_sum += {names[node]}_v;" for name, node in totals.items()]
        shape = (math.prod(self.dims),) if self.flat else self.dims
        yield "for (int64_t b = 0; b < rows; ++b) {"
        yield from ("  " + line for line in self.before)
        yield from ("  " + line for line in nest(shape, self.inside, sums=[f"{name}_sum" for name in totals]))
        yield from (f"  {name}[b] = {name}_sum;" for name in totals)
        yield "}"

    def _reads_flat(self, view: View) -> bool:
        """Whether a view is one number for all entries of a row, or has them one after the other."""
        strides = view.broadcast(self.dims).strides
        adjacent = zip(strides, contiguous(self.dims), self.dims, strict=True)
        return not any(strides) or all(have == want for have, want, n in adjacent if n != 1)

    def _at(self, strides: Sequence[int]) -> str:
        return "i0" if self.flat else index(strides)

    def _read(self, view: View, name: str) -> None:
        kind, row, strides = c_type(view.node), self.emitter.row_of(view), view.broadcast(self.dims).strides
        if not any(strides):
            self.before.append(f"const {kind} {name} = *({row});")
            return
        self.before.append(f"const {kind} *const {name}_at = {row};")
        self.inside.append(f"const {kind} {name} = {name}_at[{self._at(strides)}];")

    def _argument(self, argument: View | Scalar, node: Compute) -> str:
        if not isinstance(argument, View):
            return literal(argument, whole=node.whole_numbers)
        if self.kernels.in_register(argument, node):
            return f"{self.emitter.names[argument.node]}_v"
        return self.reads[argument]

    def _compute(self, node: Compute) -> None:
        name, kind = self.emitter.names[node], c_type(node)
        arguments = [self._argument(argument, node) for argument in node.arguments]
        operation = OPERATIONS[node.name]
        expression = operation.integers if node.whole_numbers else operation.expression
        expression = expression.format(*arguments, type=kind, declined=self.emitter.declined())
        register = "int" if node.dtype == torch.bool else kind
        self.inside.append(f"const {register} {name}_v = {expression};")
        if isinstance(node, Write):
            row, strides = self.emitter.row_of(node.target), node.target.strides
        elif node in self.kernels.stored:
            row, strides = f"{name} + b * {node.size}", contiguous(self.dims)
        else:
            return
        self.before.append(f"{kind} *const {name}_to = {row};")
        self.inside.append(f"{name}_to[{self._at(strides)}] = ({kind}){name}_v;")


def _scanned(node: Reduce, dims: tuple[int, ...], strides: tuple[int, ...], start: str) -> list[str]:
    """The C that adds up, or multiplies, entries one after the other; in double precision, as torch does."""
    total = "int64_t" if node.dtype == torch.int64 else "double"
    x = f"x[{start} + {index(strides, 'j')}]"
    first, following = {
        "cumsum": ("0", f"total + {x}"),
        "cumprod": ("1", f"total * {x}"),
        "logcumsumexp": ("-INFINITY", f"log_of_sum(total, {x})"),
    }[node.name]
    if node.dtype == torch.int64:
        following = _of_integers(node.name.removeprefix("cum"), x)
    step = f"y[{index(contiguous(node.dims)[:-1])} + j0] = total = {following};"
    return [f"{total} total = {first};", *nest(dims, [step], "j")]


def _reduced(node: Reduce, dims: tuple[int, ...], strides: tuple[int, ...], start: str) -> list[str]:
    """The C that reduces the entries `x[start + ...]`, of some dimensions, to an entry of `y`."""
    out, whole = f"y[{index(contiguous(node.dims))}]", node.dtype == torch.int64
    if node.name == "sum" and strides == contiguous(dims) and not whole:
        return [f"{out} = sum_of(x + {start}, {math.prod(dims)});"]
    x = f"x[{start} + {index(strides, 'j')}]"
    first, step = {
        "sum": ("0", f"total + {x}"),
        "prod": ("1", f"total * {x}"),
        "amax": ("INT64_MIN" if whole else "-INFINITY", f"larger(total, {x})"),
        "amin": ("INT64_MAX" if whole else "INFINITY", f"smaller(total, {x})"),
    }[node.name]
    step = _of_integers(node.name, x) if whole else step
    return [f"{c_type(node)} total = {first};", *nest(dims, [f"total = {step};"], "j"), f"{out} = total;"]


def _of_integers(name: str, x: str) -> str:
    """What a total of integers becomes with one more."""
    return {
        "sum": f"int_add(total, {x})",
        "prod": f"int_mul(total, {x})",
        "amax": f"total > {x} ? total : {x}",
        "amin": f"total < {x} ? total : {x}",
    }[name]


def _indented(lines: Sequence[str], depth: int) -> str:
    return "\n".join("  " * depth + line for line in lines)
