"""The memory in which a loop hands on a state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unrolled.lengths import Extent


@dataclass(frozen=True)
class StateBuffer:
    """The memory of one state: what the first step receives and what every step hands on, `[B + N, ...]`.

    What the steps receive is then the same memory, one place aside.

    Attributes:
        memory: `[B + N, ...]`.
        extent: of the walk.
        reverse: whether it begins with the last step.
    """

    memory: Tensor
    extent: Extent
    reverse: bool

    def begin(self, state: Tensor) -> None:
        """Put what each row's first step walked receives in its place."""
        if not self.reverse:
            self.memory[: self.extent.batch] = state
        elif self.extent.ragged:
            self.memory.index_copy_(0, self.extent.batch + self.extent.ends, state)
        else:
            self.memory[self.extent.rows :] = state

    def received(self) -> Tensor:
        """What every step received, laid out as a request's sequences."""
        return self._late() if self.reverse else self._early()

    def handed_on(self) -> Tensor:
        """What every step handed on, laid out likewise."""
        return self._early() if self.reverse else self._late()

    def last(self) -> Tensor:
        """What each row's last step walked handed on."""
        return self.extent.last_of(self.handed_on(), reverse=self.reverse).clone()

    def _late(self) -> Tensor:
        return self._in_steps(self.memory[self.extent.batch :])

    def _early(self) -> Tensor:
        """One step earlier than `_late`; where rows end at different times not all of it is read, or written."""
        if self.extent.ragged:
            return self.memory.index_select(0, self.extent.before)
        return self._in_steps(self.memory[: self.extent.rows])

    def _in_steps(self, rows: Tensor) -> Tensor:
        return rows if self.extent.ragged else rows.unflatten(0, (self.extent.steps, self.extent.batch))
