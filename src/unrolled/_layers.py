"""torch.nn's recurrent layers, unrolled: same constructors, parameters, state layout and state-dict keys.

A user swaps `torch.nn.LSTM` for `unrolled.LSTM` and keeps the checkpoint.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unrolled._unroll import Unrolled
from unrolled.cells.gates import check_sizes
from unrolled.cells.gru import gru_step
from unrolled.cells.lstm import lstm_step
from unrolled.cells.rnn import check_nonlinearity, rnn_step
from unrolled.errors import InputError, OptionError, StateError
from unrolled.trees import Tree, map_leaves

__all__ = ["GRU", "LSTM", "RNN", "TorchLayer"]

_SUFFIX = "_l0"
_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class TorchLayer(nn.Module):
    """What RNN, LSTM and GRU share. The parameters are the layer's own, under torch.nn's names.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: 1; more come with stacks.
        bias: whether the biases exist.
        batch_first: whether inputs and outputs are `[B, T, ...]`; states are `[1, B, H]` in any case.
        dropout: 0; dropout acts between layers.
        bidirectional: False; two directions come with stacks.
        device: where the parameters live.
        dtype: the parameters' dtype.

    Raises:
        OptionError: for a size below 1, or an option that is not offered yet.
    """

    gates: ClassVar[int]
    state_names: ClassVar[tuple[str, ...]] = ("h",)
    is_layer: ClassVar[bool] = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        _refuse_stacks(num_layers=(num_layers, 1), dropout=(dropout, 0.0), bidirectional=(bidirectional, False))
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = (
            bias,
            batch_first,
            dropout,
            bidirectional,
        )
        G = self.gates * hidden_size
        for name, shape in zip(_WEIGHTS, [(G, input_size), (G, hidden_size), (G,), (G,)], strict=True):
            made = bias or not name.startswith("bias")
            tensor = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if made else None
            self.register_parameter(name + _SUFFIX, tensor)
        self.reset_parameters()
        # Made now, since a compiler that traces the first call could not keep what is made there.
        self.__dict__["_unrolled"] = self.unrolled

    def reset_parameters(self) -> None:
        """Draw all parameters from `U(-1/sqrt(H), 1/sqrt(H))`, in torch.nn's order."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def flatten_parameters(self) -> None:
        """Nothing: kept so that code written for torch.nn's layers, which pack weights for cuDNN here, still runs."""

    def weights(self) -> list[Tensor | None]:
        """`weight_ih, weight_hh, bias_ih, bias_hh` as they are now: parametrised or swapped ones included."""
        return [getattr(self, name + _SUFFIX, None) for name in _WEIGHTS]

    def step(self, input: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One step of the layer's cell: input `[B, I]`, state of `[B, H]`."""
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Tree = None) -> tuple[Tensor, Tree]:
        """Run the layer as torch.nn's does.

        Args:
            input: `[T, B, I]`, `[B, T, I]` with `batch_first`, or `[T, I]` without a batch.
            hx: the initial state, `[1, B, H]` (an LSTM: a pair of them; without a batch `[1, H]`); zeros by default.

        Returns:
            The outputs, `[T, B, H]` in the input's layout, and the final state in the layout of `hx`.

        Raises:
            InputError: for an input of another shape, or a PackedSequence.
            StateError: for a state that does not fit.
        """
        rnn, inputs, state = self.prepared(input, hx)
        outputs, state = rnn(inputs, state)
        if input.dim() == 2:
            return outputs.squeeze(0 if self.batch_first else 1), state
        return outputs, map_leaves(lambda h: h.unsqueeze(0), state)

    def prepared(self, input: Tensor, hx: Tree) -> tuple[Unrolled, Tensor, Tree]:
        """The unrolled network that runs the layer, with what it is to be called with.

        A sequence without a batch becomes a batch of one.

        Raises:
            InputError: as the call itself does.
            StateError: as the call itself does.
        """
        self._check_input(input)
        state = self._cell_state(hx, batch=input.dim() == 3)
        if input.dim() == 2:
            input = input.unsqueeze(0 if self.batch_first else 1)
        return self.unrolled, input, state

    def _check_input(self, input: Tensor) -> None:
        if isinstance(input, PackedSequence):
            raise InputError("a PackedSequence is not taken yet; pad it (torch.nn.utils.rnn.pad_packed_sequence)")
        if not isinstance(input, Tensor) or input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            got = list(input.shape) if isinstance(input, Tensor) else type(input).__name__
            layout = "[B, T, I]" if self.batch_first else "[T, B, I]"
            raise InputError(f"input must be {layout} or [T, I] with I = {self.input_size}, got {got}")

    def _cell_state(self, hx: Tree, *, batch: bool) -> Tree:
        """A state in torch.nn's layout, `[1, B, H]` or without a batch `[1, H]`, as the cell's `[B, H]`."""
        if hx is None:
            return None
        pair = len(self.state_names) > 1
        tensors = hx if pair and isinstance(hx, tuple | list) else (hx,)
        fits = len(tensors) == len(self.state_names)
        rank = 3 if batch else 2
        if not fits or not all(isinstance(h, Tensor) and h.dim() == rank and h.shape[0] == 1 for h in tensors):
            wanted = f"({', '.join(self.state_names)}), each" if pair else "one tensor"
            raise StateError(
                f"the state of {type(self).__name__} is {wanted} {'[1, B, H]' if batch else '[1, H]'} as in "
                f"torch.nn, got "
                f"{[list(h.shape) if isinstance(h, Tensor) else type(h).__name__ for h in tensors]}; "
                "the first dimension is the layer: add it with unsqueeze(0)"
            )
        squeezed = tuple(h.squeeze(0) if batch else h for h in tensors)
        return squeezed if pair else squeezed[0]

    @property
    def unrolled(self) -> Unrolled:
        """The unrolled network that runs the layer, its parameters read from the layer.

        It is not a submodule: that would list the parameters twice.
        """
        made: Unrolled | None = self.__dict__.get("_unrolled")
        if made is None or made.cell.layer is not self or made.batch_first != self.batch_first:
            made = Unrolled(_LayerCell(self), batch_first=self.batch_first)
            self.__dict__["_unrolled"] = made
        return made

    def extra_repr(self) -> str:
        """What the constructor was given, where it differs from the default."""
        options = {"bias": (self.bias, True), "batch_first": (self.batch_first, False)}
        changed = [f", {name}={value}" for name, (value, default) in options.items() if value != default]
        return f"{self.input_size}, {self.hidden_size}" + "".join(changed)


