"""What checkpoints save and cost, with the full-storage run of the same engine beside them."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import unrolled as ur
from benchmarks.timing import Target, in_turn
from unrolled.bptt.actions import Advance
from unrolled.bptt.allocations import Allocations

__all__ = ["targets"]

# Steps, rows, input and hidden size; the budget as a share of full storage; how much longer a training step may take.
BUDGETS = (
    (1000, 32, 128, 128, 0.05, 1.35),
    (1000, 32, 256, 256, 0.05, 1.35),
    (1000, 64, 256, 256, 0.05, 1.35),
    (10_000, 32, 128, 128, 0.02, 1.40),
)
REVOLVE = (
    (10, 3, 15),
    (64, 8, 137),
    (100, 10, 222),
    (1000, 10, 3636),
    (1000, 32, 2405),
    (1024, 32, 2477),
    (60, 59, 59),
)
"""T, slots, and how many steps are advanced beyond those that are taped."""
ENGINES = ("native", "eager", "reference")
_LONG = Path(__file__).with_name("million_steps.py")


def activations(network: nn.Module, inputs: Tensor) -> int:
    """The most bytes that a training step holds, but for outputs and the inputs' gradient."""
    network.zero_grad()
    inputs.grad = None
    gc.collect()
    with Allocations() as noted:
        outputs = network(inputs)[0]
        outputs.sum().backward()
    assert inputs.grad is not None
    return noted.peak(without=[outputs, inputs.grad])


def training(network: nn.Module, inputs: Tensor) -> Callable[[], object]:
    """A training step; what it returns is let go."""

    def step() -> None:
        network.zero_grad()
        inputs.grad = None
        outputs = network(inputs)[0]
        outputs.sum().backward()

    return step


def targets() -> Iterator[Target]:
    """Counts of schedules; memory and time by engine and size; the promise; a million steps."""
    yield from _counts()
    for T, B, I, H, share, most in BUDGETS:
        for engine in ENGINES if T == 1000 and H == 128 else ENGINES[:1]:
            yield from _budget(engine, T, B, I, H, share, most)
    yield from _million()


def _counts() -> Iterator[Target]:
    """Steps that a replay of each schedule advances, over what the formulas of its source say: 1, exactly."""
    asked = [(f"segments of {L}, T = {T}", ur.segments(T, L), T - L) for T, L in ((1000, 10), (1000, 50), (4096, 64))]
    asked += [(f"revolve with {c} slots, T = {T}", ur.revolve(T, c), count) for T, c, count in REVOLVE]
    for name, schedule, count in asked:
        advanced = sum(action.stop - action.start for action in schedule if isinstance(action, Advance))
        assert advanced == schedule.extra_advances
        yield Target(f"{name}: extra advances / {count:,}", advanced / count, 1.0)


def _budget(engine: str, T: int, B: int, I: int, H: int, share: float, most: float) -> Iterator[Target]:
    cell, inputs = ur.LSTMCell(I, H), torch.randn(T, B, I, requires_grad=True)
    full, some = ur.unroll(cell, engine=engine), ur.unroll(cell, engine=engine, memory=share)
    chosen = ur.plan_memory(some, inputs).chosen
    runs = training(full, inputs), training(some, inputs)
    for run in runs:
        run()
    taken = [activations(network, inputs) for network in (full, some)]
    name = f"LSTM {(T, B, I, H)}, {engine}, memory={share}"
    yield Target(f"{name}: activation memory / full storage", taken[1] / taken[0], share)
    yield Target(f"{name}: measured peak / promise (at least 0.8)", taken[1] / chosen.bytes, 1.05)
    a, b = in_turn(*runs, rounds=3 if T > 1000 or engine != "native" else 7)
    yield Target(f"{name}: time / full storage's", b / a, most)


def _million() -> Iterator[Target]:
    """In processes of their own, whose memory is theirs alone."""
    for loss in ("sum", "last"):
        told = subprocess.run(
            [sys.executable, str(_LONG), loss], check=True, capture_output=True, text=True, timeout=1800
        ).stdout.split()
        resident, ratio = map(float, told)
        name = f"1,000,000 steps, LSTM (B = 1, I = 1, H = 64), loss of {loss}"
        yield Target(f"{name}: resident memory, GB", resident, 1.2)
        yield Target(f"{name}: time per step / at T = 1,000 without checkpoints", ratio, 1.5)
