"""Fusing: work that a compiled loop does though it need not, because memory for all copies would cost more.

What feeds a loop can be done ahead of time for all copies at once, and what no later state needs, afterwards. For a
product of large matrices that is right. Light work, though, is over sooner than its operands are fetched: a compiled
loop does it while they are at hand. So does it with sums over all rows and steps, of which it keeps a running total.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from unrolled.operations.operation import Cost, operation_of
from unrolled.plan.partition import Draws, Loop, Stage, Steps
from unrolled.recording.program import Op, Program, Size

_NUMBERS = (torch.float32, torch.float64, torch.bool)

WEIGHT_BYTES = 512 << 10
"""How large the weights of a loop may be together with those of the products fused into it: they are
read at every step, and have to stay in a core's own cache."""

LEAST_ROWS = 4
"""With fewer rows a product of one step reads its weights for little work: only small ones are worth it."""


def fused(
    program: Program,
    stages: Sequence[Stage],
    state: Sequence[int],
    coupled: Collection[int],
    fixed: Collection[int],
    batch_size: int,
    sums: Collection[int] = (),
) -> list[Stage]:
    """Stages whose loops also do what is worth fusing into them.

    Args:
        program: the step.
        stages: its stages.
        state: the values of the state's leaves.
        coupled: operations that do not act row by row.
        fixed: values that are the same at every step.
        batch_size: B.
        sums: values of which only the sum over all steps is asked for.
    """
    found = list(stages)
    fusing = _Fusing(program, coupled, set(fixed), batch_size, sums)
    for number, stage in enumerate(found):
        if not isinstance(stage, Loop):
            continue
        inside, totals = set(stage.ops), set[int]()
        there = fusing.there(found[:number], {state[leaf] for later in found[number + 1 :] for leaf in later.leaves})
        before = -1
        while before != len(inside):  # what follows may be the last reader of what feeds
            before = len(inside)
            for earlier in reversed(found[:number]):
                fusing.feed(inside, earlier)
            for later in found[number + 1 :]:
                fusing.follow(inside, totals, later, there)
        moved = (inside | totals).difference(stage.ops)
        found = [replace(other, ops=tuple(n for n in other.ops if n not in moved)) for other in found]
        found[number] = replace(stage, ops=tuple(sorted(inside)), totals=tuple(sorted(totals)))
    return [stage for stage in found if not isinstance(stage, Steps) or stage.ops]


class _Fusing:
    def __init__(
        self, program: Program, coupled: Collection[int], fixed: set[int], batch_size: int, sums: Collection[int]
    ) -> None:
        self.program, self.coupled, self.fixed, self.batch_size = program, coupled, fixed, batch_size
        self.sums = sums
        self.outputs = {v for v in program.outputs if v >= 0}
        self.readers: dict[int, set[int]] = {}
        for n, op in enumerate(program.ops):
            for v in op.inputs:
                self.readers.setdefault(v, set()).add(n)

    def there(self, before: Sequence[Stage], received_later: Collection[int]) -> set[int]:
        """What a loop can read: not a state that is known only after it, as what it made a step before."""
        steps = [n for earlier in before if isinstance(earlier, Steps | Draws) for n in earlier.ops]
        made = {v for n in steps for v in self.program.ops[n].outputs}
        return made.union(self.program.inputs, self.fixed).difference(received_later)

    def feed(self, inside: set[int], stage: Stage) -> None:
        """Take in operations that nobody but this loop reads."""
        for n in reversed(stage.ops if isinstance(stage, Steps) and not stage.once else ()):
            op = self.program.ops[n]
            readers = set().union(*(self.readers.get(v, set()) for v in op.outputs))
            fits = self._is_light(n) or self._small_product(n, inside)
            if fits and readers <= inside and self.outputs.isdisjoint(op.outputs):
                inside.add(n)

    def follow(self, inside: set[int], totals: set[int], stage: Stage, there: set[int]) -> None:
        """Take in operations that read what the loop made and what is there, and totals of it."""
        made = {v for n in inside for v in self.program.ops[n].outputs}
        for n in stage.ops if isinstance(stage, Steps) and not stage.once else ():
            op = self.program.ops[n]
            if not made.intersection(op.inputs) or not (made | there).issuperset(op.inputs):
                continue
            if self._is_light(n):
                inside.add(n)
                made.update(op.outputs)
            elif self._is_total(op):
                totals.add(n)

    def _is_total(self, op: Op) -> bool:
        """Whether an operation adds up the rows `[B, N]` of a value, and only the sum over all steps is asked for."""
        if op.base != "sum" or not set(op.outputs).issubset(self.sums):
            return False
        source = self.program.values[op.inputs[0]]
        over_rows = len(op.args) > 1 and tuple(op.args[1] or ()) == (0,)
        return over_rows and len(source.shape) == 2 and source.shape[0] == Size(1, 0) and source.dtype in _NUMBERS[:2]

    def _is_light(self, n: int) -> bool:
        op = self.program.ops[n]
        if n in self.coupled or operation_of(op).cost > Cost.FUSED:
            return False
        return all(self.program.values[v].dtype in _NUMBERS for v in (*op.inputs, *op.outputs) if v >= 0)

    def _small_product(self, n: int, inside: set[int]) -> bool:
        op = self.program.ops[n]
        if operation_of(op).cost != Cost.MATRIX or n in self.coupled:
            return False
        most = WEIGHT_BYTES if self.batch_size >= LEAST_ROWS else WEIGHT_BYTES // 4
        return sum(self._weight_bytes(m) for m in {*inside, n}) <= most

    def _weight_bytes(self, n: int) -> int:
        op = self.program.ops[n]
        if operation_of(op).cost != Cost.MATRIX:
            return 0
        fixed = [self.program.values[v] for v in op.inputs if v in self.fixed]
        return sum(value.bytes(1) for value in fixed if len(value.shape) == 2)
