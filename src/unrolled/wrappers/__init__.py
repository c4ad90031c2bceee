"""Wrappers: cells around cells. What they add is part of the step, so that everything that runs cells runs them."""

from unrolled.wrappers.dropout import DropoutCell
from unrolled.wrappers.outputs import ProjectedCell, ResidualCell
from unrolled.wrappers.scheduled import FedState, ScheduledSampling
from unrolled.wrappers.seeded import SeededCell, SeededState
from unrolled.wrappers.zoneout import ZoneoutCell

__all__ = [
    "DropoutCell",
    "FedState",
    "ProjectedCell",
    "ResidualCell",
    "ScheduledSampling",
    "SeededCell",
    "SeededState",
    "ZoneoutCell",
]
