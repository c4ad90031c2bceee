"""Loops in blocks of steps, as CUDA graphs replay them: here the same function is called anew."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import unrolled as ur
from random_cells import assert_as_reference
from unrolled.engine import eager, graphs
from unrolled.lengths import Extent

B, I, H = 3, 2, 4


def called_again(body: Callable[[], None]) -> Callable[[], None]:
    """In place of a graph: the work itself, after the runs that a graph's libraries need to warm up."""
    for _ in range(3):
        body()
    return body


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """All loops of the eager engine run in blocks; the lengths of these runs are noted."""
    ran: list[int] = []

    def block_for(loop, request):
        ran.append(request.extent.steps)
        return graphs.StepBlock(loop, request, called_again)

    monkeypatch.setattr(eager, "capturable", lambda request: request.extent.steps >= graphs.STEPS)
    monkeypatch.setattr(eager, "block_for", block_for)
    return ran


class Swapping(torch.nn.Module):
    """Each of two states is handed what the other one was, a little of the input with it."""

    def initial_state(self, batch_size, device=None, dtype=None):
        return torch.zeros(batch_size, I, dtype=dtype), torch.ones(batch_size, I, dtype=dtype)

    def forward(self, input, state):
        a, b = state
        return a * b, (b * 0.9 + input, a)


CELLS = {"LSTM": lambda: ur.LSTMCell(I, H), "layer norm": lambda: ur.LayerNormLSTMCell(I, H), "swapping": Swapping}


@pytest.mark.parametrize("T", [graphs.STEPS, 2 * graphs.STEPS + 5])
@pytest.mark.parametrize("name", CELLS)
def test_a_loop_in_blocks_is_the_loop(name, T, in_blocks):
    cell = CELLS[name]().double()
    assert_as_reference(cell, torch.randn(T, B, I, dtype=torch.float64), engine="eager")
    assert in_blocks.count(T) >= 2  # forward and backward


def test_a_block_begins_each_walk_afresh():
    cell = ur.GRUCell(I, H)
    rnn = ur.unroll(cell, engine="eager")
    x = torch.randn(graphs.STEPS + 3, B, I)
    plan = rnn._plans.look_up(cell, x, cell.initial_state(B), None).plan
    (loop,) = plan.loops.values()
    values = loop.program.values
    extent = Extent(len(x), B)

    def request(scale: float) -> graphs.LoopInputs:
        sequences = [torch.randn(len(x), *values[v].sizes(B)) * scale for v in loop.sequences]
        fixed = [torch.randn(values[v].sizes(B)) * scale for v in loop.fixed]
        states = [torch.randn(values[v].sizes(B)) * scale for v in loop.states]
        return graphs.LoopInputs(sequences, fixed, states, extent, False)

    first, second = request(1.0), request(0.5)
    block = graphs.StepBlock(loop, first, called_again)
    for given in (first, second, first):
        found = graphs.run_in_blocks(loop, given, block, eager._run_steps)
        right = eager._run_steps(loop, given)
        for ours, theirs in zip((*found.emitted, *found.last), (*right.emitted, *right.last), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_what_cannot_be_captured_is_run_step_by_step_and_said_once():
    def refuse(body):
        raise RuntimeError("operation not permitted when stream is capturing")

    cell = ur.RNNCell(I, H)
    x = torch.randn(graphs.STEPS, B, I)
    plan = ur.unroll(cell, engine="eager")._plans.look_up(cell, x, cell.initial_state(B), None).plan
    (loop,) = plan.loops.values()
    values = loop.program.values
    given = graphs.LoopInputs(
        [torch.zeros(len(x), *values[v].sizes(B)) for v in loop.sequences],
        [torch.zeros(values[v].sizes(B)) for v in loop.fixed],
        [torch.zeros(values[v].sizes(B)) for v in loop.states],
        Extent(len(x), B),
        False,
    )
    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        assert graphs.block_for(loop, given, refuse) is None
    assert graphs.block_for(loop, given, refuse) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
@pytest.mark.parametrize("name", CELLS)
def test_graphs_on_cuda_give_the_references_numbers(name):
    cell = CELLS[name]().double().cuda()
    rnn, truth = (ur.unroll(cell, engine=engine) for engine in ("eager", "reference"))
    x = torch.randn(2 * graphs.STEPS + 5, B, I, dtype=torch.float64, device="cuda", requires_grad=True)
    for _ in range(2):
        ours, theirs = rnn(x)[0], truth(x)[0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), x) for y in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
