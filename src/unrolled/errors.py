"""The family of exceptions: each says the rule, the value received and the remedy; warnings that name a user's line."""

from __future__ import annotations

import functools
import sys
import warnings


class UnrolledError(Exception):
    """Anything this package refuses; catch it to catch all of the family."""


class InputError(UnrolledError, ValueError):
    """A sequence of inputs (or a context) that is not what an unrolled network takes."""


class StateError(UnrolledError, ValueError):
    """A state that cannot be made, or does not fit the cell and the inputs."""


class CellError(UnrolledError, RuntimeError):
    """A cell that breaks the contract `forward(input, state) -> (output, state)`, or that raised."""


class OptionError(UnrolledError, ValueError, TypeError):
    """An argument, flag or combination of them that is not offered: torch.nn raises now one, now the other for it."""


class GradientError(UnrolledError, RuntimeError):
    """Gradients of copies that are not there, or can no longer be computed."""


class ConfigError(UnrolledError, ValueError):
    """A training configuration with an unknown key or an impossible value."""


class DataError(UnrolledError, ValueError):
    """A text that cannot be trained on: missing, empty, binary, not UTF-8 or too short."""


class DivergedError(UnrolledError, ArithmeticError):
    """A training whose loss or gradient is no longer a finite number."""


class NonFiniteError(UnrolledError, ArithmeticError):
    """A NaN or an infinity in a network under guard.

    Attributes:
        t: the time step of the copy that made it; None where none did.
        row: the row of the batch; None where it belongs to none.
        operation: the operation that made it; what held it already where none did.
        values: what the operation was given.
        layer: the layer and direction; empty for a network of one cell.
    """

    def __init__(
        self,
        message: str,
        *,
        t: int | None = None,
        row: int | None = None,
        operation: str = "",
        values: tuple[str, ...] = (),
        layer: str = "",
    ) -> None:
        super().__init__(message)
        self.t, self.row, self.operation, self.values, self.layer = t, row, operation, values, layer


class RunError(UnrolledError, OSError):
    """A run directory that cannot be written, would be overwritten, or is not one."""


@functools.cache
def warn_caller_once(message: str) -> None:
    """Warn as `warn_caller` does, but once in a process."""
    warn_caller(message)


def warn_caller(message: str) -> None:
    """Warn at the innermost line that is neither this package's nor torch's, which calls modules for the user."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("unrolled", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
