"""What a run takes in memory, by the steps of a segment and the states that are stored."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from unrolled.bptt.schedules import Schedule
from unrolled.lengths import Extent


@dataclass(frozen=True)
class Curve:
    """Bytes over steps, measured at some and linear between and beyond them.

    Attributes:
        points: pairs of steps and bytes, at least two, in order.

    Example:
        >>> Curve(((10, 100.0), (20, 180.0)))(30)
        260.0
    """

    points: tuple[tuple[int, float], ...]

    def __call__(self, steps: float) -> float:
        """Bytes for so many steps."""
        pairs = list(pairwise(self.points))
        (a, low), (b, high) = next((pair for pair in pairs if steps <= pair[1][0]), pairs[-1])
        return max(low + (high - low) * (steps - a) / (b - a), 0.0)


@dataclass(frozen=True)
class Costs:
    """Activation memory of a network for a batch size, in bytes; inputs, outputs and their gradients are not in it.

    Attributes:
        stored: full storage of so many steps.
        taped: a checkpointed run in segments of so many steps, with `slots` of its states stored.
        slots: how many that are.
        slot: one more stored state.
        outputs: those of one step, which are not counted.
    """

    stored: Curve
    taped: Curve
    slots: int
    slot: float
    outputs: float

    def full(self, extent: Extent) -> float:
        """What full storage takes."""
        return self.stored(extent.rows / extent.batch)

    def promised(self, schedule: Schedule, extent: Extent) -> float:
        """What a schedule takes at most; with rows that end early, as if each state had all rows."""
        if schedule.segments == 1:
            return self.full(extent)
        # Where states are advanced from a slot, one is at hand beside those that are stored.
        states = schedule.slots_needed + (schedule.slots_needed < schedule.segments - 1)
        return self.taped(_fullest(extent, schedule.length)) + (states - self.slots) * self.slot


def _fullest(extent: Extent, length: int) -> float:
    """How many steps of all rows a segment comes to at most: the first one in time has the most rows."""
    return sum(extent.alive[:length]) / extent.batch if extent.alive is not None else length
