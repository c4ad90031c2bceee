"""Witnesses: a recording is held against the cell itself, when it is made and from time to time afterwards.

What can be followed around a cell is looked at before every call. What cannot be followed is distrusted: then one copy,
another one at every call, is also run by the cell itself, forward and backward, before anything of the call has left.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unrolled.autograd_graph import differentiable, new_leaf
from unrolled.cells.contract import CheckedStep
from unrolled.engine import reference
from unrolled.engine.cell_call import CellCall
from unrolled.errors import UnrolledError
from unrolled.execution.answers import OtherAnswerError
from unrolled.execution.protocol import LoopRunner
from unrolled.execution.run import run_plan
from unrolled.lengths import Extent
from unrolled.plan.plan import StepPlan
from unrolled.recording.events import UnrecordableError
from unrolled.recording.guards.scratch import Twin
from unrolled.trees import Tree, leaves, map_leaves
from unrolled.unseen import OwnDraws, silent

_LIKE_NOISE = 3
"""How many times the movement under noise in the last digit passes for rounding; a cell that spikes moves by far."""

_ENTRIES_A_CALL = 50_000
"""How many entries of a cell's tensors put its first witness off by a call: at 128 hidden features it is the second."""

# A forked child has none of the threads that torch waits for: it may do less than its parent, and does no more than
# it is asked for.
_forked: list[bool] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(True))


