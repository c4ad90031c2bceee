"""What the copies of one unrolled network share: its weights, its taps, and where each state comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from unrolled.cells.adapted import parameter_names
from unrolled.introspection.taps import GradientTap, TappedTree
from unrolled.networks.layout import Call
from unrolled.networks.unroll import Unrolled
from unrolled.trees import Tree, unflatten


class RecordedRun:
    """What all the copies of one unrolled network share.

    Args:
        rnn: the network.
        call: what it is called with.
        tap: remembers gradients; several networks may have one.
        state: the state of the caller's rows, `[B, ...]`: the call's, or one that the cell made.
        fresh: the state that rows are reset to, or None where there are no resets.

    Attributes:
        cell: the cell.
        reverse: whether the last copy comes first.
        truncation: how far gradients flow back in a call of the network; copies show the whole.
        trained: the trained parameters by their path in the cell.
        paths: the path of each trained parameter by its name.
        weights: the trained parameters by name.
        initial: `state` as tapped.
        first: its rows as engines see them.
        order: which row of the caller's each of these is.
        fresh: `fresh` as tapped, with rows as engines see them.
        context: the call's context likewise.
        made: the tapped states that the cell made.
        no_outputs: what a run without any step gives out.
    """

    def __init__(self, rnn: Unrolled, call: Call, tap: GradientTap, state: Tree, fresh: Tree) -> None:
        self.cell, self.reverse, self.truncation = rnn.cell, rnn.reverse, rnn.truncation
        self.layout, self.tap = call.layout, tap
        self.trained = {path: weight for path, weight in self.cell.named_parameters() if weight.requires_grad}
        self.paths = {name: path for name, path in parameter_names(self.cell).items() if path in self.trained}
        self.weights = {name: self.trained[path] for name, path in self.paths.items()}
        (self.initial,) = tap.insert(state)
        self.first = self.layout.rows(self.initial.tree)
        self.order = self.layout.rows(torch.arange(self.layout.batch))
        self.fresh = None if fresh is None else tap.insert(self.layout.rows(fresh))[0]
        self.context = None if call.context is None else tap.insert(self.layout.rows(call.context))[0]
        self.made = [self.initial] if call.state is None else []
        if self.fresh is not None:
            self.made.append(self.fresh)
        self.no_outputs: Tree = None
        self._norms: dict[int, dict[str, Tensor]] = {}
        self._norms_of = 0

    @property
    def norms(self) -> dict[int, dict[str, Tensor]]:
        """The norms of shares by t, as far as they were asked for since the last backward pass."""
        if self._norms_of != self.tap.passes:
            self._norms, self._norms_of = {}, self.tap.passes
        return self._norms


class ReceivedState:
    """Where the rows of the state come from that a copy receives: the copy before it, or the initial state.

    Args:
        parts: tapped states, each with the rows of it that the copy receives; None for all.
    """

    def __init__(self, *parts: tuple[TappedTree, Tensor | slice | None]) -> None:
        self._parts = parts

    @property
    def grad_tree(self) -> Tree:
        """The gradients that came back to it."""
        parts = [
            [grad if grad is None or rows is None else grad[rows] for grad in tapped.grads_or_zeros]
            for tapped, rows in self._parts
        ]
        if len(parts) == 1:
            grads = parts[0]
        else:
            grads = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
        return unflatten(self._parts[0][0].structure, grads)


class Shares(Mapping[str, Tensor]):
    """Parameter names to tensors that are computed when asked for."""

    def __init__(self, run: RecordedRun, title: str, compute: Callable[[str], Tensor]) -> None:
        run.tap.require_backward()
        self._names, self._title, self._compute = tuple(run.weights), title, compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            known = ", ".join(self._names) or "none"
            raise KeyError(f"{name!r} is not a trained parameter of the cell; these are: {known}")
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"{self._title}: {', '.join(self._names)}"
