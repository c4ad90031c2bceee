"""The memory that a kernel reads and writes, as the parameters of a C function."""

from __future__ import annotations

from collections.abc import Mapping

from unrolled.engine.native.text import c_type
from unrolled.operations.nodes import Input, Node, View


def row_stride(node: Node, names: Mapping[Node, str]) -> str:
    """How far apart a node's rows are in memory, for who has the memory by these names."""
    return f"{names[node]}_row" if isinstance(node, Input) and node.kind != "state" else str(node.size)


class Memory:
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
