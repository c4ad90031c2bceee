"""What a compiler is given for a loop grows with the loop's operations and no faster; time follows it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from random_cells import assert_as_reference
from unrolled.engine.native import schedule
from unrolled.engine.native.emit import Source, emit
from unrolled.plan.plan import plan_step

H = 5


class ChainCell(nn.Module):
    """`h' = f(... f(W h + x))`: so many times a function of all entries, or one along them."""

    def __init__(self, links: int, *, along: bool = False) -> None:
        super().__init__()
        self.linear, self.links, self.along = nn.Linear(H, H), links, along

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, H, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.linear(state) + input)
        for _ in range(self.links):
            hidden = 0.9 * hidden + (0.1 * hidden.softmax(-1) if self.along else 0.1 * torch.sin(hidden))
        return hidden, hidden


def _sources(cell: nn.Module) -> list[Source]:
    """What is emitted for a cell's loop, and for its step backward."""
    plan = plan_step(cell, torch.randn(2, H), torch.randn(2, H), None, 2, (True,), fuse=True)
    ((_, planned),) = plan.planned.items()
    return [emit(planned.loop), *map(emit, planned.backward.loops.values())]


@pytest.mark.parametrize("along", [False, True])
def test_no_function_grows_with_the_cell(along):
    longest, steps = [], []
    for links in (40, 80):
        sources = _sources(ChainCell(links, along=along))
        longest.append(max(len(kernel) for source in sources for kernel in source.kernels))
        steps.append(sum(len(part) for source in sources for part in source.parts))
    assert longest[1] <= 1.1 * longest[0]
    assert steps[1] <= 2.2 * steps[0]


def test_kernels_that_do_the_same_are_one_function_and_no_part_calls_too_many():
    for source in _sources(ChainCell(40, along=True)):
        assert all(part.count("kernel_") <= 64 for part in source.parts)
        assert sum(part.count("kernel_") for part in source.parts) >= 40
        assert len(source.kernels) <= 20


def test_a_long_kernel_in_pieces_gives_the_same_numbers(monkeypatch):
    monkeypatch.setattr(schedule, "MOST_COMPUTATIONS", 3)
    monkeypatch.setattr(import_module("unrolled.engine.native.emit"), "MOST_CALLS", 2)
    x = torch.randn(4, 3, H, dtype=torch.float64)
    for cell in (ChainCell(4), ChainCell(2, along=True), ur.LayerNormLSTMCell(H, H)):
        assert_as_reference(cell.double(), x, engine="native")
