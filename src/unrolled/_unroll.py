"""Unrolling: a cell becomes a module over sequences of any length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from unrolled import sequence
from unrolled._mapped import run_mapped
from unrolled._planbook import PlanBook
from unrolled.bptt.run import run_plan
from unrolled.cells.adapted import as_cell
from unrolled.cells.contract import CheckedStep, check_context, check_state, make_state, name_of
from unrolled.engine import reference
from unrolled.errors import OptionError
from unrolled.plan.report import Plan, report
from unrolled.trees import Tree

__all__ = ["ENGINES", "Unrolled", "unroll"]

ENGINES = ("auto", "reference", "eager", "native")
"""The engines there are; 'auto' takes the fastest that can run the cell."""


class Unrolled(nn.Module):
    """A cell unrolled into one weight-sharing copy for each step of whatever sequence comes; made by `unroll`.

    Attributes:
        cell: the cell, shared by all copies.
        batch_first: whether inputs and outputs are `[B, T, ...]`.
        engine: what runs the copies.
    """

    def __init__(
        self, cell: nn.Module, *, batch_first: bool = False, engine: str = "auto", quiet: bool = False
    ) -> None:
        super().__init__()
        if engine not in ENGINES:
            raise OptionError(f"engine must be one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
        self.cell = cell
        self.batch_first = batch_first
        self.engine = engine
        self._plans = PlanBook(engine, quiet=quiet)

    def forward(self, inputs: Tree, state: Tree = None, *, context: Tree = None) -> tuple[Tree, Tree]:
        """Run the unrolled network over a sequence.

        Args:
            inputs: a pytree of `[T, B, ...]` (`[B, T, ...]` with `batch_first`).
            state: the state copy 0 receives; by default the cell's own initial state.
            context: what a cell with a third argument receives at every step.

        Returns:
            The outputs, `[T, B, ...]` (`[B, T, ...]` with `batch_first`), and the last copy's state.

        Raises:
            InputError: for inputs or a context that the cell cannot take.
            StateError: for a state that does not fit, or that cannot be made.
            CellError: if the cell breaks its contract or raises.
        """
        if torch.compiler.is_compiling():
            return self._traced(inputs, state, context)
        return self._run_prepared(inputs, state, context)

    def _traced(self, inputs: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree]:
        # Imported here since it brings in torch's compiler, which takes a second.
        from unrolled._traced import left_alone, run_traced

        if self.engine != "reference":
            found = run_traced(self._plans, self.cell, self.in_callers_layout(inputs), state, context)
            if found is not None:
                return self.in_callers_layout(found[0]), found[1]
        return left_alone(self._run_prepared, inputs, state, context)

    def _run_prepared(self, inputs: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree]:
        inputs, state = self.prepared(inputs, state, context)
        outputs, state = self._run(inputs, state, context)
        return self.in_callers_layout(outputs), state

    def _run(self, inputs: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree]:
        if self.engine != "reference":
            plan = self._plans.look_up(self.cell, inputs, state, context).plan
            if plan is not None:
                return run_plan(plan, self.cell, inputs, state, context, self._plans.runner)
            mapped = run_mapped(self._plans, self.cell, inputs, state, context)
            if mapped is not None:
                return mapped
        return reference.run(CheckedStep(self.cell, context), inputs, state)

    def plan(self, inputs: Tree, state: Tree = None, *, context: Tree = None) -> Plan:
        """How a call with these arguments will be run: what runs where, and why; bytes and FLOPs.

        Takes what the call takes, and raises what it raises. The plan is made if there is none yet.

        Example:
            >>> import torch, unrolled as ur
            >>> plan = ur.unroll(ur.GRUCell(3, 4), engine="eager").plan(torch.randn(10, 2, 3))
            >>> plan.engine, plan.loops
            ('eager', 1)
        """
        # Where the initial state is drawn at random, asking must not use up random numbers.
        with torch.random.fork_rng(devices=[]):
            inputs, state = self.prepared(inputs, state, context)
        T, B = sequence.sizes(inputs)
        if self.engine == "reference":
            return Plan(name_of(self.cell), T, B, "reference", "it was asked for")
        decision = self._plans.look_up(self.cell, inputs, state, context)
        if decision.plan is None:
            return Plan(name_of(self.cell), T, B, decision.engine, decision.why)
        return report(decision.plan, name_of(self.cell), T, B, decision.engine, decision.why)

    def prepared(self, inputs: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree]:
        """Check what a caller passed; return the inputs time-first, and the state or the cell's own."""
        _, B = sequence.sizes(inputs, batch_first=self.batch_first)
        check_context(self.cell, context, B)
        if state is None:
            state = make_state(self.cell, inputs, B)
        else:
            check_state(self.cell, state, inputs, B)
        return self.in_callers_layout(inputs), state

    def in_callers_layout(self, steps: Tree) -> Tree:
        """Time-first to the caller's layout, or back: the swap is its own inverse."""
        return sequence.swap_time_and_batch(steps) if self.batch_first else steps

    def extra_repr(self) -> str:
        """The options that differ from the defaults."""
        options = [] if self.engine == "auto" else [f"engine={self.engine!r}"]
        return ", ".join(options + (["batch_first=True"] if self.batch_first else []))

    def _get_name(self) -> str:
        return f"Unrolled[{name_of(self.cell)}]"


def unroll(cell: nn.Module | Callable[..., Any], *, batch_first: bool = False, engine: str = "auto") -> Unrolled:
    """Unroll a cell into copies that share its weights, as many as a sequence has steps.

    Args:
        cell: a cell, or anything `as_cell` makes one of without further arguments.
        batch_first: whether inputs and outputs are `[B, T, ...]`; states are `[B, ...]` in any case.
        engine: "auto" (the fastest that can run the cell), "reference", "eager" or "native".

    Returns:
        A module: `outputs, state = rnn(inputs, state=None, context=None)`.

    Raises:
        OptionError: for an unknown engine, or something that is no cell.

    Source: P. Werbos, "Backpropagation through time: what it does and how to do it", Proc. IEEE 78 (1990).

    Example:
        >>> import torch, unrolled as ur
        >>> rnn = ur.unroll(ur.LSTMCell(input_size=28, hidden_size=128))
        >>> outputs, (h, c) = rnn(torch.randn(100, 32, 28))
        >>> outputs.shape, h.shape
        (torch.Size([100, 32, 128]), torch.Size([32, 128]))
    """
    return Unrolled(as_cell(cell), batch_first=batch_first, engine=engine)
