"""The fastest schedule that fits into a memory budget, and what else is possible."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from unrolled.bptt.costs import Costs
from unrolled.bptt.schedules import Schedule, revolve, segments, store_all
from unrolled.errors import OptionError
from unrolled.lengths import Extent

_MOST_REPEATS = 8
"""How often a segment is advanced at most: more saves little memory, and without a bound work is quadratic in T."""


@dataclass(frozen=True)
class Option:
    """A schedule and what it takes.

    Attributes:
        schedule: the schedule.
        bytes: activation memory, in bytes.
        ratio: time over that of full storage, as expected of a small network: two thirds of a training step are its
            backward pass, and each call of an engine takes as long as some steps. In a large one calls count for less.
    """

    schedule: Schedule
    bytes: float
    ratio: float

    @property
    def name(self) -> str:
        """How it is made."""
        schedule = self.schedule
        if schedule.segments == 1:
            return "store_all"
        if schedule.slots is None or schedule.slots >= schedule.segments - 1:
            return f"segments(length={schedule.length})"
        length = f", length={schedule.length}" if schedule.length > 1 else ""
        return f"revolve(slots={schedule.slots}{length})"


@dataclass(frozen=True)
class Planner:
    """Chooses a schedule for a sequence.

    Attributes:
        costs: what the network takes in memory.
        extent: how far the sequence reaches.
    """

    costs: Costs
    extent: Extent

    def option(self, schedule: Schedule) -> Option:
        """A schedule with what it takes."""
        calls = schedule.extra_advances / schedule.length + schedule.segments - 1
        steps = schedule.extra_advances + 8 * calls  # to call an engine once more takes about as long as 8 steps
        return Option(schedule, self.costs.promised(schedule, self.extent), 1 + steps / (3 * schedule.T))

    def fastest(self, budget: float) -> Option | None:
        """The fastest schedule that takes at most so many bytes; None if there is none."""
        fits = (found for found in self._options(budget) if found.bytes <= budget)
        return min(fits, key=attrgetter("ratio"), default=None)

    def thriftiest(self) -> Option:
        """The schedule that takes the least memory."""
        return min(self._options(0.0), key=attrgetter("bytes"))

    def too_small(self, budget: float, given: Any) -> OptionError:
        """The error for a budget that no schedule fits into: the least that is possible, and a horizon that would fit.

        Args:
            budget: bytes.
            given: the budget as the user gave it.
        """
        extent, least, horizon = self.extent, self.thriftiest(), self._horizon(budget)
        remedy = f"horizon={horizon} would fit, truncated by rnn.windows" if horizon else "not even one step would fit"
        return OptionError(
            f"memory={given!r} is {format_bytes(budget)}, but {extent.steps} steps of {extent.batch} rows take at "
            f"least {format_bytes(least.bytes)}, by {least.name}; {remedy}"
        )

    def frontier(self) -> list[Option]:
        """The fastest schedule for full storage, a half of it, a quarter, and so on down to the least."""
        least, found = self.thriftiest(), list[Option]()
        budget = self.costs.full(self.extent)
        while budget > least.bytes:
            found.append(self.fastest(budget) or least)
            budget = min(budget / 2, found[-1].bytes * 0.99)
        return found if found and found[-1].bytes <= least.bytes else [*found, least]

    def _options(self, budget: float) -> Iterator[Option]:
        """For each length of a segment the schedule with as many slots as the budget has room for."""
        T, costs = self.extent.steps, self.costs
        yield self.option(store_all(T))
        root = int(T**0.5)
        # One length for each number of segments up to the root of T, and each length up to there.
        for length in sorted({*(-(-T // n) for n in range(2, root + 2)), *range(1, root + 1)} - {T}):
            whole = segments(T, length)
            room = whole.slots_needed - max(costs.promised(whole, self.extent) - budget, 0.0) / max(costs.slot, 1.0)
            # One less than there is room for: a state that is advanced from a slot needs a place of its own.
            slots = max(int(room) - 1, _fewest_slots(whole.segments))
            fits = room >= whole.slots_needed or slots >= whole.slots_needed
            yield self.option(whole if fits else revolve(T, slots, length))

    def _horizon(self, budget: float) -> int:
        """The longest sequence that full storage has room for."""
        fits, over = 0, self.extent.steps
        while over - fits > 1:
            middle = (fits + over) // 2
            fits, over = (middle, over) if self.costs.stored(middle) <= budget else (fits, middle)
        return fits


def _fewest_slots(n: int) -> int:
    """With how many slots n segments are advanced no more than `_MOST_REPEATS` times each."""
    slots, reach = 1, _MOST_REPEATS + 1
    while reach < n:
        slots += 1
        reach = reach * (slots + _MOST_REPEATS) // slots
    return slots


def format_bytes(count: float) -> str:
    """Bytes as a person says them.

    Example:
        >>> format_bytes(1234567)
        '1.2 MB'
    """
    if count < 1000:
        return f"{count:.0f} byte{'s' * (round(count) != 1)}"
    size = min(int(math.log10(count) / 3), 4)
    return f"{count / 1000**size:.1f} {('', 'kB', 'MB', 'GB', 'TB')[size]}"
