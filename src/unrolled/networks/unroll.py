"""Unrolling: a cell becomes a module over sequences of any length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unrolled.bptt.costs import copy_sharing_tensors
from unrolled.bptt.schedules import Schedule
from unrolled.bptt.segments import SequenceRun
from unrolled.cells import contract
from unrolled.cells.adapted import AdaptedCell, as_cell
from unrolled.engine.plan_cache import PlanCache
from unrolled.errors import InputError, OptionError
from unrolled.execution.answers import OtherAnswerError
from unrolled.internals import CONSTANTS_TAKE_OBJECTS
from unrolled.lengths import Extent, Lengths
from unrolled.networks.bounded import BoundedNetwork
from unrolled.networks.cell_run import by_the_cell, flipped, run_of_cell
from unrolled.networks.layout import Call
from unrolled.plan.report import Plan, report
from unrolled.recording.guards.twin import twin_of
from unrolled.recording.stateful import state_of_fresh
from unrolled.trees import Tree, map_leaves
from unrolled.unseen import OwnDraws
from unrolled.wrappers.resetting import ResettingCell

ENGINES = ("auto", "reference", "eager", "native")
"""The engines there are; 'auto' takes the fastest that can run the cell."""


class Unrolled(BoundedNetwork):
    """A cell unrolled into one weight-sharing copy for each step of whatever sequence comes; made by `unroll`.

    Attributes:
        cell: the cell, shared by all copies.
        batch_first: whether inputs and outputs are `[B, T, ...]`.
        reverse: whether the state is passed on from the last copy to the first.
        truncation: how far gradients flow back, and how often losses are taken; None for all copies.
        checkpointing: the memory budget or the schedule; None for full storage.
    """

    _defaults: ClassVar[Mapping[str, Any]] = {"engine": "auto", "batch_first": False, "reverse": False} | dict.fromkeys(
        ("horizon", "stride", "memory", "checkpoint")
    )

    def __init__(
        self,
        cell: nn.Module,
        *,
        batch_first: bool = False,
        engine: str = "auto",
        reverse: bool = False,
        horizon: int | None = None,
        stride: int | None = None,
        memory: int | float | str | None = None,
        checkpoint: Schedule | Callable[[int], Schedule] | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__(batch_first=batch_first, horizon=horizon, stride=stride, memory=memory, checkpoint=checkpoint)
        self.cell = cell
        self.reverse = reverse
        self._ran = "reference"
        self.run_by(engine, quiet=quiet)

    def run_by(self, engine: str, *, quiet: bool = False) -> None:
        """Have another engine run the copies; plans are made anew.

        Args:
            engine: one of `ENGINES`.
            quiet: whether the plan alone says that another engine runs than the one that was asked for by name.
        """
        if engine not in ENGINES:
            raise OptionError(f"engine must be one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
        self._plans = PlanCache(engine, quiet=quiet)
        self._resetting: tuple[ResettingCell, PlanCache] | None = None

    @property
    def engine(self) -> str:
        """What runs the copies; setting it makes plans anew."""
        return self._plans.engine

    @engine.setter
    def engine(self, engine: str) -> None:
        self.run_by(engine, quiet=self._plans.quiet)

    @property
    def ran(self) -> str:
        """The engine that the latest call ran on, in either direction; the reference before the first one.

        It is the eager one where the native one declined the numbers: ties that torch breaks in an order of its own.
        """
        declined = any(plans.runner.declined for plans in self._all_plans())
        return "eager" if declined and self._ran == "native" else self._ran

    def _all_plans(self) -> list[PlanCache]:
        """The plans of the cell, and those of the cell with resets if there are any."""
        return [self._plans] if self._resetting is None else [self._plans, self._resetting[1]]

    def plan(
        self,
        inputs: Tree,
        state: Tree = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        context: Tree = None,
    ) -> Plan:
        """How a call with these arguments will be run: what runs where, and why; bytes and FLOPs.

        Takes what the call takes, and raises what it raises. The plan is made if there is none yet.

        Example:
            >>> import torch, unrolled as ur
            >>> plan = ur.unroll(ur.GRUCell(3, 4), engine="eager").plan(torch.randn(10, 2, 3))
            >>> plan.engine, plan.loops
            ('eager', 1)
        """
        call = Call.of(inputs, state, lengths=lengths, resets=resets, context=context, batch_first=self.batch_first)
        return self._plan(call)

    def _plan(self, call: Call) -> Plan:
        # Where the initial state is drawn at random, planning must not use up random numbers.
        with OwnDraws():
            first = self._first_state(call)
            fresh = {} if call.resets is None else {self: fresh_state(self, call, first)}
            call = replace(call, state=first, fresh={**call.fresh, **fresh})
        cut = "" if self.truncation is None else f", horizon {self.horizon}, stride {self.stride}"
        title = contract.name_of(self.cell) + cut, call.extent.steps, call.extent.batch
        if not call.extent.rows:
            return Plan(*title, "reference", "no row has a step")
        schedule = self._schedule_message(call)
        if self.engine == "reference":
            return Plan(*title, "reference", "it was asked for", schedule=schedule)
        plans, *values = self._taken(call, call.state)
        decision = plans.look_up(*values)
        if decision.plan is None:
            return Plan(*title, decision.engine, decision.why, schedule=schedule)
        witnessed = f"; every call has a witness, since {decision.open}" if decision.open else ""
        names = contract.state_names(self.cell)
        lines = dict.fromkeys(each.line for each in decision.plan.reals.asked)
        asked = f"; asked of all steps at once: {', '.join(lines)}" if lines else ""
        found = report(decision.plan, *title, decision.engine, decision.why + asked + witnessed, names)
        return replace(found, schedule=schedule)

    def _traced(self, inputs: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree] | None:
        # Imported here since it brings in torch's compiler, which takes a second.
        from unrolled.tracing.traced import run_traced

        readable = CONSTANTS_TAKE_OBJECTS or not torch.compiler.is_dynamo_compiling()
        if not readable or self.engine == "reference":
            return None
        steps = flipped(self._time_first(inputs), self.reverse)
        found = run_traced(self._plans, self.cell, steps, state, context)
        return None if found is None else (self._time_first(flipped(found[0], self.reverse)), found[1])

    def _run(self, call: Call) -> tuple[Tree, Tree]:
        first = self._first_state(call)
        if not call.extent.rows:
            return empty_outputs(self.cell, call, first), first
        return self._run_from(call, first)

    def _first_state(self, call: Call) -> Tree:
        cell, batch = self.cell, call.layout.batch
        contract.check_context(cell, call.context, batch)
        state = starting_state(cell, call)
        if call.layout.by_length:
            contract.refuse_without_rows(cell, state, batch, "lengths")
            rows = call.layout.rows(state), call.layout.rows(call.context)
            if call.extent.rows and self._plans.couples(cell, call.steps, *rows, call.extent):
                raise InputError(
                    f"lengths need a cell that acts row by row, but in a step of {contract.name_of(cell)} one row's "
                    "results depend on other rows, or have no row of their own; leave lengths= out, or take what "
                    "couples them (a batch norm in training?) out of the cell"
                )
        return state

    def _runs(self, call: Call, first: Tree) -> tuple[SequenceRun, Callable[[], SequenceRun]]:
        if self.checkpointing is not None:
            self.checkpointing.check(call.layout.steps)
        plans, cell, *values = self._taken(call, first)
        run = run_of_cell(plans, cell, *values, reverse=self.reverse)
        # What is measured computes nothing that anybody reads.
        return run, lambda: run_of_cell(plans, copy_sharing_tensors(cell), *values, reverse=self.reverse, checked=False)

    def _taken(self, call: Call, first: Tree) -> tuple[PlanCache, nn.Module, Tree, Tree, Tree, Extent]:
        """What a call takes: the plans, the cell, its inputs, first state and context as engines see them, how far."""
        cell, plans, inputs, context = self.cell, self._plans, call.steps, call.layout.rows(call.context)
        if call.resets is not None:
            fresh = fresh_state(self, call, first)
            cell, plans = self._with_resets()
            inputs, context = (
                (inputs, call.layout.restarts(call.resets, reverse=self.reverse)),
                (context, call.layout.rows(fresh)),
            )
        return plans, cell, inputs, call.layout.rows(first), context, call.extent

    def _run_bounded(self, run: SequenceRun, again: Callable[[], SequenceRun]) -> tuple[Tree, Tree]:
        self._ran = run.engine
        for plans in self._all_plans():
            plans.runner.declined = False
        try:
            return super()._run_bounded(run, again)
        except OtherAnswerError as error:
            other = error
        # Nothing of the call has left: the cell raises, or it goes another way here, as it may again.
        if run.rewind is not None:
            run.rewind()
        results = super()._run_bounded(by_the_cell(run), lambda: by_the_cell(again()))
        self._ran = "reference"
        for plans in self._all_plans():
            plans.leave(other.plan, str(other))
        return results

    def _with_resets(self) -> tuple[ResettingCell, PlanCache]:
        """The cell as one whose rows start afresh where a mask says so, and its plans."""
        if self._resetting is None or self._resetting[0].cell is not self.cell:
            self._resetting = ResettingCell(self.cell), PlanCache(self.engine, quiet=self._plans.quiet)
        return self._resetting

    def _get_name(self) -> str:
        return f"Unrolled[{contract.name_of(self.cell)}]"


def starting_state(cell: nn.Module, call: Call) -> Tree:
    """As `contract.starting_state`; of a stateful module, what a fresh one has for the call's first input."""
    if call.state is None and isinstance(cell, AdaptedCell) and cell.starts_from_input:
        return state_of_fresh(cell, _first_input(call))
    return contract.starting_state(cell, call.state, call.steps, call.layout.batch)


