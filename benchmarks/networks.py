"""Training and inference against torch.nn's layers and against plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

import unrolled as ur
from benchmarks.timing import Target, in_turn, seconds

__all__ = ["targets"]

LARGE = [(100, 32, 128, 128), (100, 32, 256, 256), (50, 64, 512, 512), (784, 64, 1, 128), (35, 20, 200, 200)]
LARGE += [(128, 8, 1024, 1024)]
SMALL = [(200, 1, 64, 64), (1000, 16, 32, 64)]
"""(T, B, I, H)."""

Shape = tuple[int, int, int, int]
Step = Callable[[], object]


def geometric_mean(ratios: Sequence[float]) -> float:
    """What the targets are stated in."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def training(network: nn.Module, inputs: torch.Tensor) -> Step:
    """Forward, backward and weight gradients."""

    def step() -> None:
        network.zero_grad()
        network(inputs)[0].sum().backward()

    return step


def inference(network: nn.Module, inputs: torch.Tensor) -> Step:
    """Forward alone."""

    def step() -> None:
        with torch.no_grad():
            network(inputs)

    return step


class UnbindLoop(nn.Module):
    """What a user would write: a Python loop over a cell."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, object]:
        """Run the cell step by step."""
        state, outputs = self.cell.initial_state(inputs.shape[1]), []
        for input in inputs.unbind(0):
            output, state = self.cell(input, state)
            outputs.append(output)
        return torch.stack(outputs), state


class TwoLayers(nn.Module):
    """A two-layer cell with a head, as a user writes it."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.first, self.second = ur.LSTMCell(input_size, hidden_size), ur.GRUCell(hidden_size, hidden_size)
        self.head = nn.Linear(hidden_size, hidden_size)

    def initial_state(self, batch_size: int, device: object = None, dtype: object = None) -> tuple[object, object]:
        """The states of both layers."""
        return self.first.initial_state(batch_size), self.second.initial_state(batch_size)

    def forward(self, input: torch.Tensor, state: tuple[object, object]) -> tuple[torch.Tensor, tuple[object, object]]:
        """Run one step."""
        hidden, first = self.first(input, state[0])
        hidden, second = self.second(hidden, state[1])
        return self.head(hidden), (first, second)


def arithmetic(shape: Shape, products: Sequence[tuple[int, int]]) -> Step:
    """The three products of each weight `[K, N]`, and nothing else: forward, gradient of the rows, of the weight."""
    T, B, _, _ = shape
    given = [
        (torch.randn(B, K), torch.randn(K, N), torch.randn(B, N), torch.randn(T * B, K), torch.randn(T * B, N))
        for K, N in products
    ]

    def step() -> None:
        for rows, weight, grad, all_rows, all_grads in given:
            for _ in range(T):
                torch.mm(rows, weight)
            for _ in range(T):
                torch.mm(grad, weight.t())
            torch.mm(all_rows.t(), all_grads)

    return step


def _products(title: str, shape: Shape) -> list[tuple[int, int]]:
    _, _, I, H = shape
    first = [(I, 4 * H), (H, 4 * H)]
    return first if title == "LayerNorm LSTM" else [*first, (H, 3 * H), (H, 3 * H), (H, H)]


def _against_torch(kind: str, shape: Shape, run: Callable[[nn.Module, torch.Tensor], Step], rounds: int) -> float:
    T, B, I, H = shape
    inputs = torch.randn(T, B, I)
    ours, theirs = ur.unroll(getattr(ur, f"{kind}Cell")(I, H)), getattr(nn, kind)(I, H)
    a, b = in_turn(run(ours, inputs), run(theirs, inputs), rounds=rounds)
    return a / b


def _against_loop(title: str, make: Callable[[int, int], nn.Module], shape: Shape, rounds: int) -> tuple[float, float]:
    """Ours over the cell's own loop, and over its arithmetic."""
    T, B, I, H = shape
    inputs, cell = torch.randn(T, B, I), make(I, H)
    ours, loop = training(ur.unroll(cell), inputs), training(UnbindLoop(cell), inputs)
    a, b, c = in_turn(ours, loop, arithmetic(shape, _products(title, shape)), rounds=rounds)
    return a / b, a / c


def _against_compiled() -> Iterator[Target]:
    """LayerNorm LSTM at (100, 32, 128, 128) against its loop under torch.compile: time of a step, and preparation."""
    inputs, cell = torch.randn(100, 32, 128), ur.LayerNormLSTMCell(128, 128)
    ours, theirs = training(ur.unroll(cell), inputs), training(torch.compile(UnbindLoop(cell)), inputs)
    ready, compiled = seconds(ours), seconds(theirs)
    a, b = in_turn(ours, theirs)
    yield Target("LayerNorm LSTM (100, 32, 128, 128) / its loop under torch.compile: time", a / b, 0.6)
    yield Target("the same: preparation", ready / compiled, 1 / 40)


TORCH = [
    ("LSTM", "training", training, 0.90, 0.70),
    ("GRU", "training", training, 0.50, 0.10),
    ("RNN", "training", training, 0.60, 0.12),
    ("LSTM", "inference", inference, 0.95, 0.60),
    ("GRU", "inference", inference, 0.60, 0.20),
    ("RNN", "inference", inference, 0.60, 0.30),
]


def targets(rounds: int = 7) -> Iterator[Target]:
    """Ours over theirs: a row for each shape, and the geometric means that the targets are about."""
    for kind, title, run, large, small in TORCH:
        for name, shapes, most in (("large", LARGE, large), ("small", SMALL, small)):
            ratios = [_against_torch(kind, shape, run, rounds) for shape in shapes]
            for shape, ratio in zip(shapes, ratios, strict=True):
                yield Target(f"  {kind} {title} {shape} / torch.nn.{kind}", ratio, None)
            yield Target(f"{kind} {title}, {name} shapes / torch.nn.{kind}", geometric_mean(ratios), most)
    for title, make in (("LayerNorm LSTM", ur.LayerNormLSTMCell), ("two layers with head", TwoLayers)):
        for name, shapes, most in (("large", LARGE, 0.50), ("small", SMALL, 0.06)):
            ratios = [_against_loop(title, make, shape, max(3, rounds // 2)) for shape in shapes]
            for shape, (of_loop, of_floor) in zip(shapes, ratios, strict=True):
                yield Target(f"  {title} training {shape} / its own loop", of_loop, None)
                yield Target(f"  {title} training {shape} / its arithmetic", of_floor, None)
            loops, floors = zip(*ratios, strict=True)
            yield Target(f"{title} training, {name} shapes / its own loop", geometric_mean(loops), most)
            if name == "large":
                yield Target(f"{title} training, H >= 128 / its arithmetic", geometric_mean(floors), 1.5)
    yield from _against_compiled()
