"""The copies of modules made of unrolled networks: one list of copies for each layer and direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast, overload

from torch import Tensor, nn

from unrolled.bptt.truncation import Truncation
from unrolled.errors import OptionError
from unrolled.introspection.bias import StepGrads, TruncationBias, asked_truncation, truncation_bias
from unrolled.introspection.copies import Copies
from unrolled.introspection.recorded import backward_through
from unrolled.introspection.recording import recorded
from unrolled.introspection.taps import GradientTap
from unrolled.networks.layered import Layered
from unrolled.networks.layout import BatchLayout, Lengths, given_as
from unrolled.networks.stack import Bidirectional
from unrolled.networks.torch_layers import TorchLayer
from unrolled.networks.unroll import Unrolled
from unrolled.trees import Tree

Part: TypeAlias = "Copies | LayeredCopies"


class LayeredCopies(Sequence[Part]):
    """The copies of layers, or of two directions, after one run; made by `copies`.

    For a stack, `copies[l]` are the copies of layer l. For a bidirectional network there are two, `forwards` and
    `backwards`. Each has the shares of its own layer and direction; what layer l read is `copies[l][t].input`. A cell
    that stands in two layers has two shares, which add up to its `.grad` together.

    Attributes:
        outputs: what the module returns for this run.
        state: the last state as the module returns it.

    Example:
        >>> import torch, unrolled as ur
        >>> copies = ur.copies(ur.LSTM(3, 4, num_layers=2, bidirectional=True), torch.randn(5, 2, 3))
        >>> copies.backward(copies.outputs.sum())
        >>> sorted(copies[1].backwards.weight_grad)[-1], copies[1].backwards[0].state_grad[0].shape
        ('weight_ih_l1_reverse', torch.Size([2, 4]))
    """

    def __init__(
        self,
        name: str,
        listener: GradientTap,
        parts: Sequence[Part],
        outputs: Tree,
        state: Tree,
        truncation: Truncation | None,
    ) -> None:
        self._name, self._listener, self._truncation = name, listener, truncation
        self._parts = tuple(parts)
        self.outputs, self.state = outputs, state

    @overload
    def __getitem__(self, index: int) -> Part: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Part, ...]: ...
    def __getitem__(self, index: int | slice) -> Part | tuple[Part, ...]:
        try:
            return self._parts[index]
        except IndexError as error:
            raise IndexError(f"{self._name} has {len(self)} parts, got index {index}; they count from 0") from error

    def __len__(self) -> int:
        return len(self._parts)

    def backward(self, loss: Tensor, gradient: Tensor | None = None) -> None:
        """Do all that `loss.backward(gradient)` does, and remember what flowed back through each copy of each layer.

        Args:
            loss: a tensor computed from these copies; a scalar unless `gradient` is given.
            gradient: the gradient by `loss`, of its shape.

        Raises:
            GradientError: if the loss has no gradient, or is no scalar and comes without one.
        """
        backward_through(self._listener, loss, gradient)

    def truncated(self, horizon: int | None = None, stride: int | None = None) -> TruncationBias:
        """What truncation does to the gradient: its angle and norm beside the full one; see `Copies.truncated`.

        All layers are cut at one place.

        Args:
            horizon: k2, as in `stack`; the network's own by default.
            stride: k1, as in `stack`.

        Raises:
            OptionError: if there is no horizon, or a layer walks backwards.
            GradientError: before `backward`.
        """
        truncation = asked_truncation(horizon, stride, self._truncation)
        self._listener.require_backward()
        networks = self.networks
        if any(copies.reverse for copies in networks):
            raise OptionError(f"a truncated network walks forwards, but {self._name} has a layer that walks backwards")
        columns = [copies.step_grads(shown=copies is networks[-1]) for copies in networks]
        steps = [_together(step) for step in zip(*columns, strict=True)]
        initial = [tensor for copies in networks for tensor in copies.initial_states]
        named = {f"{n}.{name}": x for n, copies in enumerate(networks) for name, x in copies.weights.items()}
        return truncation_bias(truncation, steps, initial, named)

    @property
    def networks(self) -> list[Copies]:
        """The copies of each network, the first layer's first."""
        return [one for part in self for one in (part.networks if isinstance(part, LayeredCopies) else [part])]

    def __repr__(self) -> str:
        told = (f"[{number}] {part!r}".replace("\n", "\n  ") for number, part in enumerate(self))
        return "\n  ".join([f"LayeredCopies({self._name}, {len(self)})", *told])


