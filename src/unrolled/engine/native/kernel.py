"""Kernels in C: each is a function of its own, of the memory that it reads and writes.

A compiler's time grows faster than the length of a function: a step is many short ones. Names inside are given in the
order of use, so that kernels that do the same on other memory are the same text, and are compiled once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from unrolled.engine.native.convolved import convolved
from unrolled.engine.native.entries import EntryLoop
from unrolled.engine.native.memory import Memory
from unrolled.engine.native.placed import placed
from unrolled.engine.native.reduced import reduced
from unrolled.engine.native.schedule import Kernels
from unrolled.engine.native.text import index, nest
from unrolled.operations.nodes import (
    Compute,
    Convolution,
    Find,
    MatrixProduct,
    Node,
    Put,
    Reduce,
    Take,
    View,
    contiguous,
)


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
    memory = Memory(names, matrices)
    lines, flops = _row(nodes, kernels, memory)
    body = "\n".join("    " + line for line in lines)
    text = f"({memory.parameters()}) {{\n  for (int64_t b = 0; b < rows; ++b) {{\n{body}\n  }}\n}}\n"
    name = f"kernel_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return Kernel(f"static NOINLINE void {name}{text}", f"{name}({memory.passed()});", flops)


def _row(nodes: Sequence[Node], kernels: Kernels, memory: Memory) -> tuple[list[str], int]:
    """The C for one row, and its floating-point operations."""
    first = nodes[0]
    if isinstance(first, MatrixProduct):
        return list(_matrix_product(first, memory)), 2 * first.left.dims[-1] * first.size
    if isinstance(first, Convolution):
        return list(convolved(first, memory)), 2 * math.prod(first.matrix.dims[:-1]) * first.size
    if isinstance(first, Reduce):
        return list(reduced(first, memory)), first.source.node.size
    if isinstance(first, Take | Put | Find):
        return list(placed(first, memory)), first.size
    computations = [node for node in nodes if isinstance(node, Compute)]
    return list(EntryLoop(memory, kernels, computations).lines()), first.size * len(computations)


def _matrix_product(node: MatrixProduct, memory: Memory) -> Iterator[str]:
    (*many, N, M), (*_, K) = node.dims, node.left.dims
    out = f"out + {index(contiguous(node.dims)[:-2])}"
    x, y = (
        f"{name} + {index(view.strides[:-2])}, {view.strides[-2]}, {view.strides[-1]}"
        for name, view in (("x", node.left), ("y", node.right))
    )
    yield f"const real *const x = {memory.row_of(node.left)}, *const y = {memory.row_of(node.right)};"
    yield f"real *const out = {memory.pointer(node, written=True)} + b * {node.size};"
    yield from nest(many, [f"small_product({out}, {x}, {y}, {N}, {K}, {M});"])
