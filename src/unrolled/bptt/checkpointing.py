"""The options `memory=` and `checkpoint=`: a budget that the fastest fitting schedule is found for, or a schedule."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from unrolled.bptt.costs import Costs
from unrolled.bptt.planning import Planner
from unrolled.bptt.schedules import Schedule
from unrolled.errors import OptionError
from unrolled.lengths import Extent


@dataclass(frozen=True)
class Budget:
    """Activation memory that a call may take.

    Attributes:
        given: as it was given.
        bytes: how many, or None.
        share: the share of what full storage takes, or None.
    """

    given: Any
    bytes: int | None = None
    share: float | None = None

    @classmethod
    def parsed(cls, memory: Any) -> Budget:
        """A budget as `checkpointing_of` takes it.

        Raises:
            OptionError: for what is none.
        """
        if isinstance(memory, float) and 0 < memory <= 1:
            return cls(memory, share=memory)
        if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
            return cls(memory, bytes=memory)
        if isinstance(memory, str):
            units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
            units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
            found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B|%)\s*", memory, re.IGNORECASE)
            count, unit = (float(found[1]), found[2].upper()) if found else (0.0, "B")
            if unit == "%" and 0 < count <= 100:
                return cls(memory, share=count / 100)
            if unit in units and count * units[unit] >= 1:
                return cls(memory, bytes=int(count * units[unit]))
        raise OptionError(
            f"memory must be bytes (an integer, or text like '512MB' or '1.5GiB') or a share of full storage (a float "
            f"above 0 and up to 1, or text like '10%'), got {memory!r}"
        )

    def check(self, steps: int) -> None:
        """A budget is for sequences of any length."""

    def schedule(self, extent: Extent, measure: Callable[[int], Costs]) -> Schedule:
        """The fastest schedule that fits; without gradients, which take no tapes, the one with the least if none does.

        Args:
            extent: how far the sequence reaches.
            measure: measures what the network takes, up to so many steps of a segment.

        Raises:
            OptionError: if none fits.
        """
        costs, before = measure(1), None
        while costs != before:
            planner = Planner(costs, extent)
            budget = self.bytes if self.bytes is not None else (self.share or 0.0) * costs.full(extent)
            found = planner.fastest(budget)
            if found is None and torch.is_grad_enabled():
                raise planner.too_small(budget, self.given)
            schedule = (found or planner.thriftiest()).schedule
            before, costs = costs, measure(schedule.length)
        return schedule


@dataclass(frozen=True)
class FixedSchedule:
    """A schedule, or a function that makes one for so many steps."""

    given: Schedule | Callable[[int], Schedule]

    def check(self, steps: int) -> None:
        """Refuse a schedule for another T.

        Args:
            steps: T, as the caller sees it.

        Raises:
            OptionError: saying both.
        """
        found = self._for(steps)
        if steps != found.T:
            raise OptionError(
                f"the schedule is for T = {found.T}, but these inputs have {steps} steps; make one for each T: "
                "checkpoint=lambda T: ur.segments(T, length), or leave it to memory="
            )

    def _for(self, steps: int) -> Schedule:
        found = self.given if isinstance(self.given, Schedule) else self.given(steps)
        if not isinstance(found, Schedule):
            raise OptionError(f"checkpoint={self.given!r} must give a schedule, such as ur.segments, got {found!r}")
        return found

    def schedule(self, extent: Extent, measure: Callable[[int], Costs]) -> Schedule:
        """The schedule; where no row is as long as the padding, for as many steps as there are."""
        found = self._for(extent.steps) if not isinstance(self.given, Schedule) else self.given
        return replace(found, T=extent.steps, length=min(found.length, extent.steps))


Checkpointing: TypeAlias = Budget | FixedSchedule


def checkpointing_of(memory: Any, checkpoint: Any, horizon: Any) -> Checkpointing | None:
    """The options of checkpointed BPTT, checked; None for full storage.

    Args:
        memory: bytes as an integer or as text ("512MB", "1.5 GiB"), or a share of full storage as a float up to 1 or
            as text ("10%").
        checkpoint: a schedule, or a function that makes one for T steps.
        horizon: that of truncated BPTT, which bounds memory in another way.

    Raises:
        OptionError: for both, or for what is neither.
    """
    if memory is None and checkpoint is None:
        return None
    if memory is not None and checkpoint is not None:
        raise OptionError("memory= plans a schedule and checkpoint= gives one, got both; leave one of them out")
    if horizon is not None:
        raise OptionError(
            f"a network has a horizon, here {horizon!r}, or a memory budget, not both; to go through a long sequence "
            "in little memory with a horizon, take rnn.windows(chunks), which holds one window at a time"
        )
    if checkpoint is None:
        return Budget.parsed(memory)
    if not isinstance(checkpoint, Schedule) and not callable(checkpoint):
        raise OptionError(
            f"checkpoint must be a schedule, such as ur.segments(T, length), or a function of T that makes one, got "
            f"{checkpoint!r}"
        )
    return FixedSchedule(checkpoint)
