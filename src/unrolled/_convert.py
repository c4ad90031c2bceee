"""Weights to and from torch.nn's recurrent layers and cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from unrolled._layers import GRU, LSTM, RNN, TorchLayer
from unrolled._unroll import Unrolled
from unrolled.cells.adapted import is_torch_cell
from unrolled.cells.gru import GRUCell
from unrolled.cells.lstm import LSTMCell
from unrolled.cells.rnn import RNNCell
from unrolled.errors import OptionError

__all__ = ["from_torch", "to_torch"]

_PAIRS: list[tuple[type[nn.Module], type[nn.Module]]] = [
    (nn.RNN, RNN),
    (nn.LSTM, LSTM),
    (nn.GRU, GRU),
    (nn.RNNCell, RNNCell),
    (nn.LSTMCell, LSTMCell),
    (nn.GRUCell, GRUCell),
]

_LAYER_OPTIONS = ("num_layers", "bias", "batch_first", "dropout", "bidirectional")


def from_torch(module: nn.Module) -> nn.Module:
    """Make ours of one of torch.nn's recurrent layers or cells, with a copy of its weights.

    Args:
        module: `torch.nn.RNN`, `LSTM`, `GRU`, `RNNCell`, `LSTMCell` or `GRUCell`.

    Returns:
        `RNN`, `LSTM`, `GRU`, `RNNCell`, `LSTMCell` or `GRUCell` of this package: same numbers, dtype, device, mode and
        `requires_grad`.

    Raises:
        OptionError: for any other module, or for options that the layer here does not offer yet.

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
        module: `RNN`, `LSTM`, `GRU`, `RNNCell`, `LSTMCell`, `GRUCell`, or such a cell unrolled, which becomes a layer.

    Returns:
        The module of torch.nn: same numbers, dtype, device, mode and `requires_grad`.

    Raises:
        OptionError: for any other module, or for what torch.nn cannot hold: a learned initial state.

    Example:
        >>> import torch
        >>> rnn = Unrolled(GRUCell(3, 4))
        >>> inputs = torch.randn(5, 2, 3)
        >>> torch.allclose(to_torch(rnn)(inputs)[0], rnn(inputs)[0], atol=1e-6)
        True
    """
    if isinstance(module, Unrolled):
        return _unrolled_to_torch(module)
    for theirs, ours in _PAIRS:
        if type(module) is ours:
            _refuse_learned_state(module)
            return _moved(module, theirs)
    raise OptionError(
        f"to_torch takes {', '.join(ours.__name__ for _, ours in _PAIRS)} or such a cell unrolled, "
        f"got {type(module).__name__}: torch.nn has no counterpart of it"
    )


def _refuse_learned_state(module: nn.Module) -> None:
    if getattr(module, "learn_initial_state", False):
        raise OptionError(
            f"torch.nn.{type(module).__name__} has no place for a learned initial state; keep cell.initial_state(B) "
            "yourself and pass it to each call, then convert a cell without one"
        )


def _unrolled_to_torch(rnn: Unrolled) -> nn.Module:
    layers: dict[type[nn.Module], Callable[..., nn.Module]] = {
        RNNCell: nn.RNN,
        LSTMCell: nn.LSTM,
        GRUCell: nn.GRU,
    }
    cell = rnn.cell.module if is_torch_cell(rnn.cell) else rnn.cell
    if type(cell) in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
        cell = from_torch(cell)
    if type(cell) not in layers:
        raise OptionError(f"torch.nn has no layer whose cell is a {type(cell).__name__}")
    _refuse_learned_state(cell)
    made = layers[type(cell)](**_arguments(cell), batch_first=rnn.batch_first)
    return _with_weights(made, cell, suffix="_l0").train(rnn.training)


def _moved(module: nn.Module, target: Callable[..., nn.Module]) -> nn.Module:
    return _with_weights(target(**_arguments(module)), module)


def _arguments(module: nn.Module) -> dict[str, Any]:
    """The constructor arguments that would make such a module again."""
    names = ["input_size", "hidden_size"]
    names += _LAYER_OPTIONS if isinstance(module, nn.RNNBase | TorchLayer) else ["bias"]
    # torch.nn's RNN and GRU have the attribute proj_size, but their constructors do not take it.
    only = {"nonlinearity": (nn.RNN, nn.RNNCell, RNN, RNNCell), "proj_size": (nn.LSTM, LSTM)}
    names += [name for name, kinds in only.items() if isinstance(module, kinds)]
    first = next(module.parameters())
    return {name: getattr(module, name) for name in names} | {"device": first.device, "dtype": first.dtype}


def _with_weights(made: nn.Module, source: nn.Module, suffix: str = "") -> nn.Module:
    made.load_state_dict({name + suffix: tensor for name, tensor in source.state_dict().items()})
    trained = {name + suffix: parameter.requires_grad for name, parameter in source.named_parameters()}
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(trained[name])
    return made.train(source.training)
