"""The minimal gated recurrent unit of Feng et al. (2024), whose gates do not see its state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unrolled.cells.base import GateLayout
from unrolled.cells.gates import GatedCell


class MinGRUCell(GatedCell):
    """A gated moving average of projected inputs; its output is the new state.

    `h' = (1 - z) * h + z * n`, where `z = sigmoid(W_z x + b_z)` and `n = W_n x + b_n` depend on the input alone: the
    state is on a path of one multiplication and one addition per step, and has no product with a matrix. `weight_ih
    [2H, I]` and `bias_ih [2H]` hold z before n and are drawn as in `torch.nn.Linear`, from
    `U(-1/sqrt(I), 1/sqrt(I))`.

    Args:
        input_size: I.
        hidden_size: H.
        bias: whether `bias_ih` exists.
        learn_initial_state: whether the initial state is a parameter `initial_h [H]`, zero at first.
        device: where the parameters live.
        dtype: the parameters' dtype.

    Raises:
        OptionError: for a size that is no positive integer.

    Source: L. Feng et al., "Were RNNs all we needed?", arXiv:2410.01201 (2024).

    Example:
        >>> cell = MinGRUCell(input_size=3, hidden_size=4)
        >>> output, state = cell(torch.ones(2, 3), cell.initial_state(2))
        >>> output.shape, [name for name, _ in cell.named_parameters()]
        (torch.Size([2, 4]), ['weight_ih', 'bias_ih'])
    """

    gate_layout = GateLayout(
        blocks=("update", "candidate"),
        computed=("update",),
        keeps="update",
        keeps_at="low",
        biases=("bias_ih",),
        recurrent=(),
    )

    def reset_parameters(self) -> None:
        """Draw the weight and bias anew; a learned initial state becomes zero."""
        bound = self.input_size**-0.5
        for name, parameter in self.named_parameters():
            limit = 0.0 if name == "initial_h" else bound
            nn.init.uniform_(parameter, -limit, limit)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run one step: input `[B, I]`, state `[B, H]`; output and next state are the same `[B, H]`."""
        self.check_input(input)
        z, n = F.linear(input, self.weight_ih, self.bias_ih).chunk(2, dim=-1)
        update = torch.sigmoid(z)
        # Not h + z * (n - h): here all but two operations can be done for all steps at once.
        hidden = (1 - update) * state + update * n
        return hidden, hidden
