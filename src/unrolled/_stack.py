"""Layers and directions: modules made of unrolled networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unrolled import sequence
from unrolled._given import Given, Lengths, given_as
from unrolled._unroll import Unrolled
from unrolled.cells.adapted import as_cell, context_use
from unrolled.cells.contract import name_of
from unrolled.cells.gates import GatedCell
from unrolled.cells.min_gru import MinGRUCell
from unrolled.errors import InputError, OptionError, StateError, UnrolledError
from unrolled.trees import Tree, describe, map_leaves

__all__ = ["Bidirectional", "Layered", "Stack", "checked_dropout", "stack"]

Run: TypeAlias = Callable[[nn.Module, Tree, Tree, Tree], tuple[Tree, Tree]]
"""How one part is run: `(part, steps, state, context) -> (outputs, last state)`."""


class Layered(nn.Module):
    """A module made of unrolled networks, its `parts`; how it is called.

    Args:
        batch_first: whether inputs and outputs are `[B, T, ...]`; states are `[B, ...]` in any case.
    """

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
        return any(_takes_context(part) for part in self.parts)

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
        """What a compiler sees: the parts, each for itself; of rows that end early or start afresh nothing."""
        # Imported here since it brings in torch's compiler, which takes a second.
        from unrolled._traced import left_alone

        if lengths is not None or resets is not None or isinstance(inputs, PackedSequence):
            return left_alone(self._run, inputs, state, lengths, resets, context)
        steps = sequence.swap_time_and_batch(inputs) if self.batch_first else inputs
        outputs, last = self.composed_by(
            lambda part, *given: part(given[0], given[1], context=given[2]), steps, state, context
        )
        return sequence.swap_time_and_batch(outputs) if self.batch_first else outputs, last

    def _run(
        self, inputs: Tree, state: Tree, lengths: Lengths, resets: Tensor | None, context: Tree
    ) -> tuple[Tree, Tree]:
        given = given_as(inputs, lengths, batch_first=self.batch_first)
        outputs, last = self.through(given, given.sequences(inputs), state, resets, context)
        return given.outputs(outputs), last

    def through(
        self, given: Given, steps: Tree, state: Tree, resets: Tensor | None, context: Tree
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
        parts = self.parts
        if context is not None and not self.takes_context:
            raise InputError(f"no cell of {self._get_name()} takes a context; leave context= out")
        states = [None] * len(parts) if state is None else state
        if not isinstance(states, tuple | list) or len(states) != len(parts):
            raise StateError(
                f"the state of {self._get_name()} is a tuple with one state for each of its {len(parts)} parts "
                f"({', '.join(map(_name, parts))}), got {_count(states)}; pass on what an earlier call returned"
            )

        def each(part: nn.Module, steps: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree]:
            return run(part, steps, state, context if _takes_context(part) else None)

        return self.compose(each, steps, states, context)

    def extra_repr(self) -> str:
        """The layout."""
        return "batch_first=True" if self.batch_first else ""


class Bidirectional(Layered):
    """Two unrolled networks over the same inputs, one of them from each row's last step to its first.

    The outputs are those of both, joined along the last dimension; the state is the pair of both. Rows that end early
    begin, backwards, at their own last step.

    Args:
        forwards: a cell, or anything `as_cell` makes one of without further arguments.
        backwards: the cell of the other direction.
        batch_first: whether inputs and outputs are `[B, T, ...]`.
        engine: as in `unroll`.

    Source: M. Schuster and K. Paliwal, "Bidirectional recurrent neural networks", IEEE TSP 45 (1997).

    Example:
        >>> import torch, unrolled as ur
        >>> rnn = ur.Bidirectional(ur.GRUCell(3, 4), ur.GRUCell(3, 4))
        >>> outputs, (h_forwards, h_backwards) = rnn(torch.randn(5, 2, 3), lengths=[5, 2])
        >>> outputs.shape, outputs[2:, 1].count_nonzero()
        (torch.Size([5, 2, 8]), tensor(0))
    """

    def __init__(
        self,
        forwards: nn.Module | Callable[..., Any],
        backwards: nn.Module | Callable[..., Any],
        *,
        batch_first: bool = False,
        engine: str = "auto",
    ) -> None:
        super().__init__(batch_first=batch_first)
        self.forwards = Unrolled(as_cell(forwards), engine=engine)
        self.backwards = Unrolled(as_cell(backwards), engine=engine, reverse=True)

    @property
    def parts(self) -> list[nn.Module]:
        """Both directions, forwards first."""
        return [self.forwards, self.backwards]

    def compose(self, run: Run, steps: Tree, states: Sequence[Tree], context: Tree) -> tuple[Tree, tuple[Tree, ...]]:
        """Run both directions and join their outputs."""
        found = [run(part, steps, state, context) for part, state in zip(self.parts, states, strict=True)]
        joined = map_leaves(lambda *leaves: torch.cat(leaves, -1), *(outputs for outputs, _ in found))
        return joined, tuple(last for _, last in found)

    def _get_name(self) -> str:
        return f"Bidirectional[{name_of(self.forwards.cell)}]"


class Stack(Layered):
    """Layers, each reading what the one before it gives out; made by `stack`.

    Args:
        layers: unrolled networks, `Bidirectional` ones, or stacks; all time-first.
        dropout: the probability with which entries between two layers are dropped, in training only.
        batch_first: whether inputs and outputs are `[B, T, ...]`.

    Raises:
        OptionError: for no layer, one that is batch-first, a dropout that is no probability, or sizes that do not fit.

    Example:
        >>> import torch, unrolled as ur
        >>> rnn = ur.Stack([ur.unroll(ur.GRUCell(3, 4)), ur.unroll(ur.GRUCell(4, 2))])
        >>> outputs, (h_0, h_1) = rnn(torch.randn(5, 2, 3))
        >>> outputs.shape, h_0.shape
        (torch.Size([5, 2, 2]), torch.Size([2, 4]))
    """

    def __init__(self, layers: Sequence[nn.Module], *, dropout: float = 0.0, batch_first: bool = False) -> None:
        super().__init__(batch_first=batch_first)
        if not layers:
            raise OptionError("a stack needs at least one layer, got none; pass a list of cells")
        _refuse_batch_first(layers)
        _refuse_misfits(layers)
        self.layers = nn.ModuleList(layers)
        self.dropout = checked_dropout(dropout)

    @property
    def parts(self) -> list[nn.Module]:
        """The layers, the first one first."""
        return list(self.layers)

    def compose(self, run: Run, steps: Tree, states: Sequence[Tree], context: Tree) -> tuple[Tree, tuple[Tree, ...]]:
        """Run one layer after the other."""
        last: list[Tree] = []
        for number, (layer, state) in enumerate(zip(self.parts, states, strict=True)):
            if number and self.training and self.dropout:
                steps = map_leaves(lambda x: nn.functional.dropout(x, self.dropout), steps)
            try:
                outputs, final = run(layer, steps, state, context)
            except UnrolledError as error:
                if not number or torch.compiler.is_compiling():
                    raise
                before = _name(self.layers[number - 1])
                error.args = (
                    f"layer {number}, {_name(layer)}, reads what layer {number - 1}, {before}, gives out: {error}",
                )
                raise
            steps = outputs
            last.append(final)
        return steps, tuple(last)

    def extra_repr(self) -> str:
        """The options that differ from the defaults."""
        shown = [f"dropout={self.dropout}"] if self.dropout else []
        return ", ".join(shown + ([super().extra_repr()] if self.batch_first else []))


def stack(
    cells: Sequence[Any],
    *,
    bidirectional: bool = False,
    dropout: float = 0.0,
    batch_first: bool = False,
    engine: str = "auto",
) -> Stack:
    """Put recurrent layers on top of each other; each reads what the one before it gives out.

    A layer runs over all steps before the next one begins, so that each has its own hoisted products. A cell that is
    listed twice is one cell in two layers: they share its weights.

    Args:
        cells: for each layer a cell (or anything `as_cell` makes one of), a pair of cells for the two directions of a
            bidirectional one, or an unrolled module such as `unroll`, `Bidirectional` and `stack` make.
        bidirectional: whether every cell gets a second one for the other direction: a copy with parameters of its own,
            drawn anew. A pair says which it is to be.
        dropout: the probability with which entries between two layers are dropped, in training only.
        batch_first: whether inputs and outputs are `[B, T, ...]`; states are `[B, ...]` in any case.
        engine: as in `unroll`.

    Returns:
        A module: `outputs, states = rnn(inputs, states=None, lengths=None, resets=None, context=None)`; states is a
        tuple with one entry for each layer, a pair of states for a bidirectional one.

    Raises:
        OptionError: for layers whose sizes do not fit, naming both, or a cell that cannot be copied anew.

    Example:
        >>> import torch, unrolled as ur
        >>> rnn = ur.stack([ur.LSTMCell(3, 4), ur.GRUCell(8, 4)], bidirectional=True, dropout=0.1)
        >>> outputs, states = rnn(torch.randn(5, 2, 3))
        >>> outputs.shape, len(states)
        (torch.Size([5, 2, 8]), 2)
    """
    layers = [_layer(entry, bidirectional=bidirectional, engine=engine) for entry in cells]
    return Stack(layers, dropout=dropout, batch_first=batch_first)


def checked_dropout(p: float) -> float:
    """Refuse a dropout that is no probability.

    Raises:
        OptionError: saying what it is.
    """
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise OptionError(f"dropout must be a probability from 0 to 1, got {p!r}")
    return p


def _layer(entry: Any, *, bidirectional: bool, engine: str) -> nn.Module:
    if isinstance(entry, Unrolled | Layered):
        return entry
    if isinstance(entry, tuple | list):
        if len(entry) != 2:
            raise OptionError(f"a layer is a cell or a pair of cells, one for each direction, got {len(entry)} of them")
        return Bidirectional(*entry, engine=engine)
    cell = as_cell(entry)
    return Bidirectional(cell, _drawn_anew(cell), engine=engine) if bidirectional else Unrolled(cell, engine=engine)


def _drawn_anew(cell: nn.Module) -> nn.Module:
    """A copy of a cell with parameters drawn anew, by every module's own `reset_parameters`."""
    other = copy.deepcopy(cell)
    covered: set[int] = set()
    for module in other.modules():
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
            covered.update(map(id, module.parameters()))
    left = [name for name, parameter in other.named_parameters() if id(parameter) not in covered]
    if left:
        raise OptionError(
            f"the other direction's {name_of(cell)} needs parameters of its own, but no reset_parameters() draws "
            f"{left[0]}; pass a pair of cells for the layer, (forwards, backwards)"
        )
    return other


