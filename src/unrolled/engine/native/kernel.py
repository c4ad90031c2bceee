"""Kernels in C: each is a function of its own, of the memory that it reads and writes.

A compiler's time grows faster than the length of a function: a step is many short ones. Names inside are given in the
order of use, so that kernels that do the same on other memory are the same text, and are compiled once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from unrolled.engine.native.convolved import convolved
from unrolled.engine.native.placed import placed
from unrolled.engine.native.schedule import Kernels
from unrolled.engine.native.text import c_type, index, literal, merged, nest
from unrolled.operations.nodes import (
    Compute,
    Convolution,
    Find,
    Input,
    MatrixProduct,
    Node,
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


@dataclass(frozen=True)
class Kernel:
    """A kernel as a C function that goes over the rows.

    Attributes:
        text: the function.
        call: the statement that calls it.
        flops: floating-point operations per row, roughly.
    """

    text: str
    call: str
    flops: int


def kernel(nodes: Sequence[Node], kernels: Kernels, names: Mapping[Node, str], matrices: dict[View, int]) -> Kernel:
    """Write a kernel as a function.

    Args:
        nodes: one that is alone in its kernel, or element-wise computations of one shape, in order.
        kernels: the loop that it belongs to.
        names: by which the caller has the memory of nodes.
        matrices: the numbers of those that it has packed, to which more are added.
    """
    memory = _Memory(names, matrices)
    lines, flops = _row(nodes, kernels, memory)
    body = "\n".join("    " + line for line in lines)
    text = f"({memory.parameters()}) {{\n  for (int64_t b = 0; b < rows; ++b) {{\n{body}\n  }}\n}}\n"
    name = f"kernel_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return Kernel(f"static NOINLINE void {name}{text}", f"{name}({memory.passed()});", flops)


def _row(nodes: Sequence[Node], kernels: Kernels, memory: _Memory) -> tuple[list[str], int]:
    """The C for one row, and its floating-point operations."""
    first = nodes[0]
    if isinstance(first, MatrixProduct):
        return list(_matrix_product(first, memory)), 2 * first.left.dims[-1] * first.size
    if isinstance(first, Convolution):
        return list(convolved(first, memory)), 2 * math.prod(first.matrix.dims[:-1]) * first.size
    if isinstance(first, Reduce):
        return list(_reduction(first, memory)), first.source.node.size
    if isinstance(first, Take | Put | Find):
        return list(placed(first, memory)), first.size
    computations = [node for node in nodes if isinstance(node, Compute)]
    return list(_EntryLoop(memory, kernels, computations).lines()), first.size * len(computations)


def row_stride(node: Node, names: Mapping[Node, str]) -> str:
    """How far apart a node's rows are in memory, for who has the memory by these names."""
    return f"{names[node]}_row" if isinstance(node, Input) and node.kind != "state" else str(node.size)


class _Memory:
    """The memory of nodes as a function has it: by parameters, in the order in which they are asked for."""

    def __init__(self, names: Mapping[Node, str], matrices: dict[View, int]) -> None:
        self._names, self._matrices = names, matrices
        self._parameters = {"rows": ("const int64_t", "rows")}

    def pointer(self, node: Node, *, written: bool = False) -> str:
        """The name of a node's memory."""
        const = "" if written else "const "
        return self._parameter(self._names[node], f"{const}{c_type(node)} *const")

    def row_of(self, view: View, *, written: bool = False) -> str:
        """Where row b of a view begins."""
        stride, at = row_stride(view.node, self._names), self.pointer(view.node, written=written)
        by_row = stride if stride.isdigit() else self._parameter(stride, "const int64_t")
        return f"{at} + b * {by_row} + {view.offset}"

    def declined(self) -> str:
        """Where it is noted that the numbers are declined."""
        return self._parameter("task->declined", "int64_t *const")

    def packed(self, matrix: View) -> str:
        """A matrix in panels."""
        number = self._matrices.setdefault(matrix, len(self._matrices))
        return self._parameter(f"task->packed[{number}]", "const real *const")

    def convolve(self) -> str:
        """The function of the runtime."""
        return self._parameter("task->convolve", "const convolution")

    def _parameter(self, passed: str, kind: str) -> str:
        return self._parameters.setdefault(passed, (kind, f"p{len(self._parameters)}"))[1]

    def parameters(self) -> str:
        """The function's parameters."""
        return ", ".join(f"{kind} {name}" for kind, name in self._parameters.values())

    def passed(self) -> str:
        """What is passed for them."""
        return ", ".join(self._parameters)


