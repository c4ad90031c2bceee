"""A convolution in C: runs of what the windows see, times the rows of the matrix that they meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from unrolled.engine.native.memory import Memory
from unrolled.engine.native.text import index, merged, nest
from unrolled.operations.nodes import Convolution, contiguous


def convolved(node: Convolution, memory: Memory) -> Iterator[str]:
    """The C for one row. Windows side by side are the rows of a product, whose runs begin at some places of each."""
    seen, (N, *counts) = node.seen, node.dims
    windows = len(counts)
    (*outer, rows), by_window = _axes(counts, seen.strides[:windows])
    (*inner, K), by_entry = _axes(seen.dims[windows:], seen.strides[windows:])
    starts = [0]
    for n, step in zip(inner, by_entry, strict=False):
        starts = [start + i * step for start in starts for i in range(n)]
    yield f"static const int64_t starts[] = {{{', '.join(map(str, starts))}}};"
    yield f"const real *const x = {memory.row_of(seen)};"
    yield f"real *const y = {memory.pointer(node, written=True)} + b * {node.size};"
    out = f"y + {index(contiguous((*outer, rows))[:-1])}, {prod(counts)}"
    read = f"x + {index(by_window[:-1])}, {by_window[-1]}, starts, {len(starts)}"
    call = f"{memory.convolve()}({out}, {read}, {memory.packed(node.matrix)}, {rows}, {K}, {N});"
    yield from nest(outer, [call], "i")


def _axes(dims: Sequence[int], strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """Dimensions and their strides, fewer if some are one: the entries lie one after the other elsewhere too."""
    axes = merged(dims, [strides, contiguous(dims)]) or [(1, -1)]
    return [n for n, _ in axes], [strides[dim] for _, dim in axes]
