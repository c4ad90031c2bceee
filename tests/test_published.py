"""Published cells: on the compiled engine they give their own loop's numbers, gradients and random numbers.

A cell that is not compiled stands in `ELSEWHERE`, with the engine that runs it and the reason that its plan gives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from examples.published import CELLS, Sizes, loop
from torch import Tensor, nn

import unrolled as ur
from matching import assert_match
from unrolled.trees import Tree, leaves, map_leaves

N = Sizes(T=4, B=3, I=4, H=12)
LENGTHS = [4, 0, 2]
RESETS = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)

ELSEWHERE: dict[str, tuple[str, str]] = {
    "Kalman filter": ("eager", "the native engine does not emit _linalg_solve_ex"),
}
"""For each cell that is not compiled its engine, and what its plan says."""

WITH_ROWS = [name for name, example in CELLS.items() if example.rows]


def double(x: Tensor) -> Tensor:
    """A tensor in double precision, if its numbers are floating."""
    wide = {torch.float32: torch.float64, torch.complex64: torch.complex128}
    return x.to(wide.get(x.dtype, x.dtype))


def problem(name: str) -> tuple[nn.Module, Tree]:
    """A cell and inputs in double precision; inputs with gradients where they can have them."""
    example = CELLS[name]
    cell, inputs = example.cell(N), example.inputs(N)
    for module in cell.modules():
        for group in (module._parameters, module._buffers):
            for tensor in group.values():
                if tensor is not None:
                    tensor.data = double(tensor.data)
    return cell, map_leaves(lambda x: double(x).requires_grad_(x.is_floating_point()), inputs)


def loss_of(results: Tree) -> Tensor:
    """A loss that no two entries enter alike."""
    found = [torch.view_as_real(x) if x.is_complex() else x for x in leaves(results) if x.requires_grad]
    return sum((torch.sin(torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape) * x)).sum() for x in found)


def numbers_of(run: Callable[[], Tree], cell: nn.Module, inputs: Tree) -> Tree:
    """Results, gradients, and the state in which torch's generator is left."""
    torch.manual_seed(3)
    cell.zero_grad()
    results = run()
    by = [x for x in (*cell.parameters(), *leaves(inputs)) if x.requires_grad]
    grads = torch.autograd.grad(loss_of(results), by, allow_unused=True)
    zeros = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(by, grads, strict=True)]
    return map_leaves(torch.detach, results), zeros, torch.get_rng_state()


def assert_engine(rnn: ur.Unrolled, name: str, inputs: Tree, **call: Any) -> None:
    """That a call was run by the compiled engine, or by the one that is known to run it, for the known reason."""
    engine, reason = ELSEWHERE.get(name, ("native", "every loop"))
    plan = str(rnn.plan(inputs, **call))
    assert rnn.ran == engine, plan
    assert reason in plan, plan


@pytest.mark.parametrize("name", CELLS)
def test_a_published_cell_gives_the_numbers_of_its_loop_over_five_updates(name):
    cell, inputs = problem(name)
    rnn, ours = (
        ur.unroll(copy.deepcopy(cell)),
        map_leaves(lambda x: x.detach().clone().requires_grad_(x.requires_grad), inputs),
    )
    for update in range(5):
        want = numbers_of(lambda: loop(cell, inputs, torch.float64), cell, inputs)
        got = numbers_of(lambda: rnn(ours), rnn.cell, ours)
        assert_match(got, want, f"update {update}: ")
        with torch.no_grad():
            for one, other, grad in zip(cell.parameters(), rnn.cell.parameters(), want[1], strict=False):
                one.sub_(0.01 * grad)
                other.sub_(0.01 * grad)
    assert_engine(rnn, name, inputs)


@pytest.mark.parametrize("name", WITH_ROWS)
def test_a_published_cell_takes_lengths_where_it_is(name):
    cell, inputs = problem(name)
    rnn, reference = ur.unroll(cell), ur.unroll(cell, engine="reference")
    want = numbers_of(lambda: reference(inputs, lengths=LENGTHS), cell, inputs)
    assert_match(numbers_of(lambda: rnn(inputs, lengths=LENGTHS), cell, inputs), want)
    assert_engine(rnn, name, inputs, lengths=LENGTHS)


@pytest.mark.parametrize("name", WITH_ROWS[::6])
def test_a_published_cell_takes_resets_where_it_is(name):
    cell, inputs = problem(name)
    rnn, reference = ur.unroll(cell), ur.unroll(cell, engine="reference")
    want = numbers_of(lambda: reference(inputs, resets=RESETS), cell, inputs)
    assert_match(numbers_of(lambda: rnn(inputs, resets=RESETS), cell, inputs), want)
    assert rnn.ran == ELSEWHERE.get(name, ("native",))[0]


@pytest.mark.parametrize("name", [name for name, example in CELLS.items() if example.draws][::2])
def test_a_published_cell_draws_once_under_a_budget(name):
    cell, inputs = problem(name)
    rnn = ur.unroll(cell, checkpoint=ur.segments(N.T, 2))
    want = numbers_of(lambda: loop(cell, inputs, torch.float64), cell, inputs)
    assert_match(numbers_of(lambda: rnn(inputs), cell, inputs), want)
