"""The plan cache: which plan holds for a call. Plans are made on first use, checked, and kept under their guards."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from unrolled import sequence
from unrolled.cells.contract import name_of
from unrolled.engine.cell_call import CellCall
from unrolled.engine.choice import Runner
from unrolled.engine.witness import FailingStepError, Turns, hold_against_the_cell, refuse_failing_steps
from unrolled.errors import warn_caller, warn_caller_once
from unrolled.execution.answers import OtherAnswerError
from unrolled.internals import tensors_in, unwatched
from unrolled.lengths import Extent
from unrolled.lru import LRUCache
from unrolled.plan.independence import couples_rows
from unrolled.plan.loops import LoopProgram
from unrolled.plan.plan import StepPlan, plan_step
from unrolled.recording.events import IrreversibleError, UnrecordableError
from unrolled.recording.guards.environment import Environment
from unrolled.recording.guards.fingerprint import fingerprint
from unrolled.recording.guards.look import Look
from unrolled.recording.guards.twin import twin_of, watch_step
from unrolled.recording.record import why_not_recorded
from unrolled.trees import Tree, TreeSpec, map_leaves
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
        self._decisions: LRUCache[Decision] = LRUCache(_MOST_PLANS)
        self._coupling: LRUCache[bool] = LRUCache(_MOST_PLANS)
        # By kind of call the latest decision of a plan, and whether it still holds; emptied when a decision goes.
        self._latest: dict[Any, tuple[Look, Decision]] = {}
        self._announced: set[Decision] = set()
        # What is learnt of cells' surroundings stays for as long as their network is there.
        self._environments: set[Environment] = set()
        # By kind of call, how often in a row a step was recorded, and how often a witness spoke against it.
        self._recordings: dict[Any, int] = {}
        self._refutations: dict[Any, int] = {}

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
        self._environments.add(Environment.of(cell))
        step = CellCall.of(cell, inputs, state, context, extent).first_step

        def key() -> Any:
            with unwatched():
                return fingerprint(cell), *(TreeSpec.of(tree, 1) for tree in step), extent.batch

        try:
            try:
                return self._coupling.get(key, lambda: _couples_rows(cell, *step))
            except UnrecordableError:  # hooks on all modules would see the step being watched
                return _couples_rows(cell, *step, watched=False)
        except Exception:  # a cell that fails is reported by the run, which names the copy
            return False

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
        call = CellCall.of(cell, inputs, state, context, extent)
        decision = self._witnessed(call)
        if call.extent.ragged and decision.plan is not None and decision.plan.why_not_ragged:
            why = f"rows of different lengths need steps that act row by row: {decision.plan.why_not_ragged}"
            decision = self._left_for_lengths(Decision(None, "reference", why), decision.engine)
        return decision

    def _left_for_lengths(self, decision: Decision, engine: str) -> Decision:
        """The decision for rows of different lengths where they alone are why; who did not ask is told once, too."""
        if self.engine == "auto" and not self.quiet and decision not in self._announced:
            warn_caller(
                f"with lengths this cell runs on {decision.engine!r}, without them on {engine!r}: {decision.why}"
            )
        return self._announce_once(decision)

    def leave(self, plan: StepPlan, why: str) -> None:
        """Leave the calls that go by a plan to the reference, from now on."""
        decision = Decision(None, "reference", why)
        self._latest.clear()
        if self._decisions.replace(lambda known: known.plan is plan, decision):
            self._announce(decision)

    def drop(self, plan: StepPlan) -> None:
        """Forget a plan: the next call of its kind makes another one."""
        self._latest.clear()
        self._decisions.drop(lambda known: known.plan is plan)

    def _witnessed(self, call: CellCall) -> Decision:
        """The decision for a call; if it is this call's turn, one that was held against the cell itself."""
        while True:
            decision = self._decision(call)
            if decision.plan is None:
                return decision
            if decision.plan.draws and not call.lies_in_order:
                why = "what it draws goes by how its arguments lie in memory, and these do not as they are read"
                return self._announce_once(Decision(None, "reference", f"{why}; pass them contiguous()"))
            t = decision.turns.next(call.extent.steps, always=bool(decision.open))
            if t is None:
                return decision
            try:
                with unseen(), Environment.of(call.cell).kept():
                    hold_against_the_cell(decision.plan, call.at(t), self.runner)
            except OtherAnswerError:  # of copy t with a state that is not its own: it says nothing
                return decision
            except Exception as error:  # a cell that fails is reported by the reference, which names the copy
                refused = self._refute(decision, call, f"copy {t} of {name_of(call.cell)}: {error}")
                if refused is not None:
                    return refused
            else:
                self._refutations.pop(call.kind, None)
                return decision

    def _refute(self, decision: Decision, call: CellCall, what: str) -> Decision | None:
        """Drop a recording that a witness spoke against: None to record the step anew, which happens a few times."""
        self._latest.clear()
        self._decisions.drop(lambda known: known is decision)
        times = self._refutations[call.kind] = self._refutations.get(call.kind, 0) + 1
        message = f"{what}; {decision.open or 'something has changed that cannot be seen'}"
        if times < _MOST_TRIES:
            warn_caller(f"{message}. It is recorded anew; what a step reads is best kept in a buffer of the cell")
            return None
        why = f"{message}: its recordings did not hold, {_MOST_TRIES} times one after the other"
        return self._announce_once(Decision(None, "reference", why))

    def _decision(self, call: CellCall) -> Decision:
        """The decision that is kept for a call of this kind, made if there is none or if it no longer holds."""
        why = why_not_recorded(call.arguments())
        if why is not None:
            return Decision(None, "reference", why)
        latest = self._latest.get(call.kind)
        try:
            if latest is not None and latest[0].cell is call.cell and latest[0].stands():
                self._recordings.pop(call.kind, None)
                return latest[1]
        except UnrecordableError as error:
            return Decision(None, "reference", str(error))
        return self._looked_up(call)

    def _looked_up(self, call: CellCall) -> Decision:
        """The decision by the fingerprint of the cell; while that stays what it is, it is not asked for again."""
        why = why_not_recorded(tensors_in(call.cell, "_parameters", "_buffers"))
        if why is not None:
            return Decision(None, "reference", why)
        self._environments.add(Environment.of(call.cell))
        look, times = self._look_at(call), self._recordings.get(call.kind, 0)

        def make() -> Decision:
            self._recordings[call.kind] = times + 1
            return self._decide(call.at(0)) if times < _MOST_TRIES else self._moving(call.cell)

        def holds(decision: Decision) -> bool:
            nonlocal times
            if decision.moving:  # what moved has stood still since the call before
                times = 0
                return False
            return _still_fits(decision.plan, call.cell)

        try:
            decision = self._decisions.get(lambda: (fingerprint(call.cell), call.kind), make, holds=holds)
        except FailingStepError as error:  # nothing is learnt of a call that is about to raise
            self._recordings[call.kind] = times
            return Decision(None, "reference", str(error))
        except UnrecordableError as error:
            return Decision(None, "reference", str(error))
        if self._recordings.get(call.kind) == times:  # nothing was made
            self._recordings.pop(call.kind, None)
        if look is not None and decision.plan is not None:
            self._latest[call.kind] = look, decision
        return decision

    def _look_at(self, call: CellCall) -> Look | None:
        """A look at the cell before its fingerprint is taken; None where the one that there is will not do better."""
        known = self._latest.get(call.kind)
        if known is not None and known[0].cell is call.cell and not known[0].complete:
            return None
        if len(self._latest) >= _MOST_PLANS:
            self._latest.clear()
        try:
            return Look(call.cell)
        except UnrecordableError:  # the fingerprint raises it, too
            return None

    def _moving(self, cell: nn.Module) -> Decision:
        moved = Environment.of(cell).moved or f"what {name_of(cell)} holds"
        why = f"{moved} has changed before each of the latest calls; as a buffer of the cell it could, without this"
        return self._announce_once(Decision(None, "reference", why, moving=True))

    def _decide(self, call: CellCall) -> Decision:
        """A new decision, by a call of a step or two."""
        started = time.perf_counter()
        decision = self._planned_and_checked(call)
        seconds = time.perf_counter() - started
        if seconds > _LONG:
            _log.warning("a plan for %s took %.1f s; calls like this one now go by it", name_of(call.cell), seconds)
        return decision if decision.engine == "native" else self._announce(decision)

    def _planned_and_checked(self, call: CellCall) -> Decision:
        environment = Environment.of(call.cell)
        try:
            with unseen():
                inputs, state, context = (map_leaves(_in_order, x) for x in (call.inputs, call.state, call.context))
                call = replace(call, inputs=inputs, state=state, context=context)
                watch_step(call.cell, *call.first_step)
                with environment.kept():
                    plan, slower = self._planned(call)
                    hold_against_the_cell(plan, call, self.runner)
        except (UnrecordableError, OtherAnswerError) as error:
            return Decision(None, "reference", str(error))
        except Exception as error:  # a cell that fails is reported by the reference, which names the copy
            why = f"planning it raised {type(error).__name__}: {error}"
            with unseen(), environment.kept():
                refuse_failing_steps(call, why)
            return Decision(None, "reference", why)
        turns = Turns.of(sum(tensor.numel() for tensor in tensors_in(call.cell, "_parameters", "_buffers")))
        if slower:
            return Decision(plan, "eager", "; ".join(slower), environment.open, turns=turns)
        return Decision(plan, "native", "every loop is emitted as C", environment.open, turns=turns)

    def _planned(self, call: CellCall) -> tuple[StepPlan, list[str]]:
        """A plan, and why not all of its loops run natively; fused if that is what all of them do."""
        device = sequence.device_of(call.inputs)
        if not self.runner.why_not_native((), device):
            plan = _plan(call, fuse=True)
            if not self.runner.why_not_native(_loops_of(plan), device):
                return plan, []
        plan = _plan(call, fuse=False)
        return plan, self.runner.why_not_native(_loops_of(plan), device)

    def _announce(self, decision: Decision) -> Decision:
        """Warn where another engine runs than the one that was asked for by name, and where there is no compiler."""
        if self.engine == "auto" and self.runner.no_compiler and not self.quiet:
            warn_caller_once(f"unrolled runs loops with torch operations, which is slower: {self.runner.no_compiler}")
        if not self.quiet and self.engine not in ("auto", decision.engine):
            warn_caller(
                f"engine={self.engine!r} was asked for, but this cell runs on {decision.engine!r}: {decision.why}"
            )
        return decision

    def _announce_once(self, decision: Decision) -> Decision:
        """Warn by a decision that is made anew at every call."""
        known, self._announced = decision in self._announced, {*self._announced, decision}
        return decision if known else self._announce(decision)


def _plan(call: CellCall, *, fuse: bool) -> StepPlan:
    plan = plan_step(call.cell, *call.first_step, call.extent.batch, call.requires_grad, fuse=fuse)
    outside = [g for g in plan.recording.program.generators if isinstance(g, torch.Generator)]
    if any(all(g is not known for known in Environment.of(call.cell).generators) for g in outside):
        raise UnrecordableError("it draws from a torch.Generator that is found in no attribute of the cell")
    return plan


def _in_order(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


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
    backward = [loop for planned in plan.planned.values() for loop in planned.backward.loops.values()]
    return forward + backward


def _couples_rows(cell: nn.Module, input: Tree, state: Tree, context: Tree, *, watched: bool = True) -> bool:
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
