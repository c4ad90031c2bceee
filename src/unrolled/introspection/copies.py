"""The unrolled network as an object: T copies to point at, and what flowed back through each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import Tensor

from unrolled import sequence
from unrolled.cells.contract import name_of
from unrolled.errors import OptionError
from unrolled.introspection.bias import StepGrads, TruncationBias, asked_truncation, truncation_bias
from unrolled.introspection.recorded import Received, RecordedRun, Shares, backward_through
from unrolled.introspection.taps import TappedTree, derivative
from unrolled.trees import Tree, describe, map_leaves


class Copy:
    """One copy of the cell: the cell at time step `t`. Obtained from `Copies`.

    `seen` is the state as the cell got it, behind its door: what one differentiates by that wants no shares.

    Example:
        >>> import unrolled as ur
        >>> ur.copies(ur.unroll(ur.GRUCell(3, 4)), torch.randn(5, 2, 3))[-1]
        Copy(t=4, input=float32[2, 3], state=float32[2, 4], output=float32[2, 4], next_state=float32[2, 4])
    """

    def __init__(
        self,
        network: RecordedRun,
        t: int,
        received: Received,
        entered: Sequence[TappedTree],
        left: Sequence[TappedTree],
        input: Tree,
        state: Tree,
        seen: Tree,
    ) -> None:
        self._network, self._received = network, received
        self._input_in, self._state_in, self._weights_in = entered
        self._output_out, self.handed_on = left
        self.t, self.input, self._state = t, input, state
        self.seen = seen

    @property
    def rows(self) -> Tensor:
        """Which rows of the caller's batch are alive at t, in the order in which this copy's tensors have them: `[n]`.

        That order is by length, the longest first, where rows end at different times; else it is the caller's.
        """
        return self._network.order[: self._network.given.extent.sizes[self.t]]

    @property
    def state(self) -> Tree:
        """What the cell saw: the state handed to it, `[B, ...]`, fresh in rows that were reset just before t."""
        return self._state

    @property
    def output(self) -> Tree:
        """What it gave out, `[B, ...]`."""
        return self._output_out.tree

    @property
    def next_state(self) -> Tree:
        """The state it handed on, `[B, ...]`: to the copy after it, in a reversed network to the one before it."""
        return self.handed_on.tree

    @property
    def input_grad(self) -> Tree:
        """The loss's gradient by this copy's input, through this copy; None for integer leaves."""
        return self._grads(self._input_in)

    @property
    def state_grad(self) -> Tree:
        """What flowed back *through this copy* to the state that the cell saw."""
        return self._grads(self._state_in)

    @property
    def total_state_grad(self) -> Tree:
        """The loss's whole gradient by the state handed to it: `state_grad` and what the loss took from it directly.

        Nothing flows through a reset: in such a row it is only what the loss took directly, mostly zero.
        """
        self._network.listener.require_backward()
        return self._received.grad_tree

    @property
    def output_grad(self) -> Tree:
        """The loss's gradient by this copy's output."""
        return self._grads(self._output_out)

    @property
    def weight_grad(self) -> Mapping[str, Tensor]:
        """This copy's own share of each parameter's gradient: name -> `[*shape]`."""
        return Shares(self._network, f"weight_grad of copy {self.t}", lambda name: self._shares([name])[name])

    @property
    def aliases(self) -> dict[str, Tensor]:
        """The parameters as this copy alone reads them."""
        return dict(zip(self._network.weights, self._weights_in.passed, strict=True))

    def _grads(self, passage: TappedTree) -> Tree:
        self._network.listener.require_backward()
        return passage.grad_tree

    def _shares(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Shares of several parameters at the cost of one backward step of this copy."""
        aliases = self.aliases
        flowed = self._output_out.flowed() + self.handed_on.flowed()
        found = derivative(flowed, [aliases[name] for name in names], f"the shares of copy {self.t}")
        return dict(zip(names, found, strict=True))

    def _share_norms(self) -> dict[str, Tensor]:
        known = self._network.norms
        if self.t not in known:
            shares = self._shares(list(self._network.weights))
            known[self.t] = {name: _norm(share) for name, share in shares.items()}
        return known[self.t]

    def __repr__(self) -> str:
        shown = {
            "input": self.input,
            "state": self.state,
            "output": self.output,
            "next_state": self.next_state,
        }
        return f"Copy(t={self.t}, {', '.join(f'{name}={describe(tree)}' for name, tree in shown.items())})"


