"""Running a plan over a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from unrolled.execution.answers import errors_as_other_answers, refuse_other_answers
from unrolled.execution.batched import BatchedOps
from unrolled.execution.loop_function import LoopUnderAutograd
from unrolled.execution.protocol import LoopRunner
from unrolled.execution.series import Entry, TimeSeries
from unrolled.execution.stages import SegmentStages
from unrolled.lengths import Extent
from unrolled.plan.plan import StepPlan
from unrolled.plan.reals import in_parts
from unrolled.recording.generators import bound
from unrolled.recording.program import Value
from unrolled.recording.record import Recording
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
    checked: bool = True,
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
        checked: whether all steps have to give the answers that were recorded.

    Returns:
        The outputs, laid out as the inputs, and the last copy's state.

    Raises:
        OtherAnswerError: if a step gives another answer to what it asks than was recorded.
    """
    recording, first = plan.reals, in_parts(leaves(state))
    env = _given(recording, cell, inputs, context, extent)
    given = [*first, *[entry.tensor if isinstance(entry, TimeSeries) else entry for entry in env.values()]]
    batched = BatchedOps(
        bound(recording.program, cell), plan.rows, plan.coupled, extent, plan.written, affine=runner.affine
    )
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
    with errors_as_other_answers(plan) if checked else nullcontext():
        last = stages.run(env, first)
    if checked:
        refuse_other_answers(plan, env)
    outputs = [batched.over_time(env[plan.copies.get(v, v)], plan.rows.get(v)) for v in recording.outputs]
    tensors, own = zip(*_joined(zip([*outputs, *last], plan.copied, strict=True), plan.ends), strict=True)
    results = list(_owned_by_caller(tensors, own, given))
    many = len(plan.recording.outputs)
    return unflatten(recording.structures[3], results[:many]), unflatten(recording.structures[1], results[many:])


def _given(recording: Recording, cell: nn.Module, inputs: Tree, context: Tree, extent: Extent) -> dict[int, Entry]:
    """What a step reads and does not make, but for its state, by the values of its program."""
    fold = 0 if extent.ragged else None
    sequences = [TimeSeries(leaf, extent, fold) for leaf in in_parts(leaves(inputs))]
    fixed = [] if context is None else in_parts(leaves(context))
    fixed += [external.fetch(cell) for external in recording.externals]
    return dict(zip((*recording.inputs, *recording.fixed), [*sequences, *fixed], strict=True))


def _joined(parts: Iterator[tuple[Tensor, bool]], ends: Sequence[Value]) -> Iterator[tuple[Tensor, bool]]:
    """The tensors of these values, two parts joined where one is complex; each with whether it is a copy."""
    for value in ends:
        tensor, copy = next(parts)
        yield (torch.complex(tensor, next(parts)[0]), True) if value.dtype.is_complex else (tensor, copy)


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
