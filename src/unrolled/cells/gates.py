"""What the cells of torch.nn's family share: four parameters, their initialisation and a learned initial state."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor, nn

from unrolled.cells.base import GateLayout
from unrolled.errors import InputError, OptionError
from unrolled.trees import Tree


def check_sizes(**sizes: int) -> None:
    """Refuse a size that is not a positive integer.

    Raises:
        OptionError: naming the size.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise OptionError(f"{name} must be a positive integer, got {size!r}")


def check_flags(**flags: bool) -> None:
    """Refuse what is no bool where a yes or no is asked for: 'False' is true.

    Raises:
        OptionError: naming the argument.
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise OptionError(f"{name} must be True or False, a bool, got {flag!r}, of type {type(flag).__name__}")


class GatedCell(nn.Module):
    """A cell whose gates are one product of the input and one of the hidden state, as in torch.nn.

    Holds `weight_ih [G, I]`, `weight_hh [G, H]`, `bias_ih [G]` and `bias_hh [G]` (those of them that its gate layout
    names), drawn from `U(-1/sqrt(H), 1/sqrt(H))` in that order, so that one seed gives torch.nn's numbers.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        bias: whether the two biases exist.
        learn_initial_state: whether the initial state is a parameter (one vector per entry of the state, zero at
            first) and not zeros.
        device: where the parameters live.
        dtype: the parameters' floating dtype.

    Raises:
        OptionError: if a size is not a positive integer, or a flag no bool.
    """

    gate_layout: GateLayout
    """The weights have G / H blocks of H rows, one for each gate."""

    state_names: tuple[str, ...] = ("h",)

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None

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

        G = len(self.gate_layout.blocks) * hidden_size
        self.register_parameter("weight_ih", parameter(G, input_size))
        for name in self.gate_layout.recurrent:
            self.register_parameter(name, parameter(G, hidden_size))
        for name in self.gate_layout.biases:
            self.register_parameter(name, parameter(G) if bias else None)
        if learn_initial_state:
            for name in self.learned_names:
                self.register_parameter(f"initial_{name}", parameter(hidden_size))
        self.reset_parameters()

    @cached_property
    def output_size(self) -> int:
        """H: the output is the hidden state. A subclass whose output is another assigns its own."""
        return self.hidden_size

    @property
    def learned_names(self) -> tuple[str, ...]:
        """The tensors that `initial_tensors` makes; a learned one is the parameter `initial_<name>`."""
        return self.state_names

    def reset_parameters(self) -> None:
        """Draw the weights and biases anew, in torch.nn's order; a learned initial state becomes zero."""
        bound = 1 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters():
            if name.startswith("initial_"):
                nn.init.zeros_(parameter)
            else:
                nn.init.uniform_(parameter, -bound, bound)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tree:
        """The state before the first step: a tensor `[B, H]`, or a tuple of one for each of `state_names`.

        A learned one keeps its own device and dtype.
        """
        tensors = self.initial_tensors(batch_size, device, dtype)
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    def initial_tensors(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """The initial state's tensors, each `[B, H]`: zeros, or the learned vectors repeated over the batch."""
        if self.learn_initial_state:
            learned = [getattr(self, f"initial_{name}") for name in self.learned_names]
            return [vector.expand(batch_size, -1) for vector in learned]
        device = self.weight_ih.device if device is None else device
        dtype = self.weight_ih.dtype if dtype is None else dtype
        return [torch.zeros(batch_size, self.hidden_size, device=device, dtype=dtype) for _ in self.learned_names]

    def check_input(self, input: Tensor) -> None:
        """Refuse an input that is not `[B, I]`: broadcasting would take it for something else in silence.

        Raises:
            InputError: saying the shape.
        """
        if input.dim() != 2 or input.shape[1] != self.input_size:
            raise InputError(
                f"the input of {type(self).__name__} must be [B, I] with I = {self.input_size} at every step, "
                f"got {list(input.shape)}; a single sequence [T, I] gets a batch of one by unsqueeze"
            )

    def extra_repr(self) -> str:
        """What the constructor was given, where it differs from the default."""
        text = f"{self.input_size}, {self.hidden_size}"
        if not self.bias:
            text += ", bias=False"
        return text + (", learn_initial_state=True" if self.learn_initial_state else "")
