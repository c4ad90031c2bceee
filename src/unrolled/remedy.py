"""Remedies that need no new weights: they set some that are there, in place, so that one can measure again.

Each takes a cell, or anything that has unrolled networks in it: `unroll(cell)`, a stack, a layer, a model around them.
Where only some of several cells have what a remedy sets, these are set.

Example:
    >>> import torch, unrolled as ur
    >>> rnn = ur.unroll(ur.LSTMCell(3, 4))
    >>> ur.remedy.forget_bias(rnn, 1.0)
    >>> (rnn.cell.bias_ih + rnn.cell.bias_hh)[4:8]
    tensor([1., 1., 1., 1.], grad_fn=<SliceBackward0>)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unrolled.cells.adapted import gates_of
from unrolled.cells.contract import name_of
from unrolled.errors import OptionError
from unrolled.networks.torch_layers import TorchLayer
from unrolled.networks.unroll import Unrolled


def forget_bias(rnn: nn.Module, value: float = 1.0) -> None:
    """Set the bias of the gate that keeps the state: an LSTM's forget gate, a GRU's update gate.

    Where a cell has two biases, their sum is `value`: the second is zero. A gate that keeps the state at its low end
    (MinGRU's) gets `-value`.

    Args:
        rnn: a cell, or a module with unrolled networks.
        value: the bias; 1 keeps 0.73 of the state at each step, 4 keeps 0.98.

    Raises:
        OptionError: if no cell has such a gate with a bias.

    Source: F. Gers et al., "Learning to forget", Neural Computation 12 (2000); R. Jozefowicz et al., "An empirical
    exploration of recurrent network architectures", ICML 2015.
    """
    _check_number("value", value)
    _set_biases(rnn, "forget_bias", lambda bias: torch.full_like(bias, value))


def chrono(rnn: nn.Module, steps: int) -> None:
    """Set the biases of a gated cell such that it remembers over up to so many steps.

    The keeping gate's bias is drawn as `log U(1, steps - 1)` for each unit, so that units remember over anything from
    two steps to `steps`; an LSTM's input gate gets its negative.

    Args:
        rnn: a cell, or a module with unrolled networks.
        steps: the reach that is wanted, at least 3.

    Raises:
        OptionError: for fewer steps, or if no cell has such a gate with a bias.

    Source: C. Tallec and Y. Ollivier, "Can recurrent neural networks warp time?", ICLR 2018.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 3:
        raise OptionError(f"steps must be an integer of at least 3, got {steps!r}; give the longest reach wanted")
    _set_biases(rnn, "chrono", lambda bias: torch.empty_like(bias).uniform_(1, steps - 1).log())


def orthogonal(rnn: nn.Module, gain: float = 1.0) -> None:
    """Set every recurrent weight to a random orthogonal matrix: each gate's block is one.

    Args:
        rnn: a cell, or a module with unrolled networks.
        gain: what the matrix is multiplied by, and so its spectral radius.

    Raises:
        OptionError: if no cell that this package knows has a square recurrent weight.

    Source: A. Saxe et al., "Exact solutions to the nonlinear dynamics of learning in deep linear neural networks",
    ICLR 2014.
    """
    _check_number("gain", gain)
    _set_recurrent(rnn, "orthogonal", lambda weight: nn.init.orthogonal_(torch.empty_like(weight), gain))


def identity(rnn: nn.Module, scale: float = 1.0) -> None:
    """Set every recurrent weight to the identity: each gate's block is one. Meant for relu cells.

    Args:
        rnn: a cell, or a module with unrolled networks.
        scale: what the identity is multiplied by.

    Raises:
        OptionError: if no cell that this package knows has a square recurrent weight.

    Source: Q. Le et al., "A simple way to initialize recurrent networks of rectified linear units", arXiv:1504.00941.
    """
    _check_number("scale", scale)
    _set_recurrent(rnn, "identity", lambda weight: scale * torch.eye(len(weight)).to(weight))


def can_set_keeping_bias(cell: nn.Module) -> bool:
    """Whether `forget_bias` and `chrono` have something to set in a cell."""
    gates = gates_of(cell)
    return gates is not None and gates.layout.keeps is not None and any(map(gates.can_set, gates.biases))


def can_set_recurrent(cell: nn.Module) -> bool:
    """Whether `orthogonal` and `identity` surely have something to set in a cell.

    No where nobody can tell which weights are recurrent, or where only their parametrizations could tell.
    """
    gates = gates_of(cell)
    names = [] if gates is None else gates.recurrent
    return gates is not None and any(gates.can_set(name) and not gates.is_parametrized(name) for name in names)


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise OptionError(f"{name} must be a finite number, got {value!r}")


def _cells_of(rnn: nn.Module, remedy: str) -> list[nn.Module]:
    """The cells of the unrolled networks in a module, each once; a module without any is taken for a cell itself.

    Raises:
        OptionError: for what has no cells.
    """
    if not isinstance(rnn, nn.Module):
        raise OptionError(f"{remedy} takes a cell or a module with unrolled networks, got a {type(rnn).__name__}")
    if isinstance(rnn, nn.RNNBase):
        raise OptionError(
            f"{remedy} sets cells of unrolled networks, and torch.nn's {name_of(rnn)} has none; make it one with "
            "ur.from_torch(module), and back with ur.to_torch"
        )
    wholes = [module.network if isinstance(module, TorchLayer) else module for module in rnn.modules()]
    parts = [part for whole in wholes for part in whole.modules() if isinstance(part, Unrolled)]
    return list(dict.fromkeys(part.cell for part in parts)) or [rnn]


@torch.no_grad()
def _set_recurrent(rnn: nn.Module, remedy: str, made: Callable[[Tensor], Tensor]) -> None:
    cells = _cells_of(rnn, remedy)
    with _all_or_none(cells):
        known = [gates for cell in cells if (gates := gates_of(cell))]
        weights = [(gates, name) for gates in known for name in gates.recurrent if gates.can_set(name)]
        if not weights:
            raise OptionError(
                f"{remedy} sets square recurrent weights of cells that it knows, and {_names_of(cells)} has none; "
                "set yours with torch.nn.init"
            )
        for gates, name in weights:
            gates.set_blocks(name, {gate: made(block) for gate, block in gates.blocks(name).items()})


@torch.no_grad()
def _set_biases(rnn: nn.Module, remedy: str, drawn: Callable[[Tensor], Tensor]) -> None:
    """Set the bias of the gate that keeps the state; `chrono` also sets that of the gate that takes something new."""
    cells = _cells_of(rnn, remedy)
    with _all_or_none(cells):
        known = [gates for cell in cells if can_set_keeping_bias(cell) and (gates := gates_of(cell))]
        if not known:
            raise OptionError(
                f"{remedy} sets the bias of the gate that keeps the state, and {_names_of(cells)} has none; "
                "take a gated cell with biases: LSTMCell, GRUCell"
            )
        for gates in known:
            keeps, takes = str(gates.layout.keeps), gates.layout.takes
            first, *others = filter(gates.can_set, gates.biases)
            value = drawn(gates.blocks(first)[keeps]) * (1 if gates.layout.keeps_at == "high" else -1)
            values = {keeps: value} if remedy != "chrono" or takes is None else {keeps: value, takes: -value}
            gates.set_blocks(first, values)
            for bias in others:
                gates.set_blocks(bias, dict.fromkeys(values, torch.zeros_like(value)))


@contextmanager
def _all_or_none(cells: list[nn.Module]) -> Iterator[None]:
    """If one parametrization refuses what is set, all cells stay as they were; one may change by being read alone."""
    before = [copy.deepcopy(cell.state_dict()) for cell in cells]
    try:
        yield
    except OptionError:
        for cell, state in zip(cells, before, strict=True):
            cell.load_state_dict(state)
        raise


def _names_of(cells: list[nn.Module]) -> str:
    return ", ".join(dict.fromkeys(map(name_of, cells)))
