"""Reductions and running totals in C."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from unrolled.engine.native.memory import Memory
from unrolled.engine.native.text import c_type, index, nest
from unrolled.operations.nodes import Reduce, Scan, contiguous


def reduced(node: Reduce, memory: Memory) -> Iterator[str]:
    """The C for one row."""
    view, kind = node.source, c_type(node)
    kept = len(node.dims) - 1 if isinstance(node, Scan) else len(node.dims)
    write = _scanned if isinstance(node, Scan) else _reduced
    yield f"const {kind} *const x = {memory.row_of(view)};"
    yield f"{kind} *const y = {memory.pointer(node, written=True)} + b * {node.size};"
    yield from nest(node.dims[:kept], write(node, view.dims[kept:], view.strides[kept:], index(view.strides[:kept])))


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