@dataclass
class Turns:
    """Which calls of a recording have a witness, and which copy it is.

    A recording whose cell is followed completely has one at its second, fourth, eighth call and so on, so that their
    cost goes to nothing; the larger the cell, the later the first of them.

    Attributes:
        first: the earliest call that has one.
        calls: how many there were.

    Example:
        >>> turns = Turns()
        >>> [turns.next(steps=3, always=False) for _ in range(9)]
        [None, 1, None, 0, None, None, None, 1, None]
    """

    first: int = 2
    calls: int = 0

    @classmethod
    def of(cls, entries: int) -> Turns:
        """For a cell whose tensors have so many entries, each of which a witness compares."""
        return cls(max(2, entries // _ENTRIES_A_CALL))

    def next(self, steps: int, *, always: bool) -> int | None:
        """The copy that is witnessed at this call; None at most calls, and at the one that the recording is made for.

        Args:
            steps: how many copies there are.
            always: whether every call has one.
        """
        self.calls += 1
        rarely = self.calls >= self.first and not self.calls & (self.calls - 1) and not _forked
        due = self.calls > 1 and (always or rarely)
        return (self.calls - 1) % steps if due else None


def hold_against_the_cell(plan: StepPlan, call: CellCall, runner: LoopRunner) -> None:
    """Run two real steps, values and gradients, by the plan and by the cell itself.

    Args:
        plan: the plan.
        call: a call of two steps, or of one step, which is then taken twice; a twin of its cell is run.
        runner: the engine's way of running loops.

    Raises:
        UnrecordableError: if they do not give the same, with the numbers that are farthest apart.
        OtherAnswerError: if a step answers otherwise than was recorded, and the cell does not raise then.
    """
    copy, wanted = Twin(call.cell), iter(call.requires_grad)
    twin = copy.module
    with torch.enable_grad():
        inputs = map_leaves(lambda x: new_leaf(x[:2] if len(x) > 1 else torch.cat([x, x])), call.inputs)
        inputs = map_leaves(lambda x: x.requires_grad_(next(wanted)), inputs)
        start, extent = map_leaves(new_leaf, call.state), Extent(2, call.extent.batch)
        sample = replace(call, cell=twin, inputs=inputs, state=start, extent=extent)
        try:
            with OwnDraws():
                ours = _results(run_plan(plan, twin, inputs, start, call.context, runner, extent), sample)
        except OtherAnswerError:
            _by_the_cell(sample)  # a check that fails raises
            raise
        theirs = _by_the_cell(sample)
    with torch.no_grad(), OwnDraws():
        inferred = leaves(run_plan(plan, twin, inputs, start, call.context, runner, extent))
    ours += inferred
    theirs += theirs[: len(inferred)]
    copy.refuse_overwritten()
    scale = max([_largest(tensor) for tensor in theirs], default=0.0)
    pairs = list(zip(ours, theirs, strict=True))
    differing = [n for n, (one, other) in enumerate(pairs) if not _close(one, other, scale)]
    if differing and not _like_noise(differing, pairs, sample):
        message = _farthest_apart(*pairs[differing[0]])
        raise UnrecordableError(f"its recording does not give the numbers of the cell itself{message}")


class FailingStepError(UnrecordableError):
    """A step that raises, by the cell itself."""


def refuse_failing_steps(call: CellCall, why: str) -> None:
    """Run a call on a twin of its cell.

    Raises:
        FailingStepError: if that raises; it says what is wrong with the cell, or else why there is no plan.
    """
    twin = Twin(call.cell).module
    try:
        with silent(), torch.no_grad():
            reference.run(CheckedStep(twin, call.context), call.inputs, call.state, call.extent)
    except Exception as error:
        raise FailingStepError(str(error) if isinstance(error, UnrolledError) else why) from error


def _by_the_cell(call: CellCall) -> list[Tensor | None]:
    with silent(), OwnDraws():  # each run draws the same random numbers
        return _results(reference.run(CheckedStep(call.cell, call.context), call.inputs, call.state, call.extent), call)


def _results(results: tuple[Tree, Tree], call: CellCall) -> list[Tensor | None]:
    """Outputs, states and the gradients of a fixed mixture of them."""
    found = leaves(results)
    ends = [reals(t) for t in found if t.requires_grad]
    losses = [(t * torch.linspace(0.5, 1.5, t.numel(), device=t.device).view(t.shape).to(t.dtype)).sum() for t in ends]
    by = [t for t in (*leaves(call.inputs), *leaves(call.state), *call.cell.parameters()) if t.requires_grad]
    grads = torch.autograd.grad(sum(losses), by, allow_unused=True) if losses else [None] * len(by)
    return [*(t.detach() for t in found), *grads]


def _largest(tensor: Tensor | None) -> float:
    if tensor is None or not tensor.numel() or not differentiable(tensor):
        return 0.0
    largest = float(torch.linalg.vector_norm(reals(tensor), float("inf")))  # one pass, without a copy
    return largest if math.isfinite(largest) else float(reals(tensor).abs().nan_to_num().max())


def _close(ours: Tensor | None, theirs: Tensor | None, scale: float) -> bool:
    """Equal up to rounding, that of the largest numbers included: a fault of recording is far larger."""
    if ours is None or theirs is None:
        other = theirs if ours is None else ours
        return other is None or not other.any()
    if not differentiable(ours):
        return torch.equal(ours, theirs)
    eps = torch.finfo(ours.dtype).eps
    bound = eps**0.5 * _largest(theirs) + 100 * eps * scale
    one, other = reals(ours), reals(theirs)
    if one.shape == other.shape and one.numel() and float(torch.linalg.vector_norm(one - other, float("inf"))) <= bound:
        return True
    return torch.allclose(one, other, rtol=0.0, atol=bound, equal_nan=True)


def _like_noise(differing: Sequence[int], pairs: Sequence[tuple[Tensor | None, Tensor | None]], call: CellCall) -> bool:
    """Whether the cell itself moves as far when its inputs move in their last digit, as one with a threshold may."""
    with torch.enable_grad():
        nudged = replace(
            call, inputs=map_leaves(_in_next_digit, call.inputs), state=map_leaves(_in_next_digit, call.state)
        )
        moved = _by_the_cell(nudged)
    moved += moved[: len(pairs) - len(moved)]
    return all(_distance(*pairs[n]) <= _LIKE_NOISE * _distance(moved[n], pairs[n][1]) for n in differing)


def _in_next_digit(tensor: Tensor) -> Tensor:
    if not differentiable(tensor):
        return tensor
    moved = neighbours(reals(tensor.detach()).contiguous())
    return (torch.view_as_complex(moved) if tensor.is_complex() else moved).requires_grad_(tensor.requires_grad)


def _distance(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None:
        return _largest(other if one is None else one)
    if not differentiable(one):
        return float((one != other).any())
    return float((reals(one) - reals(other)).abs().nan_to_num(float("inf")).max()) if one.numel() else 0.0


def _farthest_apart(ours: Tensor | None, theirs: Tensor | None) -> str:
    """The two numbers that are farthest apart, in words."""
    if ours is None or theirs is None or not ours.numel():
        return ""
    one, other = reals(ours).flatten().double(), reals(theirs).flatten().double()
    at = int((one - other).abs().nan_to_num(float("inf")).argmax())
    return f": {float(one[at]):.6g} where the cell gives {float(other[at]):.6g}"


def reals(tensor: Tensor) -> Tensor:
    """A tensor's numbers, the two of a complex one side by side."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def neighbours(values: Tensor) -> Tensor:
    """The next number in every entry, up and down in turn.

    Args:
        values: floating.

    Example:
        >>> neighbours(torch.ones(2)) - 1
        tensor([-5.9605e-08,  1.1921e-07])
    """
    away = torch.full_like(values, float("inf"))
    away.view(-1)[::2] = float("-inf")
    return torch.nextafter(values, away)
