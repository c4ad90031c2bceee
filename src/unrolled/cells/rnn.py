"""The simple recurrent cell of Elman (1990)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unrolled.cells.base import GateLayout
from unrolled.cells.gates import GatedCell
from unrolled.errors import OptionError

_NONLINEARITIES = {"tanh": torch.tanh, "relu": torch.relu}


def check_nonlinearity(nonlinearity: str) -> None:
    """Refuse a nonlinearity that RNNCell does not have.

    Raises:
        OptionError: naming those it has.
    """
    if nonlinearity not in _NONLINEARITIES:
        raise OptionError(f"nonlinearity must be one of {', '.join(_NONLINEARITIES)}, got {nonlinearity!r}")


def rnn_step(
    input: Tensor,
    state: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """One step of a simple recurrence with the given weights: `h' = tanh(W_ih x + b_ih + W_hh h + b_hh)`."""
    gates = F.linear(input, weight_ih, bias_ih) + F.linear(state, weight_hh, bias_hh)
    hidden = _NONLINEARITIES[nonlinearity](gates)
    return hidden, hidden


class RNNCell(GatedCell):
    """A simple recurrent cell: `h' = tanh(W_ih x + b_ih + W_hh h + b_hh)`, its output the new state.

    Parameters and their order are those of `torch.nn.RNNCell`. See `GatedCell` for the common arguments.

    Args:
        input_size: I.
        hidden_size: H.
        bias: whether the biases exist.
        nonlinearity: "tanh" or "relu".
        learn_initial_state: whether the initial state is a parameter.
        device: where the parameters live.
        dtype: the parameters' dtype.

    Raises:
        OptionError: for a size below 1 or an unknown nonlinearity.

    Source: J. L. Elman, "Finding structure in time", Cognitive Science 14 (1990).

    Example:
        >>> cell = RNNCell(3, 4)
        >>> output, state = cell(torch.ones(2, 3), cell.initial_state(2))
        >>> output.shape, state is output
        (torch.Size([2, 4]), True)
    """

    gate_layout = GateLayout(blocks=("hidden",), computed=("hidden",))

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        *,
        learn_initial_state: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_nonlinearity(nonlinearity)
        super().__init__(
            input_size, hidden_size, bias, learn_initial_state=learn_initial_state, device=device, dtype=dtype
        )
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run one step: input `[B, I]`, state `[B, H]`; output and next state are the same `[B, H]`."""
        self.check_input(input)
        return rnn_step(
            input,
            state,
            self.weight_ih,
            self.weight_hh,
            self.bias_ih,
            self.bias_hh,
            nonlinearity=self.nonlinearity,
        )

    def extra_repr(self) -> str:
        """Sizes, and the nonlinearity where it is not tanh."""
        return super().extra_repr() + ("" if self.nonlinearity == "tanh" else f", nonlinearity={self.nonlinearity}")
