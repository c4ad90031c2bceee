"""Schedules, replayed by a machine without tensors: nothing missing is read, and no schedule does better."""

from __future__ import annotations

import heapq
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import chain, islice, takewhile
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unrolled.bptt.actions import Action, Advance, Restore, Reverse, StoreState, StoreTape, in_steps
from unrolled.bptt.schedules import Schedule, binomial, revolve, segments, store_all
from unrolled.errors import OptionError

MILLION = 1_000_000

# -- the machine -----------------------------------------------------------------------------------------------------


class Machine:
    """Replays actions on T steps; a state is the number of the step that receives it."""

    def __init__(self, T: int) -> None:
        self.T = T
        self.hand, self.gradient = 0, T
        self.stored: dict[int, int] = {}
        self.tape: tuple[int, int] | None = None
        self.advanced: Counter[int] = Counter()
        self.stores = self.most_stored = self.longest_tape = 0

    def replay(self, actions: Iterable[Action]) -> Machine:
        for action in actions:
            getattr(self, type(action).__name__)(action)
        assert self.gradient == 0, "not all steps were reversed"
        assert self.tape is None
        return self

    def run(self, start: int, stop: int) -> None:
        assert self.hand == start, "the state at hand is not the one that the first step receives"
        assert start < stop <= self.T
        self.hand = stop

    def Advance(self, action: Advance) -> None:  # noqa: N802 (named as the action)
        self.run(action.start, action.stop)
        self.advanced.update(range(action.start, action.stop))

    def StoreState(self, action: StoreState) -> None:  # noqa: N802
        assert self.hand == action.step
        assert action.step not in self.stored.values(), "stored twice"
        self.stored[action.slot] = action.step
        self.stores += 1
        self.most_stored = max(self.most_stored, len(self.stored))

    def Restore(self, action: Restore) -> None:  # noqa: N802
        assert self.stored[action.slot] == action.step, "the slot holds another state"
        self.hand = action.step

    def StoreTape(self, action: StoreTape) -> None:  # noqa: N802
        assert self.tape is None, "two tapes at once"
        self.run(action.start, action.stop)
        self.tape = action.start, action.stop
        self.longest_tape = max(self.longest_tape, action.stop - action.start)

    def Reverse(self, action: Reverse) -> None:  # noqa: N802
        assert self.tape == (action.start, action.stop), "reversed without its tape"
        assert self.gradient == action.stop, "the gradient at hand is another state's"
        self.tape, self.gradient = None, action.start
        # What `Reverse` promises: these are not read again.
        self.stored = {slot: step for slot, step in self.stored.items() if step < action.start}


def replayed(schedule: Schedule) -> Machine:
    """The machine after a schedule, whose counts have to be those that the schedule states."""
    machine = Machine(schedule.T).replay(schedule)
    assert machine.advanced.total() == schedule.extra_advances
    assert machine.most_stored == schedule.slots_needed
    assert machine.longest_tape == schedule.longest_tape
    return machine


def repetitions(n: int, c: int) -> int:
    return next(r for r in range(n) if comb(c + r, c) >= n)


@cache
def fewest(n: int, c: int) -> tuple[int, int]:
    """Extra advances, and then stores, of the best way to reverse n steps whose first state is in one of c slots."""
    if n == 1:
        return 0, 0
    if c == 1:
        return n * (n - 1) // 2, 0
    if c >= n:
        return fewest(n, n - 1)
    return min(joined(n, c, leap) for leap in range(1, n))


def joined(n: int, c: int, leap: int) -> tuple[int, int]:
    (far, far_stores), (near, near_stores) = fewest(n - leap, c - 1), fewest(leap, c)
    return leap + far + near, far_stores + near_stores + (n - leap > 1)


def assert_optimal(T: int, slots: int) -> None:
    machine, schedule, r = replayed(revolve(T, slots)), revolve(T, slots), repetitions(T, slots)
    advances, stores = fewest(T, slots)
    assert schedule.extra_advances == advances == r * T - comb(slots + r, slots + 1)
    assert schedule.slots_needed == min(slots, T - 1)
    assert machine.stores == stores + (T > 1)
    assert max(machine.advanced.values(), default=0) == r


