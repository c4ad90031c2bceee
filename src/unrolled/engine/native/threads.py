"""Threads: the team that shares the work of a compiled loop.

torch's operations run on a team of OpenMP threads, which wait for the next one on the cores that a loop wants: threads
of our own would stand in line behind them. So the loop asks for the same team, through the entry that compilers use.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["team"]


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
