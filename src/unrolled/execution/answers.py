"""Answers: whether all steps of a segment give to what they ask the answers that were recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from unrolled.execution.series import Entry
from unrolled.plan.plan import StepPlan
from unrolled.recording.checks import Asked


class OtherAnswerError(Exception):
    """A step that answers otherwise than was recorded: only the cell itself knows what it does then.

    Args:
        plan: the plan of the recording.
        what: what was asked, in words.

    Attributes:
        plan: the plan.
    """

    def __init__(self, plan: StepPlan, what: str) -> None:
        super().__init__(f"what it does depends on the numbers in its tensors: {what}")
        self.plan = plan


@contextmanager
def errors_as_other_answers(plan: StepPlan) -> Iterator[None]:
    """A context in which steps run that may answer otherwise: an error may be of what the cell would not have done.

    Raises:
        OtherAnswerError: for any error, if the step asks something.
    """
    try:
        yield
    except Exception as error:
        asked = plan.reals.asked
        if not asked:
            raise
        raise OtherAnswerError(plan, f"{asked[0]}, and going on so raised {type(error).__name__}: {error}") from error


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
        raise OtherAnswerError(plan, str(asked[flags.tolist().index(False)]))


def _as_recorded(asked: Asked, entry: Entry) -> Tensor:
    tensor = entry if isinstance(entry, Tensor) else entry.tensor
    return tensor.all() if asked.answer else tensor.any().logical_not()
