"""The memory in which a loop passes on a state."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from unrolled.lengths import Extent


class StateBuffer(NamedTuple):
    """The memory of one state: what the first step receives and what every step passes on, `[B + N, ...]`.

    What the steps receive is then the same memory, one step earlier or later.

    Attributes:
        memory: `[B + N, ...]`.
        extent: how far the segment reaches.
        reverse: whether the last step is run first.
        in_steps: the shape of what all steps pass on.
    """

    memory: Tensor
    extent: Extent
    reverse: bool
    in_steps: tuple[int, ...]

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

    def last(self, *, owned: bool) -> Tensor:
        """What the last step of each row passed on; a part of this memory if it need not have its own."""
        if self.extent.ragged:
            last = self.extent.last_of(self.passed_on(), reverse=self.reverse)
        else:
            last = self.memory.narrow(0, 0 if self.reverse else self.extent.rows, self.extent.batch)
        return last.clone() if owned else last

    def _late(self) -> Tensor:
        return self.memory.narrow(0, self.extent.batch, self.extent.rows).view(self.in_steps)

    def _early(self) -> Tensor:
        """One step earlier than `_late`; where rows end at different times not all of it is read, or written."""
        if self.extent.ragged:
            return self.memory.index_select(0, self.extent.before)
        return self.memory.narrow(0, 0, self.extent.rows).view(self.in_steps)
