"""The LSTM cell with layer normalization of Ba et al. (2016)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unrolled.cells.gates import GatedCell
from unrolled.cells.lstm import LSTMCell
from unrolled.errors import OptionError


class LayerNormLSTMCell(GatedCell):
    """An LSTM cell that normalises its gates and its memory over features; state `(h, c)`, output the new h.

    With `(i, f, g, o)` the four blocks of `LN(W_ih x) + LN(W_hh h)`:

        c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h' = sigmoid(o) * tanh(LN(c'))

    `LN(a) = gain * (a - mean(a)) / sqrt(var(a) + eps) + bias`, its mean and variance over all the features of one row:
    the 4H of a product together, the H of the memory. What is carried on is c' itself, not LN(c'). `bias_ih` and
    `bias_hh` are added after the normalization, which would take them out again; the paper's further bias is their
    sum. As in the paper gains start at one and biases at zero; the weights are drawn as in `LSTMCell`.

    Args:
        input_size: I.
        hidden_size: H. With H = 1 the normalised memory is `bias_c` at every step, since a single feature is its own
            mean.
        bias: whether `bias_ih [4H]`, `bias_hh [4H]` and `bias_c [H]` exist; `gain_ih`, `gain_hh`, `gain_c` always do.
        eps: what is added to the variance, above zero.
        learn_initial_state: whether the initial state is a parameter, zero at first.
        device: where the parameters live.
        dtype: the parameters' dtype.

    Raises:
        OptionError: for a size that is no positive integer, or an eps that is not above zero.

    Source: J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer normalization", arXiv:1607.06450 (2016).

    Example:
        >>> cell = LayerNormLSTMCell(input_size=3, hidden_size=4)
        >>> output, (h, c) = cell(torch.ones(2, 3), cell.initial_state(2))
        >>> output.shape, cell.gain_ih.shape, cell.gain_c.shape
        (torch.Size([2, 4]), torch.Size([16]), torch.Size([4]))
    """

    gate_layout = LSTMCell.gate_layout
    state_names = ("h", "c")
    bias_c: Tensor | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        eps: float = 1e-5,
        learn_initial_state: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Zero would be 0 / 0 on the first copy, where h is all zeros, and at every step where H = 1.
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < float("inf"):
            raise OptionError(f"eps must be a number above zero, got {eps!r}")
        super().__init__(
            input_size, hidden_size, bias, learn_initial_state=learn_initial_state, device=device, dtype=dtype
        )
        self.eps = float(eps)
        for name, size in (("gain_ih", 4 * hidden_size), ("gain_hh", 4 * hidden_size), ("gain_c", hidden_size)):
            self.register_parameter(name, nn.Parameter(torch.ones(size, device=device, dtype=dtype)))
        shift = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias_c", shift)

    def reset_parameters(self) -> None:
        """Draw the weights anew; gains become one, biases and a learned initial state zero."""
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.startswith(("gain_", "bias_")):
                nn.init.constant_(parameter, float(name.startswith("gain_")))

    def forward(self, input: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run one step: input `[B, I]`, state `(h, c)`; returns `h', (h', c')`."""
        self.check_input(input)
        hidden, memory = state
        of_input = self._normalised(F.linear(input, self.weight_ih), self.gain_ih, self.bias_ih)
        of_hidden = self._normalised(F.linear(hidden, self.weight_hh), self.gain_hh, self.bias_hh)
        i, f, g, o = (of_input + of_hidden).chunk(4, dim=-1)
        memory = torch.sigmoid(f) * memory + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(self._normalised(memory, self.gain_c, self.bias_c))
        return hidden, (hidden, memory)

    def _normalised(self, features: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(features, gain.shape, gain, bias, self.eps)

    def extra_repr(self) -> str:
        """Sizes, and eps where it is not the usual one."""
        return super().extra_repr() + ("" if self.eps == 1e-5 else f", eps={self.eps}")