# -- the three schedules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 60])
def test_store_all_is_one_tape(T):
    assert list(store_all(T)) == [StoreTape(0, T), Reverse(0, T)]
    replayed(store_all(T))
    assert (store_all(T).extra_advances, store_all(T).slots_needed, store_all(T).longest_tape) == (0, 0, T)


@pytest.mark.parametrize("T", range(1, 61))
def test_segments_run_all_but_the_last_twice(T):
    for length in range(1, T + 1):
        machine = replayed(segments(T, length))
        last = T % length or length
        assert machine.advanced == Counter(range(T - last))
        assert segments(T, length).slots_needed == (T - 1) // length
        assert segments(T, length).longest_tape == length


def test_segments_that_divide_the_sequence_run_all_steps_but_one_segment_again():
    assert segments(1000, 50).extra_advances == 950
    assert segments(1000, 50).slots_needed == 19


@pytest.mark.parametrize(
    ("schedule", "slots", "tape", "extra"),
    [
        (store_all(1024), 0, 1024, 0),
        (segments(1024, 32), 31, 32, 992),
        (revolve(1024, 32), 32, 1, 2477),
        (revolve(1024, 8, length=32), 8, 32, 1728),
    ],
)
def test_the_table_of_the_architecture_page(schedule, slots, tape, extra):
    replayed(schedule)
    assert (schedule.slots_needed, schedule.longest_tape, schedule.extra_advances) == (slots, tape, extra)


def test_segments_are_revolve_with_a_slot_for_each_but_the_last():
    assert list(segments(103, 10)) == list(revolve(103, slots=10, length=10)) == list(revolve(103, 99, length=10))
    assert list(segments(103, 10)) != list(revolve(103, slots=9, length=10))


@pytest.mark.parametrize("T", range(1, 61))
def test_revolve_is_optimal(T):
    for slots in range(1, T + 3):
        assert_optimal(T, slots)


@pytest.mark.slow
def test_revolve_is_optimal_for_300_steps():
    for n in range(1, 300):
        fewest(n, n)
    for slots in range(1, 302):
        assert_optimal(300, slots)


@pytest.mark.parametrize(
    ("T", "slots", "extra"),
    [(10, 3, 15), (64, 8, 137), (100, 10, 222), (1000, 10, 3636), (1000, 32, 2405), (1024, 32, 2477)],
)
def test_revolve_advances_by_known_counts(T, slots, extra):
    assert revolve(T, slots).extra_advances == replayed(revolve(T, slots)).advanced.total() == extra


@pytest.mark.parametrize("T", [1, 2, 60, MILLION])
def test_revolve_with_a_slot_for_all_but_the_last_advances_each_of_them_once(T):
    assert [revolve(T, slots).extra_advances for slots in (max(1, T - 1), T, T + 1)] == [T - 1] * 3


def searched(T: int, slots: int) -> int:
    """The fewest extra advances of any sequence of actions at all, found by a shortest path over what is stored."""
    queue, seen = [(0, T, 0, ())], set()
    while queue:
        cost, end, hand, stored = heapq.heappop(queue)
        if not end:
            return cost
        if (end, hand, stored) in seen:
            continue
        seen.add((end, hand, stored))
        if hand == end - 1:
            heapq.heappush(queue, (cost, hand, hand, stored))
        if hand < end - 1:
            heapq.heappush(queue, (cost + 1, end, hand + 1, stored))
        others = [tuple(step for step in stored if step != dropped) for dropped in stored]
        kept = chain(others, [tuple(sorted({*stored, hand}))] if len(stored) < slots else [])
        for states in kept:
            heapq.heappush(queue, (cost, end, hand, states))
        for step in stored:
            heapq.heappush(queue, (cost, end, step, stored))
    raise AssertionError("there is always a way")


@pytest.mark.parametrize("T", range(1, 9))
def test_no_sequence_of_actions_does_better_than_revolve(T):
    for slots in range(1, T + 1):
        assert searched(T, slots) == revolve(T, slots).extra_advances


# -- segments and steps ----------------------------------------------------------------------------------------------


