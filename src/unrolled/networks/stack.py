"""Layers and directions: modules made of unrolled networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import nn

from unrolled.bptt.costs import copy_sharing_tensors
from unrolled.bptt.schedules import Schedule
from unrolled.bptt.segments import SequenceRun
from unrolled.cells.adapted import as_cell
from unrolled.cells.base import DescribedCell
from unrolled.cells.contract import name_of
from unrolled.errors import OptionError, UnrolledError
from unrolled.lengths import Extent
from unrolled.networks.base import Network
from unrolled.networks.bounded import BoundedNetwork
from unrolled.networks.layered import Layered, PartRun, title
from unrolled.networks.layout import BatchLayout, Call
from unrolled.networks.unroll import Unrolled, fresh_state
from unrolled.trees import Tree, map_leaves


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

    def _compose(
        self, run: PartRun, steps: Tree, states: Sequence[Tree], context: Tree
    ) -> tuple[Tree, tuple[Tree, ...]]:
        """Run both directions and join their outputs."""
        found = [run(part, steps, state, context) for part, state in zip(self.parts, states, strict=True)]
        joined = map_leaves(lambda *leaves: torch.cat(leaves, -1), *(outputs for outputs, _ in found))
        return joined, tuple(last for _, last in found)

    def _get_name(self) -> str:
        return f"Bidirectional[{name_of(self.forwards.cell)}]"


class Stack(BoundedNetwork, Layered):
    """Layers, each reading what the one before it gives out; made by `stack`.

    Args:
        layers: unrolled networks, `Bidirectional` ones, or stacks; all time-first.
        dropout: the probability with which entries between two layers are dropped, in training only.
        batch_first: whether inputs and outputs are `[B, T, ...]`.
        horizon: as in `unroll`; all layers are cut at one place.
        stride: as in `unroll`.
        memory: as in `unroll`; all layers run within a segment, and so draw random numbers segment by segment.
        checkpoint: as in `unroll`; one and the same schedule has every engine draw the same numbers.

    Raises:
        OptionError: for no layer, one that is batch-first, a dropout that is no probability, sizes that do not fit, or
            a horizon or a memory budget of layers that walk backwards or have one of their own.

    Example:
        >>> import torch, unrolled as ur
        >>> rnn = ur.Stack([ur.unroll(ur.GRUCell(3, 4)), ur.unroll(ur.GRUCell(4, 2))])
        >>> outputs, (h_0, h_1) = rnn(torch.randn(5, 2, 3))
        >>> outputs.shape, h_0.shape
        (torch.Size([5, 2, 2]), torch.Size([2, 4]))
    """

    _defaults: ClassVar[Mapping[str, Any]] = {
        "dropout": 0.0,
        **dict.fromkeys(("horizon", "stride", "memory", "checkpoint")),
        "batch_first": False,
    }

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        dropout: float = 0.0,
        batch_first: bool = False,
        horizon: int | None = None,
        stride: int | None = None,
        memory: int | float | str | None = None,
        checkpoint: Schedule | Callable[[int], Schedule] | None = None,
    ) -> None:
        super().__init__(batch_first=batch_first, horizon=horizon, stride=stride, memory=memory, checkpoint=checkpoint)
        if not layers:
            raise OptionError("a stack needs at least one layer, got none; pass a list of cells")
        _check_layers(layers)
        self.layers = nn.ModuleList(layers)
        if self.truncation is not None or self.checkpointing is not None:
            self._refuse_parts("horizon" if self.truncation is not None else "memory budget")
        self.dropout = checked_dropout(dropout)

    @property
    def parts(self) -> list[nn.Module]:
        """The layers, the first one first."""
        return list(self.layers)

    def _run(self, call: Call) -> tuple[Tree, Tree]:
        cut, T = self.truncation, call.extent.steps
        if not T or (self.checkpointing is None and (cut is None or cut.horizon >= T)):
            return Layered._run(self, call)
        return self._run_from(call, self._first_state(call))

    def _runs(self, call: Call, first: Tree) -> tuple[SequenceRun, Callable[[], SequenceRun]]:
        if self.checkpointing is not None:
            self.checkpointing.check(call.layout.steps)
        states = zip(self.networks, self._state_of_each(call.state), self._state_of_each(first), strict=True)
        fresh = list[Tree]()
        if call.resets is not None:
            fresh = [call.layout.rows(fresh_state(rnn, replace(call, state=s), one)) for rnn, s, one in states]
        run = partial(_stack_run, call, call.layout.rows(first), fresh)
        plans = [network._plans for network in self.networks]
        return run(self), lambda: run(copy_sharing_tensors(self, plans))

    def _compose(
        self, run: PartRun, steps: Tree, states: Sequence[Tree], context: Tree
    ) -> tuple[Tree, tuple[Tree, ...]]:
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
                before = title(self.layers[number - 1])
                error.args = (
                    f"layer {number}, {title(layer)}, reads what layer {number - 1}, {before}, gives out: {error}",
                )
                raise
            steps = outputs
            last.append(final)
        return steps, tuple(last)

    def _refuse_parts(self, what: str) -> None:
        parts = [(number, part) for number, layer in enumerate(self.layers) for part in layer.modules()]
        for number, part in parts:
            if isinstance(part, Network) and (part.truncation is not None or part.checkpointing is not None):
                raise OptionError(
                    f"layer {number}, {title(part)}, has a horizon or a memory budget of its own; give one to the "
                    "stack or to its layers"
                )
            if getattr(part, "reverse", False):
                raise OptionError(
                    f"a stack with a {what} walks forwards, but layer {number} has {title(part)} that walks backwards "
                    f"and begins where the last block ends; leave the {what} out, or stack one direction"
                )


def _stack_run(call: Call, first: Tree, fresh: Sequence[Tree], network: Stack) -> SequenceRun:
    """The run of a stack all layers of which are cut at one place; states have their rows as engines see them."""

    def run(inputs: Tree, state: Tree, context: Tree, extent: Extent, start: int) -> tuple[Tree, Tree]:
        (steps, resets), (around, restarts) = inputs, context
        by_network = dict(zip(network.networks, restarts, strict=False))
        # The first segment, which has all rows, checks that the cells take lengths.
        layout = BatchLayout(extent, extent.batch, by_length=call.layout.by_length and not start)
        return Layered._run(network, Call(layout, steps, state, resets, around, by_network))

    around = call.layout.rows(call.context), fresh
    return SequenceRun(run, (call.steps, call.resets), first, around, call.extent, reverse=False, module=network)


def stack(
    cells: Sequence[Any],
    *,
    bidirectional: bool = False,
    dropout: float = 0.0,
    batch_first: bool = False,
    engine: str = "auto",
    horizon: int | None = None,
    stride: int | None = None,
    memory: int | float | str | None = None,
    checkpoint: Schedule | Callable[[int], Schedule] | None = None,
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
        horizon: as in `unroll`; all layers are cut at one place.
        stride: as in `unroll`.
        memory: as in `unroll`; all layers run within a segment, and so draw random numbers segment by segment.
        checkpoint: as in `unroll`; one and the same schedule has every engine draw the same numbers.

    Returns:
        A module: `outputs, states = rnn(inputs, states=None, lengths=None, resets=None, context=None)`; states is a
        tuple with one entry for each layer, a pair of states for a bidirectional one.

    Raises:
        OptionError: for layers whose sizes do not fit, naming both, a cell that cannot be copied anew, or a
            horizon or a memory budget of layers that walk backwards or have one of their own.

    Example:
        >>> import torch, unrolled as ur
        >>> rnn = ur.stack([ur.LSTMCell(3, 4), ur.GRUCell(8, 4)], bidirectional=True, dropout=0.1)
        >>> outputs, states = rnn(torch.randn(5, 2, 3))
        >>> outputs.shape, len(states)
        (torch.Size([5, 2, 8]), 2)
    """
    layers = [_layer(entry, bidirectional=bidirectional, engine=engine) for entry in cells]
    return Stack(
        layers,
        dropout=dropout,
        batch_first=batch_first,
        horizon=horizon,
        stride=stride,
        memory=memory,
        checkpoint=checkpoint,
    )


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


