"""Partitioning: where in an unrolled sequence each operation of a step runs.

The step's operations and its state's leaves are the nodes of a graph. An operation depends on those that make what it
reads; a leaf, as the next copy receives it, depends on the operation that computes it. A cycle in this graph is a
recurrence, which has to be run step by step: a *loop*. All else is run for many copies at once: *once* per sequence
what depends on no input and no state, and the rest *before* or *after* the loops. If there are several loops, none
needs what a later one makes; what lies between two of them is run for all copies after the one and before the other. A
cycle that only counts is no loop: what every copy receives of it is known beforehand. Random numbers are drawn before
the first loop, copy after copy as they would be in it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from unrolled.recording.events import UnrecordableError
from unrolled.recording.program import Program, Ref


@dataclass(frozen=True)
class Stage:
    """A part of a step. It is done for all copies of a segment before the next stage begins.

    Attributes:
        ops: its operations, by their numbers in the step.
        leaves: the leaves of the state that it passes on from copy to copy.
    """

    ops: tuple[int, ...] = ()
    leaves: tuple[int, ...] = ()


@dataclass(frozen=True)
class Steps(Stage):
    """Operations that are run for all copies of a segment at once (once per sequence, if `once`)."""

    once: bool = False


@dataclass(frozen=True)
class Draws(Stage):
    """All operations that draw random numbers, and those between them: run copy by copy, in the loop's own order."""


@dataclass(frozen=True)
class Loop(Stage):
    """Operations on a cycle through time.

    Totals are operations that add up over the rows what the loop made; it adds their results up over the steps.
    """

    totals: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shift(Stage):
    """A leaf of the state that is on no cycle: what copy t receives is what copy t-1 computed without it."""


@dataclass(frozen=True)
class Held(Stage):
    """A leaf of the state that every copy passes on as it received it."""


@dataclass(frozen=True)
class Counter(Stage):
    """An integer leaf of the state that every copy passes on as itself plus a constant."""

    step: int = 0


def partition(program: Program, state: Sequence[int], next_state: Sequence[int], inputs: Iterable[int]) -> list[Stage]:
    """The stages in which a sequence is run, in order.

    Args:
        program: the step.
        state: the values of the state's leaves.
        next_state: the values that replace them.
        inputs: other values that differ from step to step.

    Raises:
        UnrecordableError: if random numbers are drawn from a distribution that depends on the state.
    """
    graph = _DependencyGraph(program, state, next_state)
    drawn = {v for op in program.ops if op.draws for v in op.outputs if v >= 0}
    changing = program.dependents({*inputs, *state, *drawn})
    once = [n for n, op in enumerate(program.ops) if not op.draws and not changing.intersection(op.outputs)]
    stages: list[Stage] = [Steps(tuple(once), once=True)] if once else []
    stages += _drawing(program, state, drawn, once)
    done = {n for stage in stages for n in stage.ops}
    components = list(graph.components())
    waiting = [c for c in components if not done.issuperset(c)]
    while waiting:
        easy, waiting = graph.ready(waiting, done)
        if easy:
            stages.append(Steps(tuple(sorted(n for c in easy for n in c))))
            continue
        component = next(c for c in waiting if graph.sources(c) <= done)
        waiting.remove(component)
        done.update(component)
        stages.append(graph.stage(component))
    return stages


def _drawing(program: Program, state: Sequence[int], drawn: Collection[int], once: Collection[int]) -> Iterator[Stage]:
    """What draws read and is the same whatever they draw; then the draws with what lies between them."""
    by_chance, by_state = program.dependents(drawn), program.dependents(state)
    needed: set[int] = set()
    ahead, drawing = list[int](), list[int]()
    for n, op in reversed(list(enumerate(program.ops))):
        if n in once or not (op.draws or needed.intersection(op.outputs)):
            continue
        if op.draws and by_state.intersection(op.inputs):
            raise UnrecordableError(f"it draws random numbers whose distribution depends on the state ({op.name})")
        needed.update(op.inputs)
        (drawing if op.draws or by_chance.intersection(op.inputs) else ahead).append(n)
    if ahead:
        yield Steps(tuple(reversed(ahead)))
    if drawing:
        yield Draws(tuple(reversed(drawing)))


def read_outside(program: Program, stages: Sequence[Stage], state: Sequence[int]) -> frozenset[int]:
    """The states of loops that are read outside of the loop that passes them on."""
    home = {state[leaf]: stage for stage in stages if isinstance(stage, Loop) for leaf in stage.leaves}
    found = {v for v in program.outputs if v in home}
    for stage in stages:
        for n in stage.ops:
            found.update(v for v in program.ops[n].inputs if home.get(v, stage) is not stage)
    return frozenset(found)


