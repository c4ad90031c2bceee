"""Running programs with torch operations: one function made for each program, and Functions with their own backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from unrolled.recording.program import Custom, Op, Program, Ref, Size, resolved


def run_op(op: Op, values: Any, rows: int) -> Sequence[Tensor | None]:
    """Run one operation on the tensors of its values, for so many rows; its results, one for each output."""
    arguments = op.arguments(values, rows)
    if isinstance(op.target, Custom):
        return _RecordedFunction.run(op.target, rows, arguments)
    result = op.target(*arguments, **{name: resolved(arg, values, rows) for name, arg in op.kwargs})
    return result if isinstance(result, tuple | list) else (result,)


def all_values(program: Program, inputs: Sequence[Tensor], rows: int) -> dict[int, Tensor]:
    """Every value of a program, for so many rows."""
    values = dict(zip(program.inputs, inputs, strict=True))
    with torch.no_grad():
        for op in program.ops:
            results = run_op(op, values, rows)
            values |= {v: r for v, r in zip(op.outputs, results, strict=False) if v >= 0 and r is not None}
    return values


@lru_cache(maxsize=512)
def compiled(program: Program) -> Callable[..., tuple[Tensor | None, ...]]:
    """A function `(rows, *inputs) -> outputs` that runs a program; None for outputs that it does not have."""
    writer = Writer(program)
    return writer.compiled(writer.source(), "step")


class Writer:
    """Writes a program as the source of a Python function; interpreting it would cost as much as running it.

    Args:
        program: the program.

    Attributes:
        prefix: what the names of values begin with.
        rows: the name of how many rows there are.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.prefix, self.rows = "v", "rows"
        self.held: dict[str, Any] = {}

    def compiled(self, source: str, name: str, **known: Any) -> Callable[..., Any]:
        """The function of this name in a source, which may also mention what is known."""
        scope: dict[str, Any] = {"run": _RecordedFunction.run, **known, **self.held}
        exec(compile(source, f"<step of {len(self.program.ops)} operations>", "exec"), scope)
        function: Callable[..., Any] = scope[name]
        return function

    def source(self) -> str:
        """The source of the whole program as a function `step`."""
        inputs = ", ".join(["rows", *(f"v{v}" for v in self.program.inputs)])
        lines = [f"def step({inputs}):"]
        lines += [f"    {self._targets(op)} = {self._call(op)}" for op in self.program.ops]
        outputs = ", ".join(f"v{v}" if v >= 0 else "None" for v in self.program.outputs)
        return "\n".join([*lines, f"    return ({outputs}{',' if outputs else ''})"])

    def _targets(self, op: Op) -> str:
        names = [f"{self.prefix}{v}" if v >= 0 else "_" for v in op.outputs]
        several = isinstance(op.target, Custom) or len(names) > 1
        if not several:  # what it returns may be a list of one
            returns = op.target._schema.returns  # type: ignore[attr-defined]
            several = len(returns) == 1 and str(returns[0].type).startswith("List")
        return f"({', '.join(names)},)" if several else names[0]

    def _call(self, op: Op) -> str:
        arguments = [self._argument(arg) for arg in op.args]
        if isinstance(op.target, Custom):
            return f"run({self._hold(op.target)}, {self.rows}, [{', '.join(arguments)}])"
        named = [f"{name}={self._argument(arg)}" for name, arg in op.kwargs]
        return f"{self._hold(op.target)}({', '.join(arguments + named)})"

    def _argument(self, tree: Any) -> str:
        if isinstance(tree, Ref):
            return f"{self.prefix}{tree.value}"
        if isinstance(tree, Size):
            return f"({tree.per_row} * {self.rows} + {tree.constant})"
        if isinstance(tree, tuple | list):
            return f"[{', '.join(map(self._argument, tree))}]"
        if tree is None or type(tree) in (bool, int):
            return repr(tree)
        return self._hold(tree)

    def _hold(self, thing: Any) -> str:
        name = f"k{len(self.held)}"
        self.held[name] = thing
        return name


class _RecordedFunction(torch.autograd.Function):
    """A Function of a program: its recorded operations, and its own backward where autograd asks for it."""

    @classmethod
    def run(cls, custom: Custom, rows: int, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        """Its results, those that its backward reads included."""
        results = cls.apply(custom, rows, *arguments)
        return results if isinstance(results, tuple) else (results,)

    @staticmethod
    def forward(ctx: Any, custom: Custom, rows: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.custom, ctx.rows = custom, rows
        outputs = compiled(custom.forward)(rows, *inputs)
        ctx.save_for_backward(*inputs, *outputs)
        return tuple(output for output in outputs if output is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        custom: Custom = ctx.custom
        known = dict(zip((*custom.forward.inputs, *custom.forward.outputs), ctx.saved_tensors, strict=True))
        saved = [known[v] for v in custom.saved]
        tangents = grads[: len(custom.backward.inputs) - len(saved)]
        return (None, None, *compiled(custom.backward)(ctx.rows, *saved, *tangents))
