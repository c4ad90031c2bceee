"""Published cells against the loops over them that their users write: a training step, without and with lengths."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import torch
from examples.published import CELLS, Sizes, loop
from torch import nn

import unrolled as ur
from benchmarks.timing import Target, in_turn
from unrolled.trees import Tree, leaves

__all__ = ["targets"]

SIZES = Sizes(T=64, B=8, I=32, H=48)
LENGTHS = [64, 40, 40, 17, 5, 1, 0, 63]


def _trained(cell: nn.Module, run: Callable[[], Tree]) -> Callable[[], None]:
    def step() -> None:
        cell.zero_grad()
        ends = [torch.view_as_real(x) if x.is_complex() else x for x in leaves(run()) if x.requires_grad]
        torch.stack([x.square().mean() for x in ends]).sum().backward()

    return step


def targets() -> Iterator[Target]:
    """Each cell's training step over its own loop's; then how many are compiled, and the mean of those."""
    found: dict[str, list[tuple[str, float]]] = {"": [], ", lengths": []}
    for name, example in CELLS.items():
        torch.manual_seed(0)
        cell, inputs = example.cell(SIZES), example.inputs(SIZES)
        rnn = ur.unroll(cell)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for what, call in (("", {}), (", lengths", {"lengths": LENGTHS})):
                if what and not example.rows:
                    continue
                ours = _trained(cell, lambda call=call, rnn=rnn, inputs=inputs: rnn(inputs, **call))
                theirs = _trained(cell, lambda cell=cell, inputs=inputs: loop(cell, inputs))
                mine, its = in_turn(ours, theirs, rounds=5)
                found[what].append((rnn.ran, mine / its))
                yield Target(f"{name}{what}: {rnn.ran} / its own loop", mine / its, None if what else 1.05)
    for what, figures in found.items():
        native = [ratio for engine, ratio in figures if engine == "native"]
        yield Target(f"published cells{what}: not compiled, of all", 1 - len(native) / len(figures), 0.15)
        mean = math.exp(sum(math.log(ratio) for ratio in native) / len(native))
        yield Target(f"published cells{what}: compiled / own loop, geometric mean", mean, None if what else 0.15)
