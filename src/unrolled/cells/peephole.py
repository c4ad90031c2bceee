"""The LSTM cell with peephole connections of Gers and Schmidhuber (2000)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unrolled.cells.gates import GatedCell
from unrolled.cells.lstm import LSTMCell


class PeepholeLSTMCell(GatedCell):
    """An LSTM cell whose gates see its memory; its state is `(h, c)`, its output the new h.

    With `(i, f, g, o)` the four blocks of `W_ih x + b_ih + W_hh h + b_hh`:

        c' = sigmoid(f + w_cf * c) * c + sigmoid(i + w_ci * c) * tanh(g)
        h' = sigmoid(o + w_co * c') * tanh(c')

    Input and forget gate see the old memory, the output gate the new one; each unit sees its own memory only, so
    that `weight_ci`, `weight_cf` and `weight_co` are vectors `[H]`. The other parameters are those of `LSTMCell`; all
    are drawn from `U(-1/sqrt(H), 1/sqrt(H))`.

    Args:
        input_size: I.
        hidden_size: H.
        bias: whether the two biases exist.
        learn_initial_state: whether the initial state is a parameter, zero at first.
        device: where the parameters live.
        dtype: the parameters' dtype.

    Raises:
        OptionError: for a size that is no positive integer.

    Source: F. Gers and J. Schmidhuber, "Recurrent nets that time and count", IJCNN 2000; F. Gers, N. Schraudolph and
    J. Schmidhuber, "Learning precise timing with LSTM recurrent networks", JMLR 3 (2002).

    Example:
        >>> cell = PeepholeLSTMCell(input_size=3, hidden_size=4)
        >>> output, (h, c) = cell(torch.ones(2, 3), cell.initial_state(2))
        >>> output.shape, cell.weight_co.shape
        (torch.Size([2, 4]), torch.Size([4]))
    """

    gate_layout = LSTMCell.gate_layout
    state_names = ("h", "c")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        learn_initial_state: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, bias, learn_initial_state=learn_initial_state, device=device, dtype=dtype
        )
        bound = hidden_size**-0.5
        # After the other parameters, as reset_parameters draws them too: one seed gives the same numbers either way.
        for name in ("weight_ci", "weight_cf", "weight_co"):
            drawn = torch.empty(hidden_size, device=device, dtype=dtype).uniform_(-bound, bound)
            self.register_parameter(name, nn.Parameter(drawn))

    def forward(self, input: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run one step: input `[B, I]`, state `(h, c)`; returns `h', (h', c')`."""
        self.check_input(input)
        hidden, memory = state
        gates = F.linear(input, self.weight_ih, self.bias_ih) + F.linear(hidden, self.weight_hh, self.bias_hh)
        i, f, g, o = gates.chunk(4, dim=-1)
        forget = torch.sigmoid(f + self.weight_cf * memory)
        memory = forget * memory + torch.sigmoid(i + self.weight_ci * memory) * torch.tanh(g)
        hidden = torch.sigmoid(o + self.weight_co * memory) * torch.tanh(memory)
        return hidden, (hidden, memory)
