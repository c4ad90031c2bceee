"""What a plan says to a person: each operation with its place and the reason, and what a step costs."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from unrolled.operations.operation import operation_of
from unrolled.plan.partition import Counter, Draws, Loop
from unrolled.plan.plan import StepPlan
from unrolled.recording.program import Op, Ref, Value
from unrolled.results import Result, aligned
from unrolled.trees import paths

PLACES = ("once", "before", "through", "after")


@dataclass(frozen=True)
class PlannedOperation:
    """One operation of the step.

    Attributes:
        name: as torch calls it: 'aten.mm'.
        result: dtype and shape of what it makes.
        place: where it runs: one of `PLACES`.
        reason: why not elsewhere.
        reads: what it reads: operations by their number, and by its name what the step is given ('input', 'weight_hh').
    """

    name: str
    result: str
    place: str
    reason: str
    reads: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class Plan(Result):
    """How an unrolled network will be run; `print` it.

    Attributes:
        cell: the cell's name.
        T: copies.
        B: batch size.
        engine: what runs it.
        why: why this engine and no faster one.
        operations: the step's operations, in order; none where the step could not be recorded.
        results: what leaves the step: its name ('output', 'next state[0]'), and the operation that made it, or the name
            of the tensor that it is.
        loops: how many loops run through time.
        kept_bytes: what a backward pass keeps of one step, in bytes.
        flops: floating-point operations of one step by place.
        schedule: under a memory budget what the call goes by: bytes promised, extra steps, the time expected.
    """

    cell: str
    T: int
    B: int
    engine: str
    why: str
    operations: tuple[PlannedOperation, ...] = ()
    results: tuple[tuple[str, int | str], ...] = ()
    loops: int = 0
    kept_bytes: int = 0
    flops: tuple[tuple[str, int], ...] = ()
    schedule: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, as JSON takes them."""
        return {**dataclasses.asdict(self), "flops": dict(self.flops)}

    def __str__(self) -> str:
        head = f"{self.cell}, {self.T} copies, batch {self.B}: engine {self.engine} ({self.why})"
        head += f"\n{self.schedule}" if self.schedule else ""
        if not self.operations:
            return f"{head}\nevery copy is run by itself: nothing could be moved"
        cells = [(op.name, op.result, op.place, op.reason) for op in self.operations]
        table = aligned([("operation", "result", "place", "why there"), *cells])
        return "\n".join([head, "", *table, "", *self._costs()])

    def _costs(self) -> list[str]:
        total = max(sum(count for _, count in self.flops), 1)
        shares = ", ".join(f"{place} {count:,} ({count / total:.0%})" for place, count in self.flops)
        return [
            f"{self.loops} loop{'s' if self.loops != 1 else ''} through time",
            f"kept for the backward pass: {self.kept_bytes:,} bytes per step, {self.kept_bytes * self.T:,} in all",
            f"floating-point operations per step: {shares}",
        ]


def report(plan: StepPlan, cell: str, T: int, B: int, engine: str, why: str, state_names: Sequence[str] = ()) -> Plan:
    """Say what a plan does, for so many copies and rows.

    Args:
        plan: the plan.
        cell: what the cell is called.
        T: copies.
        B: rows.
        engine: which engine runs it.
        why: why no faster one.
        state_names: what the cell calls the leaves of its state; without them they go by their place.
    """
    reporter = _Reporter(plan, B, state_names)
    operations = tuple(map(reporter.operation, range(len(plan.places))))
    loops = sum(isinstance(stage, Loop) for stage in plan.stages)
    return Plan(cell, T, B, engine, why, operations, reporter.results(), loops, reporter.kept_bytes(), reporter.flops())


