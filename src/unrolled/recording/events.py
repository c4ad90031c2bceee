"""Events: what a tape notes down of one recording, at one batch size, or why it cannot be recorded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unrolled.recording.program import Op


class UnrecordableError(Exception):
    """A step that cannot be recorded; the message says why, and ends up in the plan."""


class IrreversibleError(UnrecordableError):
    """A step that does something which cannot be put back: it is not even tried."""


def depends_on_numbers(how: str) -> UnrecordableError:
    """The refusal of a step that goes another way with other numbers, which a program cannot."""
    return UnrecordableError(f"what it does depends on the numbers in its tensors: {how}")


@dataclass(frozen=True)
class Event(Op):
    """One operation as it ran, its tensors replaced by the numbers of values.

    Attributes:
        differentiable: whether autograd was on.
    """

    differentiable: bool


class Events:
    """The operations of a recording, and the values that they read and make.

    Attributes:
        noted: the operations, in order.
        tensors: for each value a tensor like it.
        line: of the user's code, what runs now.
    """

    def __init__(self) -> None:
        self.noted: list[Event] = []
        self.tensors: list[Tensor] = []
        self.line = ""
        self._kept: list[Any] = []

    def value(self, tensor: Tensor) -> int:
        """The number of a new value, whose tensor is kept alive: no memory is used twice."""
        self.tensors.append(tensor)
        self._kept.append(tensor)
        return len(self.tensors) - 1

    def note(
        self,
        target: Any,
        args: tuple[Any, ...],
        results: Sequence[Any],
        *,
        differentiable: bool,
        kwargs: dict[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Note an operation down.

        Args:
            target: what is called; a `RawCustom`.
            args: with a `Ref` for each tensor.
            results: tensors like its results; anything else for one that nobody reads.
            differentiable: whether autograd sees it.
            kwargs: its keyword arguments.

        Returns:
            The number of each result; -1 for one that nobody reads.
        """
        outputs = tuple([self.value(x) if isinstance(x, Tensor) else -1 for x in results])
        named = tuple((kwargs or {}).items())
        self.noted.append(Event(target, args, named, outputs, differentiable, line=self.line))
        return outputs


@dataclass(eq=False)
class RawProgram:
    """A program as one recording saw it: shapes are still those of that batch size."""

    tensors: Sequence[Tensor]
    inputs: list[int]
    events: list[Event]
    outputs: list[int]


@dataclass(eq=False)
class RawCustom:
    """An operation with a backward of its own as one recording saw it: an `autograd.Function`, or a write."""

    name: str
    forward: RawProgram
    backward: RawProgram
    saved: list[int]


def needed(events: Sequence[Event], outputs: Iterable[int]) -> list[Event]:
    """The events that some values depend on."""
    found, kept = set(outputs), []
    for event in reversed(events):
        if found.intersection(event.outputs):
            found.update(event.inputs)
            kept.append(event)
    return kept[::-1]
