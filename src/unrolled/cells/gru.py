"""The gated recurrent unit of Cho et al. (2014)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unrolled.cells.base import GateLayout
from unrolled.cells.gates import GatedCell


def gru_step(
    input: Tensor,
    state: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of a GRU with the given weights; gates in torch.nn's order: reset, update, new."""
    r_i, z_i, n_i = F.linear(input, weight_ih, bias_ih).chunk(3, dim=-1)
    r_h, z_h, n_h = F.linear(state, weight_hh, bias_hh).chunk(3, dim=-1)
    reset = torch.sigmoid(r_i + r_h)
    update = torch.sigmoid(z_i + z_h)
    new = torch.tanh(n_i + reset * n_h)
    hidden = new + update * (state - new)
    return hidden, hidden


class GRUCell(GatedCell):
    """A gated recurrent unit; its output is the new state.

    `h' = (1 - z) * n + z * h`, where r and z are sigmoids and `n = tanh(W_in x + b_in + r * (W_hn h + b_hn))`: the
    reset gate acts after the product, as in torch.nn and cuDNN. Parameters, gate order (r, z, n) and
    initialisation are those of `torch.nn.GRUCell`.

    Args:
        input_size: I.
        hidden_size: H.
        bias: whether the two biases exist.
        learn_initial_state: whether the initial state is a parameter, zero at first.
        device: where the parameters live.
        dtype: the parameters' dtype.

    Raises:
        OptionError: for a size that is no positive integer.

    Source: K. Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014.

    Example:
        >>> cell = GRUCell(3, 4)
        >>> output, state = cell(torch.ones(2, 3), cell.initial_state(2))
        >>> output.shape
        torch.Size([2, 4])
    """

    gate_layout = GateLayout(
        blocks=("reset", "update", "candidate"), computed=("reset", "update", "candidate"), keeps="update"
    )

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run one step: input `[B, I]`, state `[B, H]`; output and next state are the same `[B, H]`."""
        self.check_input(input)
        return gru_step(input, state, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
