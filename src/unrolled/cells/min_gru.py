"""The minimal gated recurrent unit of Feng et al. (2024), whose gates do not see its state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unrolled.cells.gates import check_flags, check_sizes
from unrolled.errors import InputError


class MinGRUCell(nn.Module):
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

    # Not a GatedCell, which is one by its product with the hidden state.
    state_names = ("h",)
    bias_ih: Tensor | None

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
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size)
        check_flags(bias=bias, learn_initial_state=learn_initial_state)
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self.learn_initial_state = learn_initial_state

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.weight_ih = parameter(2 * hidden_size, input_size)
        self.register_parameter("bias_ih", parameter(2 * hidden_size) if bias else None)
        if learn_initial_state:
            self.initial_h = parameter(hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight and bias anew; a learned initial state becomes zero."""
        bound = self.input_size**-0.5
        for name, parameter in self.named_parameters():
            limit = 0.0 if name == "initial_h" else bound
            nn.init.uniform_(parameter, -limit, limit)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The hidden state before the first step, `[B, H]`; a learned one keeps its own device and dtype."""
        if self.learn_initial_state:
            return self.initial_h.expand(batch_size, -1)
        return self.weight_ih.new_zeros(batch_size, self.hidden_size, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run one step: input `[B, I]`, state `[B, H]`; output and next state are the same `[B, H]`."""
        if input.dim() != 2 or input.shape[1] != self.input_size:
            raise InputError(
                f"the input of MinGRUCell must be [B, I] with I = {self.input_size} at every step, "
                f"got {list(input.shape)}; a single sequence [T, I] gets a batch of one by unsqueeze"
            )
        z, n = F.linear(input, self.weight_ih, self.bias_ih).chunk(2, dim=-1)
        update = torch.sigmoid(z)
        # Not h + z * (n - h): here all but two operations can be done for all steps at once.
        hidden = (1 - update) * state + update * n
        return hidden, hidden

    def extra_repr(self) -> str:
        """What the constructor was given, where it differs from the default."""
        text = f"{self.input_size}, {self.hidden_size}" + ("" if self.bias else ", bias=False")
        return text + (", learn_initial_state=True" if self.learn_initial_state else "")
