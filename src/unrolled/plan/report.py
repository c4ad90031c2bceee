"""What a plan says to a person: each operation with its place and the reason, and what a step costs."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from unrolled.operations.operation import operation_of
from unrolled.plan.partition import Counter, Loop, Stage
from unrolled.plan.plan import StepPlan
from unrolled.recording.program import Op, Program, Ref
from unrolled.recording.record import Recording
from unrolled.results import Result
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
        loops: how many loops walk through time.
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
        return "\n".join([head, "", *self._table(), "", *self._costs()])

    def _table(self) -> list[str]:
        rows = [("operation", "result", "place", "why there"), *map(_cells, self.operations)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows
        ]

    def _costs(self) -> list[str]:
        total = max(sum(count for _, count in self.flops), 1)
        shares = ", ".join(f"{place} {count:,} ({count / total:.0%})" for place, count in self.flops)
        return [
            f"{self.loops} loop{'s' if self.loops != 1 else ''} through time",
            f"kept for the backward pass: {self.kept_bytes:,} bytes per step, {self.kept_bytes * self.T:,} in all",
            f"floating-point operations per step: {shares}",
        ]


def _cells(operation: PlannedOperation) -> tuple[str, str, str, str]:
    return operation.name, operation.result, operation.place, operation.reason


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
    names = _StateNames(plan.recording, state_names)
    program, sources = plan.recording.program, _sources(plan.recording, names)
    operations = tuple(
        PlannedOperation(
            op.name,
            _result(program, op),
            place,
            _reason(plan, number, place, names),
            tuple(sources[v] for v in op.inputs),
        )
        for number, (op, place) in enumerate(zip(program.ops, plan.places, strict=True))
    )
    flops = collections.Counter[str]()
    for op, place in zip(program.ops, plan.places, strict=True):
        flops[place] += _flops(program, op, B)
    loops = [stage for stage in plan.stages if isinstance(stage, Loop)]
    costs = tuple((place, flops[place]) for place in PLACES if flops[place])
    return Plan(
        cell, T, B, engine, why, operations, _results(plan.recording, sources, names), len(loops), _kept(plan, B), costs
    )


class _StateNames:
    """What the leaves of a state are called."""

    def __init__(self, recording: Recording, given: Sequence[str]) -> None:
        places = paths(recording.structures[1])
        known = len(given) == len(places)
        self.received = list(given) if known else [f"state{place}" for place in places]
        self.handed_on = [f"next {name}" for name in self.received]


def _sources(recording: Recording, state: _StateNames) -> dict[int, int | str]:
    """For each value the operation that makes it, or the name of what it is in the step's arguments and weights."""
    inputs, _, context, _ = recording.structures
    names = [*paths(inputs, "input"), *state.received, *paths(context, "context")]
    names += [external.name for external in recording.externals]
    return {**dict(zip(recording.program.inputs, names, strict=True)), **recording.program.producers()}


def _results(
    recording: Recording, sources: dict[int, int | str], state: _StateNames
) -> tuple[tuple[str, int | str], ...]:
    names = [*paths(recording.structures[3], "output"), *state.handed_on]
    made = zip(names, (*recording.outputs, *recording.next_state), strict=True)
    return tuple((name, sources[v]) for name, v in made if v in sources)


def _result(program: Program, op: Op) -> str:
    made = [program.values[v] for v in op.outputs if v >= 0]
    text = str(made[0]) if made else "nothing"
    return text if len(made) == 1 else f"{len(made)} x {text}"


def _reason(plan: StepPlan, number: int, place: str, state: _StateNames) -> str:
    counting = {
        plan.recording.next_state[leaf] for stage in plan.stages if isinstance(stage, Counter) for leaf in stage.leaves
    }
    if counting.intersection(plan.recording.program.ops[number].outputs):
        return "only counts: what every copy receives of it is known beforehand"
    mapped = f"; step by step, as {plan.coupled[number]}" if number in plan.coupled and place != "through" else ""
    if place == "once":
        return "depends on parameters and context only"
    if place == "before":
        return f"feeds a loop, but depends on no state of it{mapped}"
    if place == "after":
        return f"no later state needs it{mapped}"
    if number in plan.fused:
        return "light enough to be done in the loop while its operands are at hand"
    leaves = _loop_of(plan.stages, number).leaves
    return f"on the way from {', '.join(state.received[leaf] for leaf in leaves)} to the next one"


def _loop_of(stages: Sequence[Stage], number: int) -> Loop:
    return next(stage for stage in stages if isinstance(stage, Loop) and number in stage.ops)


def _kept(plan: StepPlan, rows: int) -> int:
    """Bytes of all that the backward of the loops reads of one step."""
    total = 0
    for planned in plan.planned.values():
        values = planned.backward.program.values
        total += sum(values[v].bytes(rows) for v in planned.backward.kept)
    return total


def _flops(program: Program, op: Op, rows: int) -> int:
    operation = operation_of(op)
    if operation.moves:
        return 0
    if not any(program.values[v].differentiable for v in (*op.inputs, *op.outputs) if v >= 0):
        return 0
    made = sum(prod(program.values[v].sizes(rows)) for v in op.outputs if v >= 0)
    if operation.factors is not None:
        left = op.args[operation.factors[0]]
        if isinstance(left, Ref):
            return 2 * made * program.values[left.value].sizes(rows)[-1]
    return made
