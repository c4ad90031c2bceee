"""The scalar LSTM cell of xLSTM (Beck et al., 2024): exponential gates, a normaliser and a stabiliser."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unrolled.cells.base import GateLayout
from unrolled.cells.gates import GatedCell
from unrolled.errors import OptionError

_LOG_FORGET = {"sigmoid": F.logsigmoid, "exponential": lambda f: f}


class SLSTMState(NamedTuple):
    """The state of an `SLSTMCell`, four tensors `[B, H]`.

    Attributes:
        h: the hidden state.
        c: the memory, divided by `exp(m)`.
        n: the normaliser, divided by `exp(m)`: zero before the first step, at least one after it.
        m: the stabiliser, a logarithm.

    Example:
        >>> SLSTMCell(3, 4).initial_state(2)._fields
        ('h', 'c', 'n', 'm')
    """

    h: Tensor
    c: Tensor
    n: Tensor
    m: Tensor


class SLSTMCell(GatedCell):
    """An LSTM cell with exponential gates, which average what it stored; its output is the new h.

    With `(i, f, z, o)` the four blocks of `W_ih x + b_ih + W_hh h + b_hh`, in that order, and log_f being
    `log(sigmoid(f))` or f itself:

        m' = max(log_f + m, i)
        c' = exp(log_f + m - m') * c + exp(i - m') * tanh(z)
        n' = exp(log_f + m - m') * n + exp(i - m')
        h' = sigmoid(o) * c' / n'

    h' does not depend on m', which is there so that no exponential overflows and that one of the two is 1: n' >= 1.
    For this to hold in copy 0 too, where n = 0, m starts at half the dtype's lowest number, below any i: so m' = i
    and c' / n' = tanh(z), as the authors' code has it by asking whether n is zero. (Minus infinity would do as well,
    but not be told from a fault.) The paper's block-diagonal heads are left out: W_hh is one full block.

    A learned initial state is h, c and m, zero at first, with n = 1: any positive n is this one at another m.

    Args:
        input_size: I.
        hidden_size: H.
        bias: whether the two biases exist.
        forget_gate: "sigmoid" or "exponential".
        learn_initial_state: whether the initial state is a parameter.
        device: where the parameters live.
        dtype: the parameters' dtype.

    Raises:
        OptionError: for a size that is no positive integer, or an unknown forget gate.

    Source: M. Beck et al., "xLSTM: extended long short-term memory", NeurIPS 2024, section 2.2.

    Example:
        >>> cell = SLSTMCell(input_size=3, hidden_size=4)
        >>> output, state = cell(1000 * torch.ones(2, 3), cell.initial_state(2))
        >>> output.shape, state.n.min().item()
        (torch.Size([2, 4]), 1.0)
    """

    gate_layout = GateLayout(
        blocks=("input", "forget", "candidate", "output"), computed=("forget", "candidate", "output"), keeps="forget"
    )
    state_names = ()  # the state is a named tuple
    learned_names = ("h", "c", "m")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        forget_gate: str = "sigmoid",
        learn_initial_state: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if forget_gate not in _LOG_FORGET:
            raise OptionError(f"forget_gate must be one of {', '.join(_LOG_FORGET)}, got {forget_gate!r}")
        if forget_gate == "exponential":  # which does not saturate: it is none of the activations that are looked at
            self.gate_layout = replace(self.gate_layout, computed=("candidate", "output"))
        super().__init__(
            input_size, hidden_size, bias, learn_initial_state=learn_initial_state, device=device, dtype=dtype
        )
        self.forget_gate = forget_gate

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SLSTMState:
        """The state before the first step: `(h, c, n, m)`, each `[B, H]`."""
        hidden, memory, stabiliser = self.initial_tensors(batch_size, device, dtype)
        if self.learn_initial_state:
            return SLSTMState(hidden, memory, torch.ones_like(memory), stabiliser)
        # Half: adding log_f or taking off i must not overflow.
        lowest = torch.finfo(stabiliser.dtype).min / 2
        return SLSTMState(hidden, memory, torch.zeros_like(memory), torch.full_like(stabiliser, lowest))

    def forward(self, input: Tensor, state: SLSTMState) -> tuple[Tensor, SLSTMState]:
        """Run one step: input `[B, I]`, state `(h, c, n, m)`; returns `h', (h', c', n', m')`."""
        self.check_input(input)
        hidden, memory, normaliser, stabiliser = state
        gates = F.linear(input, self.weight_ih, self.bias_ih) + F.linear(hidden, self.weight_hh, self.bias_hh)
        i, f, z, o = gates.chunk(4, dim=-1)
        log_kept = _LOG_FORGET[self.forget_gate](f) + stabiliser
        stabiliser = torch.maximum(log_kept, i)
        kept, taken = torch.exp(log_kept - stabiliser), torch.exp(i - stabiliser)
        memory = kept * memory + taken * torch.tanh(z)
        normaliser = kept * normaliser + taken
        hidden = torch.sigmoid(o) * (memory / normaliser)
        return hidden, SLSTMState(hidden, memory, normaliser, stabiliser)

    def extra_repr(self) -> str:
        """Sizes, and the forget gate where it is not a sigmoid."""
        return super().extra_repr() + ("" if self.forget_gate == "sigmoid" else f", forget_gate={self.forget_gate}")
