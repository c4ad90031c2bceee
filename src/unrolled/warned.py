"""Warnings that name the line of whoever called the library, and not a line of its own."""

from __future__ import annotations

import sys
import warnings

_OURS = ("unrolled", "torch")


def warn_caller(message: str) -> None:
    """Warn at the innermost line that is neither this package's nor torch's, which calls modules for the user."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
