"""Unrolling: a cell becomes a module over sequences of any length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from unrolled import sequence
from unrolled.bptt.checkpointing import checkpointing_of
from unrolled.bptt.costs import copy_sharing_tensors
from unrolled.bptt.schedules import Schedule
from unrolled.bptt.segments import SegmentRunner, SequenceRun
from unrolled.bptt.truncated import run_by_blocks
from unrolled.bptt.truncation import truncation_of
from unrolled.cells import contract
from unrolled.cells.adapted import as_cell
from unrolled.engine import reference
from unrolled.engine.plan_cache import PlanCache
from unrolled.errors import InputError, OptionError
from unrolled.execution.run import run_plan
from unrolled.internals import CONSTANTS_TAKE_OBJECTS
from unrolled.lengths import Extent, Lengths
from unrolled.networks.budgeted import Budgeted
from unrolled.networks.layout import BatchLayout, given_as, is_plain, run_as_given
from unrolled.networks.windows import Windowed
from unrolled.plan.plan import StepPlan
from unrolled.plan.report import Plan, report
from unrolled.recording.guards.twin import twin_of
from unrolled.tracing.vmap import run_mapped, transformed
from unrolled.trees import Tree, map_leaves
from unrolled.unseen import OwnDraws
from unrolled.wrappers.resetting import ResettingCell

_Parts: TypeAlias = tuple[Tree, Tree, Tree, Extent]  # inputs, state, context, as engines see them

ENGINES = ("auto", "reference", "eager", "native")
"""The engines there are; 'auto' takes the fastest that can run the cell."""


class Unrolled(Windowed, Budgeted, nn.Module):
    """A cell unrolled into one weight-sharing copy for each step of whatever sequence comes; made by `unroll`.

    Attributes:
        cell: the cell, shared by all copies.
        batch_first: whether inputs and outputs are `[B, T, ...]`.
        reverse: whether the state is handed from the last copy to the first.
        ran: the engine that the latest call ran on; the reference before the first one.
        truncation: how far gradients flow back, and how often losses are taken; None for all copies.
        checkpointing: the memory budget or the schedule; None for full storage.
    """

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
        super().__init__()
        self.truncation = truncation_of(horizon, stride)
        self.checkpointing = checkpointing_of(memory, checkpoint, horizon)
        self.cell = cell
        self.batch_first = batch_first
        self.reverse = reverse
        self.ran = "reference"
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
        self.__dict__.pop("_resetting", None)

    @property
    def engine(self) -> str:
        """What runs the copies; setting it makes plans anew."""
        return self._plans.engine

    @engine.setter
    def engine(self, engine: str) -> None:
        self.run_by(engine, quiet=self._plans.quiet)

    def forward(
        self,
        inputs: Tree,
        state: Tree = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        context: Tree = None,
    ) -> tuple[Tree, Tree]:
        """Run the unrolled network over a sequence.

        Args:
            inputs: a pytree of `[T, B, ...]` (`[B, T, ...]` with `batch_first`), or a PackedSequence.
            state: the state that each row's first copy receives; by default the cell's own initial state.
            lengths: how many steps each row has, integers `[B]` from 0 to T. A row that has ended costs nothing: its
                outputs are zero, its last state is that of its own end, and what stands in the padding reaches neither
                values nor gradients.
            resets: a bool `[T, B]` (`[B, T]` with `batch_first`): rows that start afresh from the cell's initial state
                just before step t.
            context: what a cell with a third argument receives at every step.

        Returns:
            The outputs, `[T, B, ...]` (`[B, T, ...]` with `batch_first`, a PackedSequence for one), and the state that
            each row's last copy hands on.

        Raises:
            InputError: for inputs, lengths, resets or a context that the cell cannot take.
            StateError: for a state that does not fit, or that cannot be made.
            CellError: if the cell breaks its contract or raises.
        """
        if torch.compiler.is_compiling():
            return self._traced(inputs, state, lengths, resets, context)
        return self._run_prepared(inputs, state, lengths, resets, context)

    def _traced(
        self, inputs: Tree, state: Tree, lengths: Lengths, resets: Tensor | None, context: Tree
    ) -> tuple[Tree, Tree]:
        # Imported here since it brings in torch's compiler, which takes a second.
        from unrolled.tracing.traced import graph_break, run_traced

        whole = self.truncation is None and self.checkpointing is None
        whole = whole and (CONSTANTS_TAKE_OBJECTS or not torch.compiler.is_dynamo_compiling())
        if whole and self.engine != "reference" and is_plain(inputs, lengths, resets):
            found = run_traced(self._plans, self.cell, self._forwards(self.in_callers_layout(inputs)), state, context)
            if found is not None:
                return self.in_callers_layout(self._forwards(found[0])), found[1]
        return graph_break(self._run_prepared, inputs, state, lengths, resets, context)

    def _run_prepared(
        self, inputs: Tree, state: Tree, lengths: Lengths, resets: Tensor | None, context: Tree
    ) -> tuple[Tree, Tree]:
        return run_as_given(self.through, inputs, state, lengths, resets, context, batch_first=self.batch_first)

    def through(
        self, given: BatchLayout, steps: Tree, state: Tree, resets: Tensor | None, context: Tree
    ) -> tuple[Tree, Tree]:
        """Run over sequences that are laid out as engines take them; so one layer after the other is.

        Args:
            given: how the caller gave the batch.
            steps: the inputs.
            state: `[B, ...]` with the caller's rows, or None.
            resets: as the caller gave them, or None.
            context: `[B, ...]` with the caller's rows, or None.

        Returns:
            The outputs as engines return them, and the last state with the caller's rows.
        """
        first = self.checked(given, steps, state, context)
        if not given.extent.rows:
            return self.no_outputs(given, steps, first, context), first
        rnn, parts = self._started(given, steps, state, first, resets, context)
        outputs, last = self._run(rnn, parts)
        self.ran = rnn.ran
        return outputs, given.last(last, first)

    def _started(
        self, given: BatchLayout, steps: Tree, state: Tree, first: Tree, resets: Tensor | None, context: Tree
    ) -> tuple[Unrolled, _Parts]:
        """The network that runs, which may be one that resets rows, and what it runs on."""
        if self.checkpointing is not None:
            self.checkpointing.check(given.steps)
        if resets is None:
            return self, (steps, given.rows(first), given.rows(context), given.extent)
        fresh = given.fresh(self)
        if fresh is None:
            fresh = first if state is None else contract.make_state(self.cell, steps, given.batch)
        mask = self.checked_resets(given, resets, fresh)
        started = given.rows(context), given.rows(fresh)
        return self._with_resets(), ((steps, mask), given.rows(first), started, given.extent)

    def _run(self, rnn: Unrolled, parts: _Parts) -> tuple[Tree, Tree]:
        whole, cut = rnn.whole(*parts), self.truncation
        if cut is None or whole.extent.steps <= cut.horizon or not torch.is_grad_enabled():
            return self.run_whole(whole, lambda: copy_sharing_tensors(rnn).whole(*parts))
        within = transformed(whole.tensors) if cut.stride < cut.horizon else ""
        if within:
            raise OptionError(
                f"stride < horizon is not offered inside of {within}; take stride = horizon, or "
                "differentiate with backward()"
            )
        return run_by_blocks(cut, whole)

    def runs(
        self, given: BatchLayout, steps: Tree, state: Tree, resets: Tensor | None, context: Tree
    ) -> tuple[SequenceRun, Callable[[], SequenceRun]]:
        """A run that could be made, and the same on a copy of the network; takes what `through` does."""
        first = self.checked(given, steps, state, context)
        rnn, parts = self._started(given, steps, state, first, resets, context)
        return rnn.whole(*parts), lambda: copy_sharing_tensors(rnn).whole(*parts)

    def whole(self, inputs: Tree, state: Tree, context: Tree, extent: Extent) -> SequenceRun:
        """A run over what engines see of a batch, which may be taken piece by piece."""
        plan = None
        if self.engine != "reference":
            decision = self._plans.look_up(self.cell, inputs, state, context, extent)
            plan, self.ran = decision.plan, decision.engine
        run = self._way(plan, context, extent)
        return SequenceRun(run, inputs, state, context, extent, self.reverse, self.cell, pure=plan is not None)

    def _way(self, plan: StepPlan | None, context: Tree, whole: Extent) -> SegmentRunner:
        """How a sequence, or a piece of it, is run: by a plan, or by the reference."""

        def run(inputs: Tree, state: Tree, context: Tree, extent: Extent, start: int) -> tuple[Tree, Tree]:
            if plan is not None:
                return run_plan(
                    plan, self.cell, inputs, state, context, self._plans.runner, extent, reverse=self.reverse
                )
            if self.engine != "reference" and not extent.ragged:
                mapped = run_mapped(self._plans, self.cell, self._forwards(inputs), state, context)
                if mapped is not None:
                    return self._forwards(mapped[0]), mapped[1]
            self.ran = "reference"
            step = contract.CheckedStep(self.cell, context, whole)  # which counts the copies of all pieces
            return reference.run(lambda t, *given: step(start + t, *given), inputs, state, extent, reverse=self.reverse)

        return run

    def _forwards(self, steps: Tree) -> Tree:
        """Sequences `[T, ...]` turned such that the first copy to run is copy 0, and back."""
        return map_leaves(lambda x: x.flip(0), steps) if self.reverse else steps

    def plan(self, inputs: Tree, state: Tree = None, *, lengths: Lengths = None, context: Tree = None) -> Plan:
        """How a call with these arguments will be run: what runs where, and why; bytes and FLOPs.

        Takes what the call takes, and raises what it raises. The plan is made if there is none yet.

        Example:
            >>> import torch, unrolled as ur
            >>> plan = ur.unroll(ur.GRUCell(3, 4), engine="eager").plan(torch.randn(10, 2, 3))
            >>> plan.engine, plan.loops
            ('eager', 1)
        """
        given = given_as(inputs, lengths, batch_first=self.batch_first)
        # Where the initial state is drawn at random, asking must not use up random numbers.
        with OwnDraws():
            steps = given.sequences(inputs)
            state = self.checked(given, steps, state, context)
        if not given.extent.rows:
            return Plan(self._told_name, given.extent.steps, given.extent.batch, "reference", "no row has a step")
        told = self.schedule_told(*self.runs(given, steps, state, None, context))
        return replace(self.step_plan(steps, given.rows(state), given.rows(context), given.extent), schedule=told)

    def step_plan(self, inputs: Tree, state: Tree, context: Tree, extent: Extent) -> Plan:
        """How each copy will be run, whatever the schedule; takes what engines see of a batch, as `whole` does."""
        about = self._told_name, extent.steps, extent.batch
        if self.engine == "reference":
            return Plan(*about, "reference", "it was asked for")
        decision = self._plans.look_up(self.cell, inputs, state, context, extent)
        if decision.plan is None:
            return Plan(*about, decision.engine, decision.why)
        witnessed = f"; every call has a witness, since {decision.open}" if decision.open else ""
        names = contract.state_names(self.cell)
        return report(decision.plan, *about, decision.engine, decision.why + witnessed, names)

    @property
    def _told_name(self) -> str:
        cut = "" if self.truncation is None else f", horizon {self.horizon}, stride {self.stride}"
        return contract.name_of(self.cell) + cut

    def prepared(self, inputs: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree]:
        """Check what a caller passed; return the inputs time-first, and the state or the cell's own."""
        given = given_as(inputs, None, batch_first=self.batch_first)
        steps = given.sequences(inputs)
        return steps, self.checked(given, steps, state, context)

    def checked(self, given: BatchLayout, steps: Tree, state: Tree, context: Tree) -> Tree:
        """Check what a caller passed; return the state that each row's first copy receives, or the cell's own."""
        contract.check_context(self.cell, context, given.batch)
        if state is None:
            state = contract.make_state(self.cell, steps, given.batch)
        else:
            contract.check_state(self.cell, state, steps, given.batch)
        if given.by_length:
            self._refuse_lengths(given, steps, state, context)
        return state

    def checked_resets(self, given: BatchLayout, resets: Tensor, fresh: Tree) -> Tensor:
        """A mask of the rows that start afresh, laid out as the steps and in the order in which they are walked.

        Raises:
            InputError: if it is no bool of T and B, or the state has leaves without rows.
        """
        contract.refuse_without_rows(self.cell, fresh, given.batch, "resets")
        return cast("Tensor", given.sequences(given.resets(resets, reverse=self.reverse)))

    def _refuse_lengths(self, given: BatchLayout, steps: Tree, state: Tree, context: Tree) -> None:
        """Refuse lengths for a cell whose rows are not rows of their own."""
        name = contract.name_of(self.cell)
        contract.refuse_without_rows(self.cell, state, given.batch, "lengths")
        rows = given.rows(state), given.rows(context)
        if given.extent.rows and self._plans.couples(self.cell, steps, *rows, given.extent):
            raise InputError(
                f"lengths need a cell that acts row by row, but in a step of {name} one row's results depend on other "
                "rows, or have no row of their own; leave lengths= out, or take what couples them (a batch norm in "
                "training?) out of the cell"
            )

    def no_outputs(self, given: BatchLayout, steps: Tree, state: Tree, context: Tree) -> Tree:
        """The outputs `[0, ...]` of a batch in which no row has a step: their kind is that of any step's."""
        first = map_leaves(lambda x: x.new_zeros((given.batch, *x.shape[1:])), steps)
        with torch.no_grad(), OwnDraws():
            output, _ = contract.CheckedStep(twin_of(self.cell), context)(0, first, state)
        return map_leaves(lambda x: x[:0], output)

    def _with_resets(self) -> Unrolled:
        """The network whose rows start afresh where they are told to; no submodule, which would list weights twice."""
        made: Unrolled | None = self.__dict__.get("_resetting")
        same = (self.cell, self.engine, self.reverse)
        if made is None or (made.cell.cell, made.engine, made.reverse) != same:
            made = Unrolled(ResettingCell(self.cell), engine=self.engine, reverse=self.reverse, quiet=self._plans.quiet)
            self.__dict__["_resetting"] = made
        return made

    def in_callers_layout(self, steps: Tree) -> Tree:
        """Time-first to the caller's layout, or back: the swap is its own inverse."""
        return sequence.swap_time_and_batch(steps) if self.batch_first else steps

    def extra_repr(self) -> str:
        """The options that differ from the defaults."""
        defaults: dict[str, Any] = {"engine": "auto", "batch_first": False, "reverse": False}
        defaults |= dict.fromkeys(("horizon", "stride", "memory", "checkpoint"))
        given = {name: getattr(self, name) for name in defaults}
        return ", ".join(f"{name}={value!r}" for name, value in given.items() if value != defaults[name])

    def _get_name(self) -> str:
        return f"Unrolled[{contract.name_of(self.cell)}]"


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
        reverse: whether the state is handed from the last copy to the first: a row begins at its own last step.
        horizon: k2, how many copies gradients flow back through (truncated BPTT); None for all of them. At every k1-th
            step the losses of the last k1 steps are taken, each once, and flow back through k2 copies; the state that
            the earliest of these received counts as a constant. Steps are counted as the copies run.
        stride: k1, from 1 to k2; k2 by default.
        memory: what a call may take beside inputs, outputs and their gradients: bytes as an integer or as text
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
