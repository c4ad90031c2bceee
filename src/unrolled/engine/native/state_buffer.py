"""The memory in which a loop passes on a state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unrolled.lengths import Extent


@dataclass(frozen=True)
class StateBuffer:
    """The memory of one state: what the first step receives and what every step passes on, `[B + N, ...]`.

    What the steps receive is then the same memory, one step earlier or later.

    Attributes:
        memory: `[B + N, ...]`.
        extent: how far the segment reaches.
        reverse: whether the last step is run first.
    """

    memory: Tensor
    extent: Extent
    reverse: bool

    def begin(self, state: Tensor) -> None:
        """Put what the first step of each row receives in its place."""
        if not self.reverse:
            self.memory[: self.extent.batch] = state
        elif self.extent.ragged:
            self.memory.index_copy_(0, self.extent.batch + self.extent.ends, state)
        else:
            self.memory[self.extent.rows :] = state

    def received(self) -> Tensor:
        """What every step received, laid out as the sequences are."""
        return self._late() if self.reverse else self._early()

    def passed_on(self) -> Tensor:
        """What every step passed on, laid out likewise."""
        return self._early() if self.reverse else self._late()

    def last(self) -> Tensor:
        """What the last step of each row passed on."""
        return self.extent.last_of(self.passed_on(), reverse=self.reverse).clone()

    def _late(self) -> Tensor:
        return self._in_steps(self.memory[self.extent.batch :])

    def _early(self) -> Tensor:
        """One step earlier than `_late`; where rows end at different times not all of it is read, or written."""
        if self.extent.ragged:
            return self.memory.index_select(0, self.extent.before)
        return self._in_steps(self.memory[: self.extent.rows])

    def _in_steps(self, rows: Tensor) -> Tensor:
        return rows if self.extent.ragged else rows.unflatten(0, (self.extent.steps, self.extent.batch))
