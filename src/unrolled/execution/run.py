"""Running a plan over a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from unrolled.execution.batched import Batched, Entry
from unrolled.execution.loop_function import LoopUnderAutograd
from unrolled.execution.protocol import LoopRunner
from unrolled.execution.stages import Stages, over_time
from unrolled.execution.timed import Timed
from unrolled.lengths import Extent
from unrolled.plan.plan import StepPlan
from unrolled.trees import Tree, leaves, unflatten


def run_plan(
    plan: StepPlan,
    cell: nn.Module,
    inputs: Tree,
    state: Tree,
    context: Tree,
    runner: LoopRunner,
    extent: Extent,
    *,
    reverse: bool = False,
) -> tuple[Tree, Tree]:
    """Run an unrolled cell by its plan.

    Args:
        plan: how.
        cell: the cell, whose tensors are read as they are now.
        inputs: `[T, B, ...]`; `[N, ...]` where rows end at different times.
        state: what the first copy receives.
        context: what is the same at every step, or None.
        runner: the engine's way of running loops.
        extent: how far the sequence reaches.
        reverse: whether the last copy comes first.

    Returns:
        The outputs, laid out as the inputs, and the last copy's state.
    """
    recording = plan.recording
    given = leaves(inputs)
    fold = 0 if extent.ragged else None
    env: dict[int, Entry] = {v: Timed(leaf, extent, fold) for v, leaf in zip(recording.inputs, given, strict=True)}
    context_leaves = [] if context is None else leaves(context)
    externals = [external.fetch(cell) for external in recording.externals]
    env.update(zip(recording.fixed, [*context_leaves, *externals], strict=True))
    stages = Stages(
        plan.stages,
        plan.loops,
        recording.state,
        recording.next_state,
        Batched(recording.program, plan.rows, plan.coupled, extent, affine=runner.affine),
        LoopUnderAutograd(plan.planned, runner),
        plan.read,
        reverse=reverse,
    )
    first = leaves(state)
    last = stages.run(env, first)
    outputs = [over_time(env[plan.copies.get(v, v)], extent, plan.rows.get(v)) for v in recording.outputs]
    read = [*given, *first, *context_leaves, *externals]
    copies = [v in plan.copies for v in recording.outputs] + [True] * len(last)
    results = list(_callers_own([*outputs, *last], copies, read))
    return unflatten(recording.structures[3], results[: len(outputs)]), unflatten(
        recording.structures[1], results[len(outputs) :]
    )


def _callers_own(tensors: Sequence[Tensor], copies: Sequence[bool], read: Sequence[Tensor]) -> Iterator[Tensor]:
    """Outputs and states are the caller's to write into: never memory that someone else reads, or a backward pass."""
    others = {tensor.untyped_storage().data_ptr() for tensor in read}
    for tensor, copy in zip(tensors, copies, strict=True):
        memory = tensor.untyped_storage().data_ptr()
        own = (copy or not tensor.requires_grad) and memory not in others and 0 not in tensor.stride()
        others.add(memory)
        yield tensor if own else tensor.clone()
