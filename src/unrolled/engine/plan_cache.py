"""The plan cache: which plan holds for a call. Plans are made on first use, checked, and kept under their guards."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from unrolled import sequence
from unrolled.cells.contract import name_of
from unrolled.engine.choice import Runner
from unrolled.engine.witness import Turns, hold_against_the_cell, steps_at
from unrolled.errors import warn_caller, warn_caller_once
from unrolled.internals import unwatched
from unrolled.lengths import Extent
from unrolled.lru import LRUCache
from unrolled.plan.independence import couples_rows
from unrolled.plan.loops import LoopProgram
from unrolled.plan.plan import StepPlan, plan_step
from unrolled.recording.guards.environment import Environment
from unrolled.recording.guards.fingerprint import fingerprint
from unrolled.recording.guards.twin import scratch_of, twin_of, watch_step
from unrolled.recording.record import why_not_recorded
from unrolled.recording.tape import IrreversibleError, UnrecordableError
from unrolled.trees import Tree, TreeSpec, leaves, map_leaves
from unrolled.unseen import unseen

_log = logging.getLogger("unrolled")

_LONG = 2.0
"""Seconds after which a user wants to know what a first call waited for."""

_MOST_PLANS = 128
_MOST_TRIES = 4
"""How often in a row a step is recorded anew because of what changes around it, before it is left to the reference."""


@dataclass(frozen=True)
class Decision:
    """A plan, or none; the engine that is taken, and why no faster one.

    Attributes:
        plan: how the step is run.
        engine: which engine runs it.
        why: why no faster one.
        open: what around the cell cannot be followed; empty where everything can.
        moving: whether there is no plan because what the step reads changes before every call.
        turns: which of its calls have a witness.
    """

    plan: StepPlan | None
    engine: str
    why: str
    open: str = ""
    moving: bool = False
    turns: Turns = field(default_factory=Turns, compare=False)


class PlanCache:
    """The plans of one unrolled network.

    Args:
        engine: 'auto', 'reference', 'eager' or 'native'.
        quiet: whether the plan alone says that another engine runs than the one that was asked for by name.
    """

    def __init__(self, engine: str, *, quiet: bool = False) -> None:
        self.engine, self.quiet = engine, quiet
        self.runner = Runner(use_native=engine in ("auto", "native"))
        self._entries: LRUCache[Decision] = LRUCache(_MOST_PLANS)
        self._coupling: LRUCache[bool] = LRUCache(_MOST_PLANS)
        self._said: set[Decision] = set()
        # What is learnt of cells' surroundings stays for as long as their network is there.
        self._watchers: set[Environment] = set()
        self._made: dict[Any, int] = {}
        self._doubted: dict[Any, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled network makes its plans anew."""
        return vars(PlanCache(self.engine, quiet=self.quiet))

    def couples(self, cell: nn.Module, inputs: Tree, state: Tree, context: Tree, extent: Extent) -> bool:
        """Whether a row's results depend on other rows; the step is tried once for each kind of call.

        Args:
            cell: the cell.
            inputs: `[T, B, ...]`; `[N, ...]` where rows end at different times.
            state: what copy 0 receives.
            context: what is the same at every step, or None.
            extent: how far the inputs reach.
        """
        self._watchers.add(Environment.of(cell))
        sample = map_leaves(lambda x: x[0], steps_at(inputs, extent, 0))

        def key() -> Any:
            with unwatched():
                return fingerprint(cell), *(TreeSpec.of(tree, 1) for tree in (sample, state, context)), extent.batch

        try:
            return self._coupling.get(key, lambda: _tried(cell, sample, state, context))
        except UnrecordableError:  # hooks on all modules would see the step being watched
            return _tried(cell, sample, state, context, watched=False)

    def look_up(
        self, cell: nn.Module, inputs: Tree, state: Tree, context: Tree, extent: Extent | None = None
    ) -> Decision:
        """The plan for a call, made now if there is none yet.

        Args:
            cell: the cell.
            inputs: `[T, B, ...]`; `[N, ...]` where rows end at different times.
            state: what copy 0 receives.
            context: what is the same at every step, or None.
            extent: how far the inputs reach; None for T and B of their own.
        """
        self._watchers.add(Environment.of(cell))
        extent = extent or Extent(*leaves(inputs)[0].shape[:2])
        decision = self._witnessed(cell, inputs, state, context, extent)
        if extent.ragged and decision.plan is not None and decision.plan.why_not_ragged:
            why = f"rows of different lengths need steps that act row by row: {decision.plan.why_not_ragged}"
            decision = self._told_once(Decision(None, "reference", why))
        return decision

    def _witnessed(self, cell: nn.Module, inputs: Tree, state: Tree, context: Tree, extent: Extent) -> Decision:
        """The decision for a call; if it is this call's turn, one that was held against the cell itself."""
        while True:
            decision = self._decision(cell, inputs, state, context, extent)
            t = decision.turns.next(extent.steps, always=bool(decision.open)) if decision.plan is not None else None
            if t is None or decision.plan is None:
                return decision
            kind = _kind(inputs, state, context, extent)
            rows = extent.sizes[t]
            first, same_for_all = (_rows(tree, rows, extent) for tree in (state, context))
            try:
                with unseen(), Environment.of(cell).kept():
                    steps = steps_at(inputs, extent, t)
                    hold_against_the_cell(decision.plan, cell, steps, first, same_for_all, self.runner, kind[-1])
            except Exception as error:  # a cell that fails is told by the reference, which names the copy
                refused = self._doubt(decision, kind, f"copy {t} of {name_of(cell)}: {error}")
                if refused is not None:
                    return refused
            else:
                self._doubted.pop(kind, None)
                return decision

    def _doubt(self, decision: Decision, kind: Any, what: str) -> Decision | None:
        """What a recording comes to that a witness spoke against: the step is recorded anew, at most a few times."""
        self._entries.drop(lambda known: known is decision)
        self._doubted[kind] = self._doubted.get(kind, 0) + 1
        told = f"{what}; {decision.open or 'something has changed that cannot be seen'}"
        if self._doubted[kind] < _MOST_TRIES:
            warn_caller(f"{told}. It is recorded anew; what a step reads is best kept in a buffer of the cell")
            return None
        why = f"{told}: its recordings did not hold, {_MOST_TRIES} times one after the other"
        return self._told_once(Decision(None, "reference", why))

    def _decision(self, cell: nn.Module, inputs: Tree, state: Tree, context: Tree, extent: Extent) -> Decision:
        given = [*leaves(inputs), *leaves(state), *(leaves(context) if context is not None else [])]
        why = why_not_recorded([*given, *_held(cell)])
        if why is not None:
            return Decision(None, "reference", why)
        kind = _kind(inputs, state, context, extent)
        made = self._made.get(kind, 0)

        def make() -> Decision:
            self._made[kind] = made + 1
            if made >= _MOST_TRIES:
                return self._moving(cell)
            return self._decide(cell, steps_at(inputs, extent, 0), state, context, kind[-1])

        def holds(decision: Decision) -> bool:
            nonlocal made
            if decision.moving:  # what moved has stood still since the call before
                made = 0
                return False
            return _still_fits(decision.plan, cell)

        try:
            decision = self._entries.get(lambda: (fingerprint(cell), kind), make, holds=holds)
        except UnrecordableError as error:
            return Decision(None, "reference", str(error))
        if self._made.get(kind) == made:  # nothing was made
            self._made.pop(kind, None)
        return decision

    def _moving(self, cell: nn.Module) -> Decision:
        moved = Environment.of(cell).moved or f"what {name_of(cell)} holds"
        why = f"{moved} has changed before each of the latest calls; as a buffer of the cell it could, without this"
        return self._told_once(Decision(None, "reference", why, moving=True))

    def _decide(self, cell: nn.Module, inputs: Tree, state: Tree, context: Tree, needing: tuple[bool, ...]) -> Decision:
        started = time.perf_counter()
        decision = self._planned_and_checked(cell, inputs, state, context, needing)
        seconds = time.perf_counter() - started
        if seconds > _LONG:
            _log.warning("a plan for %s took %.1f s; calls like this one now go by it", name_of(cell), seconds)
        return decision

    def _planned_and_checked(
        self, cell: nn.Module, inputs: Tree, state: Tree, context: Tree, needing: tuple[bool, ...]
    ) -> Decision:
        watcher = Environment.of(cell)
        try:
            with unseen():
                inputs, state, context = (map_leaves(Tensor.clone, tree) for tree in (inputs, state, context))
                watch_step(cell, map_leaves(lambda x: x[0], inputs), state, context)
                with watcher.kept():
                    plan, slower = self._planned(cell, inputs, state, context, needing)
                    hold_against_the_cell(plan, cell, inputs, state, context, self.runner, needing)
        except UnrecordableError as error:
            return self._told(Decision(None, "reference", str(error)))
        except Exception as error:  # a cell that fails is told by the reference, which names the copy
            return self._told(Decision(None, "reference", f"planning it raised {type(error).__name__}: {error}"))
        turns = Turns.of(sum(tensor.numel() for tensor in _held(cell)))
        if slower:
            return self._told(Decision(plan, "eager", "; ".join(slower), watcher.open, turns=turns))
        return Decision(plan, "native", "every loop is emitted as C", watcher.open, turns=turns)

    def _planned(
        self, cell: nn.Module, inputs: Tree, state: Tree, context: Tree, needing: tuple[bool, ...]
    ) -> tuple[StepPlan, list[str]]:
        """A plan, and why not all of its loops run natively; fused if that is what all of them do."""
        device = sequence.device_of(inputs)
        if not self.runner.why_not_native((), device):
            plan = self._recorded(cell, inputs, state, context, needing, fuse=True)
            if not self.runner.why_not_native(_loops_of(plan), device):
                return plan, []
        plan = self._recorded(cell, inputs, state, context, needing, fuse=False)
        return plan, self.runner.why_not_native(_loops_of(plan), device)

    def _recorded(
        self, cell: nn.Module, inputs: Tree, state: Tree, context: Tree, needing: tuple[bool, ...], *, fuse: bool
    ) -> StepPlan:
        """Record on a twin; twice if the step writes attributes: only if that changes nothing are they scratch."""
        first, batch, twin = map_leaves(lambda x: x[0], inputs), sequence.sizes(inputs)[1], twin_of(cell)
        plan = plan_step(twin, first, state, context, batch, needing, fuse=fuse)
        scratch = scratch_of(cell, twin)
        if scratch:
            again = plan_step(twin, first, state, context, batch, needing, fuse=fuse)
            scratch_of(cell, twin)
            read = {external.attribute for external in plan.recording.externals}
            if again.recording != plan.recording or read.intersection(scratch):
                raise UnrecordableError(f"its step reads {scratch[0]}, which the step before it left")
        return plan

    def _told(self, decision: Decision) -> Decision:
        """Say it where another engine runs than the one that was asked for by name, and where there is no compiler."""
        if self.engine == "auto" and self.runner.no_compiler and not self.quiet:
            warn_caller_once(f"unrolled runs loops with torch operations, which is slower: {self.runner.no_compiler}")
        if not self.quiet and self.engine not in ("auto", decision.engine):
            warn_caller(
                f"engine={self.engine!r} was asked for, but this cell runs on {decision.engine!r}: {decision.why}"
            )
        return decision

    def _told_once(self, decision: Decision) -> Decision:
        """Say it for a decision that is made anew at every call."""
        known, self._said = decision in self._said, {*self._said, decision}
        return decision if known else self._told(decision)


