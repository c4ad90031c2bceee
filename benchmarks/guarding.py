"""What it costs to look at everything again that a step can read: a training step with and without guards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from unittest import mock

import torch

import unrolled as ur
from benchmarks.timing import Target, in_turn

__all__ = ["targets"]

CASES = {(100, 32, 128, 128): 1.02, (200, 1, 64, 64): 1.10}


def _training_step(T: int, B: int, I: int, H: int) -> Callable[[], None]:
    torch.manual_seed(0)
    rnn, x = ur.unroll(ur.LayerNormLSTMCell(I, H)), torch.randn(T, B, I)

    def step() -> None:
        rnn.zero_grad()
        rnn(x)[0].square().mean().backward()

    step()
    return step


def _nothing(*_: object, **__: object) -> None:
    """Looks at nothing."""


def _unguarded(step: Callable[[], None]) -> Callable[[], None]:
    """The same step of a network whose cell is taken to be what it was, and which has no witnesses."""

    def run() -> None:
        with ExitStack() as stack:
            stack.enter_context(mock.patch("unrolled._planbook.fingerprint", new=_nothing))
            stack.enter_context(mock.patch("unrolled._witness.Turns.next", new=_nothing))
            step()

    run()
    return run


def targets() -> Iterator[Target]:
    """A training step with all guards over one without, at a large and at a small shape."""
    for shape, most in CASES.items():
        guarded, unguarded = in_turn(_training_step(*shape), _unguarded(_training_step(*shape)), rounds=41)
        yield Target(f"a layer-norm LSTM's training step at {shape} with guards / without", guarded / unguarded, most)