class _Reporter:
    """Says what a plan does, for so many rows."""

    def __init__(self, plan: StepPlan, rows: int, state_names: Sequence[str]) -> None:
        self.plan, self.rows = plan, rows
        self.recording, self.program = plan.reals, plan.reals.program
        inputs, state, context, _ = self.recording.structures
        leaves = paths(state, "state")
        leaves = list(state_names) if len(state_names) == len(leaves) else leaves
        whole, values = plan.recording, plan.recording.program.values
        taken = [values[v] for v in whole.program.inputs]
        names = _by_part([*paths(inputs, "input"), *leaves, *paths(context, "context")], taken)
        a, b, _ = self.recording.counts
        self.state = names[a : a + b]
        names += [external.name for external in self.recording.externals]
        # For each value the operation that makes it, or the name of what it is in the step's arguments and weights.
        self.sources: dict[int, int | str] = {
            **dict(zip(self.program.inputs, names, strict=True)),
            **self.program.producers(),
        }

    def operation(self, number: int) -> PlannedOperation:
        """An operation with its place and the reason."""
        op = self.program.ops[number]
        made = [self.program.values[v] for v in op.outputs if v >= 0]
        result = str(made[0]) if made else "nothing"
        return PlannedOperation(
            op.name,
            result if len(made) == 1 else f"{len(made)} x {result}",
            self.plan.places[number],
            self.reason(number),
            tuple(self.sources[v] for v in op.inputs),
        )

    def reason(self, number: int) -> str:
        """Why an operation runs where it does."""
        plan, place = self.plan, self.plan.places[number]
        counters = [stage.leaves[0] for stage in plan.stages if isinstance(stage, Counter)]
        if not {self.recording.next_state[leaf] for leaf in counters}.isdisjoint(self.program.ops[number].outputs):
            return "only counts: what every copy receives of it is known beforehand"
        mapped = f"; step by step, as {plan.coupled[number]}" if number in plan.coupled else ""
        if place == "once":
            return "depends on parameters and context only"
        if any(number in stage.ops for stage in plan.stages if isinstance(stage, Draws)):
            return "random numbers, drawn step by step in the order of the loop"
        if place == "before":
            return f"feeds a loop, but depends on no state of it{mapped}"
        if place == "after":
            return f"no later state needs it{mapped}"
        if number in plan.fused:
            return "light enough to be done in the loop while its operands are at hand"
        loop = next(stage for stage in plan.stages if number in stage.ops)
        return f"on the way from {', '.join(self.state[leaf] for leaf in loop.leaves)} to the next one"

    def results(self) -> tuple[tuple[str, int | str], ...]:
        """What leaves the step, by name, and where it comes from."""
        outputs = [self.plan.recording.program.values[v] for v in self.plan.recording.outputs]
        names = _by_part(paths(self.recording.structures[3], "output"), outputs)
        names += [f"next {name}" for name in self.state]
        values = (*self.recording.outputs, *self.recording.next_state)
        return tuple((name, self.sources[v]) for name, v in zip(names, values, strict=True) if v in self.sources)

    def kept_bytes(self) -> int:
        """What the backward of the loops reads of one step."""
        backwards = [planned.backward for planned in self.plan.planned.values()]
        return sum(backward.program.values[v].bytes(self.rows) for backward in backwards for v in backward.kept)

    def flops(self) -> tuple[tuple[str, int], ...]:
        """Floating-point operations of one step by place."""
        found = collections.Counter[str]()
        for op, place in zip(self.program.ops, self.plan.places, strict=True):
            found[place] += self.flops_of(op)
        return tuple((place, found[place]) for place in PLACES if found[place])

    def flops_of(self, op: Op) -> int:
        """Floating-point operations of an operation."""
        values, operation = self.program.values, operation_of(op)
        if operation.moves or not any(values[v].differentiable for v in (*op.inputs, *op.outputs) if v >= 0):
            return 0
        made = sum(prod(values[v].sizes(self.rows)) for v in op.outputs if v >= 0)
        if operation.factors is not None:
            left = op.args[operation.factors[0]]
            if isinstance(left, Ref):
                return 2 * made * values[left.value].sizes(self.rows)[-1]
        return made


def _by_part(names: Sequence[str], values: Sequence[Value]) -> list[str]:
    """Names of values, and of a complex one both of its parts'."""
    parts = [(".real", ".imag") if value.dtype.is_complex else ("",) for value in values]
    return [name + part for name, both in zip(names, parts, strict=False) for part in both]