def _first_input(call: Call) -> Tree:
    """The input of the first copy, `[B, ...]`; rows without a step have that of another one, or zeros."""
    extent, batch = call.extent, call.layout.batch
    if not extent.rows:
        return map_leaves(lambda x: x.new_zeros((batch, *x.shape[1:])), call.steps)
    if not extent.ragged:
        return map_leaves(lambda x: x[0], call.steps)
    return map_leaves(lambda x: x[(torch.arange(batch) % extent.sizes[0]).to(x.device)], call.steps)


def fresh_state(rnn: Unrolled, call: Call, first: Tree) -> Tree:
    """The state that rows of a network start afresh from, `[B, ...]`: the cell's own.

    It is that of the first copies, unless they received one that was passed: so one drawn at random is drawn once.

    Raises:
        InputError: if it has leaves without rows.
    """
    fresh, batch = call.fresh.get(rnn), call.layout.batch
    if fresh is None:
        fresh = first if call.state is None else starting_state(rnn.cell, replace(call, state=None))
    contract.refuse_without_rows(rnn.cell, fresh, batch, "resets")
    return fresh


def empty_outputs(cell: nn.Module, call: Call, state: Tree) -> Tree:
    """The outputs `[0, ...]` of a call in which no row has a step: their kind is that of any step's."""
    first = map_leaves(lambda x: x.new_zeros((call.layout.batch, *x.shape[1:])), call.steps)
    with torch.no_grad(), OwnDraws():
        output, _ = contract.CheckedStep(twin_of(cell), call.context)(0, first, state)
    return map_leaves(lambda x: x[:0], output)