class Copies(Sequence[Copy]):
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

    def __init__(self, network: RecordedRun, members: Sequence[Copy], run: Sequence[Copy]) -> None:
        self._network = network
        self._members, self._run = tuple(members), tuple(run)

    @property
    def outputs(self) -> Tree:
        """The copies' outputs as the unrolled network returns them, `[T, B, ...]` or `[B, T, ...]`.

        A slice has one step for each of its copies. Where rows end at different times, it is padded with zeros, also
        where the whole is a PackedSequence.
        """
        given = self._network.given
        if self._members == self._run:
            return given.outputs(self.joined)
        steps = [self._padded(copy) if given.extent.ragged else copy.output for copy in self._some()]
        stacked = sequence.stacked(steps)
        return sequence.swap_time_and_batch(stacked) if given.batch_first else stacked

    @property
    def joined(self) -> Tree:
        """The copies' outputs as engines return them: `[T, B, ...]`, `[N, ...]` where rows end at different times."""
        if not self._run:
            return self._network.no_outputs
        return sequence.joined([copy.output for copy in self._some()], self._network.given.extent)

    def _padded(self, copy: Copy) -> Tree:
        """A copy's output with all rows of the batch."""
        batch = self._network.given.batch

        def placed(rows: Tensor) -> Tensor:
            return rows.new_zeros((batch, *rows.shape[1:])).index_copy(0, copy.rows.to(rows.device), rows)

        return map_leaves(placed, copy.output)

    @property
    def state(self) -> Tree:
        """The state of each row once the last of these copies has run, `[B, ...]`; of all copies, the network's own.

        The last to run is the one with the largest t, in a reversed network with the smallest. A row that has ended
        keeps the state of its own end, one that has not begun the initial state.
        """
        network = self._network
        if not self._run:
            return network.initial.tree
        last = (min if network.reverse else max)(self._some(), key=lambda copy: copy.t)
        return network.given.last(self._reached(last), network.initial.tree)

    def _reached(self, last: Copy) -> Tree:
        """The states of all rows that have a step, as engines see them, once a copy has run."""
        sizes = self._network.given.extent.sizes
        if self._network.reverse:
            others = [map_leaves(lambda leaf: leaf[sizes[last.t] :], self._network.first)]
        else:
            ending = [t for t in range(last.t - 1, -1, -1) if sizes[t] > sizes[t + 1]]
            others = [map_leaves(lambda leaf, n=sizes[t + 1]: leaf[n:], self._run[t].next_state) for t in ending]
        if not self._network.given.extent.ragged or not others:
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
            return Copies(self._network, self._members[index], self._run)
        try:
            return self._members[index]
        except IndexError as error:
            raise IndexError(f"there are {len(self)} copies, got index {index}") from error

    def __len__(self) -> int:
        return len(self._members)

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
        backward_through(self._network.listener, loss, gradient)

    def truncated(self, horizon: int | None = None, stride: int | None = None) -> TruncationBias:
        """What truncation does to the gradient: its angle and norm beside the full one, for losses already gone back.

        Copies keep the whole graph and show the full gradient, whatever the network's horizon. Here each block's losses
        (those taken from outputs and from the last state) go back through it as far as truncated BPTT would let them.

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
        truncation = asked_truncation(horizon, stride, self._network.truncation)
        self._network.listener.require_backward()
        if self._members != self._run:
            raise OptionError(
                f"truncation is a matter of the whole run, got a slice of {len(self)} copies; ask all copies"
            )
        return truncation_bias(truncation, self.step_grads(shown=True), self.initial_states, self._network.weights)

    @property
    def reverse(self) -> bool:
        """Whether the last copy came first."""
        return self._network.reverse

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The trained parameters by name."""
        return self._network.weights

    @property
    def initial_states(self) -> list[Tensor]:
        """The tensors of initial and fresh states that the cell made, as the copies received them."""
        return [tensor for passage in self._network.made for tensor in passage.passed]

    def step_grads(self, *, shown: bool) -> list[StepGrads]:
        """Each step in the order in which they were walked; `shown` says whether a loss sees the outputs."""
        walked = self._run[::-1] if self._network.reverse else self._run
        sizes = [*(self._network.given.extent.sizes[copy.t] for copy in walked), 0]
        found = []
        for copy, going_on in zip(walked, sizes[1:], strict=True):
            flowed = [(x, _ended(grad, going_on)) for x, grad in copy.handed_on.flowed() if _rows_end(x, going_on)]
            flowed = [*copy._output_out.flowed(), *flowed] if shown else flowed
            handed = [x for x in copy.handed_on.passed if x.requires_grad]
            found.append(StepGrads(flowed, copy.aliases, handed))
        return found

    @property
    def weight_grad(self) -> Mapping[str, Tensor]:
        """Every copy's own share of each parameter's gradient: name -> `[T, *shape]`.

        Over all copies, and with `initial_grad`, they add up to what the copies gave to `.grad`.
        """
        return Shares(self._network, "weight_grad", self._stacked_shares)

    def _stacked_shares(self, name: str) -> Tensor:
        weight = self._network.weights[name]
        shares = weight.new_empty((len(self), *weight.shape))
        for row, copy in zip(shares, self, strict=True):
            row.copy_(copy._shares([name])[name])
        return shares

    @property
    def weight_grad_norm(self) -> Mapping[str, Tensor]:
        """The Euclidean norm of each copy's share: name -> `[T]` float64. One copy's shares are held at a time."""
        return Shares(
            self._network,
            "weight_grad_norm",
            self._norms,
        )

    def _norms(self, name: str) -> Tensor:
        norms = [copy._share_norms()[name] for copy in self]
        return torch.stack(norms) if norms else self._network.weights[name].new_empty(0, dtype=torch.float64)

    @property
    def initial_grad(self) -> Mapping[str, Tensor]:
        """What parameters got through the initial state, which is no copy's: name -> `[*shape]`.

        Fresh states that rows were reset to are of it. Zeros where the initial state does not depend on a parameter, or
        was passed by the caller.
        """
        network = self._network

        def share(name: str) -> Tensor:
            flowed = [pair for passage in network.made for pair in passage.flowed()]
            return derivative(flowed, [network.weights[name]], "the initial state's share")[0]

        return Shares(network, "initial_grad", share)

    def __repr__(self) -> str:
        name = name_of(self._network.cell)
        if not self._members:
            return f"Copies({name}, none)"
        first, last = self._members[0], self._members[-1]
        return "\n".join(
            [
                f"Copies({name}, {len(self)}: t = {first.t} to {last.t})",
                f"  input   {describe(first.input)}",
                f"  state   {describe(first.state)}",
                f"  output  {describe(first.output)}",
                f"  shared  {', '.join(self._network.weights) or 'no trained parameter'}",
                f"  grads   {'there' if self._network.listener.backwards else 'after copies.backward(loss)'}",
            ]
        )


def _rows_end(state: Tensor, going_on: int) -> bool:
    return not going_on or (state.dim() > 0 and state.shape[0] > going_on)


def _ended(grad: Tensor, going_on: int) -> Tensor:
    """The gradient of a handed-on state in rows that no copy receives: what the loss took from them."""
    if not going_on:
        return grad
    return torch.cat([torch.zeros_like(grad[:going_on]), grad[going_on:]])


def _norm(share: Tensor) -> Tensor:
    """In float64, since the square of a small float32 is zero: a share that vanishes is to be seen."""
    return torch.linalg.vector_norm(share.abs(), dtype=torch.float64)