def _still_fits(plan: StepPlan | None, cell: nn.Module) -> bool:
    """Whether the tensors that a plan reads out of the cell are of the kind that was recorded."""
    if plan is None:
        return True
    recording = plan.recording
    values = recording.fixed[len(recording.fixed) - len(recording.externals) :]
    return all(
        (known := recording.program.values[value]).dtype == (tensor := external.fetch(cell)).dtype
        and known.shape == tuple(tensor.shape)
        and (value in plan.requires_grad) == tensor.requires_grad
        for value, external in zip(values, recording.externals, strict=True)
    )


def _loops_of(plan: StepPlan) -> list[LoopProgram]:
    """All loops that a plan may run: forward, with nothing kept, and backward."""
    forward = [loop for planned in plan.planned.values() for loop in (planned.loop, planned.inference)]
    backward = [loop for planned in plan.planned.values() for loop in planned.backward.loops if loop is not None]
    return forward + backward


def _held(cell: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers; torch's own way also makes their names, which takes longer than all that is asked."""
    for module in cell.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor


def _needing(inputs: Tree, context: Tree) -> tuple[bool, ...]:
    """For each leaf of inputs and context whether it requires a gradient."""
    return tuple([leaf.requires_grad for tree in (inputs, context) for leaf in leaves(tree)])


def _kind(inputs: Tree, state: Tree, context: Tree, extent: Extent) -> tuple[Any, ...]:
    """What of a call a plan depends on, which leaves need a gradient last.

    A step may do something else for some batch sizes, which a recording at two others does not show.
    """
    specs = TreeSpec.of(inputs, 2 - extent.ragged), TreeSpec.of(state, 1), TreeSpec.of(context, 1)
    return (*specs, extent.batch, _needing(inputs, context))


def _rows(tree: Tree, rows: int, extent: Extent) -> Tree:
    """A state's or context's rows that are alive at a step."""
    return tree if tree is None or not extent.ragged else map_leaves(lambda x: x[:rows] if x.dim() else x, tree)


def _tried(cell: nn.Module, input: Tree, state: Tree, context: Tree, *, watched: bool = True) -> bool:
    """Whether a step couples rows, found on a copy of the cell; what cannot be copied or put back is not touched."""
    with unseen():
        try:
            twin = twin_of(cell)
        except UnrecordableError:
            return False
        try:
            if watched:
                watch_step(cell, input, state, context)
        except IrreversibleError:
            return False
        except UnrecordableError:  # it is tried all the same
            pass
        return couples_rows(twin, input, state, context, Environment.of(cell).snapshot())