def unroll(
    cell: nn.Module | Callable[..., Any],
    *,
    batch_first: bool = False,
    engine: str = "auto",
    reverse: bool = False,
    horizon: int | None = None,
    stride: int | None = None,
    memory: int | float | str | None = None,
    checkpoint: Schedule | Callable[[int], Schedule] | None = None,
) -> Unrolled:
    """Unroll a cell into copies that share its weights, as many as a sequence has steps.

    Args:
        cell: a cell, or anything `as_cell` makes one of without further arguments.
        batch_first: whether inputs and outputs are `[B, T, ...]`; states are `[B, ...]` in any case.
        engine: "auto" (the fastest that can run the cell), "reference", "eager" or "native".
        reverse: whether the state is passed on from the last copy to the first: a row begins at its own last step.
        horizon: k2, how many copies gradients flow back through (truncated BPTT); None for all of them. At every k1-th
            step the losses of the last k1 steps are taken, each once, and flow back through k2 copies; the state that
            the earliest of these received counts as a constant. Steps are counted as the copies run.
        stride: k1, from 1 to k2; k2 by default.
        memory: what a call may take on top of inputs, outputs and their gradients: bytes as an integer or as text
            ("512MB", "1.5GiB"), or the share of what full storage takes on the same engine (0.1 or "10%"). The
            fastest schedule that fits is planned from the memory of a few steps, measured when such a call comes for
            the first time; `plan_memory` shows what there is to choose from.
        checkpoint: a schedule (`segments`, `revolve`), or a function that makes one for T steps. Steps whose tape is
            not kept are run again in the backward pass, on the random numbers of the first time.

    Returns:
        A module: `outputs, state = rnn(inputs, state=None, lengths=None, resets=None, context=None)`.

    Raises:
        OptionError: for an unknown engine, what is no cell, a horizon, stride or budget that is none.

    Source: P. Werbos, "Backpropagation through time: what it does and how to do it", Proc. IEEE 78 (1990); horizon and
    stride: R. Williams and J. Peng, "An efficient gradient-based algorithm for on-line training of recurrent network
    trajectories", Neural Computation 2 (1990).

    Example:
        >>> import torch, unrolled as ur
        >>> rnn = ur.unroll(ur.LSTMCell(input_size=28, hidden_size=128))
        >>> outputs, (h, c) = rnn(torch.randn(100, 32, 28))
        >>> outputs.shape, h.shape
        (torch.Size([100, 32, 128]), torch.Size([32, 128]))
    """
    return Unrolled(
        as_cell(cell),
        batch_first=batch_first,
        engine=engine,
        reverse=reverse,
        horizon=horizon,
        stride=stride,
        memory=memory,
        checkpoint=checkpoint,
    )
