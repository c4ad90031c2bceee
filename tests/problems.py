"""Cells whose right answers are known exactly, cells of every kind a user may write, and the loop written by hand.

Shape letters as everywhere: `T` time, `B` batch, `I` input features, `H` hidden features, `S` context length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import unrolled as ur
from unrolled.trees import Tree, leaves

T, B, I, H, S = 5, 2, 3, 4, 6


class LinearCell(nn.Module):
    """`h' = w h + x` with a number w, or `h' = W h + x` with a matrix; the output is h'.

    After T steps from h_0 without input: `h_T = w^T h_0`, so `d h_T / d h_0 = w^T` and `d h_T / d w = T w^(T-1) h_0`,
    to which every copy contributes the same `w^(T-1) h_0`.
    """

    def __init__(self, weight: Tensor, size: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.size = weight.shape[0] if weight.dim() else size

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, self.size, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        carried = state @ self.weight.T if self.weight.dim() else state * self.weight
        hidden = carried + input
        return hidden, hidden


def linear_states(weight: Tensor, initial: Tensor, inputs: Tensor) -> Tensor:
    """`h_0 .. h_T` of a matrix LinearCell, `[T + 1, B, H]`, by the closed form `W^t h_0 + sum_s W^(t-1-s) x_s`."""
    steps = len(inputs)
    powers = [torch.linalg.matrix_power(weight, k).T for k in range(steps + 1)]
    return torch.stack(
        [initial @ powers[t] + sum(inputs[s] @ powers[t - 1 - s] for s in range(t)) for t in range(steps + 1)]
    )


def linear_state_grads(weight: Tensor, steps: int, by_last: Tensor) -> Tensor:
    """`d loss / d h_t` for t = 0 .. T, `[T + 1, B, H]`, from that by h_T: `(W^(T-t))^T d loss / d h_T`."""
    return torch.stack([by_last @ torch.linalg.matrix_power(weight, steps - t) for t in range(steps + 1)])


class DelayCell(nn.Module):
    """Gives out what came in `delay` steps ago (zeros at first). No parameters; its state is a tuple of inputs."""

    def __init__(self, delay: int, size: int) -> None:
        super().__init__()
        self.delay, self.size = delay, size

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(batch_size, self.size, device=device, dtype=dtype) for _ in range(self.delay))

    def forward(self, input: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return state[0], (*state[1:], input)


class CountingState(NamedTuple):
    count: Tensor
    total: Tensor


class CountingCell(nn.Module):
    """Adds `(t + 1) * rate * x_t` to a total, t from an integer leaf of its state: `rate * sum (t + 1) x_t`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.full((size,), 0.5))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> CountingState:
        count = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return CountingState(count, torch.zeros(batch_size, len(self.rate), device=device, dtype=dtype))

    def forward(self, input: Tensor, state: CountingState) -> tuple[Tensor, CountingState]:
        count = state.count + 1
        total = state.total + count.unsqueeze(-1) * self.rate * input
        return total, CountingState(count, total)


