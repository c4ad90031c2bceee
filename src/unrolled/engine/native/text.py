"""C as text: types, places of entries, loops, numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from unrolled.operations.nodes import Node, Scalar

_TYPES = {
    torch.bool: "unsigned char",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
}


def c_type(node: Node) -> str:
    """The type of a node's entries in memory."""
    return _TYPES.get(node.dtype, "real")


def index(strides: Sequence[int], letter: str = "i") -> str:
    """Where an entry lies, by the counters of loops."""
    terms = [f"{letter}{d} * {s}" if s != 1 else f"{letter}{d}" for d, s in enumerate(strides) if s]
    return " + ".join(terms) or "0"


def merged(dims: Sequence[int], strides: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Dimensions that are one loop: all that is read and written goes on from row to row of them as inside of a row."""
    found: list[tuple[int, int]] = []
    for dim, n in enumerate(dims):
        if n == 1:
            continue
        if found and all(steps[found[-1][1]] == n * steps[dim] for steps in strides):
            found[-1] = found[-1][0] * n, dim
        else:
            found.append((n, dim))
    return found


def nest(dims: Sequence[int], body: Sequence[str], letter: str = "i", sums: Sequence[str] = ()) -> list[str]:
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


def literal(number: Scalar, *, whole: bool = False) -> str:
    """A number as C, exactly: floating-point, or an integer; a bound that is not there is NaN."""
    if number is None:
        return "NAN"
    if whole and isinstance(number, bool | int):
        return f"(-INT64_C({2**63 - 1}) - 1)" if number == -(2**63) else f"INT64_C({int(number)})"
    if isinstance(number, bool | int):
        return f"((real){int(number)})"
    if math.isnan(number):
        return "((real)NAN)"
    if math.isinf(number):
        return f"((real){'-' if number < 0 else ''}INFINITY)"
    return f"((real){number.hex()})"
