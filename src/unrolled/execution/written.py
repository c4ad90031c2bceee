"""Operations outside of loops written as one Python function, for entries of known kinds.

How an operation is run on a segment (once, on all rows of all steps at once, on a sum) follows from what is known of
the values that it reads: the same at every step, a series, or a sum. To find that out at every call takes longer than
most of these operations do on a short sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from unrolled.execution.series import Entry, TimeSeries, Total
from unrolled.recording.interpret import Writer
from unrolled.recording.program import Op

if TYPE_CHECKING:
    from unrolled.execution.batched import BatchedOps

_PRODUCTS = ("aten.mm", "aten.addmm")
_AT_ONCE: Mapping[str, tuple[str, str, type]] = {
    "once": ("v", "batch", Tensor),
    "folded": ("f", "all_rows", TimeSeries),
    "contracted": ("f", "all_rows", Total),
    "sums": ("t", "batch", Total),
}
"""The ways of `BatchedOps.way` that are one call: how values are had for it, for how many rows, and what it makes."""


def product(op: Op, batched: BatchedOps, *tensors: Tensor) -> Tensor:
    """A product by the engine's own kernel, if it has one and takes it; else by torch."""
    *bias, x, y = tensors
    if batched.affine is not None and not (bias and bias[0].dim() != 1):
        found = batched.affine(x, y, bias[0] if bias else None)
        if found is not None:
            return found
    result: Tensor = op.target(*tensors)
    return result


class StepsWriter(Writer):
    """Writes operations as a function `(batched, env)`.

    A value's name says how it is had: `v3` is the same at every step, `f3` has time folded into its rows, `t3` is a
    sum.

    Args:
        batched: the step; that of any call of the plan.
        ops: the operations.
        kinds: what is known of each value that they read: the type of its entry.
    """

    def __init__(self, batched: BatchedOps, ops: Sequence[int], kinds: Mapping[int, type]) -> None:
        super().__init__(batched.program)
        self.batched, self.ops, self.kinds = batched, ops, {**kinds}
        self.lines: list[str] = []
        self.had: set[str] = set()

    def function(self) -> Callable[[BatchedOps, MutableMapping[int, Entry]], None]:
        """The operations as a function; their results are added to `env`."""
        for number in self.ops:
            self._write(number, self.program.ops[number])
        head = ["def steps(batched, env):", "    extent = batched.extent"]
        head += ["    batch, all_rows = extent.batch, extent.rows"]
        source = "\n".join([*head, *self.lines])
        return self.compiled(source, "steps", product=product, TimeSeries=TimeSeries, Total=Total)

    def _write(self, number: int, op: Op) -> None:
        way = self.batched.way(number, op, {v: self.kinds[v] for v in op.inputs})
        made = [v for v in op.outputs if v >= 0]
        if way in _AT_ONCE:
            self._call_at_once(op, *_AT_ONCE[way])
            for v in made:
                self._keep(*_AT_ONCE[way], v)
        else:
            held, entries = self._hold(op), ", ".join(f"{v}: env[{v}]" for v in dict.fromkeys(op.inputs))
            self.lines.append(f"    env.update(zip({held}.outputs, batched.{way}({held}, {{{entries}}})))")
            self.kinds |= dict.fromkeys(made, self.batched.made(op, way))

    def _call_at_once(self, op: Op, prefix: str, rows: str, _: type) -> None:
        """Write a call on values that are had in one way, those that are not yet first."""
        self.prefix, self.rows = prefix, rows
        for v in dict.fromkeys(op.inputs):
            if f"{prefix}{v}" not in self.had:
                self.lines.append(f"    {prefix}{v} = {self._read(v)}")
        if prefix == "f" and op.name in _PRODUCTS and not op.kwargs:
            arguments = ", ".join(self._argument(arg) for arg in op.args)
            call = f"product({self._hold(op)}, batched, {arguments})"
        else:
            call = self._call(op)
        self.lines.append(f"    {self._targets(op)} = {call}")
        self.had.update(f"{prefix}{v}" for v in (*op.inputs, *op.outputs) if v >= 0)

    def _read(self, v: int) -> str:
        if self.kinds[v] is TimeSeries:
            return f"env[{v}].folded({self.batched.rows.get(v)})"
        return f"env[{v}].tensor" if self.kinds[v] is Total else f"env[{v}]"

    def _keep(self, prefix: str, _: str, kind: type, v: int) -> None:
        """Write that a result is added to `env`; it is the same at every step if it has no rows to fold."""
        self.kinds[v] = kind = Tensor if kind is TimeSeries and v not in self.batched.rows else kind
        made = f"{prefix}{v}"
        if kind is TimeSeries:
            made = f"TimeSeries({made}, extent, {self.batched.rows[v]})"
        elif kind is Total:
            made = f"Total({made})"
        self.lines.append(f"    env[{v}] = {made}")