_REMEDIES = {
    "num_layers": "call one layer after the other",
    "dropout": "it acts between layers, of which there is one",
    "bidirectional": "run a second layer on inputs.flip(0)",
    "proj_size": "put a torch.nn.Linear after the layer, or keep torch.nn.LSTM",
}


def _refuse_stacks(**options: tuple[Any, Any]) -> None:
    for name, (value, only) in options.items():
        if value != only:
            raise OptionError(f"{name}={value!r} is not offered yet, only {name}={only!r}; {_REMEDIES[name]}")


class _LayerCell(nn.Module):
    """A layer's cell. It has no parameters of its own: it reads the layer's at every step."""

    names_start_with = "layer."

    def __init__(self, layer: TorchLayer) -> None:
        super().__init__()
        self.layer = layer
        self.display_name = type(layer).__name__

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tree:
        zeros = [
            torch.zeros(batch_size, self.layer.hidden_size, device=device, dtype=dtype) for _ in self.layer.state_names
        ]
        return tuple(zeros) if len(zeros) > 1 else zeros[0]

    def forward(self, input: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        return self.layer.step(input, state)


class RNN(TorchLayer):
    """A simple recurrent layer that stands in for `torch.nn.RNN`.

    Takes `torch.nn.RNN`'s constructor arguments, `nonlinearity` ("tanh" or "relu") among them; see `TorchLayer` for the
    others and for what `forward` takes and returns.

    Example:
        >>> layer = RNN(3, 4, nonlinearity="relu")
        >>> outputs, h = layer(torch.randn(5, 2, 3))
        >>> outputs.shape, h.shape
        (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))
    """

    gates = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_nonlinearity(nonlinearity)
        self.nonlinearity = nonlinearity
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )

    def step(self, input: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One step of a simple recurrent cell."""
        return rnn_step(input, state, *self.weights(), nonlinearity=self.nonlinearity)


class LSTM(TorchLayer):
    """A long short-term memory layer that stands in for `torch.nn.LSTM`; its state is `(h, c)`.

    Takes `torch.nn.LSTM`'s constructor arguments; see `TorchLayer`.

    Example:
        >>> layer = LSTM(3, 4)
        >>> layer.load_state_dict(torch.nn.LSTM(3, 4).state_dict())
        <All keys matched successfully>
        >>> outputs, (h, c) = layer(torch.randn(5, 2, 3))
        >>> c.shape
        torch.Size([1, 2, 4])
    """

    gates = 4
    state_names = ("h", "c")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _refuse_stacks(proj_size=(proj_size, 0))
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self.proj_size = proj_size

    def step(self, input: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One step of an LSTM cell."""
        return lstm_step(input, state, *self.weights())


class GRU(TorchLayer):
    """A layer of gated recurrent units that stands in for `torch.nn.GRU`.

    Takes `torch.nn.GRU`'s constructor arguments; see `TorchLayer`.

    Example:
        >>> outputs, h = GRU(3, 4, batch_first=True)(torch.randn(2, 5, 3))
        >>> outputs.shape, h.shape
        (torch.Size([2, 5, 4]), torch.Size([1, 2, 4]))
    """

    gates = 3

    def step(self, input: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One step of a GRU cell."""
        return gru_step(input, state, *self.weights())
