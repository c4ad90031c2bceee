"""Timing two things in turn, so that a machine that slows down slows both."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Target", "in_turn", "refuse_busy_machine", "seconds"]


@dataclass(frozen=True)
class Target:
    """A measured figure, and the most that it should be; None for one that only explains another."""

    name: str
    ratio: float
    most: float | None

    def __str__(self) -> str:
        if self.most is None:
            return f"{self.name:<72} {self.ratio:>7.2f}"
        verdict = "met" if self.ratio <= self.most else "MISSED"
        return f"{self.name:<72} {self.ratio:>7.2f}  <= {self.most:<5} {verdict}"


def seconds(run: Callable[[], object]) -> float:
    """How long one run takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def in_turn(*runs: Callable[[], object], rounds: int = 7) -> list[float]:
    """The median time of each run, in seconds, one run after the other in every round.

    Each is run once untimed before it is timed: threads of the one before it still wait for work, spinning, for some
    milliseconds, and would slow down whatever comes next.
    """
    for run in runs:
        run()
    rows = [[_settled(run) for run in runs] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def _settled(run: Callable[[], object]) -> float:
    run()
    return seconds(run)


def refuse_busy_machine(most: float = 0.5) -> None:
    """Stop if other programs keep the machine busy: its figures would mean nothing."""
    load = os.getloadavg()[0]
    if load > most * (os.cpu_count() or 1):
        sys.exit(f"the machine is busy (load {load:.1f} on {os.cpu_count()} cores); wait a minute and start again")
