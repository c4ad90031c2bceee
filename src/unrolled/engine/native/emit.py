"""Emission: a scheduled loop as plain C."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from math import prod

import torch

from unrolled.engine.native.lower import lower, state_homes
from unrolled.engine.native.schedule import Scheduled, local, schedule
from unrolled.operations.nodes import (
    Compute,
    Input,
    Lowered,
    Node,
    Product,
    Reduce,
    Scalar,
    Scan,
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
        setup: the C of what a walk begins with.
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

    def walk(self, name: str) -> str:
        """The C function that walks through time, under a name."""
        return _WALK % {"name": name, "setup": self.setup, "step": self.step}


def emit(loop: LoopProgram) -> Source:
    """Write a loop as C.

    Raises:
        UnsupportedError: if it has an operation that this engine does not emit.
    """
    lowered = lower(loop)
    return _Emitter(loop, lowered, schedule(lowered)).source()


def one_file(sources: Sequence[Source]) -> str:
    """Some loops over numbers of one dtype as one C file: what all of them need is compiled once.

    Its entry is `ur_loop`; its first argument is the address of a loop's walk: `ur_walk_0`, `ur_walk_1`, ...
    """
    (real,) = {source.real for source in sources}
    folder = resources.files("unrolled.engine.native")
    shared = "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in ("kernels.c", "loops.c"))
    walks = "".join(source.walk(f"ur_walk_{number}") for number, source in enumerate(sources))
    return f"#define REAL_IS_FLOAT {int(real == torch.float32)}\n{shared}{walks}"


_WALK = """
void %(name)s(const task *w, int64_t number) {
  const int64_t batch = w->batch, begin = w->begin, most = w->end - begin, *const offsets = w->offsets;
  (void)most; (void)number;
%(setup)s
  for (int64_t i = w->first; i < w->last; ++i) {
    const int64_t t = w->reverse ? w->steps - 1 - i : i;
    const int64_t alive = (offsets ? offsets[t + 1] - offsets[t] : batch) - begin, rows = alive < most ? alive : most;
    if (rows <= 0) continue;
    const int64_t at = offsets ? offsets[t] : t * batch, skipped = offsets ? at : 0;
    /* A state's memory begins with room for one more step: what is received and what is handed on lie apart in it. */
    const int64_t early = t ? batch + (offsets ? offsets[t - 1] : at - batch) : 0, late = batch + at;
    const int64_t received = w->reverse ? late : early, handed_on = w->reverse ? early : late;
    (void)at; (void)skipped; (void)received; (void)handed_on;
%(step)s
  }
}
"""


class _Emitter:
    def __init__(self, loop: LoopProgram, lowered: Lowered, scheduled: Scheduled) -> None:
        self.loop, self.lowered, self.scheduled = loop, lowered, scheduled
        self.names = {node: f"n{number}" for number, node in enumerate(lowered.nodes)}
        self.matrices: list[int] = []
        self.scratch = 0
        self.flops = self.weights = 0
        self.state_homes = state_homes(loop)

    def source(self) -> Source:
        body = [line for kernel in self.scheduled.kernels for line in self.kernel(kernel.nodes)]
        body += [self.total(number, view) for number, view in enumerate(self.lowered.totals)]
        setup, step = self.memory()
        found = (_indented(setup, 1), _indented([*step, *body], 2))
        matrices = tuple(self.matrices), self._only_packed("\n".join(body))
        return Source(*found, self.lowered.real, *matrices, self.scratch, self.flops, self.weights)

    def _only_packed(self, body: str) -> frozenset[int]:
        leaves = [node for node in self.lowered.nodes if isinstance(node, Input) and node.kind == "fixed"]
        read = {node.position for node in leaves if re.search(rf"\b{self.names[node]}\b", body)}
        return frozenset(self.matrices) - read

    # -- memory

    def memory(self) -> tuple[list[str], list[str]]:
        """Pointers: those for the whole walk, and those that move with t."""
        setup: list[str] = []
        step: list[str] = []
        for node in self.lowered.nodes:
            name, kind = self.names[node], _c_type(node)
            if isinstance(node, Input):
                self._leaf(node, name, kind, setup, step)
            elif node in self.scheduled.homes:
                home = self.scheduled.homes[node]
                if home is not None:
                    at = "handed_on" if home in self.state_homes else "at"
                    start = f"({kind} *)w->emitted[{home}] + ({at} + begin) * {node.size}"
                    step.append(f"{kind} *const {name} = {start};")
                else:
                    setup.append(f"{kind} *const {name} = ({kind} *)(w->scratch + {self.scratch} * most);")
                    self.scratch += -(-node.size * node.dtype.itemsize // 64) * 64
        return setup, step

    def _leaf(self, node: Input, name: str, kind: str, setup: list[str], step: list[str]) -> None:
        a, b, _ = self.loop.counts
        place = {"sequence": 0, "fixed": a, "state": a + b}[node.kind] + node.position
        base, rows = f"(const {kind} *)w->leaves[{place}]", f"w->by_row[{place}]"
        if node.kind == "fixed":
            at = f" + begin * {rows}" if node.rows else ""
            setup.append(f"const {kind} *const {name} = {base}{at};")
            setup.append(f"const int64_t {name}_row = {rows if node.rows else 0}; (void){name}; (void){name}_row;")
        elif node.kind == "sequence":
            setup.append(f"const int64_t {name}_row = {rows};")
            start = f"{base} + t * w->by_step[{place}] + (skipped + begin) * {name}_row"
            step.append(f"const {kind} *const {name} = {start};")
        else:
            home = self.state_homes[node.position]
            start = f"(const {kind} *)w->emitted[{home}] + (received + begin) * {node.size}"
            step.append(f"const {kind} *const {name} = {start}; (void){name};")

    def row_stride(self, node: Node) -> str:
        return f"{self.names[node]}_row" if isinstance(node, Input) and node.kind != "state" else str(node.size)

    # -- kernels

    def kernel(self, nodes: Sequence[Node]) -> Iterator[str]:
        first = nodes[0]
        if isinstance(first, Product):
            yield self.product(first)
        elif isinstance(first, Reduce):
            yield from self.reduce(first)
        else:
            yield from self.loop_over_entries([node for node in nodes if isinstance(node, Compute)])

    def product(self, node: Product) -> str:
        K, N = node.matrix.dims
        if node.matrix.position not in self.matrices:
            self.matrices.append(node.matrix.position)
        index = self.matrices.index(node.matrix.position)
        row, many = node.row, prod(node.dims[:-1])
        x = f"{self.names[row.node]} + {row.offset}"
        by_row = str(K) if len(node.dims) > 1 else self.row_stride(row.node)
        self.flops += 2 * many * K * N
        self.weights += K * N
        out, matrix = f"{self.names[node]}, {N}", f"w->packed[{index}], {many} * rows, {K}, {N}"
        return f"product_with(w->helped, {out}, {x}, {by_row}, {matrix});"

    def total(self, number: int, view: View) -> str:
        (N,) = view.dims
        x = f"{self.names[view.node]} + {view.offset}"
        return f"add_rows(w->totals[{number}] + number * {N}, {x}, {self.row_stride(view.node)}, rows, {N});"

    def reduce(self, node: Reduce) -> Iterator[str]:
        view = node.source
        kept = len(node.dims) - isinstance(node, Scan)
        inner_dims, inner_strides = view.dims[kept:], view.strides[kept:]
        yield "for (int64_t b = 0; b < rows; ++b) {"
        yield f"  const real *x = {self.names[view.node]} + b * {self.row_stride(view.node)} + {view.offset};"
        yield f"  real *y = {self.names[node]} + b * {node.size};"
        index = _index(view.strides[:kept])
        yield from _nest(node.dims[:kept], self._reduction(node, inner_dims, inner_strides, index))
        yield "}"
        self.flops += view.node.size

    def _reduction(self, node: Reduce, dims: tuple[int, ...], strides: tuple[int, ...], index: str) -> list[str]:
        if isinstance(node, Scan):
            step = f"y[{_index(contiguous(node.dims)[:-1])} + j0] = total += x[{index} + {_index(strides, 'j')}];"
            return ["double total = 0;", *_nest(dims, [step], "j")]
        out = f"y[{_index(contiguous(node.dims))}]"
        if node.name == "sum" and strides == contiguous(dims):
            return [f"{out} = sum_of(x + {index}, {prod(dims)});"]
        at = _index(strides, "j")
        start, step = {
            "sum": ("0", f"total + x[{index} + {at}]"),
            "prod": ("1", f"total * x[{index} + {at}]"),
            "amax": ("-INFINITY", f"larger(total, x[{index} + {at}])"),
            "amin": ("INFINITY", f"smaller(total, x[{index} + {at}])"),
        }[node.name]
        return [f"real total = {start};", *_nest(dims, [f"total = {step};"], "j"), f"{out} = total;"]

    def loop_over_entries(self, nodes: list[Compute]) -> Iterator[str]:
        dims = nodes[0].dims
        views = [view for node in nodes for view in self._from_memory(node)]
        flat = all(_pattern(view, dims) is not None for view in views) and all(
            not isinstance(node, Write) or node.target.strides == contiguous(dims) for node in nodes
        )
        shape = (prod(dims),) if flat else dims
        reads = {view: f"a{number}" for number, view in enumerate(dict.fromkeys(views))}
        yield "for (int64_t b = 0; b < rows; ++b) {"
        constants: list[str] = []
        inside: list[str] = []
        for view in dict.fromkeys(views):
            self._read(view, dims, flat, reads, constants, inside)
        for node in nodes:
            self._write(node, dims, flat, reads, constants, inside)
        sums = {self.names[total]: node for node in nodes for total in self.scheduled.sums.get(node, ())}
        constants += [f"real {name}_sum = 0;" for name in sums]
        inside += [f"{name}_sum += {self.names[node]}_v;" for name, node in sums.items()]
        yield from _indented(constants, 1).splitlines()
        yield from ("  " + line for line in _nest(shape, inside, sums=[f"{name}_sum" for name in sums]))
        yield from (f"  {name}[b] = {name}_sum;" for name in sums)
        yield "}"
        self.flops += prod(dims) * len(nodes)

    def _from_memory(self, node: Compute) -> list[View]:
        return [v for v in node.views if not self._in_register(v, node)]

    def _in_register(self, view: View, reader: Node) -> bool:
        levels = self.scheduled.levels
        return local(view, reader) and levels[view.node] == levels[reader]

    def _read(
        self,
        view: View,
        dims: tuple[int, ...],
        flat: bool,
        reads: dict[View, str],
        constants: list[str],
        inside: list[str],
    ) -> None:
        name, kind = reads[view], _c_type(view.node)
        row = f"{self.names[view.node]} + b * {self.row_stride(view.node)} + {view.offset}"
        strides = _broadcast(view, dims)
        if not any(strides):
            constants.append(f"const {kind} {name} = *({row});")
            return
        constants.append(f"const {kind} *const {name}_at = {row};")
        index = "i0" if flat else _index(strides)
        inside.append(f"const {kind} {name} = {name}_at[{index}];")

    def _write(
        self,
        node: Compute,
        dims: tuple[int, ...],
        flat: bool,
        reads: dict[View, str],
        constants: list[str],
        inside: list[str],
    ) -> None:
        name = self.names[node]
        arguments = [
            (f"{self.names[a.node]}_v" if self._in_register(a, node) else reads[a])
            if isinstance(a, View)
            else _literal(a)
            for a in node.arguments
        ]
        expression = OPERATIONS[node.name].expression.format(*arguments, type=_c_type(node))
        inside.append(f"const {_register_type(node)} {name}_v = {expression};")
        if isinstance(node, Write):
            target = node.target
            row = f"{self.names[target.node]} + b * {target.node.size} + {target.offset}"
            strides = target.strides
        elif node in self.scheduled.homes:
            row, strides = f"{name} + b * {node.size}", contiguous(dims)
        else:
            return
        constants.append(f"{_c_type(node)} *const {name}_to = {row};")
        inside.append(f"{name}_to[{'i0' if flat else _index(strides)}] = ({_c_type(node)}){name}_v;")


def _c_type(node: Node) -> str:
    return {torch.bool: "unsigned char", torch.int64: "int64_t"}.get(node.dtype, "real")


def _register_type(node: Node) -> str:
    return {torch.bool: "int", torch.int64: "int64_t"}.get(node.dtype, "real")


def _broadcast(view: View, dims: tuple[int, ...]) -> tuple[int, ...]:
    """A view's strides along the dimensions of a loop that it is broadcast to."""
    missing = len(dims) - len(view.dims)
    return (0,) * missing + tuple(
        0 if have == 1 else stride for have, stride in zip(view.dims, view.strides, strict=True)
    )


