"""Whether time is linear in T: a training step's time per time step at a long horizon over that at a short one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import unrolled as ur
from benchmarks.timing import Target, in_turn

__all__ = ["targets"]

SHORT, LONG = 500, 4000


def _training_step(cell: torch.nn.Module, T: int) -> Callable[[], object]:
    rnn = ur.unroll(cell, engine="reference")
    inputs = torch.randn(T, 8, 32, requires_grad=True)

    def step() -> None:
        rnn.zero_grad()
        outputs, _ = rnn(inputs)
        outputs.sum().backward()

    return step


def targets() -> Iterator[Target]:
    """One row for each of the built-in cells."""
    for make in (ur.RNNCell, ur.LSTMCell, ur.GRUCell):
        cell = make(32, 64)
        short, long = in_turn(_training_step(cell, SHORT), _training_step(cell, LONG))
        name = f"{make.__name__}, reference: time per step at T = {LONG} / at T = {SHORT}"
        yield Target(name, (long / LONG) / (short / SHORT), 1.5)
    yield _native()


def _native() -> Target:
    rnn = ur.unroll(ur.LSTMCell(64, 64))
    short, long = (torch.randn(T, 1, 64, requires_grad=True) for T in (1000, 100_000))

    def step(inputs: torch.Tensor) -> Callable[[], object]:
        return lambda: rnn(inputs)[0].sum().backward()

    a, b = in_turn(step(short), step(long), rounds=3)
    name = "LSTMCell (B = 1, I = H = 64): time per step at T = 100,000 / at T = 1,000"
    return Target(name, (b / 100_000) / (a / 1000), 1.2)
