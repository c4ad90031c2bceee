"""Threads: the team that shares the work of a compiled loop.

torch's operations run on a team of OpenMP threads, which wait for the next one on the cores that a loop wants: threads
of our own would stand in line behind them. So the loop asks for the same team, through the entry that compilers use.
"""

from __future__ import annotations

import ctypes
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from unrolled.engine.native.emit import Source
from unrolled.lengths import Extent

_WORTH_A_TEAM = 2_000_000  # floating-point operations
# Up to so many rows threads share products, if the matrices that a step reads take so many bytes: with rows of their
# own each thread would read all of them.
_WORTH_A_QUEUE = ((2, 200_000), (8, 8 << 20))
_STEP = 3  # what a step costs over and above its rows, in rows


class _OpenMP:
    """The OpenMP library that torch has loaded.

    Attributes:
        start: the address of its `GOMP_parallel`; None if there is none.
    """

    def __init__(self) -> None:
        try:
            self.start = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
        except (AttributeError, OSError, TypeError):
            self.start = None
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        # A forked child has none of the team's threads, and would wait for them forever.
        self.start = None


_OPENMP = _OpenMP()


def team() -> int | None:
    """What starts a team, as compiled code takes it; None where that has to start threads of its own."""
    return _OPENMP.start


@dataclass(frozen=True)
class Threads:
    """How threads share a run: each owns the rows from its bound up to the next one's.

    Attributes:
        bounds: one more than there are threads.
        queued: whether the first one owns all rows, and the others help it with its products.
    """

    bounds: Sequence[int]
    queued: bool

    @property
    def count(self) -> int:
        """How many threads there are."""
        return len(self.bounds) - 1

    @property
    def owners(self) -> int:
        """How many of them own rows."""
        return 1 if self.queued else self.count


def threads_for(source: Source, extent: Extent) -> Threads:
    """How as many threads as torch has share a run."""
    most = min(torch.get_num_threads(), 64)  # MOST_PARTS in threads.c
    read = source.weights * source.real.itemsize
    if most > 1 and any(extent.batch <= rows and read >= least for rows, least in _WORTH_A_QUEUE):
        return Threads([0] + [extent.batch] * most, queued=True)
    worth = extent.rows * source.flops > _WORTH_A_TEAM
    return Threads(shares(extent, min(most, extent.batch) if worth else 1), queued=False)


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
        if _bounds(lengths, before, threads, middle)[-1] == extent.batch:
            high = middle
        else:
            low = middle + 1
    return _bounds(lengths, before, threads, high)


def _bounds(lengths: list[int], before: list[int], threads: int, most: int) -> list[int]:
    """The shares if none may cost more than so much; rows that are left over are nobody's."""
    bounds = [0]
    for _ in range(threads):
        begin = bounds[-1]
        left = most - _STEP * lengths[begin] if begin < len(lengths) else 0
        bounds.append(max(begin, bisect_right(before, before[begin] + left) - 1) if left > 0 else begin)
    return bounds
