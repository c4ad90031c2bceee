"""The unrolled network as an object: T copies to point at, and what flowed back through each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import overload

import torch
from torch import Tensor, nn

from unrolled import sequence
from unrolled._doors import Passage, derivative, leads_to, ways_past
from unrolled._layers import TorchLayer
from unrolled._network import Network, Shares
from unrolled._unroll import Unrolled
from unrolled.cells.contract import CheckedStep, name_of
from unrolled.engine import reference
from unrolled.errors import CellError, GradientError, OptionError
from unrolled.lengths import Extent
from unrolled.trees import Tree, describe

__all__ = ["Copies", "Copy", "copies"]


class Copy:
    """One copy of the cell: the cell at time step `t`. Obtained from `Copies`.

    Example:
        >>> import unrolled as ur
        >>> ur.copies(ur.unroll(ur.GRUCell(3, 4)), torch.randn(5, 2, 3))[-1]
        Copy(t=4, input=float32[2, 3], state=float32[2, 4], output=float32[2, 4], next_state=float32[2, 4])
    """

    def __init__(
        self,
        network: Network,
        t: int,
        received: Passage,
        entered: Sequence[Passage],
        left: Sequence[Passage],
        input: Tree,
    ) -> None:
        self._network, self._received = network, received
        self._input_in, self._state_in, self._weights_in = entered
        self._output_out, self._state_out = left
        self.t = t
        self.input = input

    @property
    def state(self) -> Tree:
        """What it received: the state handed on by the copy before it, `[B, ...]`."""
        return self._received.tree

    @property
    def output(self) -> Tree:
        """What it gave out, `[B, ...]`."""
        return self._output_out.tree

    @property
    def next_state(self) -> Tree:
        """The state it handed to the copy after it, `[B, ...]`."""
        return self._state_out.tree

    @property
    def input_grad(self) -> Tree:
        """The loss's gradient by this copy's input, through this copy; None for integer leaves."""
        return self._grads(self._input_in)

    @property
    def state_grad(self) -> Tree:
        """What flowed back *through this copy* to the state it received."""
        return self._grads(self._state_in)

    @property
    def total_state_grad(self) -> Tree:
        """The loss's whole gradient by the state it received: `state_grad` and what the loss took from it directly."""
        return self._grads(self._received)

    @property
    def output_grad(self) -> Tree:
        """The loss's gradient by this copy's output."""
        return self._grads(self._output_out)

    @property
    def weight_grad(self) -> Mapping[str, Tensor]:
        """This copy's own share of each parameter's gradient: name -> `[*shape]`."""
        return Shares(self._network, f"weight_grad of copy {self.t}", lambda name: self._shares([name])[name])

    def _grads(self, passage: Passage) -> Tree:
        self._network.require_backward()
        return passage.grad_tree

    def _shares(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Shares of several parameters at the cost of one backward step of this copy."""
        aliases = dict(zip(self._network.weights, self._weights_in.passed, strict=True))
        flowed = self._output_out.flowed() + self._state_out.flowed()
        found = derivative(flowed, [aliases[name] for name in names], f"the shares of copy {self.t}")
        return dict(zip(names, found, strict=True))

    def _share_norms(self) -> dict[str, Tensor]:
        known = self._network.norms
        if self.t not in known:
            shares = self._shares(list(self._network.weights))
            known[self.t] = {name: torch.linalg.vector_norm(share) for name, share in shares.items()}
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
    `outputs`, of `state`, or of any copy's `output`, `state` or `next_state`.

    Example:
        >>> import unrolled as ur
        >>> copies = ur.copies(ur.unroll(ur.GRUCell(3, 4)), torch.randn(5, 2, 3))
        >>> [copy.t for copy in copies[2:]]
        [2, 3, 4]
    """

    def __init__(self, network: Network, members: Sequence[Copy], *, batch_first: bool) -> None:
        self._network = network
        self._members = tuple(members)
        self._batch_first = batch_first

    @property
    def outputs(self) -> Tree:
        """The copies' outputs as the unrolled network returns them, `[T, B, ...]` or `[B, T, ...]`."""
        stacked = sequence.stacked([copy.output for copy in self._some()])
        return sequence.swap_time_and_batch(stacked) if self._batch_first else stacked

    @property
    def state(self) -> Tree:
        """The state that the last of these copies handed on, `[B, ...]`."""
        return self._some()[-1].next_state

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
            return Copies(self._network, self._members[index], batch_first=self._batch_first)
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
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise GradientError(
                "the loss has no gradient; compute it from copies.outputs, or from a copy's output or state, "
                "with gradients enabled"
            )
        if gradient is None and loss.numel() != 1:
            raise GradientError(
                f"the loss must be a scalar, got shape {list(loss.shape)}; take its .sum() or .mean(), or pass gradient"
            )
        if gradient is not None and gradient.shape != loss.shape:
            raise GradientError(f"gradient must have the loss's shape {list(loss.shape)}, got {list(gradient.shape)}")
        if not leads_to([loss], self._network.listener):
            raise GradientError(
                "the loss does not depend on these copies; compute it from their outputs or states, not of another run"
            )
        self._network.remember(lambda: loss.backward(gradient, retain_graph=True))

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
        """The Euclidean norm of each copy's share: name -> `[T]`. One copy's shares are held at a time."""
        return Shares(
            self._network,
            "weight_grad_norm",
            self._norms,
        )

    def _norms(self, name: str) -> Tensor:
        norms = [copy._share_norms()[name] for copy in self]
        return torch.stack(norms) if norms else self._network.weights[name].new_empty(0)

    @property
    def initial_grad(self) -> Mapping[str, Tensor]:
        """What parameters got through the initial state, which is no copy's: name -> `[*shape]`.

        Zeros where the initial state does not depend on a parameter, or was passed by the caller.
        """
        network = self._network

        def share(name: str) -> Tensor:
            flowed = network.initial.flowed() if network.own_state else []
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
                f"  grads   {'there' if self._network.backwards else 'after copies.backward(loss)'}",
            ]
        )


