"""The unrolled network as an object: T copies to point at, and what flowed back through each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import Tensor, nn

from unrolled import sequence
from unrolled.bptt.truncation import Truncation
from unrolled.cells.contract import name_of
from unrolled.errors import OptionError
from unrolled.introspection.bias import StepGrads, TruncationBias, truncation_bias, truncation_to_compare
from unrolled.introspection.recorded_run import RecordedRun, Shares
from unrolled.introspection.single_copy import Copy
from unrolled.introspection.taps import GradientTap, derivative
from unrolled.networks.layout import BatchLayout
from unrolled.trees import Tree, describe, map_leaves


class TappedRun:
    """What can be gone back through: the copies of one network, or of the layers and directions of a larger one."""

    _tap: GradientTap
    truncation: Truncation | None
    """How far gradients flow back in a call of the network, whose copies show the whole gradient; None for all."""

    def backward(self, loss: Tensor, gradient: Tensor | None = None) -> None:
        """Do all that `loss.backward(gradient)` does, and remember what flowed back through each copy.

        As with `.grad`, a second call adds to what the first one left. The graph is kept for as long as the copies are:
        shares are computed from it when they are asked for.

        Args:
            loss: a tensor computed from these copies; a scalar unless `gradient` is given.
            gradient: the gradient by `loss`, of its shape.

        Raises:
            GradientError: if the loss has no gradient, or is no scalar and comes without one.
        """
        self._tap.backward(loss, gradient)

    def observe(self, loss: Tensor) -> dict[Tensor, Tensor]:
        """As `backward`, but leave every `.grad` as it is.

        Args:
            loss: a scalar computed from these copies.

        Returns:
            The leaves that the loss depends on, each with its gradient.

        Raises:
            GradientError: if the loss has no gradient, or is no scalar.

        Example:
            >>> import unrolled as ur
            >>> rnn = ur.unroll(ur.RNNCell(3, 4))
            >>> copies = ur.copies(rnn, torch.randn(5, 2, 3))
            >>> grads = copies.observe(copies.outputs.sum())
            >>> grads[rnn.cell.weight_hh].shape, rnn.cell.weight_hh.grad, copies[4].state_grad.shape
            (torch.Size([4, 4]), None, torch.Size([2, 4]))
        """
        return self._tap.observe(loss)


class Copies(TappedRun, Sequence[Copy]):
    """The copies of an unrolled network after one run; made by `copies`.

    `copies[t]` is a `Copy`; `copies[a:b]` is of this class too, and its copies keep their own t. A loss may be made of
    `outputs`, of `state`, or of any copy's `output`, `state` or `next_state`. Where rows end at different times, there
    are as many copies as the longest row has steps, and a copy has the rows that are alive: `copies[t].rows`.

    Example:
        >>> import unrolled as ur
        >>> copies = ur.copies(ur.unroll(ur.GRUCell(3, 4)), torch.randn(5, 2, 3), lengths=[2, 4])
        >>> [copy.t for copy in copies[2:]], copies[2].rows
        ([2, 3], tensor([1]))
    """

    def __init__(self, run: RecordedRun, members: Sequence[Copy], whole: Sequence[Copy]) -> None:
        self._run, self._tap, self.truncation = run, run.tap, run.truncation
        self._members, self._whole = tuple(members), tuple(whole)

    @property
    def cell(self) -> nn.Module:
        """The cell."""
        return self._run.cell

    @property
    def layout(self) -> BatchLayout:
        """How the caller laid the batch out."""
        return self._run.layout

    @property
    def reverse(self) -> bool:
        """Whether the last copy came first."""
        return self._run.reverse

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The trained parameters by name."""
        return self._run.weights

    @property
    def context(self) -> Tree:
        """What the cell received as its third argument, its rows in the order of the copies', detached; None for none.

        A copy received those of the first rows that are alive at its time.
        """
        return None if self._run.context is None else map_leaves(Tensor.detach, self._run.context.tree)

    def context_of(self, copy: Copy) -> Tree:
        """The rows of `context` that one of these copies received."""
        return map_leaves(lambda leaf: leaf[: len(copy.rows)], self.context)

    def arguments(self, copy: Copy) -> tuple[Tree, ...]:
        """What the cell was called with in one of these copies, detached: input, state, and the context if any."""
        called = copy.input, copy.state, self.context_of(copy)
        return tuple(map_leaves(Tensor.detach, called[: 2 if self.context is None else 3]))

    @property
    def in_order(self) -> Sequence[Copy]:
        """These copies in the order in which they ran."""
        return self._members[::-1] if self.reverse else self._members

    def named_networks(self) -> list[tuple[str, Copies]]:
        """These copies under an empty name; see `LayeredCopies.named_networks`."""
        return [("", self)]

    @property
    def outputs(self) -> Tree:
        """The copies' outputs as the unrolled network returns them, `[T, B, ...]` or `[B, T, ...]`.

        A slice has one step for each of its copies. Where rows end at different times, it is padded with zeros, also
        where the whole is a PackedSequence.
        """
        layout = self.layout
        if self._members == self._whole:
            return layout.outputs(self.joined)
        steps = [self._padded(copy) if layout.extent.ragged else copy.output for copy in self._some()]
        stacked = sequence.stacked(steps)
        return sequence.swap_time_and_batch(stacked) if layout.batch_first else stacked

    @property
    def joined(self) -> Tree:
        """The copies' outputs as engines return them: `[T, B, ...]`, `[N, ...]` where rows end at different times."""
        if not self._whole:
            return self._run.no_outputs
        return sequence.joined([copy.output for copy in self._some()], self.layout.extent)

    def _padded(self, copy: Copy) -> Tree:
        """A copy's output with all rows of the batch."""

        def padded(rows: Tensor) -> Tensor:
            zeros = rows.new_zeros((self.layout.batch, *rows.shape[1:]))
            return zeros.index_copy(0, copy.rows.to(rows.device), rows)

        return map_leaves(padded, copy.output)

    @property
    def state(self) -> Tree:
        """The state of each row once the last of these copies has run, `[B, ...]`; of all copies, the network's own.

        The last to run is the one with the largest t, in a reversed network with the smallest. A row that has ended
        keeps the state of its own end, one that has not begun the initial state.
        """
        initial = self._run.initial.tree
        if not self._whole:
            return initial
        last = (min if self.reverse else max)(self._some(), key=lambda copy: copy.t)
        return self.layout.last(self._reached(last), initial)

    def _reached(self, last: Copy) -> Tree:
        """The states of all rows that have a step, as engines see them, once a copy has run."""
        extent = self.layout.extent
        if self.reverse:
            others = [map_leaves(lambda leaf: leaf[extent.sizes[last.t] :], self._run.first)]
        else:
            ending = [t for t in range(last.t - 1, -1, -1) if extent.sizes[t] > extent.sizes[t + 1]]
            others = [
                map_leaves(lambda leaf, n=extent.sizes[t + 1]: leaf[n:], self._whole[t].next_state) for t in ending
            ]
        if not extent.ragged or not others:
            return last.next_state
        return map_leaves(lambda *rows: torch.cat(rows), last.next_state, *others)

    def _some(self) -> Sequence[Copy]:
        if not self._members:
            raise IndexError("this slice has no copies; take one that reaches into the sequence")
        return self._members

    @overload
    def __getitem__(self, index: int) -> Copy: ...
    @overload
    def __getitem__(self, index: slice) -> Copies: ...
    def __getitem__(self, index: int | slice) -> Copy | Copies:
        if isinstance(index, slice):
            return Copies(self._run, self._members[index], self._whole)
        try:
            return self._members[index]
        except IndexError as error:
            raise IndexError(f"there are {len(self)} copies, got index {index}") from error

    def __len__(self) -> int:
        return len(self._members)

    def truncated(self, horizon: int | None = None, stride: int | None = None) -> TruncationBias:
        """What truncation does to the gradient: its angle to the full one and relative norm.

        Copies keep the whole graph and show the full gradient, whatever the network's horizon. Here each block's losses
        (those that have gone back already, taken from outputs and from the last state) go back through it as far as
        truncated BPTT would let them.

        Args:
            horizon: k2, as in `unroll`; the network's own by default.
            stride: k1, as in `unroll`.

        Raises:
            OptionError: if there is no horizon, or for a slice of a run.
            GradientError: before `backward`.

        Example:
            >>> import torch, unrolled as ur
            >>> copies = ur.copies(ur.unroll(ur.GRUCell(3, 4)), torch.randn(50, 2, 3))
            >>> copies.backward(copies.outputs.pow(2).sum())
            >>> round(copies.truncated(horizon=50).whole.ratio, 4), copies.truncated(horizon=1).whole.cosine < 0.9999
            (1.0, True)
        """
        truncation = truncation_to_compare(horizon, stride, self.truncation)
        self._tap.require_backward()
        if self._members != self._whole:
            raise OptionError(
                f"truncation is a matter of the whole run, got a slice of {len(self)} copies; ask all copies"
            )
        return truncation_bias(truncation, self.step_grads(with_outputs=True), self.initial_states, self.weights)

    @property
    def initial_states(self) -> list[Tensor]:
        """The tensors of initial and fresh states that the cell made, as the copies received them."""
        return [tensor for tapped in self._run.made for tensor in tapped.passed]

    def step_grads(self, *, with_outputs: bool) -> list[StepGrads]:
        """What the loss took of each step, in the order in which they ran.

        Args:
            with_outputs: whether it saw the outputs, as it does those of a stack's last layer.
        """
        found = []
        following: Copy | None = None
        for copy in reversed(self.in_order):
            going_on = len(following.rows) if following else 0
            flowed = [
                (state, _of_ended_rows(grad, going_on))
                for state, grad in copy.taps.next_state.flowed
                if not going_on or (state.dim() > 0 and state.shape[0] > going_on)
            ]
            flowed = [*copy.taps.output.flowed, *flowed] if with_outputs else flowed
            next_state = [x for x in copy.taps.next_state.passed if x.requires_grad]
            found.append(StepGrads(flowed, copy.aliases, next_state))
            following = copy
        return found[::-1]

    @property
    def weight_grad(self) -> Mapping[str, Tensor]:
        """Every copy's own share of each parameter's gradient: name -> `[T, *shape]`.

        Over all copies, and with `initial_grad`, they add up to what the copies gave to `.grad`.
        """

        def stacked(name: str) -> Tensor:
            shares = self.weights[name].new_empty((len(self), *self.weights[name].shape))
            for row, copy in zip(shares, self, strict=True):
                row.copy_(copy.shares([name])[name])
            return shares

        return Shares(self._run, "weight_grad", stacked)

    @property
    def weight_grad_norm(self) -> Mapping[str, Tensor]:
        """The Euclidean norm of each copy's share: name -> `[T]` float64. One copy's shares are held at a time."""

        def norms(name: str) -> Tensor:
            found = [copy.share_norms()[name] for copy in self]
            return torch.stack(found) if found else self.weights[name].new_empty(0, dtype=torch.float64)

        return Shares(self._run, "weight_grad_norm", norms)

    @property
    def initial_grad(self) -> Mapping[str, Tensor]:
        """What parameters got through the initial state, which is no copy's: name -> `[*shape]`.

        Fresh states that rows were reset to are of it. Zeros where the initial state does not depend on a parameter, or
        was passed by the caller.
        """

        def share(name: str) -> Tensor:
            flowed = [pair for tapped in self._run.made for pair in tapped.flowed]
            return derivative(flowed, [self.weights[name]], "the initial state's share")[0]

        return Shares(self._run, "initial_grad", share)

    def __repr__(self) -> str:
        name = name_of(self.cell)
        if not self._members:
            return f"Copies({name}, none)"
        first, last = self._members[0], self._members[-1]
        return "\n".join(
            [
                f"Copies({name}, {len(self)}: t = {first.t} to {last.t})",
                f"  input   {describe(first.input)}",
                f"  state   {describe(first.state)}",
                f"  output  {describe(first.output)}",
                f"  shared  {', '.join(self.weights) or 'no trained parameter'}",
                f"  grads   {'there' if self._tap.passes else 'after copies.backward(loss)'}",
            ]
        )


def _of_ended_rows(grad: Tensor, going_on: int) -> Tensor:
    """The gradient by a next state in rows that no copy receives: what the loss took from them."""
    if not going_on:
        return grad
    return torch.cat([torch.zeros_like(grad[:going_on]), grad[going_on:]])
