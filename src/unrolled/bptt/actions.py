"""What a schedule is made of: five actions on the current state, slots for states, and one tape."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Advance:
    """Run steps `[start, stop)` without a tape: the current state, which `start` receives, becomes that of `stop`."""

    start: int
    stop: int


@dataclass(frozen=True)
class StoreState:
    """Store the current state, which step `step` receives, in a slot; what was in there is no longer needed."""

    step: int
    slot: int


@dataclass(frozen=True)
class StoreTape:
    """Run steps `[start, stop)` and keep the tape: all that their backward needs."""

    start: int
    stop: int


@dataclass(frozen=True)
class Restore:
    """Make the state in a slot, which step `step` receives, the current one; it stays in the slot."""

    step: int
    slot: int


@dataclass(frozen=True)
class Reverse:
    """Run the backward of steps `[start, stop)` over their tape, and drop it.

    From the gradient of the state that `stop` would receive follows that of the state that `start` receives. No state
    of `start` or a later step is read again: the stored ones may be dropped.
    """

    start: int
    stop: int


Action = Advance | StoreState | StoreTape | Restore | Reverse


def in_steps(action: Action, length: int, T: int) -> Action:
    """An action on segments as one on their steps.

    Args:
        action: an action that counts in segments.
        length: steps of a segment.
        T: steps of the sequence; the last segment ends there and may be shorter than the others.

    Returns:
        The same action, counted in steps.

    Example:
        >>> in_steps(Advance(1, 3), length=4, T=10)
        Advance(start=4, stop=10)
        >>> in_steps(StoreState(2, slot=1), length=4, T=10)
        StoreState(step=8, slot=1)
    """
    if isinstance(action, (StoreState, Restore)):
        return replace(action, step=action.step * length)
    return replace(action, start=action.start * length, stop=min(action.stop * length, T))