def _pattern(view: View, dims: tuple[int, ...]) -> str | None:
    """'one' or 'all' for a view that a flat loop can read; None for another."""
    strides = _broadcast(view, dims)
    if not any(strides):
        return "one"
    same = all(s == c for s, c, n in zip(strides, contiguous(dims), dims, strict=True) if n != 1)
    return "all" if same else None


def _index(strides: Sequence[int], letter: str = "i") -> str:
    terms = [f"{letter}{d} * {s}" if s != 1 else f"{letter}{d}" for d, s in enumerate(strides) if s]
    return " + ".join(terms) or "0"


def _nest(dims: Sequence[int], body: Sequence[str], letter: str = "i", sums: Sequence[str] = ()) -> list[str]:
    """Nested loops around some lines, which may add to some sums."""
    if not dims:
        return ["{", *("  " + line for line in body), "}"]
    lines: list[str] = []
    for d, n in enumerate(dims):
        if d == len(dims) - 1 and letter == "i":
            # Sums of floating-point numbers are put in another order only where that is asked for.
            lines.append(
                "  " * d + (f"#pragma omp simd reduction(+:{','.join(sums)})" if sums else "#pragma GCC ivdep")
            )
        lines.append("  " * d + f"for (int64_t {letter}{d} = 0; {letter}{d} < {n}; ++{letter}{d}) {{")
    lines += ["  " * len(dims) + line for line in body]
    return lines + ["  " * d + "}" for d in reversed(range(len(dims)))]


def _indented(lines: Sequence[str], depth: int) -> str:
    return "\n".join("  " * depth + line for line in lines)


def _literal(number: Scalar) -> str:
    """A number as C, exactly; None as an endless bound is written by who knows which."""
    if number is None:
        return "NAN"
    if isinstance(number, bool | int):
        return f"((real){int(number)})"
    if math.isnan(number):
        return "((real)NAN)"
    if math.isinf(number):
        return f"((real){'-' if number < 0 else ''}INFINITY)"
    return f"((real){number.hex()})"