class _EntryLoop:
    """Element-wise computations of one shape: what is done for each row, and a loop over its entries.

    Args:
        memory: the memory of nodes.
        kernels: the loop that they belong to.
        nodes: the computations, in order.

    Attributes:
        axes: the loops over a row's entries: how many there are, and the last of the dimensions that each goes over.
        reads: for each view that is read from memory the name of the variable that it is read into.
        made: for each computation the name of the variable that has its result.
        before: lines for each row.
        inside: lines for each entry.
    """

    def __init__(self, memory: _Memory, kernels: Kernels, nodes: Sequence[Compute]) -> None:
        self.memory, self.kernels, self.nodes, self.dims = memory, kernels, nodes, nodes[0].dims
        read = (view for node in nodes for view in node.views if not self.kernels.in_register(view, node))
        views = dict.fromkeys(read)
        written = [node.target.strides for node in nodes if isinstance(node, Write)]
        read_at = [view.broadcast(self.dims).strides for view in views]
        self.axes = merged(self.dims, [contiguous(self.dims), *written, *read_at])
        self.reads = {view: f"a{number}" for number, view in enumerate(views)}
        self.made = {node: f"v{number}" for number, node in enumerate(nodes)}
        self.before: list[str] = []
        self.inside: list[str] = []

    def lines(self) -> Iterator[str]:
        """The C for one row."""
        for view, name in self.reads.items():
            self._read(view, name)
        for node in self.nodes:
            self._compute(node)
        totals = [(node, total) for node in self.nodes for total in self.kernels.sums.get(node, ())]
        sums = [f"sum{number}" for number in range(len(totals))]
        self.before += [f"real {name} = 0;" for name in sums]
        self.inside += [f"{name} += {self.made[node]};" for name, (node, _) in zip(sums, totals, strict=True)]
        yield from self.before
        yield from nest([n for n, _ in self.axes], self.inside, sums=sums)
        for name, (_, total) in zip(sums, totals, strict=True):
            yield f"{self.memory.pointer(total, written=True)}[b] = {name};"

    def _at(self, strides: Sequence[int]) -> str:
        return index([strides[dim] for _, dim in self.axes])

    def _read(self, view: View, name: str) -> None:
        kind, row, strides = c_type(view.node), self.memory.row_of(view), view.broadcast(self.dims).strides
        if not any(strides):
            self.before.append(f"const {kind} {name} = *({row});")
            return
        self.before.append(f"const {kind} *const {name}_at = {row};")
        self.inside.append(f"const {kind} {name} = {name}_at[{self._at(strides)}];")

    def _argument(self, argument: View | Scalar, node: Compute) -> str:
        if not isinstance(argument, View):
            return literal(argument, whole=node.whole_numbers)
        if self.kernels.in_register(argument, node):
            return self.made[argument.node]  # type: ignore[index]
        return self.reads[argument]

    def _compute(self, node: Compute) -> None:
        name, kind = self.made[node], c_type(node)
        arguments = [self._argument(argument, node) for argument in node.arguments]
        operation = OPERATIONS[node.name]
        expression = operation.integers if node.whole_numbers else operation.expression
        declined = self.memory.declined() if "{declined}" in expression else ""
        expression = expression.format(*arguments, type=kind, declined=declined)
        register = "int" if node.dtype == torch.bool else kind
        self.inside.append(f"const {register} {name} = {expression};")
        if isinstance(node, Write):
            target = node.target
        elif node in self.kernels.stored:
            target = View(node, self.dims, contiguous(self.dims))
        else:
            return
        self.before.append(f"{kind} *const {name}_to = {self.memory.row_of(target, written=True)};")
        self.inside.append(f"{name}_to[{self._at(target.strides)}] = ({kind}){name};")


def _matrix_product(node: MatrixProduct, memory: _Memory) -> Iterator[str]:
    (*many, N, M), (*_, K) = node.dims, node.left.dims
    out = f"out + {index(contiguous(node.dims)[:-2])}"
    x, y = (
        f"{name} + {index(view.strides[:-2])}, {view.strides[-2]}, {view.strides[-1]}"
        for name, view in (("x", node.left), ("y", node.right))
    )
    yield f"const real *const x = {memory.row_of(node.left)}, *const y = {memory.row_of(node.right)};"
    yield f"real *const out = {memory.pointer(node, written=True)} + b * {node.size};"
    yield from nest(many, [f"small_product({out}, {x}, {y}, {N}, {K}, {M});"])


def _reduction(node: Reduce, memory: _Memory) -> Iterator[str]:
    view, kind = node.source, c_type(node)
    kept = len(node.dims) - 1 if isinstance(node, Scan) else len(node.dims)
    reduced = _scanned if isinstance(node, Scan) else _reduced
    yield f"const {kind} *const x = {memory.row_of(view)};"
    yield f"{kind} *const y = {memory.pointer(node, written=True)} + b * {node.size};"
    yield from nest(node.dims[:kept], reduced(node, view.dims[kept:], view.strides[kept:], index(view.strides[:kept])))


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
