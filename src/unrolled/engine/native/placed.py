"""What reads, writes or finds entries at computed places, in C. Its helpers are in `places.c` and `ordering.c`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from unrolled.engine.native.memory import Memory
from unrolled.engine.native.text import c_type, index, nest
from unrolled.operations.nodes import At, Find, Put, Take, contiguous


def placed(node: Take | Put | Find, memory: Memory) -> Iterator[str]:
    """The C for one row."""
    if isinstance(node, Find):
        yield from _find(node, memory)
    elif isinstance(node, Take):
        yield from _take(node, memory)
    else:
        yield from _put(node, memory)


def _take(node: Take, memory: Memory) -> Iterator[str]:
    kind = c_type(node)
    yield f"const {kind} *const x = {memory.row_of(node.source)};"
    yield f"{kind} *const y = {memory.pointer(node, written=True)} + b * {node.size};"
    yield from _indices(node.at, memory)
    where = " + ".join([index(node.source.strides, "j"), *_places(node.at, memory)])
    yield from nest(node.dims, [f"y[{index(contiguous(node.dims), 'j')}] = x[{where}];"], "j")


def _put(node: Put, memory: Memory) -> Iterator[str]:
    """What is written comes in the order of its entries: the last of those for one place stays, and sums are alike."""
    kind, source = c_type(node), node.source
    yield f"const {kind} *const x = {memory.row_of(node.base)}, *const v = {memory.row_of(source)};"
    yield f"{kind} *const y = {memory.pointer(node, written=True)} + b * {node.size};"
    yield from nest(node.dims, [f"y[{index(contiguous(node.dims))}] = x[{index(node.base.strides)}];"])
    yield from _indices(node.at, memory)
    where = " + ".join([index(node.strides, "j"), *_places(node.at, memory)])
    new = f"v[{index(source.strides, 'j')}]"
    total = new if not node.added else f"*to + {new}" if node.dtype.is_floating_point else f"int_add(*to, {new})"
    yield from nest(source.dims, [f"{kind} *const to = y + {where};", f"*to = ({kind})({total});"], "j")


def _indices(at: Sequence[At], memory: Memory) -> Iterator[str]:
    for number, place in enumerate(at):
        yield f"const {c_type(place.index.node)} *const k{number} = {memory.row_of(place.index)};"


def _places(at: Sequence[At], memory: Memory) -> list[str]:
    return [
        f"{place.stride} * place_of(k{number}[{index(place.index.strides, 'j')}], {place.size}, "
        f"{int(place.from_end)}, {memory.declined()})"
        for number, place in enumerate(at)
    ]


def _find(node: Find, memory: Memory) -> Iterator[str]:
    source, count = node.source, node.dims[-1]
    name = f"{node.name}_of_{'integers' if source.dtype == torch.int64 else 'reals'}"
    yield f"const {c_type(source.node)} *const x = {memory.row_of(source)};"
    yield f"int64_t *const y = {memory.pointer(node, written=True)} + b * {node.size};"
    run = f"x + {index(source.strides[:-1], 'j')}, {source.strides[-1]}, {source.dims[-1]}"
    if node.wanted is None:
        out = f"y + {index(contiguous(node.dims)[:-1], 'j')}"
        yield from nest(node.dims[:-1], [f"{name}({out}, {run}, {count}, {memory.declined()});"], "j")
        return
    yield f"const {c_type(node.wanted.node)} *const w = {memory.row_of(node.wanted)};"
    one = f"y[{index(contiguous(node.dims), 'j')}] = {name}({run}, w[{index(node.wanted.strides, 'j')}]);"
    yield from nest(node.dims, [one], "j")
