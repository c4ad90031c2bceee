"""What it costs to look at everything again that a step can read: a training step with and without guards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import unrolled as ur
from benchmarks.timing import Target, in_turn

__all__ = ["targets"]

CASES = {(100, 32, 128, 128): 1.02, (200, 1, 64, 64): 1.10}


def _training_step(T: int, B: int, I: int, H: int, *, guarded: bool) -> Callable[[], None]:
    """A training step; without guards the plan of the first call is taken for every other one, unseen."""
    torch.manual_seed(0)
    rnn, x = ur.unroll(ur.LayerNormLSTMCell(I, H)), torch.randn(T, B, I)

    def step() -> None:
        rnn.zero_grad()
        rnn(x)[0].square().mean().backward()

    step()
    if not guarded:
        decision = rnn._plans.look_up(rnn.cell, x, rnn.cell.initial_state(B), None)
        rnn._plans.look_up = lambda *_: decision
    return step


def targets() -> Iterator[Target]:
    """A training step with all guards over one without, at a large and at a small shape."""
    for shape, most in CASES.items():
        guarded, unguarded = in_turn(
            _training_step(*shape, guarded=True), _training_step(*shape, guarded=False), rounds=41
        )
        yield Target(f"a layer-norm LSTM's training step at {shape} with guards / without", guarded / unguarded, most)
