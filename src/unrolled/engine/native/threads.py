"""Threads: the team that shares the work of a compiled loop.

torch's operations run on a team of OpenMP threads, which wait for the next one on the cores that a loop wants: threads
of our own would stand in line behind them. So the loop asks for the same team, through the entry that compilers use.
"""

from __future__ import annotations

import ctypes
import os
from bisect import bisect_right
from itertools import accumulate

from unrolled.lengths import Extent

_STEP = 3  # what a step costs beside its rows, in rows


def _entry() -> int | None:
    """The address of the OpenMP library's `GOMP_parallel`, if torch has loaded one that has it."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


class _Team:
    def __init__(self) -> None:
        self.entry = _entry()
        os.register_at_fork(after_in_child=self._leave)

    def _leave(self) -> None:
        # A forked child has none of the team's threads, and would wait for them forever.
        self.entry = None


_TEAM = _Team()


def team() -> int | None:
    """What starts a team, as compiled code takes it; None where that has to start threads of its own."""
    return _TEAM.entry


def shares(extent: Extent, threads: int) -> list[int]:
    """Which rows each thread takes: thread n those from `shares[n]` up to `shares[n + 1]`.

    Where rows end at different times, rows of about one length go to one thread, such that all have as much to do: few
    long rows or many short ones.
    """
    if not extent.ragged:
        return [extent.batch * n // threads for n in range(threads + 1)]
    lengths = extent.lengths.tolist()
    before = [0, *accumulate(lengths)]
    low, high = extent.rows // threads, extent.rows + _STEP * lengths[0]
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if _bounds(lengths, before, threads, middle)[-1] == extent.batch else (middle + 1, high)
        )
    return _bounds(lengths, before, threads, high)


def _bounds(lengths: list[int], before: list[int], threads: int, most: int) -> list[int]:
    """The shares if none may cost more than so much; rows that are left over are nobody's."""
    bounds = [0]
    for _ in range(threads):
        begin = bounds[-1]
        room = most - _STEP * lengths[begin] if begin < len(lengths) else 0
        bounds.append(max(begin, bisect_right(before, before[begin] + room) - 1) if room > 0 else begin)
    return bounds
