"""Weights to and from torch.nn's recurrent layers and cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from unrolled.cells.adapted import is_torch_cell
from unrolled.cells.gru import GRUCell
from unrolled.cells.lstm import LSTMCell
from unrolled.cells.rnn import RNNCell
from unrolled.errors import OptionError
from unrolled.networks.layered import Layered
from unrolled.networks.stack import Bidirectional, Stack
from unrolled.networks.torch_layers import GRU, LSTM, RNN, TorchLayer
from unrolled.networks.unroll import Unrolled

_PAIRS: list[tuple[type[nn.Module], type[nn.Module]]] = [
    (nn.RNN, RNN),
    (nn.LSTM, LSTM),
    (nn.GRU, GRU),
    (nn.RNNCell, RNNCell),
    (nn.LSTMCell, LSTMCell),
    (nn.GRUCell, GRUCell),
]


def from_torch(module: nn.Module) -> nn.Module:
    """Make ours of one of torch.nn's recurrent layers or cells, with a copy of its weights.

    Args:
        module: `torch.nn.RNN`, `LSTM`, `GRU`, `RNNCell`, `LSTMCell` or `GRUCell`.

    Returns:
        `RNN`, `LSTM`, `GRU`, `RNNCell`, `LSTMCell` or `GRUCell` of this package: same numbers, dtype, device, mode and
        `requires_grad`.

    Raises:
        OptionError: for any other module.

    Example:
        >>> import torch
        >>> theirs = torch.nn.LSTM(3, 4)
        >>> inputs = torch.randn(5, 2, 3)
        >>> torch.allclose(from_torch(theirs)(inputs)[0], theirs(inputs)[0], atol=1e-6)
        True
    """
    for theirs, ours in _PAIRS:
        if type(module) is theirs:
            return _moved(module, ours)
    raise OptionError(
        f"from_torch takes {', '.join(f'torch.nn.{theirs.__name__}' for theirs, _ in _PAIRS)}, "
        f"got {type(module).__name__}; for other modules use ur.unroll(ur.as_cell(module))"
    )


def to_torch(module: nn.Module) -> nn.Module:
    """Make torch.nn's counterpart of one of our layers or cells, with a copy of its weights.

    Args:
        module: `RNN`, `LSTM`, `GRU`, `RNNCell`, `LSTMCell`, `GRUCell`; or such a cell unrolled, a `Bidirectional` or a
            `Stack` of such, which becomes a layer: torch.nn's has one tensor for the states of all layers.

    Returns:
        The module of torch.nn: same numbers, dtype, device, mode and `requires_grad`.

    Raises:
        OptionError: for any other module, or for what torch.nn cannot hold: a learned initial state, one direction
            that is the backward one, layers that are not alike, or one cell in two layers.

    Example:
        >>> import torch
        >>> rnn = Unrolled(GRUCell(3, 4))
        >>> inputs = torch.randn(5, 2, 3)
        >>> torch.allclose(to_torch(rnn)(inputs)[0], rnn(inputs)[0], atol=1e-6)
        True
    """
    if isinstance(module, Unrolled | Layered):
        return _network_to_torch(module)
    for theirs, ours in _PAIRS:
        if type(module) is ours:
            _refuse_learned_state(module)
            return _moved(module, theirs)
    raise OptionError(
        f"to_torch takes {', '.join(ours.__name__ for _, ours in _PAIRS)} or networks of such cells, "
        f"got {type(module).__name__}: torch.nn has no counterpart of it"
    )


def _refuse_learned_state(module: nn.Module) -> None:
    if getattr(module, "learn_initial_state", False):
        raise OptionError(
            f"torch.nn.{type(module).__name__} has no place for a learned initial state; keep cell.initial_state(B) "
            "yourself and pass it to each call, then convert a cell without one"
        )


_LAYERS: dict[type[nn.Module], Callable[..., nn.Module]] = {RNNCell: nn.RNN, LSTMCell: nn.LSTM, GRUCell: nn.GRU}


def _network_to_torch(rnn: Unrolled | Layered) -> nn.Module:
    parts = rnn.parts if isinstance(rnn, Stack) else [rnn]
    layers = [[_torch_like(cell) for cell in _directions(part)] for part in parts]
    _refuse_unlike(layers)
    first, ways = layers[0][0], len(layers[0])
    made = _LAYERS[type(first)](
        **_arguments(first),
        num_layers=len(layers),
        bidirectional=ways > 1,
        dropout=rnn.dropout if isinstance(rnn, Stack) and len(layers) > 1 else 0.0,
        batch_first=rnn.batch_first,
    )
    ends = ("", "_reverse")
    sources = {f"_l{n}{end}": cell for n, layer in enumerate(layers) for end, cell in zip(ends, layer, strict=False)}
    return _with_weights(made, sources).train(rnn.training)


def _directions(part: nn.Module) -> list[nn.Module]:
    """The cells of one layer, forwards first."""
    if isinstance(part, Bidirectional):
        return [part.forwards.cell, part.backwards.cell]
    if not isinstance(part, Unrolled):
        raise OptionError(f"torch.nn has no layer in which there is a {type(part).__name__}; stack cells, not stacks")
    if part.reverse:
        raise OptionError(
            "torch.nn has no layer that runs backwards alone; convert ur.unroll(cell) and flip what it reads and gives"
        )
    return [part.cell]


def _torch_like(cell: nn.Module) -> nn.Module:
    """A cell as one of ours that has a layer in torch.nn."""
    if is_torch_cell(cell):
        cell = from_torch(cell.module)
    if type(cell) not in _LAYERS:
        raise OptionError(f"torch.nn has no layer whose cell is a {type(cell).__name__}")
    _refuse_learned_state(cell)
    return cell


def _refuse_unlike(layers: list[list[nn.Module]]) -> None:
    """Refuse what torch.nn has no one module for: its layers have one kind of cell, one H and as many directions."""
    cells = [cell for layer in layers for cell in layer]
    first = cells[0]
    for n, layer in enumerate(layers):
        reads = first.input_size if n == 0 else first.hidden_size * len(layer)
        wanted = _arguments(first) | {"input_size": reads}
        if len(layer) != len(layers[0]) or any((type(c), _arguments(c)) != (type(first), wanted) for c in layer):
            raise OptionError(
                f"torch.nn's layers are all alike, but layer {n} is {layer} and layer 0 {layers[0]}; convert them one "
                "by one"
            )
    if len(set(map(id, cells))) < len(cells):
        raise OptionError("torch.nn's layers share no weights, but one cell is in two of these; copy it first")


def _moved(module: nn.Module, target: Callable[..., nn.Module]) -> nn.Module:
    return _with_weights(target(**_arguments(module)), {"": module}).train(module.training)


def _arguments(module: nn.Module) -> dict[str, Any]:
    """The constructor arguments that would make such a module again."""
    names = ["input_size", "hidden_size", "bias"]
    if isinstance(module, nn.RNNBase | TorchLayer):
        names += ["num_layers", "batch_first", "dropout", "bidirectional"]
    # torch.nn's RNN and GRU have the attribute proj_size, but their constructors do not take it.
    only = {"nonlinearity": (nn.RNN, nn.RNNCell, RNN, RNNCell), "proj_size": (nn.LSTM, LSTM)}
    names += [name for name, kinds in only.items() if isinstance(module, kinds)]
    first = next(module.parameters())
    return {name: getattr(module, name) for name in names} | {"device": first.device, "dtype": first.dtype}


def _with_weights(made: nn.Module, sources: Mapping[str, nn.Module]) -> nn.Module:
    """A module with copies of other modules' parameters, whose names get an ending."""
    copied = {name + end: p for end, source in sources.items() for name, p in source.named_parameters()}
    made.load_state_dict(copied)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(copied[name].requires_grad)
    return made
