"""What `unroll`, `stack` and `Bidirectional` make has one way of being called, and this is it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unrolled import sequence
from unrolled.bptt.checkpointing import Checkpointing
from unrolled.bptt.truncation import Truncation
from unrolled.lengths import Lengths
from unrolled.networks.layout import Call
from unrolled.trees import Tree


class Network(nn.Module):
    """A module over sequences of any length, made of cells that are unrolled.

    Attributes:
        batch_first: whether inputs and outputs are `[B, T, ...]`; states are `[B, ...]` in any case.
        truncation: how far gradients flow back, and how often losses are taken; None for all copies.
        checkpointing: the memory budget or the schedule; None for full storage.
    """

    truncation: Truncation | None = None
    checkpointing: Checkpointing | None = None
    _defaults: ClassVar[Mapping[str, Any]] = {"batch_first": False}

    def __init__(self, *, batch_first: bool = False) -> None:
        super().__init__()
        self.batch_first = batch_first

    def forward(
        self,
        inputs: Tree,
        state: Tree = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        context: Tree = None,
    ) -> tuple[Tree, Tree]:
        """Run the network over a sequence.

        Args:
            inputs: a pytree of `[T, B, ...]` (`[B, T, ...]` with `batch_first`), or a PackedSequence.
            state: the state that each row's first copy receives, by default the cell's own initial state; of layers
                or directions a tuple with one entry for each.
            lengths: how many steps each row has, integers `[B]` from 0 to T. A row that has ended costs nothing: its
                outputs are zero, its last state is that of its own end, and what stands in the padding reaches neither
                values nor gradients.
            resets: a bool `[T, B]` (`[B, T]` with `batch_first`): rows that start afresh from the cell's initial state
                just before step t.
            context: what every cell with a third argument receives at every step.

        Returns:
            The outputs, `[T, B, ...]` (`[B, T, ...]` with `batch_first`, a PackedSequence for one), and the state that
            each row's last copy hands on, built like `state`.

        Raises:
            InputError: for inputs, lengths, resets or a context that a cell cannot take.
            StateError: for a state that does not fit, or that cannot be made.
            CellError: if a cell breaks its contract or raises.
        """
        if not torch.compiler.is_compiling():
            return self._call(inputs, state, lengths, resets, context)
        # Imported here since it brings in torch's compiler, which takes a second.
        from unrolled.tracing.traced import graph_break

        plain = lengths is None and resets is None and not isinstance(inputs, PackedSequence)
        if plain and self.truncation is None and self.checkpointing is None:
            traced = self._traced(inputs, state, context)
            if traced is not None:
                return traced
        return graph_break(self._call, inputs, state, lengths, resets, context)

    def _call(
        self, inputs: Tree, state: Tree, lengths: Lengths, resets: Tensor | None, context: Tree
    ) -> tuple[Tree, Tree]:
        call = Call.of(inputs, state, lengths=lengths, resets=resets, context=context, batch_first=self.batch_first)
        outputs, last = self._run(call)
        return call.layout.outputs(outputs), last

    def _time_first(self, steps: Tree) -> Tree:
        """Sequences in the caller's layout time-first, or back: the swap is its own inverse."""
        return sequence.swap_time_and_batch(steps) if self.batch_first else steps

    def _traced(self, inputs: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree] | None:
        """What a compiler sees of a call whose rows are of one length; None if it cannot look into it."""
        raise NotImplementedError

    def _run(self, call: Call) -> tuple[Tree, Tree]:
        """The outputs of a call as engines return them, and the last state with the caller's rows."""
        raise NotImplementedError

    def _first_state(self, call: Call) -> Tree:
        """The state that each row's first copy receives: the one that was passed, checked, or the cell's own."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The options that differ from the defaults."""
        options = {name: getattr(self, name) for name in self._defaults}
        return ", ".join(f"{name}={value!r}" for name, value in options.items() if value != self._defaults[name])


def first_state(rnn: Network, call: Call) -> Tree:
    """The state that each row's first copy receives in a call, without running it; the call's arguments are checked.

    Raises:
        InputError: as the call itself does.
        StateError: as the call itself does.
    """
    return rnn._first_state(call)
