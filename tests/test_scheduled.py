"""Scheduled sampling: a loop by hand, every engine, windows, both ends of p, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from matching import assert_match
from problems import AttendingCell, B, H, S, T, TokenCell, uneven_loss
from random_cells import ENGINES, assert_as_reference, decision
from unrolled.networks.unroll import ENGINES as ALL
from unrolled.trees import Tree
from unrolled.wrappers.masks import RowDraws

F64 = torch.float64


def scheduled(p: float = 0.5, cell: nn.Module | None = None, feed: Any = torch.tanh) -> ur.ScheduledSampling:
    cell = cell or ur.LSTMCell(H, H, dtype=F64)
    return ur.ScheduledSampling(cell, feed, p, first=torch.zeros(H, dtype=F64))


def by_hand(cell: ur.ScheduledSampling, inputs: Tensor, state: ur.SeededState) -> tuple[Tensor, Tree]:
    """A plain loop; which rows read their own output is said by the hash, row by row."""
    now, outputs = state.state.state, []
    for t, given in enumerate(inputs):
        own = ~RowDraws.at(state.seed, state.t + t).kept(cell.p, ()) if t else torch.zeros(len(given), dtype=torch.bool)
        rows = [cell.feed(outputs[-1])[b] if own[b] else given[b] for b in range(len(given))]
        output, now = cell.cell(torch.stack(rows), now)
        outputs.append(output)
    return torch.stack(outputs), now


@pytest.mark.parametrize("engine", ALL)
def test_it_is_the_loop_by_hand(engine):
    cell, inputs = scheduled(), torch.randn(9, 5, H, dtype=F64, requires_grad=True)
    state = cell.initial_state(5, dtype=F64)
    outputs, last = ur.unroll(cell, engine=engine)(inputs, state)
    want, after = by_hand(cell, inputs, state)
    assert_match((outputs, last.state.state), (want, after))
    assert_match(last.state.fed, want[-1].tanh())
    assert last.t.tolist() == [9] * 5
    asked = [inputs, *cell.parameters()]
    assert_match(
        torch.autograd.grad(uneven_loss(outputs, last.state.state), asked),
        torch.autograd.grad(uneven_loss(want, after), asked),
    )


CELLS = {
    "fed through": lambda: (scheduled(), torch.randn(T, B, H, dtype=F64), None),
    "cut off": lambda: (scheduled(feed=lambda o: o.detach()), torch.randn(T, B, H, dtype=F64), None),
    "around a wrapper": lambda: (
        scheduled(cell=ur.ZoneoutCell(ur.GRUCell(H, H, dtype=F64), 0.3)),
        torch.randn(T, B, H, dtype=F64),
        None,
    ),
    "with a context": lambda: (
        scheduled(cell=AttendingCell(H, H).double()),
        torch.randn(T, B, H, dtype=F64),
        torch.randn(B, S, H, dtype=F64),
    ),
    "tokens": lambda: (
        ur.ScheduledSampling(TokenCell(7, H).double(), lambda o: o.argmax(-1), 0.5, first=torch.tensor(0)),
        torch.randint(7, (T, B)),
        None,
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CELLS)
def test_every_engine_gives_the_references_numbers(name, engine):
    cell, inputs, context = CELLS[name]()
    state = cell.initial_state(B, dtype=F64)
    assert_as_reference(cell, inputs, state, engine=engine, context=context)
    took = decision(cell, inputs, engine, state, context)
    assert took.engine == engine, took.why


def test_verify_passes():
    assert ur.verify(ur.unroll(scheduled()), torch.randn(T, B, H))


@pytest.mark.parametrize("engine", ALL)
def test_p_is_assigned_anew_between_calls(engine):
    cell, inputs = scheduled(), torch.randn(9, 5, H, dtype=F64)
    rnn, state = ur.unroll(cell, engine=engine), cell.initial_state(5, dtype=F64)
    found = []
    for cell.p in (0.2, 0.8, 0.2):
        assert_match(rnn(inputs, state)[0], by_hand(cell, inputs, state)[0])
        found.append(rnn(inputs, state)[0])
    assert_match(found[0], found[2], bound=0)
    assert not torch.equal(found[0], found[1])


def test_at_zero_it_reads_what_is_given_and_at_one_it_generates():
    inner, inputs = ur.GRUCell(H, H, dtype=F64), torch.randn(9, B, H, dtype=F64)
    cell = scheduled(0, inner)
    assert_match(ur.unroll(cell)(inputs)[0], ur.unroll(inner)(inputs)[0], bound=0)
    cell.p = 1
    outputs, _, state = ur.generate(inner, None, inputs[0], feed=torch.tanh, max_steps=9)
    alone, last = ur.unroll(cell)(inputs)
    assert_match((alone, last.state.state), (outputs, state))


def test_in_evaluation_every_copy_reads_what_is_given():
    inner, inputs = ur.GRUCell(H, H, dtype=F64), torch.randn(9, B, H, dtype=F64)
    assert_match(ur.unroll(scheduled(1, inner).eval())(inputs)[0], ur.unroll(inner)(inputs)[0])


@pytest.mark.parametrize("engine", ALL)
def test_windows_with_the_state_carried_read_the_same(engine):
    cell, inputs = scheduled(), torch.randn(9, 5, H, dtype=F64)
    rnn, state = ur.unroll(cell, engine=engine), cell.initial_state(5, dtype=F64)
    first, between = rnn(inputs[:4], state)
    second, last = rnn(inputs[4:], between)
    assert_match((torch.cat([first, second]), last), rnn(inputs, state))


def test_as_many_read_their_own_output_as_p_says():
    """A cell that gives out 1 and reads 0: what it reads is whether it read its own output."""
    echo = ur.as_cell(lambda x, s: (torch.ones_like(x), s + x), state=lambda n, dtype=None, **_: torch.zeros(n))
    cell = ur.ScheduledSampling(echo, lambda o: o, 0.3, first=torch.tensor(0.0))
    _, state = ur.unroll(cell)(torch.zeros(201, 100))
    own = state.state.state.sum().item() / 20000
    assert abs(own - 0.3) < 5 * (0.3 * 0.7 / 20000) ** 0.5


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), True, "0.5", None, (0.5,)])
def test_what_is_no_probability_is_refused(p):
    with pytest.raises(ur.OptionError, match="from 0 to 1"):
        scheduled(p)
    cell = scheduled()
    cell.p = p
    with pytest.raises(ur.OptionError, match="from 0 to 1"):
        ur.unroll(cell)(torch.zeros(T, B, H, dtype=F64))


def test_a_feed_or_a_first_of_another_kind_is_refused():
    with pytest.raises(ur.OptionError, match="feed must be a function"):
        ur.ScheduledSampling(ur.GRUCell(H, H), 3, 0.5, first=torch.zeros(H))
    with pytest.raises(ur.OptionError, match="first must be a pytree of tensors"):
        ur.ScheduledSampling(ur.GRUCell(H, H), torch.tanh, 0.5, first=0)
    cell = ur.ScheduledSampling(ur.GRUCell(H, H), torch.tanh, 0.5, first=torch.tensor(0.0))
    with pytest.raises(ur.InputError, match=r"float32\[2\], got float32\[2, 4\]"):
        ur.unroll(cell)(torch.zeros(T, B, H))
    with pytest.raises(ur.CellError, match=r"float32\[2, 3\]"):
        ur.unroll(ur.ScheduledSampling(ur.GRUCell(H, H), lambda o: o[:, :3], 0.5, first=torch.zeros(H)))(
            torch.zeros(T, B, H)
        )
