"""The long short-term memory cell of Hochreiter and Schmidhuber (1997), with the forget gate of Gers et al. (2000)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unrolled.cells.base import GateLayout
from unrolled.cells.gates import GatedCell


def lstm_step(
    input: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One step of an LSTM with the given weights; gates in torch.nn's order: input, forget, cell, output.

    With `weight_hr [P, H]` the hidden state is projected (Sak et al., 2014): h is `[B, P]`, c still `[B, H]`.
    """
    hidden, memory = state
    gates = F.linear(input, weight_ih, bias_ih) + F.linear(hidden, weight_hh, bias_hh)
    i, f, g, o = gates.chunk(4, dim=-1)
    memory = torch.sigmoid(f) * memory + torch.sigmoid(i) * torch.tanh(g)
    hidden = torch.sigmoid(o) * torch.tanh(memory)
    if weight_hr is not None:
        hidden = F.linear(hidden, weight_hr)
    return hidden, (hidden, memory)


class LSTMCell(GatedCell):
    """A long short-term memory cell; its state is `(h, c)`, its output the new h.

    `c' = f * c + i * g` and `h' = o * tanh(c')`, where i, f, o are sigmoids and g is the tanh of
    `W_ih x + b_ih + W_hh h + b_hh`. Parameters, gate order (i, f, g, o) and initialisation are those of
    `torch.nn.LSTMCell`.

    Args:
        input_size: I.
        hidden_size: H.
        bias: whether the two biases exist.
        learn_initial_state: whether the initial state is a parameter, zero at first.
        device: where the parameters live.
        dtype: the parameters' dtype.

    Raises:
        OptionError: for a size that is no positive integer.

    Source: S. Hochreiter and J. Schmidhuber, "Long short-term memory", Neural Computation 9 (1997); forget gate:
    F. Gers et al., "Learning to forget", Neural Computation 12 (2000).

    Example:
        >>> cell = LSTMCell(input_size=3, hidden_size=4)
        >>> output, (h, c) = cell(torch.ones(2, 3), cell.initial_state(2))
        >>> output.shape, c.shape
        (torch.Size([2, 4]), torch.Size([2, 4]))
    """

    gate_layout = GateLayout(
        blocks=("input", "forget", "candidate", "output"),
        computed=("forget", "input", "candidate", "output", "memory"),
        keeps="forget",
        takes="input",
    )
    state_names = ("h", "c")

    def forward(self, input: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run one step: input `[B, I]`, state `(h, c)`; returns `h', (h', c')`."""
        self.check_input(input)
        return lstm_step(input, state, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
