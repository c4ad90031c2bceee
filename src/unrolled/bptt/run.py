"""Running a plan over a sequence."""

from __future__ import annotations

from torch import nn

from unrolled import sequence
from unrolled.bptt.batched import Batched, Entry
from unrolled.bptt.glue import LoopUnderAutograd
from unrolled.bptt.segment import Stages, over_time
from unrolled.bptt.timed import Timed
from unrolled.bptt.walk import LoopRunner
from unrolled.plan.plan import StepPlan
from unrolled.trees import Tree, leaves, unflatten

__all__ = ["run_plan"]


def run_plan(
    plan: StepPlan, cell: nn.Module, inputs: Tree, state: Tree, context: Tree, runner: LoopRunner
) -> tuple[Tree, Tree]:
    """Run an unrolled cell by its plan.

    Args:
        plan: how.
        cell: the cell, whose tensors are read as they are now.
        inputs: `[T, B, ...]`.
        state: what copy 0 receives.
        context: what is the same at every step, or None.
        runner: the engine's way of running loops.

    Returns:
        The outputs, `[T, B, ...]`, and the last copy's state.
    """
    recording = plan.recording
    T, B = sequence.sizes(inputs)
    env: dict[int, Entry] = {v: Timed(leaf, T) for v, leaf in zip(recording.inputs, leaves(inputs), strict=True)}
    context_leaves = [] if context is None else leaves(context)
    externals = [external.fetch(cell) for external in recording.externals]
    env.update(zip(recording.fixed, [*context_leaves, *externals], strict=True))
    stages = Stages(
        plan.stages,
        plan.loops,
        recording.state,
        recording.next_state,
        Batched(recording.program, plan.rows, plan.coupled, T, B, affine=runner.affine),
        LoopUnderAutograd(plan.planned, runner),
        plan.read,
    )
    last = stages.run(env, leaves(state))
    # Outputs and states are the caller's to write into: never memory that someone else reads.
    outputs = [over_time(env[v], T).clone() for v in recording.outputs]
    last = [tensor.clone() if tensor is given else tensor for tensor, given in zip(last, leaves(state), strict=True)]
    return unflatten(recording.structures[3], outputs), unflatten(recording.structures[1], last)
