"""The copies of modules made of unrolled networks: one list of copies for each layer and direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias, cast, overload

from torch import Tensor, nn

from unrolled.bptt.truncation import Truncation
from unrolled.errors import OptionError
from unrolled.introspection.bias import StepGrads, TruncationBias, truncation_bias, truncation_to_compare
from unrolled.introspection.copies import Copies, TappedRun
from unrolled.introspection.recording import record
from unrolled.introspection.taps import GradientTap
from unrolled.lengths import Lengths
from unrolled.networks.base import Network
from unrolled.networks.layered import Layered, run_parts
from unrolled.networks.layout import BatchLayout, Call
from unrolled.networks.stack import Bidirectional
from unrolled.networks.torch_layers import TorchLayer, layer_results, network_call, networks_of
from unrolled.networks.unroll import Unrolled
from unrolled.trees import Tree

Part: TypeAlias = "Copies | LayeredCopies"


class LayeredCopies(TappedRun, Sequence[Part]):
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
        >>> [name for name, _ in copies.named_networks()]
        ['layer 0, forwards', 'layer 0, backwards', 'layer 1, forwards', 'layer 1, backwards']
    """

    def __init__(
        self,
        name: str,
        tap: GradientTap,
        parts: Sequence[Part],
        outputs: Tree,
        state: Tree,
        truncation: Truncation | None,
    ) -> None:
        self._name, self._tap, self.truncation = name, tap, truncation
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

    @property
    def layout(self) -> BatchLayout:
        """How the caller laid the batch out."""
        return self._parts[0].layout

    @property
    def part_names(self) -> tuple[str, ...]:
        """What a person would call each part."""
        return tuple(f"layer {number}" for number in range(len(self)))

    def named_networks(self) -> list[tuple[str, Copies]]:
        """The copies of each single network, and its name, in the order in which they ran."""
        return [
            (f"{name}, {inner}" if inner else name, copies)
            for name, part in zip(self.part_names, self, strict=True)
            for inner, copies in part.named_networks()
        ]

    def truncated(self, horizon: int | None = None, stride: int | None = None) -> TruncationBias:
        """What truncation does to the gradient: its angle to the full one and relative norm; see `Copies.truncated`.

        All layers are cut at one place.

        Args:
            horizon: k2, as in `stack`; the network's own by default.
            stride: k1, as in `stack`.

        Raises:
            OptionError: if there is no horizon, or a layer walks backwards.
            GradientError: before `backward`.
        """
        truncation = truncation_to_compare(horizon, stride, self.truncation)
        self._tap.require_backward()
        networks = [copies for _, copies in self.named_networks()]
        if any(copies.reverse for copies in networks):
            raise OptionError(f"a truncated network walks forwards, but {self._name} has a layer that walks backwards")
        columns = [copies.step_grads(with_outputs=copies is networks[-1]) for copies in networks]
        steps = [StepGrads.of_layers(layers) for layers in zip(*columns, strict=True)]
        initial = [tensor for copies in networks for tensor in copies.initial_states]
        named = {f"{n}.{name}": x for n, copies in enumerate(networks) for name, x in copies.weights.items()}
        return truncation_bias(truncation, steps, initial, named)

    def __repr__(self) -> str:
        parts = (f"[{number}] {part!r}".replace("\n", "\n  ") for number, part in enumerate(self))
        return "\n  ".join([f"LayeredCopies({self._name}, {len(self)})", *parts])


class DirectedCopies(LayeredCopies):
    """The copies of a bidirectional network."""

    part_names = ("forwards", "backwards")

    @property
    def forwards(self) -> Copies:
        """The copies of the direction that walks from the first step to the last."""
        return cast("Copies", self[0])

    @property
    def backwards(self) -> Copies:
        """The copies of the direction that walks from the last step to the first; `backwards[t]` is the one at t."""
        return cast("Copies", self[1])


def copies(
    rnn: nn.Module,
    inputs: Tree,
    state: Tree = None,
    *,
    lengths: Lengths = None,
    resets: Tensor | None = None,
    context: Tree = None,
) -> Copies | LayeredCopies:
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
    networks_of(rnn, "copies")
    network, network_inputs, state = network_call(rnn, inputs, state)
    call = Call.of(
        network_inputs, state, lengths=lengths, resets=resets, context=context, batch_first=network.batch_first
    )
    made, outputs, last = _record(network, call, GradientTap())
    if isinstance(rnn, TorchLayer) and isinstance(made, LayeredCopies):
        made.outputs, made.state = layer_results(rnn, inputs, call.layout.outputs(outputs), last)
    return made


def _record(network: Network, call: Call, tap: GradientTap) -> tuple[Part, Tree, Tree]:
    """The copies of a network and of all that it is made of, its outputs as engines return them, and its last state."""
    if isinstance(network, Unrolled):
        copies = record(network, call, tap)
        return copies, copies.joined, copies.state
    parts: list[Part] = []

    def run(part: Network, steps: Tree, state: Tree, context: Tree) -> tuple[Tree, Tree]:
        made, outputs, last = _record(part, replace(call, steps=steps, state=state, context=context), tap)
        parts.append(made)
        return outputs, last

    outputs, last = run_parts(cast("Layered", network), run, call.steps, call.state, call.context)
    kind = DirectedCopies if isinstance(network, Bidirectional) else LayeredCopies
    made = kind(network._get_name(), tap, parts, call.layout.outputs(outputs), last, network.truncation)
    return made, outputs, last
