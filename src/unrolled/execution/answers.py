"""Answers: whether all steps of a segment give to what they ask the answers that were recorded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from unrolled.execution.series import Entry
from unrolled.plan.plan import StepPlan
from unrolled.recording.checks import Asked


class OtherAnswerError(Exception):
    """A step that answers otherwise than was recorded: only the cell itself knows what it does then.

    Attributes:
        plan: the plan of the recording.
    """

    def __init__(self, plan: StepPlan, asked: Asked) -> None:
        super().__init__(f"what it does depends on the numbers in its tensors: {asked}")
        self.plan = plan


@torch.no_grad()
def refuse_other_answers(plan: StepPlan, values: Mapping[int, Entry]) -> None:
    """Look at what was asked, at all steps at once; the device is waited for once.

    Args:
        plan: the plan of a step.
        values: its values over a segment.

    Raises:
        OtherAnswerError: naming the first question that some step answers otherwise.
    """
    asked = plan.reals.asked
    if not asked:
        return
    found = [_as_recorded(each, values[each.value]) for each in asked]
    flags = torch.stack([flag.to(found[0].device) for flag in found])
    if not flags.all():
        raise OtherAnswerError(plan, asked[flags.tolist().index(False)])


def _as_recorded(asked: Asked, entry: Entry) -> Tensor:
    tensor = entry if isinstance(entry, Tensor) else entry.tensor
    return tensor.all() if asked.answer else tensor.any().logical_not()
