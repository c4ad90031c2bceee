"""`make bench`: one table of every target, with what was measured here."""

from __future__ import annotations

import platform
from itertools import chain

import torch

from benchmarks import horizon, lengths, memory, networks, preparation
from benchmarks.timing import refuse_busy_machine


def main() -> None:
    """Measure and print, row by row."""
    refuse_busy_machine()
    torch.set_num_threads(2)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; medians, in turn")
    missed = []
    for target in chain(
        preparation.targets(), networks.targets(), lengths.targets(), memory.targets(), horizon.targets()
    ):
        print(target, flush=True)
        missed += [target] if target.most is not None and not target.ratio <= target.most else []
    print(f"\n{len(missed)} missed")


main()
