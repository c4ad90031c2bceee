"""Wrappers: cells around cells.

In comes a cell, out comes a cell whose input, output or state is treated differently. What a wrapper adds is part of
the step, so that everything that runs cells runs it.
"""

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
