"""The run of one cell over a sequence: by its plan, or by the cell itself, copy after copy."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from unrolled.bptt.replay import AmbientState
from unrolled.bptt.segments import SegmentRunner, SequenceRun
from unrolled.cells.contract import CheckedStep
from unrolled.engine import reference
from unrolled.engine.plan_cache import PlanCache
from unrolled.execution.run import run_plan
from unrolled.lengths import Extent
from unrolled.plan.plan import StepPlan
from unrolled.recording.guards.environment import generators_around
from unrolled.tracing.vmap import run_mapped
from unrolled.trees import Tree, leaves, map_leaves


def run_of_cell(
    plans: PlanCache,
    cell: nn.Module,
    inputs: Tree,
    state: Tree,
    context: Tree,
    extent: Extent,
    *,
    reverse: bool,
    checked: bool = True,
) -> SequenceRun:
    """The run of a cell over what engines see of a batch, by a plan or by the reference.

    If it is checked, it ends by an `OtherAnswerError` where a step goes another way than was recorded.
    """
    by_reference = plans.engine == "reference"
    decision = None if by_reference else plans.look_up(cell, inputs, state, context, extent)
    given = inputs, state, context, extent, reverse, cell
    if decision is not None and decision.plan is not None:
        run = _by_plan(decision.plan, plans, cell, reverse=reverse, checked=checked)
        found = SequenceRun(run, *given, pure=True, engine=decision.engine)
        if not (decision.plan.reals.asked and decision.plan.draws):
            return found
        ambient = AmbientState([*leaves(inputs), *leaves(state)], generators_around(cell))
        return replace(found, rewind=partial(ambient.seed, ambient.random()))
    by_steps = _by_steps(cell, reverse=reverse)

    def run_or_mapped(inputs: Tree, state: Tree, context: Tree, part: Extent, start: int) -> tuple[Tree, Tree]:
        if not by_reference and not part.ragged:
            mapped = run_mapped(plans, cell, flipped(inputs, reverse), state, context)
            if mapped is not None:
                return flipped(mapped[0], reverse), mapped[1]
        return by_steps(inputs, state, context, part, start)

    return SequenceRun(run_or_mapped, *given, engine="reference" if decision is None else decision.engine)


def by_the_cell(run: SequenceRun) -> SequenceRun:
    """The same run by the reference."""
    return replace(run, run=_by_steps(run.module, reverse=run.reverse), pure=False, engine="reference", rewind=None)


def _by_plan(plan: StepPlan, plans: PlanCache, cell: nn.Module, *, reverse: bool, checked: bool) -> SegmentRunner:
    """Runs segments by a plan. What one has answered once it is not asked again, for a backward pass."""
    answered = set[int]()

    def run(inputs: Tree, state: Tree, context: Tree, part: Extent, start: int) -> tuple[Tree, Tree]:
        new = checked and start not in answered
        results = run_plan(plan, cell, inputs, state, context, plans.runner, part, reverse=reverse, checked=new)
        answered.add(start)
        return results

    return run


def _by_steps(cell: nn.Module, *, reverse: bool) -> SegmentRunner:
    """Runs segments by the reference."""

    def run(inputs: Tree, state: Tree, context: Tree, part: Extent, start: int) -> tuple[Tree, Tree]:
        step = CheckedStep(cell, context, part, start)
        return reference.run(lambda t, *values: step(start + t, *values), inputs, state, part, reverse=reverse)

    return run


def flipped(steps: Tree, reverse: bool) -> Tree:
    """Sequences `[T, ...]` flipped such that the first copy to run is copy 0, and back."""
    return map_leaves(lambda x: x.flip(0), steps) if reverse else steps