class NestedCell(nn.Module):
    """A fast LSTM under a slow moving average: nested dict and tuple state, dict output."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.fast = nn.LSTMCell(input_size + hidden_size, hidden_size)
        self.rate = nn.Parameter(torch.zeros(hidden_size))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tree:
        zeros = torch.zeros(batch_size, self.fast.hidden_size, device=device, dtype=dtype)
        return {"fast": {"h": zeros, "c": zeros.clone()}, "slow": (zeros.clone(),)}

    def forward(self, input: Tensor, state: Tree) -> tuple[Tree, Tree]:
        (slow,) = state["slow"]
        h, c = self.fast(torch.cat([input, slow], -1), (state["fast"]["h"], state["fast"]["c"]))
        rate = torch.sigmoid(self.rate)
        slow = rate * slow + (1 - rate) * h
        return {"h": h, "both": (h, slow)}, {"fast": {"h": h, "c": c}, "slow": (slow,)}


class AttendingCell(nn.Module):
    """Attends with its state to a context `[B, S, H]` that is the same at every step, which it requires."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.inner = ur.GRUCell(input_size + hidden_size, hidden_size)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return self.inner.initial_state(batch_size, device, dtype)

    def forward(self, input: Tensor, state: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.softmax(torch.einsum("bsh,bh->bs", context, state), -1)
        return self.inner(torch.cat([input, torch.einsum("bs,bsh->bh", scores, context)], -1), state)


class SharedStartCell(nn.Module):
    """`h' = tanh(W h + x)` from `h_0 = tanh(W 1)`: the initial state depends on the parameter that the step uses."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size) / 2)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.tanh(self.weight.sum(1)).expand(batch_size, -1)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(state @ self.weight.T + input)
        return hidden, hidden


class TokenCell(nn.Module):
    """Reads integer tokens `[B]` through an embedding whose matrix is also its output layer (tied weights)."""

    def __init__(self, vocabulary: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden_size)
        self.inner = ur.RNNCell(hidden_size, hidden_size)
        self.head = nn.Linear(hidden_size, vocabulary)
        self.head.weight = self.embedding.weight

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return self.inner.initial_state(batch_size, device, dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden, state = self.inner(self.embedding(input), state)
        return self.head(hidden), state


def leaky(parameters: dict[str, Tensor], input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """A plain function as a step: `h' = tanh(a h + x)`."""
    hidden = torch.tanh(parameters["decay"] * state + input)
    return 2 * hidden, hidden


class Problem(NamedTuple):
    """A cell and something to run it on, T = 5, B = 2."""

    cell: nn.Module
    inputs: Tree
    context: Tree = None

    def unrolled(self, **options: Any) -> ur.Unrolled:
        return ur.unroll(self.cell, **options)


def _plain(make: Callable[[], nn.Module]) -> Callable[[torch.dtype], Problem]:
    return lambda dtype: Problem(make().to(dtype), torch.randn(T, B, I, dtype=dtype))


def _learned(make: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        cell = make(I, H, learn_initial_state=True)
        for name, parameter in cell.named_parameters():
            if name.startswith("initial"):
                nn.init.normal_(parameter)
        return cell

    return made


def _attending(dtype: torch.dtype) -> Problem:
    cell = AttendingCell(I, H).to(dtype)
    return Problem(cell, torch.randn(T, B, I, dtype=dtype), torch.randn(B, S, H, dtype=dtype))


def _leaky(dtype: torch.dtype) -> Problem:
    def zeros(batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, I, device=device, dtype=dtype)

    cell = ur.as_cell(leaky, parameters={"decay": torch.randn(I, dtype=dtype)}, state=zeros)
    return Problem(cell, torch.randn(T, B, I, dtype=dtype))


PROBLEMS: dict[str, Callable[[torch.dtype], Problem]] = {
    "RNNCell": _plain(lambda: ur.RNNCell(I, H)),
    "RNNCell relu": _plain(lambda: ur.RNNCell(I, H, nonlinearity="relu")),
    "RNNCell without bias": _plain(lambda: ur.RNNCell(I, H, bias=False)),
    "LSTMCell": _plain(lambda: ur.LSTMCell(I, H)),
    "GRUCell": _plain(lambda: ur.GRUCell(I, H)),
    "RNNCell learned start": _plain(_learned(ur.RNNCell)),
    "LSTMCell learned start": _plain(_learned(ur.LSTMCell)),
    "GRUCell learned start": _plain(_learned(ur.GRUCell)),
    "nn.RNNCell": _plain(lambda: ur.as_cell(nn.RNNCell(I, H))),
    "nn.LSTMCell": _plain(lambda: ur.as_cell(nn.LSTMCell(I, H))),
    "nn.GRUCell": _plain(lambda: ur.as_cell(nn.GRUCell(I, H))),
    "linear": _plain(lambda: LinearCell(torch.randn(I, I) / 2)),
    "counting": _plain(lambda: CountingCell(I)),
    "nested state": _plain(lambda: NestedCell(I, H)),
    "shared start": _plain(lambda: SharedStartCell(I)),
    "function": _leaky,
    "attending": _attending,
    "tokens": lambda dtype: Problem(TokenCell(7, H).to(dtype), torch.randint(7, (T, B))),
}
"""Cells of every kind by name, each with inputs in a given dtype."""


def loop_by_hand(cell: nn.Module, inputs: Tree, state: Tree, context: Tree = None) -> tuple[list[Tree], list[Tree]]:
    """What unrolling means, for inputs that are one tensor: outputs 0 .. T-1 and states 0 .. T."""
    rest = () if context is None else (context,)
    outputs, states = [], [state]
    for t in range(len(inputs)):
        output, state = cell(inputs[t], states[-1], *rest)
        outputs.append(output)
        states.append(state)
    return outputs, states


def uneven_loss(*trees: Tree) -> Tensor:
    """A scalar loss that no two entries of some trees enter alike (their floating leaves, as float64)."""
    total = torch.zeros((), dtype=torch.float64)
    for leaf in leaves(list(trees)):
        if leaf.is_floating_point():
            weights = torch.linspace(0.5, 1.5, leaf.numel(), dtype=leaf.dtype).view(leaf.shape)
            total = total + torch.sin(weights * leaf).sum()
    return total


class Surrogate(torch.autograd.Function):
    """A spike forward, a fast sigmoid's slope backward; written the old way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / (1 + 5 * x.abs()) ** 2


def learned(make: Callable[..., nn.Module] = ur.LSTMCell, input_size: int = I) -> nn.Module:
    cell = make(input_size, H, learn_initial_state=True)
    for name, parameter in cell.named_parameters():
        if name.startswith("initial"):
            nn.init.normal_(parameter)
    return cell
