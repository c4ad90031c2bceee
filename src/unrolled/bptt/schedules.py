"""Schedules that trade memory for time: which states and tapes are kept, and what is run again to make the others.

All of them are one: a sequence of segments, reversed one after the other from slots for states. What differs is how
long a segment is and how many slots there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb

from unrolled.bptt.actions import Action, Advance, Restore, Reverse, StoreState, StoreTape, in_steps
from unrolled.errors import OptionError


@dataclass(frozen=True)
class Schedule:
    """The actions that run a sequence forward and backward; iterate over it, as often as needed.

    All before the first `Reverse` is the forward pass: every step once, in order, the last segment's with its tape.
    One tape exists at a time, and every step is run with a tape once. Actions are made one by one: memory grows with
    the slots that are in use, not with T.

    Args:
        T: steps of the sequence.
        length: steps of a segment, which are taped and reversed together; the last segment may be shorter.
        slots: states that may be stored at once, the initial one included. None: as many as it takes to run no step
            more than twice.

    Raises:
        OptionError: if T, length or slots is below 1, or length above T.

    Example:
        >>> schedule = Schedule(T=1000, length=10, slots=20)
        >>> schedule.segments, schedule.extra_advances, schedule.slots_needed
        (100, 1780, 20)
    """

    T: int
    length: int
    slots: int | None = None

    def __post_init__(self) -> None:
        _check_positive("T", self.T, "a sequence has at least one step")
        _check_positive("length", self.length, "one step is the shortest segment")
        if self.length > self.T:
            raise OptionError(
                f"length must be at most T, got length {self.length} with T {self.T}; "
                "the longest segment is the whole sequence: pass T"
            )
        if self.slots is not None:
            _check_positive("slots", self.slots, "the initial state takes one")

    def __iter__(self) -> Iterator[Action]:
        """Make the actions, counted in steps."""
        return (in_steps(action, self.length, self.T) for action in binomial(self.segments, self._slots))

    @property
    def segments(self) -> int:
        """How many segments there are."""
        return -(-self.T // self.length)

    @property
    def _slots(self) -> int:
        return self.slots or max(1, self.segments - 1)

    @property
    def extra_advances(self) -> int:
        """Steps that are run by `Advance`: all that are run beyond the T that are run with a tape.

        The last segment is never advanced, so a shorter one does not change the count of segments times their length.
        """
        n, c = self.segments, self._slots
        r = _repetitions(n, c)
        return self.length * (r * n - comb(c + r, c + 1))

    @property
    def slots_needed(self) -> int:
        """How many states are stored at once, at most: the last segment is taped as soon as it is reached."""
        return min(self._slots, self.segments - 1)

    @property
    def longest_tape(self) -> int:
        """How many steps a tape holds, at most."""
        return self.length


def store_all(T: int) -> Schedule:
    """Ordinary backpropagation through time: one tape of all steps, no state stored, nothing run twice.

    Args:
        T: steps of the sequence.

    Returns:
        The schedule.

    Raises:
        OptionError: if T is below 1.

    Example:
        >>> list(store_all(5))
        [StoreTape(start=0, stop=5), Reverse(start=0, stop=5)]
    """
    return Schedule(T, length=T)


def segments(T: int, length: int) -> Schedule:
    """Checkpoints at even distances: a state for every segment, and the tape of one.

    Every segment but the last is run twice: `T - length` extra steps if `length` divides T. With segments of about
    sqrt(T) steps memory grows with sqrt(T).

    Args:
        T: steps of the sequence.
        length: steps of a segment; the last one may be shorter.

    Returns:
        The schedule.

    Raises:
        OptionError: if T or length is below 1, or length above T.

    Source: T. Chen, B. Xu, C. Zhang and C. Guestrin, "Training deep nets with sublinear memory cost", arXiv:1604.06174
    (2016).

    Example:
        >>> schedule = segments(6, length=4)
        >>> for action in schedule:
        ...     print(action)
        StoreState(step=0, slot=0)
        Advance(start=0, stop=4)
        StoreTape(start=4, stop=6)
        Reverse(start=4, stop=6)
        Restore(step=0, slot=0)
        StoreTape(start=0, stop=4)
        Reverse(start=0, stop=4)
        >>> schedule.extra_advances, schedule.slots_needed, schedule.longest_tape
        (4, 1, 4)
    """
    return Schedule(T, length)


def revolve(T: int, slots: int, length: int = 1) -> Schedule:
    """Binomial checkpointing: as few extra steps as `slots` states allow, and among those ways the fewest stores.

    For n segments and c slots that is `r n - C(c + r, c + 1)` segments, with the smallest r for which
    `C(c + r, c) >= n`; no segment is advanced more than r times.

    Args:
        T: steps of the sequence.
        slots: c, states that may be stored at once, the initial one included; more than n - 1 are not used.
        length: steps of a segment; the last one may be shorter.

    Returns:
        The schedule.

    Raises:
        OptionError: if T, slots or length is below 1, or length above T.

    Source: A. Griewank and A. Walther, "Algorithm 799: revolve", ACM TOMS 26 (2000); for recurrent networks
    A. Gruslys et al., "Memory-efficient backpropagation through time", NeurIPS (2016).

    Example:
        >>> [revolve(1000, slots).extra_advances for slots in (1, 2, 10, 32, 999)]
        [499500, 28820, 3636, 2405, 999]
        >>> revolve(1000, slots=2, length=50).extra_advances
        3250
    """
    _check_positive("slots", slots, "the initial state takes one")
    return Schedule(T, length, slots)


def binomial(n: int, slots: int) -> Iterator[Action]:
    """The actions that reverse n segments from `slots` states, counted in segments.

    Args:
        n: segments.
        slots: states that may be stored at once, the first segment's included.

    Yields:
        The actions.

    Source: Griewank and Walther (2000), as `revolve`; with a stack instead of their recursion.
    """
    stored: list[int] = []
    here, end = 0, n
    while True:
        while end - here > 1:
            if here not in stored[-1:]:
                yield StoreState(here, slot=len(stored))
                stored.append(here)
            stop = here + _leap(end - here, slots - len(stored) + 1)
            yield Advance(here, stop)
            here = stop
        yield StoreTape(here, end)
        yield Reverse(here, end)
        if not here:
            return
        end = here
        if stored[-1] == end:
            stored.pop()
        here = stored[-1]
        yield Restore(here, slot=len(stored) - 1)


def _leap(n: int, c: int) -> int:
    """How many of n segments to advance before the next state is stored, with c slots, the first segment's included.

    Of the leaps with the fewest extra advances these lead to the fewest stores. The bounds are how many segments c
    slots reverse if none is advanced more than r - 2 times, or r - 1 times.
    """
    r = _repetitions(n, c)
    behind = comb(c + r - 2, c - 1) + (comb(c + r - 3, c - 2) if c > 1 else 0)
    return min(comb(c + r - 1, c), max(1, comb(c + r - 2, c), n - behind))


def _repetitions(n: int, c: int) -> int:
    """The smallest r with C(c + r, c) >= n: how often a segment is advanced, at most."""
    if c == 1:
        return n - 1
    r, reach = 0, 1
    while reach < n:
        r += 1
        reach = reach * (c + r) // r
    return r


def _check_positive(name: str, value: int, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name} must be a positive integer, got {value!r}; {remedy}")