class DirectedCopies(LayeredCopies):
    """The copies of a bidirectional network."""

    @property
    def forwards(self) -> Copies:
        """The copies of the direction that walks from the first step to the last."""
        return cast("Copies", self._parts[0])

    @property
    def backwards(self) -> Copies:
        """The copies of the direction that walks from the last step to the first; `backwards[t]` is the one at t."""
        return cast("Copies", self._parts[1])


def copies(
    rnn: nn.Module,
    inputs: Tree,
    state: Tree = None,
    *,
    lengths: Lengths = None,
    resets: Tensor | None = None,
    context: Tree = None,
) -> Any:  # Copies or LayeredCopies: for torch.nn's layers their options decide
    """Run an unrolled network and keep its copies as objects.

    A horizon or a memory budget of the network is not heeded: copies keep the whole graph, and show the full gradient;
    `truncated` of what is returned says what a horizon would do to it.

    Args:
        rnn: what `unroll`, `stack` or `Bidirectional` made, or a `RNN`, `LSTM` or `GRU` layer of this package.
        inputs: a pytree of `[T, B, ...]` (`[B, T, ...]` with `batch_first`), or a PackedSequence.
        state: the state that each row's first copy receives, as `rnn` takes it; by default the cell's own.
        lengths: how many steps each row has, integers `[B]`. A copy has the rows that are alive at its time.
        resets: a bool `[T, B]` (`[B, T]` with `batch_first`): rows that start afresh just before step t.
        context: what a cell with a third argument receives at every step.

    Returns:
        The copies, as many as the longest row has steps: `Copies` of one network, `LayeredCopies` of one that has
        layers or directions. Their outputs and state have the values that `rnn` returns for the same call. `Copies`
        speak of the cell: those of a layer have states `[B, H]` without torch.nn's leading dimension, and a sequence
        without a batch is a batch of one.

    Raises:
        OptionError: if `rnn` is no unrolled network.
        InputError: as the call itself does.
        StateError: as the call itself does.
        CellError: as the call itself does, and if the cell writes into its input or state in place.

    Example:
        >>> import torch, unrolled as ur
        >>> rnn = ur.unroll(ur.RNNCell(3, 4))
        >>> copies = ur.copies(rnn, torch.randn(10, 2, 3), lengths=[10, 6])
        >>> copies.backward(copies.outputs.sum())
        >>> copies[7].state_grad.shape, copies.weight_grad["weight_hh"].shape
        (torch.Size([1, 4]), torch.Size([10, 4, 4]))
        >>> torch.allclose(copies.weight_grad["weight_hh"].sum(0), rnn.cell.weight_hh.grad, atol=1e-6)
        True
    """
    listener, layer = GradientTap(), rnn
    if isinstance(layer, TorchLayer):
        asked = inputs
        rnn, inputs, state = layer.prepared(inputs, state)
    if not isinstance(rnn, Unrolled | Layered):
        raise OptionError(
            f"copies takes what unroll or stack made, got a {type(rnn).__name__}; wrap its cell: ur.unroll(cell)"
        )
    given = given_as(inputs, lengths, batch_first=rnn.batch_first)
    made, outputs, last = _recorded(rnn, given, given.sequences(inputs), state, resets, context, listener)
    if isinstance(layer, TorchLayer) and isinstance(made, LayeredCopies):
        made.outputs, made.state = layer.returned(asked, given.outputs(outputs), last)
    return made


def _recorded(
    part: nn.Module,
    given: BatchLayout,
    steps: Tree,
    state: Tree,
    resets: Tensor | None,
    context: Tree,
    listener: GradientTap,
) -> tuple[Part, Tree, Tree]:
    """The copies of a network or of one of its parts, its outputs as engines return them, and its last state."""
    if isinstance(part, Unrolled):
        one = recorded(part, given, steps, state, resets, context, listener)
        return one, one.joined, one.state
    parts: list[Part] = []

    def run(part: nn.Module, steps: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree]:
        made, outputs, last = _recorded(part, given, steps, state, resets, context, listener)
        parts.append(made)
        return outputs, last

    rnn = cast("Layered", part)
    outputs, last = rnn.composed_by(run, steps, state, context)
    kind = DirectedCopies if isinstance(rnn, Bidirectional) else LayeredCopies
    return kind(rnn._get_name(), listener, parts, given.outputs(outputs), last, rnn.truncation), outputs, last


def _together(step: Sequence[StepGrads]) -> StepGrads:
    """One step of all layers."""
    flowed = [pair for one in step for pair in one.flowed]
    weights = {f"{n}.{name}": x for n, one in enumerate(step) for name, x in one.weights.items()}
    return StepGrads(flowed, weights, [x for one in step for x in one.handed])
