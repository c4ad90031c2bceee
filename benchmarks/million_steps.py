"""A million steps of BPTT in one call: resident memory in GB, and time per step over that of a thousand steps.

Run as a program of its own, with the loss as its argument: "sum" for outputs.sum(), "last" for the last step's alone.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import unrolled as ur

T, SHORT = 1_000_000, 1_000


def per_step(rnn: ur.Unrolled, steps: int, loss: str, rounds: int) -> float:
    """The median time of a training step, in seconds for each time step."""
    inputs, times = torch.randn(steps, 1, 1), []
    for _ in range(rounds):
        rnn.zero_grad()
        started = time.perf_counter()
        outputs: Tensor = rnn(inputs)[0]
        (outputs.sum() if loss == "sum" else outputs[-1].sum()).backward()
        del outputs
        times.append(time.perf_counter() - started)
    return sorted(times)[rounds // 2] / steps


def most_resident() -> int:
    """The most bytes that were resident, libraries and all; the system's own count, of this program alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main(loss: str) -> None:
    """Print both figures."""
    torch.set_num_threads(2)
    cell = ur.LSTMCell(1, 64)
    short = per_step(ur.unroll(cell), SHORT, loss, 21)
    long = per_step(ur.unroll(cell, memory="16MB"), T, loss, 1)
    print(most_resident() / 1e9, long / short)


if __name__ == "__main__":
    main(sys.argv[1])
