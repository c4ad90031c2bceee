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
        self.prefix = "v"

    def function(self) -> Callable[[BatchedOps, MutableMapping[int, Entry]], None]:
        """The operations as a function; their results are added to `env`."""
        for number in self.ops:
            self._write(number, self.program.ops[number])
        head = ["def steps(batched, env):", "    extent = batched.extent"]
        head += ["    batch, all_rows = extent.batch, extent.rows"]
        source = "\n".join([*head, *self.lines])
        return self.compiled(source, "steps", product=product, TimeSeries=TimeSeries, Total=Total)

    def _write(self, number: int, op: Op) -> None:
        kinds = {v: self.kinds[v] for v in op.inputs}
        how = self.batched.way(number, op, kinds)
        made = [v for v in op.outputs if v >= 0]
        if how == "once":
            self._call_with("v", "batch", op)
            self.lines += [f"    env[{v}] = v{v}" for v in made]
            self.kinds |= dict.fromkeys(made, Tensor)
        elif how in ("folded", "contracted"):
            self._folded(op, kinds)
            self._call_with("f", "all_rows", op)
            self._keep_folded(made, contracted=how == "contracted")
        elif how == "sums":
            self._call_with("t", "batch", op)
            self.lines += [f"    env[{v}] = Total(t{v})" for v in made]
            self.kinds |= dict.fromkeys(made, Total)
        else:
            entries = ", ".join(f"{v}: env[{v}]" for v in dict.fromkeys(op.inputs))
            held = self._hold(op)
            self.lines.append(f"    env.update(zip({held}.outputs, batched.results({number}, {held}, {{{entries}}})))")
            self.kinds |= dict.fromkeys(made, self.batched.made(op, how))

    def _folded(self, op: Op, kinds: Mapping[int, type]) -> None:
        for v, kind in kinds.items():
            if f"f{v}" in self.had:
                continue
            rows = self.batched.rows.get(v)
            self.lines.append(f"    f{v} = env[{v}].folded({rows})" if kind is TimeSeries else f"    f{v} = env[{v}]")
            self.had.add(f"f{v}")

    def _keep_folded(self, made: Sequence[int], *, contracted: bool) -> None:
        for v in made:
            self.had.add(f"f{v}")
            if contracted:
                self.lines.append(f"    env[{v}] = Total(f{v})")
                self.had.discard(f"f{v}")
                self.kinds[v] = Total
            elif v in self.batched.rows:
                self.lines.append(f"    env[{v}] = TimeSeries(f{v}, extent, {self.batched.rows[v]})")
                self.kinds[v] = TimeSeries
            else:
                self.lines.append(f"    env[{v}] = f{v}")
                self.kinds[v] = Tensor

    def _call_with(self, prefix: str, rows: str, op: Op) -> None:
        """Write a call on values that are had in one way, those that are not yet first."""
        self.prefix, self.rows = prefix, rows
        for v in dict.fromkeys(op.inputs):
            if f"{prefix}{v}" not in self.had:
                tail = ".tensor" if self.kinds[v] is Total else ""
                self.lines.append(f"    {prefix}{v} = env[{v}]{tail}")
                self.had.add(f"{prefix}{v}")
        if prefix == "f" and op.name in _PRODUCTS and not op.kwargs:
            arguments = ", ".join(self._argument(arg) for arg in op.args)
            call = f"product({self._hold(op)}, batched, {arguments})"
        else:
            call = self._call(op)
        self.lines.append(f"    {self._targets(op)} = {call}")
        self.had.update(f"{prefix}{v}" for v in op.outputs if v >= 0)