def _check_layers(layers: Sequence[Any]) -> None:
    """Refuse what is no network, what is batch-first, and neighbours whose sizes do not fit."""
    for layer in layers:
        if not isinstance(layer, Unrolled | Layered):
            raise OptionError(
                f"layers of a Stack are unrolled networks, got {type(layer).__name__}; ur.stack takes cells"
            )
        if layer.batch_first:
            raise OptionError(
                f"layers of a stack are time-first, got {layer._get_name()} with batch_first; pass it to stack"
            )
    for number, (below, above) in enumerate(pairwise(layers)):
        made, read = _output_size(below), _input_size(above)
        if made is not None and read is not None and made != read:
            raise OptionError(
                f"layer {number + 1}, {title(above)}, reads inputs of size {read}, but layer {number}, {title(below)}, "
                f"gives out {made}; make its input_size {made}"
            )


def _input_size(layer: nn.Module) -> int | None:
    first = layer
    while isinstance(first, Layered):
        first = first.parts[0]
    return first.cell.input_size if isinstance(first.cell, DescribedCell) else None


def _output_size(layer: nn.Module) -> int | None:
    if isinstance(layer, Stack):
        return _output_size(layer.parts[-1])
    if isinstance(layer, Bidirectional):
        sizes = [_output_size(part) for part in layer.parts]
        return None if None in sizes else sum(size for size in sizes if size is not None)
    return layer.cell.output_size if isinstance(layer.cell, DescribedCell) else None
