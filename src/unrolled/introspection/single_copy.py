"""One copy of the cell: what went into it and came out, and what flowed back through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unrolled.introspection.recorded_run import ReceivedState, RecordedRun, Shares
from unrolled.introspection.taps import TappedTree, derivative
from unrolled.trees import Tree, describe


class CopyTaps(NamedTuple):
    """What enters and leaves a copy, as tapped.

    Attributes:
        input: the input.
        state: the state that the cell saw.
        weights: the trained parameters, as this copy alone reads them.
        output: the output.
        next_state: the state that it passed on.
    """

    input: TappedTree
    state: TappedTree
    weights: TappedTree
    output: TappedTree
    next_state: TappedTree


class Copy:
    """One copy of the cell: the cell at time step `t`. Obtained from `Copies`.

    Attributes:
        t: the time step.
        input: what it read, `[B, ...]`.
        state: what the cell saw: the state passed on to it, `[B, ...]`, fresh in rows that were reset just before t.
        seen: the same tensors, from which the graph of this step alone leads on: to differentiate by.
        taps: what enters and leaves it, with the gradients that came back.

    Example:
        >>> import unrolled as ur
        >>> ur.copies(ur.unroll(ur.GRUCell(3, 4)), torch.randn(5, 2, 3))[-1]
        Copy(t=4, input=float32[2, 3], state=float32[2, 4], output=float32[2, 4], next_state=float32[2, 4])
    """

    def __init__(
        self, run: RecordedRun, t: int, taps: CopyTaps, received: ReceivedState, input: Tree, state: Tree, seen: Tree
    ) -> None:
        self._run, self._received = run, received
        self.t, self.taps, self.input, self.state, self.seen = t, taps, input, state, seen

    @property
    def rows(self) -> Tensor:
        """Which rows of the caller's batch are alive at t, in the order in which this copy's tensors have them: `[n]`.

        That order is by length, the longest first, where rows end at different times; else it is the caller's.
        """
        return self._run.order[: self._run.layout.extent.sizes[self.t]]

    @property
    def output(self) -> Tree:
        """What it gave out, `[B, ...]`."""
        return self.taps.output.tree

    @property
    def next_state(self) -> Tree:
        """The state it passed on, `[B, ...]`: to the copy after it, in a reversed network to the one before it."""
        return self.taps.next_state.tree

    @property
    def input_grad(self) -> Tree:
        """The loss's gradient by this copy's input, through this copy; None for integer leaves."""
        return self._grads(self.taps.input)

    @property
    def state_grad(self) -> Tree:
        """What flowed back *through this copy* to the state that the cell saw."""
        return self._grads(self.taps.state)

    @property
    def total_state_grad(self) -> Tree:
        """The loss's whole gradient by the state passed on to it: `state_grad` and what the loss took from it directly.

        Nothing flows through a reset: in such a row it is only what the loss took directly, mostly zero.
        """
        self._run.tap.require_backward()
        return self._received.grad_tree

    @property
    def output_grad(self) -> Tree:
        """The loss's gradient by this copy's output."""
        return self._grads(self.taps.output)

    @property
    def weight_grad(self) -> Mapping[str, Tensor]:
        """This copy's own share of each parameter's gradient: name -> `[*shape]`."""
        return Shares(self._run, f"weight_grad of copy {self.t}", lambda name: self.shares([name])[name])

    @property
    def aliases(self) -> dict[str, Tensor]:
        """The parameters as this copy alone reads them."""
        return dict(zip(self._run.weights, self.taps.weights.passed, strict=True))

    def _grads(self, tapped: TappedTree) -> Tree:
        self._run.tap.require_backward()
        return tapped.grad_tree

    def shares(self, names: Sequence[str]) -> dict[str, Tensor]:
        """This copy's own shares of several parameters' gradients, at the cost of one backward step of it."""
        aliases = self.aliases
        flowed = self.taps.output.flowed + self.taps.next_state.flowed
        found = derivative(flowed, [aliases[name] for name in names], f"the shares of copy {self.t}")
        return dict(zip(names, found, strict=True))

    def share_norms(self) -> dict[str, Tensor]:
        """The Euclidean norm of each share, float64: the square of a small float32 is zero."""
        known = self._run.norms
        if self.t not in known:
            shares = self.shares(list(self._run.weights)).items()
            known[self.t] = {name: torch.linalg.vector_norm(share.abs(), dtype=torch.float64) for name, share in shares}
        return known[self.t]

    def __repr__(self) -> str:
        trees = {name: getattr(self, name) for name in ("input", "state", "output", "next_state")}
        return f"Copy(t={self.t}, {', '.join(f'{name}={describe(tree)}' for name, tree in trees.items())})"
