"""Running a plan over a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from unrolled.execution.batched import BatchedOps
from unrolled.execution.loop_function import LoopUnderAutograd
from unrolled.execution.protocol import LoopRunner
from unrolled.execution.series import Entry, TimeSeries
from unrolled.execution.stages import SegmentStages
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
    sequences = leaves(inputs)
    fold = 0 if extent.ragged else None
    env: dict[int, Entry] = {
        v: TimeSeries(leaf, extent, fold) for v, leaf in zip(recording.inputs, sequences, strict=True)
    }
    context_leaves = [] if context is None else leaves(context)
    externals = [external.fetch(cell) for external in recording.externals]
    env.update(zip(recording.fixed, [*context_leaves, *externals], strict=True))
    batched = BatchedOps(recording.program, plan.rows, plan.coupled, extent, affine=runner.affine)
    stages = SegmentStages(
        stages=plan.stages,
        loops=plan.loops,
        state=recording.state,
        next_state=recording.next_state,
        batched=batched,
        runner=LoopUnderAutograd(plan.planned, runner),
        read=plan.read,
        reverse=reverse,
    )
    first = leaves(state)
    last = stages.run(env, first)
    outputs = [batched.over_time(env[plan.copies.get(v, v)], plan.rows.get(v)) for v in recording.outputs]
    read = [*sequences, *first, *context_leaves, *externals]
    copies = [v in plan.copies for v in recording.outputs] + [True] * len(last)
    results = list(_owned_by_caller([*outputs, *last], copies, read))
    return unflatten(recording.structures[3], results[: len(outputs)]), unflatten(
        recording.structures[1], results[len(outputs) :]
    )


def _owned_by_caller(tensors: Sequence[Tensor], copies: Sequence[bool], read: Sequence[Tensor]) -> Iterator[Tensor]:
    """Outputs and states that the caller may write into: nobody else, and no backward pass, reads their memory.

    Args:
        tensors: the outputs and the last states.
        copies: which of them a loop has made for the caller alone.
        read: what was read to make them.
    """
    others = {tensor.untyped_storage().data_ptr() for tensor in read}
    for tensor, copy in zip(tensors, copies, strict=True):
        memory = tensor.untyped_storage().data_ptr()
        own = (copy or not tensor.requires_grad) and memory not in others and 0 not in tensor.stride()
        others.add(memory)
        yield tensor if own else tensor.clone()