class _AliasedStep(CheckedStep):
    """A checked step of a cell whose parameters are replaced by one copy's own aliases of them."""

    def __init__(self, network: Network, aliases: Sequence[Tensor]) -> None:
        super().__init__(network.cell, None if network.context is None else network.context.tree)
        self._aliases = dict(zip(network.paths.values(), aliases, strict=True))

    def run(self, t: int, input: Tree, state: Tree) -> tuple[Tree, Tree]:
        return torch.func.functional_call(self.cell, self._aliases, (input, state, *self.rest(t)))


def _recording(network: Network, members: list[Copy]) -> Callable[[int, Tree, Tree], tuple[Tree, Tree]]:
    """A step for the reference engine that makes a copy of every call."""

    def step(t: int, input: Tree, state: Tree) -> tuple[Tree, Tree]:
        received = members[-1]._state_out if members else network.initial
        entered = network.through_door(input, state, list(network.weights.values()))
        aliased = _AliasedStep(network, entered[2].passed)
        returned = aliased(t, entered[0].tree, entered[1].tree)
        left = network.through_door(*returned)
        _refuse_other_ways(network, t, entered, left)
        members.append(Copy(network, t, received, entered, left, input))
        return left[0].tree, left[1].tree

    return step


def _refuse_other_ways(network: Network, t: int, entered: Sequence[Passage], left: Sequence[Passage]) -> None:
    """What reaches a copy by another way than through its door would be missing from its share, or be in another's."""
    doors = [*entered, network.context] if network.context is not None else entered
    beside, others = ways_past(doors, [tensor for passage in left for tensor in passage.raw])
    hidden = [name for name, weight in network.weights.items() if id(weight) in beside]
    if hidden:
        raise CellError(
            f"copy {t} of {name_of(network.cell)} reads {', '.join(hidden)} by another way than its registered name, "
            "so its share cannot be told; read the parameter as an attribute of its module in every step"
        )
    if others:
        raise CellError(
            f"copy {t} of {name_of(network.cell)} uses something that an earlier copy computed and did not hand on in "
            "its state (a cached weight?), so their shares cannot be told apart; compute it in every step"
        )


def copies(rnn: nn.Module, inputs: Tree, state: Tree = None, *, context: Tree = None) -> Copies:
    """Run an unrolled network and keep its T copies as objects.

    Args:
        rnn: what `unroll` made, or a `RNN`, `LSTM` or `GRU` layer of this package.
        inputs: a pytree of `[T, B, ...]` (`[B, T, ...]` with `batch_first`).
        state: the state copy 0 receives, as `rnn` takes it; by default the cell's own.
        context: what a cell with a third argument receives at every step.

    Returns:
        The copies. Their outputs and state have the values that `rnn(inputs, state)` returns. Copies speak of the
        cell: those of a layer have states `[B, H]` without the layer's leading dimension, and a sequence without a
        batch is a batch of one.

    Raises:
        OptionError: if `rnn` is no unrolled network.
        InputError: as the call itself does.
        StateError: as the call itself does.
        CellError: as the call itself does, and if the cell writes into its input or state in place.

    Example:
        >>> import torch, unrolled as ur
        >>> rnn = ur.unroll(ur.RNNCell(3, 4))
        >>> copies = ur.copies(rnn, torch.randn(10, 2, 3))
        >>> copies.backward(copies.outputs[-1].sum())
        >>> copies[7].state_grad.shape, copies.weight_grad["weight_hh"].shape
        (torch.Size([2, 4]), torch.Size([10, 4, 4]))
        >>> torch.allclose(copies.weight_grad["weight_hh"].sum(0), rnn.cell.weight_hh.grad, atol=1e-6)
        True
    """
    if isinstance(rnn, TorchLayer):
        rnn, inputs, state = rnn.prepared(inputs, state)
    if not isinstance(rnn, Unrolled):
        raise OptionError(f"copies takes what unroll made, got a {type(rnn).__name__}; wrap its cell: ur.unroll(cell)")
    own_state = state is None
    inputs, state = rnn.prepared(inputs, state, context)
    network = Network(rnn.cell, state, context, own_state=own_state)
    members: list[Copy] = []
    extent = Extent(*sequence.sizes(inputs))
    reference.run(_recording(network, members), inputs, network.initial.tree, extent)
    return Copies(network, members, batch_first=rnn.batch_first)
