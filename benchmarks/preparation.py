"""How long a user waits before the first step: recording, planning and building, in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from benchmarks.timing import Target

__all__ = ["targets"]

_PROGRAM = """
import time, torch
started = time.perf_counter()
import unrolled as ur
T = {steps}

def first_step(cell):
    rnn = ur.unroll(cell)
    rnn(torch.randn(T, 2, 16))[0].sum().backward()

first_step(ur.LSTMCell(16, 16))
print(time.perf_counter() - started)
started = time.perf_counter()
first_step(ur.GRUCell(16, 16))
print(time.perf_counter() - started)
rnn, inputs = ur.unroll(ur.LSTMCell(16, 24)), torch.randn(T, 2, 16)
started = time.perf_counter()
rnn.plan(inputs)
print(time.perf_counter() - started)
"""


def _seconds(cache: str, steps: int = 10) -> list[float]:
    environment = {**os.environ, "UNROLLED_CACHE": cache}
    program = [sys.executable, "-c", _PROGRAM.format(steps=steps)]
    printed = subprocess.run(program, env=environment, capture_output=True, text=True, check=True).stdout
    return [float(line) for line in printed.split()]


def targets() -> Iterator[Target]:
    """Seconds, and preparation at a long horizon over that at a short one."""
    with tempfile.TemporaryDirectory() as cache:
        cold, further, _ = _seconds(cache)
        warm, *_ = _seconds(cache)
        yield Target("preparation of a first cell, cold, after `import torch`: seconds", cold, 4.0)
        yield Target("preparation of a further cell in the process: seconds", further, 1.5)
        yield Target("preparation of a first cell with a warm cache: seconds", warm, 2.5)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        short, long = _seconds(one, 100)[2], _seconds(other, 100_000)[2]
        yield Target("preparation at T = 100,000 / at T = 100", long / short, 1.1)
