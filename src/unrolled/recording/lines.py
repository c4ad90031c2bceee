"""Lines: where in a user's code a step does what is refused."""

from __future__ import annotations

import contextlib
import linecache
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

from unrolled.recording.events import UnrecordableError

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), contextlib.__file__)
_LONGEST = 60
_INTO_A_LEAF = "eaf Variable that requires grad"  # torch says so of arguments: when a step is tried, all have gradients


@contextlib.contextmanager
def named_in_refusals() -> Iterator[None]:
    """A context in which a step runs: what refuses it also says which line did what is refused.

    Raises:
        UnrecordableError: as what runs does, with the innermost line that is neither torch's nor of this package.
    """
    try:
        yield
    except UnrecordableError as error:
        raise type(error)(after(str(error), _line_of(error))) from error
    except RuntimeError as error:
        if _INTO_A_LEAF not in str(error):
            raise
        why = "it writes in place into an argument of its step, or a parameter; write into a copy: x = x.clone()"
        raise UnrecordableError(after(why, _line_of(error))) from error


def _line_of(error: BaseException) -> str:
    """The innermost line of a user's that led to an error; empty if there is none."""
    lines = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _is_users(frame)]
    if not lines:
        return "" if error.__context__ is None else _line_of(error.__context__)
    return _written(lines[-1][0].f_code.co_filename, lines[-1][1])


def after(reason: str, line: str) -> str:
    """A reason, and the line that it is about, if there is one.

    Example:
        >>> after("it writes into an argument", "cell.py:12: h[0] = 1")
        'it writes into an argument (cell.py:12: h[0] = 1)'
    """
    return f"{reason} ({line})" if line else reason


def line_of_step() -> str:
    """The innermost line of a user's that runs in a step, as `cell.py:12: h[0] = 1`; empty if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_users(frame):
        frame = frame.f_back
        if frame is not None and frame.f_globals.get("__name__") == "unrolled.recording.record":  # who runs the step
            return ""
    return "" if frame is None else _written(frame.f_code.co_filename, frame.f_lineno)


def _is_users(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return not file.startswith((*_NOT_THE_USERS, "<step of"))


def _written(file: str, number: int) -> str:
    source = linecache.getline(file, number).strip()
    source = source if len(source) <= _LONGEST else f"{source[: _LONGEST - 3]}..."
    return f"{Path(file).name}:{number}" + (f": {source}" if source else "")