@st.composite
def sizes(draw):
    T = draw(st.integers(1, 400))
    return T, draw(st.integers(1, 40)), draw(st.integers(1, T))


@given(sizes())
def test_revolve_over_segments_whose_last_is_shorter(size):
    T, slots, length = size
    schedule = revolve(T, slots, length)
    machine = replayed(schedule)
    n = -(-T // length)
    r = repetitions(n, slots)
    assert schedule.segments == n
    assert machine.advanced.total() == length * (r * n - comb(slots + r, slots + 1))
    reversed_steps = [(action.start, action.stop) for action in schedule if isinstance(action, Reverse)]
    assert reversed_steps == [(start, min(start + length, T)) for start in range(0, T, length)][::-1]


@given(sizes())
def test_all_before_the_first_reverse_is_the_forward_pass(size):
    T, slots, length = size
    forward = list(takewhile(lambda action: not isinstance(action, Reverse), revolve(T, slots, length)))
    assert not any(isinstance(action, Restore) for action in forward)
    runs = [range(a.start, a.stop) for a in forward if isinstance(a, (Advance, StoreTape))]
    assert list(chain(*runs)) == list(range(T))
    assert isinstance(forward[-1], StoreTape)


def test_actions_on_segments_become_actions_on_steps():
    given_actions = [StoreState(2, slot=1), Restore(2, slot=1), Advance(0, 2), StoreTape(2, 3), Reverse(2, 3)]
    expected = [StoreState(8, slot=1), Restore(8, slot=1), Advance(0, 8), StoreTape(8, 10), Reverse(8, 10)]
    assert [in_steps(action, length=4, T=10) for action in given_actions] == expected


def test_a_schedule_can_be_walked_again_and_compared():
    schedule = revolve(20, 3)
    assert list(schedule) == list(schedule) == list(binomial(20, 3))
    assert schedule == revolve(20, 3) != revolve(20, 4)


# -- long sequences --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 10, 1000, MILLION])
def test_actions_are_made_as_they_are_taken(slots):
    tracemalloc.start()
    try:
        taken = sum(1 for _ in islice(revolve(MILLION, slots), 1000))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken == 1000
    assert peak < 200_000


def test_actions_of_a_million_steps_in_a_thousand_segments():
    kinds = Counter(type(action) for action in segments(MILLION, 1000))
    assert kinds == {StoreState: 999, Advance: 999, StoreTape: 1000, Reverse: 1000, Restore: 999}


def test_more_stored_states_than_frames_of_a_call_stack():
    replayed(revolve(5000, slots=4999))


def test_counts_of_a_million_steps():
    # slots: r and the sum as `math.comb` gives them; for one slot T (T - 1) / 2
    assert revolve(MILLION, 1).extra_advances == MILLION * (MILLION - 1) // 2
    assert comb(2 + 1412, 2) < MILLION <= comb(2 + 1413, 2)
    assert revolve(MILLION, 2).extra_advances == 1413 * MILLION - comb(2 + 1413, 3)
    assert revolve(MILLION, MILLION // 2).extra_advances == 2 * MILLION - (MILLION // 2 + 2)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [0, -3, 2.0, True])
@pytest.mark.parametrize("make", [store_all, lambda T: segments(T, 1), lambda T: revolve(T, 1)])
def test_a_sequence_without_steps_is_refused(make, T):
    with pytest.raises(OptionError, match=f"T must be a positive integer, got {T!r}; a sequence has at least one step"):
        make(T)


@pytest.mark.parametrize("length", [0, -1, 2.5])
@pytest.mark.parametrize("make", [segments, lambda T, length: revolve(T, 3, length)])
def test_length_is_refused(make, length):
    with pytest.raises(OptionError, match=f"length must be a positive integer, got {length!r}; one step"):
        make(10, length)


def test_a_segment_longer_than_the_sequence_is_refused():
    with pytest.raises(OptionError, match=r"length must be at most T, got length 11 with T 10; .* pass T"):
        segments(10, 11)


@pytest.mark.parametrize("slots", [0, -1, "3"])
def test_slots_are_refused(slots):
    with pytest.raises(OptionError, match=f"slots must be a positive integer, got {slots!r}; the initial state"):
        revolve(10, slots)