def _refuse_batch_first(layers: Sequence[Any]) -> None:
    for layer in layers:
        if not isinstance(layer, Unrolled | Layered):
            raise OptionError(
                f"layers of a Stack are unrolled networks, got {type(layer).__name__}; ur.stack takes cells"
            )
        if layer.batch_first:
            raise OptionError(
                f"layers of a stack are time-first, got {layer._get_name()} with batch_first; pass it to stack"
            )


def _refuse_misfits(layers: Sequence[nn.Module]) -> None:
    for number, (below, above) in enumerate(pairwise(layers)):
        made, read = _output_size(below), _input_size(above)
        if made is not None and read is not None and made != read:
            raise OptionError(
                f"layer {number + 1}, {_name(above)}, reads inputs of size {read}, but layer {number}, {_name(below)}, "
                f"gives out {made}; make its input_size {made}"
            )


def _input_size(layer: nn.Module) -> int | None:
    first = layer
    while isinstance(first, Layered):
        first = first.parts[0]
    return first.cell.input_size if isinstance(first.cell, GatedCell | MinGRUCell) else None


def _output_size(layer: nn.Module) -> int | None:
    if isinstance(layer, Stack):
        return _output_size(layer.parts[-1])
    if isinstance(layer, Bidirectional):
        sizes = [_output_size(part) for part in layer.parts]
        return None if None in sizes else sum(size for size in sizes if size is not None)
    return layer.cell.hidden_size if isinstance(layer.cell, GatedCell | MinGRUCell) else None


def _takes_context(part: nn.Module) -> bool:
    return part.takes_context if isinstance(part, Layered) else context_use(part.cell) != "refuses"


def _name(part: nn.Module) -> str:
    return part._get_name() if isinstance(part, Layered) else name_of(part.cell)


def _count(states: Any) -> str:
    if isinstance(states, tuple | list):
        return f"{len(states)} of them"
    return describe(states) if isinstance(states, Tensor) else f"a {type(states).__name__}"
