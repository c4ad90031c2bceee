"""`make bench`: one table of every target, with what was measured here."""

from __future__ import annotations

import platform
import sys
from itertools import chain

import torch

from benchmarks import guarding, horizon, lengths, memory, networks, preparation, published, seeing
from benchmarks.timing import refuse_busy_machine

ROOMS = {
    "preparation": preparation,
    "guarding": guarding,
    "networks": networks,
    "published": published,
    "lengths": lengths,
    "memory": memory,
    "horizon": horizon,
    "seeing": seeing,
}


def main() -> None:
    """Measure and print, row by row; all of it, or what is named: `python -m benchmarks memory seeing`."""
    refuse_busy_machine()
    torch.set_num_threads(2)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; medians, in turn")
    missed = []
    strangers = [name for name in sys.argv[1:] if name not in ROOMS]
    if strangers:
        sys.exit(f"there is no benchmark {strangers[0]!r}; there are {', '.join(ROOMS)}")
    wanted = sys.argv[1:] or list(ROOMS)
    for target in chain.from_iterable(ROOMS[name].targets() for name in wanted):
        print(target, flush=True)
        missed += [target] if target.most is not None and not target.ratio <= target.most else []
    print(f"\n{len(missed)} missed")


main()
