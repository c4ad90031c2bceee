"""The fastest schedule that a budget has room for, and what could be had instead."""

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

MOST_REPEATS = 8
"""How often a segment is advanced at most: more saves little memory, and without a bound work is quadratic in T."""

_PER_RUN = 8
"""What it takes to call an engine for one more segment, in steps."""


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


def fitting(costs: Costs, extent: Extent, budget: float) -> Schedule | None:
    """The fastest schedule that fits; None if none does."""
    found = _fastest(costs, extent, budget)
    return None if found is None else found.schedule


def _fastest(costs: Costs, extent: Extent, budget: float) -> Option | None:
    fits = (found for found in options(costs, extent, budget) if found.bytes <= budget)
    return min(fits, key=attrgetter("ratio"), default=None)


def planned(costs: Costs, extent: Extent, budget: float, given: Any) -> Schedule:
    """The fastest schedule that fits.

    Args:
        costs: what the network takes.
        extent: how far the sequence reaches.
        budget: bytes.
        given: the budget as the user gave it.

    Raises:
        OptionError: if none fits, with the least that is possible and the horizon that would fit.
    """
    best = fitting(costs, extent, budget)
    if best is not None:
        return best
    least = thriftiest(costs, extent)
    horizon = _horizon(costs, extent, budget)
    remedy = f"horizon={horizon} would fit, truncated by rnn.windows" if horizon else "not even one step would fit"
    raise OptionError(
        f"memory={given!r} is {format_bytes(budget)}, but {extent.steps} steps of {extent.batch} rows take at least "
        f"{format_bytes(least.bytes)}, by {least.name}; {remedy}"
    )


def frontier(costs: Costs, extent: Extent) -> list[Option]:
    """The fastest schedule for full storage, a half of it, a quarter, and so on down to the least."""
    least, found = thriftiest(costs, extent), list[Option]()
    budget = costs.full(extent)
    while budget > least.bytes:
        found.append(_fastest(costs, extent, budget) or least)
        budget = min(budget / 2, found[-1].bytes * 0.99)
    return found if found and found[-1].bytes <= least.bytes else [*found, least]


def thriftiest(costs: Costs, extent: Extent) -> Option:
    """The schedule that takes the least memory there is to be had."""
    return min(options(costs, extent, 0.0), key=lambda option: option.bytes)


def options(costs: Costs, extent: Extent, budget: float) -> Iterator[Option]:
    """For each length of a segment the schedule with as many slots as the budget has room for."""
    T = extent.steps
    yield option(costs, extent, store_all(T))
    for length in _lengths(T):
        whole = segments(T, length)
        room = whole.slots_needed - max(costs.promised(whole, extent) - budget, 0.0) / max(costs.slot, 1.0)
        # One less than there is room for: a state that is advanced from a slot needs a place of its own.
        slots = max(int(room) - 1, fewest_slots(whole.segments))
        fits = room >= whole.slots_needed or slots >= whole.slots_needed
        yield option(costs, extent, whole if fits else revolve(T, slots, length))


def fewest_slots(n: int) -> int:
    """With how many slots n segments are advanced no more than `MOST_REPEATS` times each."""
    slots, reach = 1, MOST_REPEATS + 1
    while reach < n:
        slots += 1
        reach = reach * (slots + MOST_REPEATS) // slots
    return slots


def _lengths(T: int) -> list[int]:
    """Lengths of segments, one for each number of them up to the root of T, and each length up to there."""
    root = int(T**0.5)
    return sorted({*(-(-T // n) for n in range(2, root + 2)), *range(1, root + 1)} - {T})


def option(costs: Costs, extent: Extent, schedule: Schedule) -> Option:
    """A schedule with what it takes."""
    return Option(schedule, costs.promised(schedule, extent), 1 + _more(schedule) / (3 * schedule.T))


def _more(schedule: Schedule) -> float:
    """What a schedule takes beyond full storage, in steps forward."""
    return schedule.extra_advances + _PER_RUN * (schedule.extra_advances / schedule.length + schedule.segments - 1)


def _horizon(costs: Costs, extent: Extent, budget: float) -> int:
    """The longest sequence that full storage has room for."""
    fits, over = 0, extent.steps
    while over - fits > 1:
        middle = (fits + over) // 2
        fits, over = (middle, over) if costs.stored(middle) <= budget else (fits, middle)
    return fits


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
