"""torch.nn's recurrent layers, unrolled: same constructors, parameters, state layout and state-dict keys.

A user swaps `torch.nn.LSTM` for `unrolled.LSTM` and keeps the checkpoint.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unrolled.cells.base import GateLayout, StandInCell
from unrolled.cells.gates import GatedCell, check_flags, check_sizes
from unrolled.cells.gru import GRUCell, gru_step
from unrolled.cells.lstm import LSTMCell, lstm_step
from unrolled.cells.rnn import RNNCell, check_nonlinearity, rnn_step
from unrolled.errors import InputError, OptionError, StateError, warn_caller
from unrolled.lengths import Lengths
from unrolled.networks.layered import Layered
from unrolled.networks.stack import Bidirectional, Stack, checked_dropout
from unrolled.networks.unroll import Unrolled
from unrolled.trees import Tree, leaves


class TorchLayer(nn.Module):
    """What RNN, LSTM and GRU share. The parameters are the layer's own, under torch.nn's names.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: L, how many layers lie on each other.
        bias: whether the biases exist.
        batch_first: whether inputs and outputs are `[B, T, ...]`; states are `[L, B, H]` in any case.
        dropout: the probability with which entries between two layers are dropped, in training only.
        bidirectional: whether every layer has a second direction; its states follow those of the first one.
        proj_size: the size of an LSTM's projected hidden state, 0 for none.
        device: where the parameters live.
        dtype: the parameters' dtype.

    Raises:
        OptionError: for a size below 1, a flag that is no bool, a dropout that is no probability, or a projection that
            is not smaller than H.
    """

    _cell_type: ClassVar[type[GatedCell]]
    _weight_names: ClassVar = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

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
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        check_flags(bias=bias, batch_first=batch_first, bidirectional=bidirectional)
        if isinstance(proj_size, bool) or not isinstance(proj_size, int) or not 0 <= proj_size < hidden_size:
            raise OptionError(
                f"proj_size must be an integer from 0 (none) up to, but not including, hidden_size = {hidden_size}, "
                f"got {proj_size!r}"
            )
        self.input_size, self.hidden_size, self.num_layers, self.proj_size = (
            input_size,
            hidden_size,
            num_layers,
            proj_size,
        )
        self.bias, self.batch_first, self.bidirectional = bias, batch_first, bidirectional
        self.dropout = checked_dropout(dropout)
        if dropout and num_layers == 1:
            warn_caller(f"dropout={dropout} acts between layers, and this is one; leave it out")
        for number, suffix in enumerate(self._suffixes):
            for name, shape in self._shapes(first=number < 1 + bidirectional).items():
                made = bias or not name.startswith("bias")
                tensor = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if made else None
                self.register_parameter(name + suffix, tensor)
        self.reset_parameters()
        # Made now, since a compiler that traces the first call could not keep what is made there.
        self.__dict__["_network"] = self.network

    @property
    def _suffixes(self) -> list[str]:
        """How the parameters of each layer and direction end: `_l0`, `_l0_reverse`, `_l1`, ..."""
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{end}" for layer in range(self.num_layers) for end in ends]

    def _shapes(self, *, first: bool) -> dict[str, tuple[int, ...]]:
        G, H, P = len(self._cell_type.gate_layout.blocks) * self.hidden_size, self.hidden_size, self.proj_size
        I = self.input_size if first else (P or H) * (1 + self.bidirectional)
        shapes: dict[str, tuple[int, ...]] = dict(
            zip(self._weight_names, [(G, I), (G, P or H), (G,), (G,)], strict=True)
        )
        return shapes | ({"weight_hr": (P, H)} if P else {})

    def reset_parameters(self) -> None:
        """Draw all parameters from `U(-1/sqrt(H), 1/sqrt(H))`, in torch.nn's order."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def flatten_parameters(self) -> None:
        """Nothing: kept so that code written for torch.nn's layers, which pack weights for cuDNN here, still runs."""

    def _weights(self, suffix: str) -> list[Tensor | None]:
        """`weight_ih, weight_hh, bias_ih, bias_hh` as they are now: parametrised or swapped ones included."""
        return [getattr(self, name + suffix, None) for name in self._weight_names]

    def step(self, suffix: str, input: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One step of the cell of one layer and direction, which a layer of one's own may override.

        Args:
            suffix: how the parameters of the layer and direction end, such as `_l0_reverse`.
            input: `[B, I]`.
            state: `[B, H]`, or a tuple of such.
        """
        raise NotImplementedError

    def forward(
        self, input: Tensor, hx: Tree = None, *, lengths: Lengths = None, resets: Tensor | None = None
    ) -> tuple[Tensor, Tree]:
        """Run the layers as torch.nn's do.

        Args:
            input: `[T, B, I]`, `[B, T, I]` with `batch_first`, `[T, I]` without a batch, or a PackedSequence.
            hx: the initial state, `[L, B, H]` with two entries in L for a bidirectional layer (an LSTM: a pair of them;
                without a batch `[L, H]`); zeros by default.
            lengths: how many steps each row has, integers `[B]`, as `Unrolled.forward` takes them.
            resets: a bool `[T, B]` (`[B, T]` with `batch_first`), rows that start afresh just before step t.

        Returns:
            The outputs, `[T, B, H]` (two directions one after the other in H) in the input's layout, and the final
            state in the layout of `hx`.

        Raises:
            InputError: for an input of another shape, or lengths or resets that do not fit it.
            StateError: for a state that does not fit.
        """
        network, inputs, state = network_call(self, input, hx)
        return layer_results(self, input, *network(inputs, state, lengths=lengths, resets=resets))

    def _check_input(self, input: Tensor | PackedSequence) -> None:
        tensor = input.data if isinstance(input, PackedSequence) else input
        ranks = (2,) if isinstance(input, PackedSequence) else (2, 3)
        if not isinstance(tensor, Tensor) or tensor.dim() not in ranks or tensor.shape[-1] != self.input_size:
            got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            layout = "[B, T, I]" if self.batch_first else "[T, B, I]"
            raise InputError(
                f"input must be {layout}, [T, I] or a PackedSequence with I = {self.input_size}, got {got}"
            )

    def _cell_states(self, hx: Tree, *, batch: bool) -> Tree:
        """A state in torch.nn's layout, `[L, B, H]` or without a batch `[L, H]`, as the network's cells have them."""
        if hx is None:
            return None
        many, pair = len(self._suffixes), len(self._cell_type.state_names) > 1
        tensors = hx if pair and isinstance(hx, tuple | list) else (hx,)
        fits = len(tensors) == len(self._cell_type.state_names)
        rank = 3 if batch else 2
        if not fits or not all(isinstance(h, Tensor) and h.dim() == rank and h.shape[0] == many for h in tensors):
            wanted = f"({', '.join(self._cell_type.state_names)}), each" if pair else "one tensor"
            shape = f"[{many}, B, H]" if batch else f"[{many}, H]"
            got = [list(h.shape) if isinstance(h, Tensor) else type(h).__name__ for h in tensors]
            raise StateError(
                f"the state of {type(self).__name__} is {wanted} {shape} as in torch.nn, got {got}; the first "
                "dimension counts layers and directions: a cell's [B, H] gets it by unsqueeze(0) or torch.stack"
            )
        batched = [h if batch else h.unsqueeze(1) for h in tensors]
        each = [tuple(h[n] for h in batched) if pair else batched[0][n] for n in range(many)]
        if isinstance(self.network, Unrolled):
            return each[0]
        return tuple(zip(each[::2], each[1::2], strict=True)) if self.bidirectional else tuple(each)

    @property
    def network(self) -> Unrolled | Stack:
        """What runs the layers, its parameters read from here; for one layer and direction an unrolled cell.

        It is not a submodule: that would list the parameters twice.
        """
        made: Unrolled | Stack | None = self.__dict__.get("_network")
        if made is None or made.owner is not self or made.batch_first != self.batch_first:
            made = self._made()
            self.__dict__["_network"] = made
        if isinstance(made, Stack):
            made.training, made.dropout = self.training, self.dropout
        return made

    def _made(self) -> Unrolled | Stack:
        cells = [_LayerCell(self, suffix) for suffix in self._suffixes]
        if len(cells) == 1:
            network: Unrolled | Stack = Unrolled(cells[0], batch_first=self.batch_first)
        elif self.bidirectional:
            layers = [Bidirectional(*pair) for pair in zip(cells[::2], cells[1::2], strict=True)]
            network = Stack(layers, batch_first=self.batch_first)
        else:
            network = Stack([Unrolled(cell) for cell in cells], batch_first=self.batch_first)
        network.__dict__["owner"] = self
        return network

    def extra_repr(self) -> str:
        """The constructor's arguments that differ from the defaults."""
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        defaults["proj_size"] = 0
        options = {name: getattr(self, name) for name in defaults}
        changed = [f", {name}={value}" for name, value in options.items() if value != defaults[name]]
        return f"{self.input_size}, {self.hidden_size}" + "".join(changed)


def networks_of(rnn: nn.Module, caller: str, remedy: str = "wrap its cell: ur.unroll(cell)") -> list[Unrolled]:
    """The unrolled networks in what `unroll`, `stack`, `Bidirectional`, `RNN`, `LSTM` or `GRU` made.

    Raises:
        OptionError: for anything else, naming the caller and the remedy.
    """
    network = rnn.network if isinstance(rnn, TorchLayer) else rnn
    if not isinstance(network, Unrolled | Layered):
        raise OptionError(f"{caller} takes what unroll or stack made, got a {type(rnn).__name__}; {remedy}")
    return [network] if isinstance(network, Unrolled) else network.networks


def network_call(rnn: nn.Module, input: Tree, hx: Tree) -> tuple[Any, Tree, Tree]:
    """The network that runs a layer, and the inputs and the state that it is to be called with; any other as it is.

    A layer's sequence without a batch becomes a batch of one.

    Raises:
        InputError: as the call of the layer does.
        StateError: as the call of the layer does.
    """
    if not isinstance(rnn, TorchLayer):
        return rnn, input, hx
    rnn._check_input(input)
    batch = isinstance(input, PackedSequence) or input.dim() == 3
    state = rnn._cell_states(hx, batch=batch)
    return rnn.network, input if batch else input.unsqueeze(0 if rnn.batch_first else 1), state


def layer_results(layer: TorchLayer, input: Tensor, outputs: Tensor, last: Tree) -> tuple[Tensor, Tree]:
    """What a layer returns for an input, made of what its network returns: states as `[L, B, H]`."""
    tensors, names = leaves(last), len(layer._cell_type.state_names)
    joined = [torch.stack(tensors[n::names]) for n in range(names)]
    if isinstance(input, Tensor) and input.dim() == 2:
        outputs, joined = outputs.squeeze(0 if layer.batch_first else 1), [h.squeeze(1) for h in joined]
    return outputs, tuple(joined) if names > 1 else joined[0]


class _LayerCell(StandInCell):
    """The cell of one layer and direction. It has no parameters of its own: it reads the layer's at every step."""

    names_start_with = "layer."

    def __init__(self, layer: TorchLayer, suffix: str) -> None:
        super().__init__()
        self.layer, self.suffix = layer, suffix
        self.display_name = type(layer).__name__

    def reads_parameter(self, name: str) -> bool:
        """Whether a parameter of the layer is this cell's, and not that of another layer or direction."""
        others = tuple(suffix for suffix in self.layer._suffixes if suffix != self.suffix)
        return not any(part.endswith(others) for part in name.split("."))

    @property
    def state_names(self) -> tuple[str, ...]:
        """The layer's."""
        return self.layer._cell_type.state_names

    @property
    def gate_layout(self) -> GateLayout:
        """The gates are in the layer's parameters."""
        return self.layer._cell_type.gate_layout.renamed("layer.{}" + self.suffix)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tree:
        sizes = {"h": self.layer.proj_size or self.layer.hidden_size, "c": self.layer.hidden_size}
        zeros = [torch.zeros(batch_size, sizes[name], device=device, dtype=dtype) for name in self.state_names]
        return tuple(zeros) if len(zeros) > 1 else zeros[0]

    def forward(self, input: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        return self.layer.step(self.suffix, input, state)


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

    _cell_type = RNNCell

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

    def step(self, suffix: str, input: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One step of a simple recurrent cell."""
        return rnn_step(input, state, *self._weights(suffix), nonlinearity=self.nonlinearity)


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

    _cell_type = LSTMCell

    def step(self, suffix: str, input: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One step of an LSTM cell."""
        weights = [*self._weights(suffix), getattr(self, "weight_hr" + suffix, None)]
        return lstm_step(input, state, *weights)


class GRU(TorchLayer):
    """A layer of gated recurrent units that stands in for `torch.nn.GRU`.

    Takes `torch.nn.GRU`'s constructor arguments; see `TorchLayer`.

    Example:
        >>> outputs, h = GRU(3, 4, batch_first=True)(torch.randn(2, 5, 3))
        >>> outputs.shape, h.shape
        (torch.Size([2, 5, 4]), torch.Size([1, 2, 4]))
    """

    _cell_type = GRUCell

    def step(self, suffix: str, input: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One step of a GRU cell."""
        return gru_step(input, state, *self._weights(suffix))
