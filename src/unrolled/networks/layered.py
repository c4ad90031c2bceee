"""What modules made of unrolled networks have in common: how their parts are run, and what state they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor, nn

from unrolled.cells.adapted import context_use
from unrolled.cells.contract import name_of, starting_state
from unrolled.errors import InputError, StateError
from unrolled.lengths import Lengths
from unrolled.networks.base import Network
from unrolled.networks.layout import Call
from unrolled.networks.unroll import Unrolled
from unrolled.plan.report import Plan
from unrolled.trees import Tree, describe
from unrolled.unseen import OwnDraws

PartRun: TypeAlias = Callable[[Any, Tree, Tree, Tree], tuple[Tree, Tree]]
"""How one part is run: `(part, steps, state, context) -> (outputs, last state)`."""


class Layered(Network):
    """A module made of unrolled networks, its `parts`."""

    @property
    def parts(self) -> list[nn.Module]:
        """The unrolled networks, or modules made of such, in the order in which their states are passed."""
        raise NotImplementedError

    @property
    def networks(self) -> list[Unrolled]:
        """The unrolled networks, those inside of parts included."""
        return [network for part in self.parts for network in (part.networks if isinstance(part, Layered) else [part])]

    def _compose(
        self, run: PartRun, steps: Tree, states: Sequence[Tree], context: Tree
    ) -> tuple[Tree, tuple[Tree, ...]]:
        """Run the parts, one way or another, and put their outputs together."""
        raise NotImplementedError

    def _traced(self, inputs: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree] | None:
        """The parts, each for itself."""

        def run(part: nn.Module, steps: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree]:
            return part(steps, state, context=context)

        outputs, last = run_parts(self, run, self._time_first(inputs), state, context)
        return self._time_first(outputs), last

    def _run(self, call: Call) -> tuple[Tree, Tree]:
        def run(part: Network, steps: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree]:
            return part._run(replace(call, steps=steps, state=state, context=context))

        return run_parts(self, run, call.steps, call.state, call.context)

    def plan(
        self,
        inputs: Tree,
        state: Tree = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        context: Tree = None,
    ) -> tuple[Plan, ...]:
        """How a call with these arguments will be run: the plan of each of the networks.

        Takes what the call takes, and raises what it raises. The call is made: a layer's plan is for what it reads.

        Example:
            >>> import torch, unrolled as ur
            >>> rnn = ur.stack([ur.GRUCell(3, 4), ur.GRUCell(4, 5)], engine="eager")
            >>> [plan.engine for plan in rnn.plan(torch.randn(10, 2, 3))]
            ['eager', 'eager']
        """
        call = Call.of(inputs, state, lengths=lengths, resets=resets, context=context, batch_first=self.batch_first)
        plans: list[Plan] = []

        def run(part: nn.Module, steps: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree]:
            if isinstance(part, Layered):
                return run_parts(part, run, steps, state, context)
            own = replace(call, steps=steps, state=state, context=context)
            plans.append(part._plan(own))
            return part._run(own)

        with OwnDraws():
            run_parts(self, run, call.steps, call.state, call.context)
        return tuple(plans)

    def _first_state(self, call: Call) -> tuple[Tree, ...]:
        return tuple(
            _first_state(part, replace(call, state=state))
            for part, state in zip(self.parts, self._states(call.state), strict=True)
        )

    def _states(self, state: Tree) -> Sequence[Tree]:
        """The state of each part, None where none was passed."""
        parts = self.parts
        states = [None] * len(parts) if state is None else state
        if not isinstance(states, tuple | list) or len(states) != len(parts):
            raise StateError(
                f"the state of {self._get_name()} is a tuple with one state for each of its {len(parts)} parts "
                f"({', '.join(map(title, parts))}), got {_count(states)}; pass on what an earlier call returned"
            )
        return states

    def _state_of_each(self, state: Tree) -> list[Tree]:
        """The state of each of the networks, None where none was passed."""
        pairs = zip(self.parts, self._states(state), strict=True)
        return [one for part, s in pairs for one in (part._state_of_each(s) if isinstance(part, Layered) else [s])]


def run_parts(network: Layered, run: PartRun, steps: Tree, state: Tree, context: Tree) -> tuple[Tree, tuple[Tree, ...]]:
    """Run the parts of a network in any way, as its own call puts them together; what is passed is checked.

    Args:
        network: the network.
        run: how one part is run.
        steps: what the first part reads.
        state: the state of the network, or None.
        context: what every cell with a third argument receives, or None.

    Raises:
        InputError: for a context that no cell takes.
        StateError: for a state that is no tuple with one entry for each part.
    """
    if context is not None and not _takes_context(network):
        raise InputError(f"no cell of {network._get_name()} takes a context; leave context= out")

    def each(part: nn.Module, steps: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree]:
        return run(part, steps, state, context if _takes_context(part) else None)

    return network._compose(each, steps, network._states(state), context)


def _first_state(part: nn.Module, call: Call) -> Tree:
    """Of an inner part: its cells' lengths and contexts are looked at when it runs, and reads what is there by then."""
    if isinstance(part, Layered):
        return part._first_state(call)
    return starting_state(part.cell, call.state, call.steps, call.layout.batch)


def _takes_context(part: nn.Module) -> bool:
    """Whether any cell of a part has a third argument."""
    if isinstance(part, Layered):
        return any(map(_takes_context, part.parts))
    return context_use(part.cell) != "refuses"


def title(part: nn.Module) -> str:
    """What a person would call a part."""
    return part._get_name() if isinstance(part, Layered) else name_of(part.cell)


def _count(states: Any) -> str:
    if isinstance(states, tuple | list):
        return f"{len(states)} of them"
    return describe(states) if isinstance(states, Tensor) else f"a {type(states).__name__}"