def sink_light(program: Program, stages: Sequence[Stage], light: Collection[int]) -> list[Stage]:
    """Move light operations that only one loop reads into it: one more there costs less than memory for all copies.

    Args:
        program: the step.
        stages: its stages.
        light: the operations that may be moved.
    """
    home = {n: i for i, stage in enumerate(stages) for n in stage.ops}
    returned = {v for v in program.outputs if v >= 0}
    reading: dict[int, list[int]] = {}
    for m, other in enumerate(program.ops):
        for v in other.inputs:
            reading.setdefault(v, []).append(m)
    for n in sorted(light, reverse=True):
        op = program.ops[n]
        readers = {home[m] for v in op.outputs for m in reading.get(v, ())}
        if len(readers) == 1 and returned.isdisjoint(op.outputs) and isinstance(stages[min(readers)], Loop):
            (home[n],) = readers
    moved = [replace(stage, ops=tuple(sorted(n for n in home if home[n] == i))) for i, stage in enumerate(stages)]
    return [stage for stage in moved if not isinstance(stage, Steps) or stage.ops]


def places_of(program: Program, stages: Sequence[Stage]) -> list[str]:
    """For each operation where it runs: once, before, through (in a loop) or after."""
    found = ["after"] * len(program.ops)
    needed: set[int] = set()
    for stage in reversed(stages):
        if isinstance(stage, Loop):
            needed.update(v for n in stage.ops for v in program.ops[n].inputs)
        for n in reversed(stage.ops):
            op = program.ops[n]
            if isinstance(stage, Loop):
                found[n] = "through"
            elif isinstance(stage, Steps) and stage.once:
                found[n] = "once"
            elif isinstance(stage, Draws) or needed.intersection(op.outputs):
                found[n] = "before"
                needed.update(op.inputs)
    return found


class _DependencyGraph:
    """Nodes 0.. are operations, -1, -2, .. the state's leaves 0, 1, .."""

    def __init__(self, program: Program, state: Sequence[int], next_state: Sequence[int]) -> None:
        producers = program.producers()
        producers |= {value: -1 - leaf for leaf, value in enumerate(state)}
        self.before: dict[int, set[int]] = {
            n: {producers[v] for v in op.inputs if v in producers} for n, op in enumerate(program.ops)
        }
        self.counters = self._counters(program, state, next_state)
        for leaf, value in enumerate(next_state):
            computed = value in producers and leaf not in self.counters
            self.before[-1 - leaf] = {producers[value]} if computed else set()

    def sources(self, component: frozenset[int]) -> set[int]:
        """The nodes outside of a component that it depends on."""
        return set().union(*(self.before[n] for n in component)) - component

    def stage(self, component: frozenset[int]) -> Stage:
        """The stage of a component that is not a single operation."""
        leaves = tuple(sorted(-1 - n for n in component if n < 0))
        ops = tuple(sorted(n for n in component if n >= 0))
        if ops or len(leaves) > 1:
            return Loop(ops, leaves)
        if leaves[0] in self.counters:
            return Counter(leaves=leaves, step=self.counters[leaves[0]])
        node = -1 - leaves[0]
        return Held(leaves=leaves) if node in self.before[node] else Shift(leaves=leaves)

    def ready(self, waiting: list[frozenset[int]], done: set[int]) -> tuple[list[frozenset[int]], list[frozenset[int]]]:
        """The single operations that can run now, one after another, which it marks as done; and what still waits."""
        easy, hard = [], []
        for component in waiting:
            single = len(component) == 1 and next(iter(component)) >= 0
            if single and self.sources(component) <= done and not component & self.before[next(iter(component))]:
                easy.append(component)
                done.update(component)
            else:
                hard.append(component)
        return easy, hard

    def components(self) -> Iterator[frozenset[int]]:
        """Strongly connected components, sources first (Tarjan 1972, without recursion)."""
        index: dict[int, int] = {}
        low: dict[int, int] = {}
        path: list[int] = []
        on_path: set[int] = set()
        for root in self.before:
            if root in index:
                continue
            work = [(root, iter(sorted(self.before[root])))]
            while work:
                node, rest = work[-1]
                if node not in index:
                    index[node] = low[node] = len(index)
                    path.append(node)
                    on_path.add(node)
                following = next(rest, None)
                if following is None:
                    work.pop()
                    if work:
                        low[work[-1][0]] = min(low[work[-1][0]], low[node])
                    if low[node] == index[node]:
                        yield frozenset(self._popped(path, on_path, node))
                elif following not in index:
                    work.append((following, iter(sorted(self.before[following]))))
                elif following in on_path:
                    low[node] = min(low[node], index[following])

    @staticmethod
    def _popped(path: list[int], on_path: set[int], node: int) -> Iterator[int]:
        while True:
            popped = path.pop()
            on_path.discard(popped)
            yield popped
            if popped == node:
                return

    @staticmethod
    def _counters(program: Program, state: Sequence[int], next_state: Sequence[int]) -> dict[int, int]:
        """The leaves that are passed on as themselves plus an integer, and that integer; of integers, to be exact."""
        integers = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
        producers, found = program.producers(), {}
        for leaf, (received, following) in enumerate(zip(state, next_state, strict=True)):
            op = program.ops[producers[following]] if following in producers else None
            if op is None or op.name != "aten.add.Tensor" or op.kwargs or op.args[0] != Ref(received):
                continue
            dtypes = {program.values[received].dtype, program.values[following].dtype}
            if type(op.args[1]) is int and len(dtypes) == 1 and dtypes <= integers:
                found[leaf] = op.args[1]
        return found
