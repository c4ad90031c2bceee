"""What a step computes with gradients turned off: in its program it reads what is detached."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from unrolled.autograd_graph import differentiable
from unrolled.recording.program import Ref
from unrolled.recording.tape import Tape


def detach_operands(tape: Tape) -> None:
    """Detach what the events read that ran with autograd off, so that they may run with autograd on.

    Those inside of an `autograd.Function` must have been folded before.
    """
    noted, off = list(tape.events), {v for event in tape.events if not event.differentiable for v in event.outputs}
    detached: dict[int, int] = {}
    tape.events.clear()
    for event in noted:
        if event.differentiable:
            tape.events.append(event)
            continue
        for value in event.inputs:
            if value not in off and value not in detached and differentiable(tape.tensors[value]):
                like = tape.tensors[value]
                (detached[value],) = tape.note(torch.ops.aten.detach.default, (Ref(value),), (like,))
        args, kwargs = _with_others(event.args, detached), _with_others(event.kwargs, detached)
        tape.events.append(replace(event, args=args, kwargs=kwargs, differentiable=True))


def _with_others(tree: Any, others: dict[int, int]) -> Any:
    """A nest of arguments in which some values stand for others."""
    if isinstance(tree, Ref):
        return Ref(others.get(tree.value, tree.value))
    if isinstance(tree, tuple):
        return tuple(_with_others(child, others) for child in tree)
    return tree
