"""What modules made of unrolled networks have in common: how they are called, and what state they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from unrolled import sequence
from unrolled.bptt.checkpointing import Checkpointing
from unrolled.bptt.truncation import Truncation
from unrolled.cells.adapted import context_use
from unrolled.cells.contract import check_state, make_state, name_of
from unrolled.errors import InputError, StateError
from unrolled.lengths import Lengths
from unrolled.networks.layout import BatchLayout, is_plain, run_as_given
from unrolled.networks.unroll import Unrolled
from unrolled.trees import Tree, describe

Run: TypeAlias = Callable[[nn.Module, Tree, Tree, Tree], tuple[Tree, Tree]]
"""How one part is run: `(part, steps, state, context) -> (outputs, last state)`."""


class Layered(nn.Module):
    """A module made of unrolled networks, its `parts`; how it is called.

    Args:
        batch_first: whether inputs and outputs are `[B, T, ...]`; states are `[B, ...]` in any case.
    """

    truncation: Truncation | None = None
    checkpointing: Checkpointing | None = None

    def __init__(self, *, batch_first: bool = False) -> None:
        super().__init__()
        self.batch_first = batch_first

    @property
    def parts(self) -> list[nn.Module]:
        """The unrolled networks, or modules made of such, in the order in which their states are handed out."""
        raise NotImplementedError

    @property
    def takes_context(self) -> bool:
        """Whether any cell has a third argument."""
        return any(takes_context(part) for part in self.parts)

    def compose(self, run: Run, steps: Tree, states: Sequence[Tree], context: Tree) -> tuple[Tree, tuple[Tree, ...]]:
        """Run the parts, one way or another, and put their outputs together."""
        raise NotImplementedError

    def forward(
        self,
        inputs: Tree,
        state: Tree = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        context: Tree = None,
    ) -> tuple[Tree, Tree]:
        """Run over a sequence.

        Args:
            inputs: a pytree of `[T, B, ...]` (`[B, T, ...]` with `batch_first`), or a PackedSequence.
            state: a tuple with one state for each part, None for its cell's own; None for all of them.
            lengths: how many steps each row has, integers `[B]`, as `Unrolled.forward` takes them.
            resets: a bool `[T, B]`, rows that start afresh just before step t.
            context: what every cell with a third argument receives at every step.

        Returns:
            The outputs, laid out as the inputs, and a tuple with the last state of each part.

        Raises:
            InputError: for what a cell cannot take, naming the part.
            StateError: for a state that does not fit.
        """
        if torch.compiler.is_compiling():
            return self._traced(inputs, state, lengths, resets, context)
        return self._run(inputs, state, lengths, resets, context)

    def _traced(
        self, inputs: Tree, state: Tree, lengths: Lengths, resets: Tensor | None, context: Tree
    ) -> tuple[Tree, Tree]:
        """What a compiler sees: the parts, each for itself; of rows that end or start afresh, and of cuts, nothing."""
        # Imported here since it brings in torch's compiler, which takes a second.
        from unrolled.tracing.traced import graph_break

        if not is_plain(inputs, lengths, resets) or self.truncation is not None or self.checkpointing is not None:
            return graph_break(self._run, inputs, state, lengths, resets, context)
        steps = sequence.swap_time_and_batch(inputs) if self.batch_first else inputs
        outputs, last = self.composed_by(
            lambda part, *given: part(given[0], given[1], context=given[2]), steps, state, context
        )
        return sequence.swap_time_and_batch(outputs) if self.batch_first else outputs, last

    def _run(
        self, inputs: Tree, state: Tree, lengths: Lengths, resets: Tensor | None, context: Tree
    ) -> tuple[Tree, Tree]:
        return run_as_given(self.through, inputs, state, lengths, resets, context, batch_first=self.batch_first)

    def through(
        self, given: BatchLayout, steps: Tree, state: Tree, resets: Tensor | None, context: Tree
    ) -> tuple[Tree, Tree]:
        """Run over sequences that are laid out as engines take them; see `Unrolled.through`."""

        def run(part: nn.Module, steps: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree]:
            return cast("Layered | Unrolled", part).through(given, steps, state, resets, context)

        return self.composed_by(run, steps, state, context)

    def composed_by(self, run: Run, steps: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree]:
        """Check what was passed and run the parts, one way or another; see `compose`.

        Raises:
            InputError: for a context that no cell takes.
            StateError: for a state that is no tuple with one entry for each part.
        """
        if context is not None and not self.takes_context:
            raise InputError(f"no cell of {self._get_name()} takes a context; leave context= out")
        states = self._states(state)

        def each(part: nn.Module, steps: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree]:
            return run(part, steps, state, context if takes_context(part) else None)

        return self.compose(each, steps, states, context)

    def _states(self, state: Tree) -> Sequence[Tree]:
        """The state of each part, None where it is not given."""
        parts = self.parts
        states = [None] * len(parts) if state is None else state
        if not isinstance(states, tuple | list) or len(states) != len(parts):
            raise StateError(
                f"the state of {self._get_name()} is a tuple with one state for each of its {len(parts)} parts "
                f"({', '.join(map(named, parts))}), got {_count(states)}; pass on what an earlier call returned"
            )
        return states

    def first_state(self, steps: Tree, state: Tree, batch: int) -> tuple[Tree, ...]:
        """The state that each part's first copy receives: the one that is given, checked, or the cell's own."""
        return tuple(
            _first_state(part, steps, given, batch) for part, given in zip(self.parts, self._states(state), strict=True)
        )

    @property
    def networks(self) -> list[Unrolled]:
        """The unrolled networks, those inside of parts included."""
        return [network for part in self.parts for network in (part.networks if isinstance(part, Layered) else [part])]

    def each_state(self, state: Tree) -> list[Tree]:
        """The state of each of the networks, None where it is not given."""
        pairs = zip(self.parts, self._states(state), strict=True)
        return [one for part, s in pairs for one in (part.each_state(s) if isinstance(part, Layered) else [s])]

    def extra_repr(self) -> str:
        """The layout."""
        return "batch_first=True" if self.batch_first else ""


def _first_state(part: nn.Module, steps: Tree, state: Tree, batch: int) -> Tree:
    if isinstance(part, Layered):
        return part.first_state(steps, state, batch)
    if state is None:
        return make_state(part.cell, steps, batch)
    check_state(part.cell, state, steps, batch)
    return state


def takes_context(part: nn.Module) -> bool:
    """Whether any cell of a part has a third argument."""
    return part.takes_context if isinstance(part, Layered) else context_use(part.cell) != "refuses"


def named(part: nn.Module) -> str:
    """What a person would call a part."""
    return part._get_name() if isinstance(part, Layered) else name_of(part.cell)


def _count(states: Any) -> str:
    if isinstance(states, tuple | list):
        return f"{len(states)} of them"
    return describe(states) if isinstance(states, Tensor) else f"a {type(states).__name__}"
