"""Generation: against a loop by hand, row by row; its gradients, its memory, its ends, and what it refuses."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import unrolled as ur
from matching import assert_match
from problems import PROBLEMS, AttendingCell, B, H, I, NestedCell, S, TokenCell, uneven_loss
from unrolled.cells.contract import CheckedStep
from unrolled.plan.independence import rows_are_independent
from unrolled.trees import Tree, leaves, map_leaves

F64 = torch.float64


def row(tree: Tree, b: int) -> Tree:
    return map_leaves(lambda x: x[b : b + 1], tree)


def one_by_one(
    cell: nn.Module,
    state: Tree,
    first: Tree,
    feed: Callable[[Tree], Tree] = lambda output: output,
    until: Callable[[Tree], Tensor] | None = None,
    max_steps: int | None = None,
    context: Tree = None,
) -> tuple[Tree, Tensor, Tree]:
    """Each row on its own, by a plain loop, put together with zeros."""
    outputs, states = [], []
    for b in range(len(leaves(first)[0])):
        rest = () if context is None else (row(context, b),)
        input, now, found = row(first, b), row(state, b), []
        for t in itertools.count(1):
            output, now = cell(input, now, *rest)
            found.append(output)
            if t == max_steps or (until is not None and until(output).item()):
                break
            input = feed(output)
        outputs.append(map_leaves(lambda *x: torch.cat(x), *found))
        states.append(now)
    padded = map_leaves(lambda *x: nn.utils.rnn.pad_sequence(x), *outputs)
    lengths = torch.tensor([len(leaves(x)[0]) for x in outputs])
    return padded, lengths, map_leaves(lambda *x: torch.cat(x), *states)


def endings(lengths: list[int], threshold: float = 0.5) -> tuple[nn.Module, Tensor]:
    """A cell that shrinks its input by a learned factor, and first inputs that fall below 0.5 after so many steps."""
    cell = ur.as_cell(
        lambda p, x, s: (p["by"] * x, s + x * x),
        parameters={"by": torch.tensor(0.5, dtype=F64)},
        state=lambda n, dtype=None, **_: torch.zeros(n, dtype=dtype),
    )
    return cell, torch.tensor([threshold * 1.5 * 2.0 ** (n - 1) for n in lengths], dtype=F64)


def small(x: Tensor) -> Tensor:
    return x < 0.5


# -- the numbers -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6), most=st.none() | st.integers(1, 8))
def test_every_row_ends_where_it_would_alone(lengths, most):
    cell, first = endings(lengths)
    state = torch.arange(len(lengths), dtype=F64)
    outputs, counted, last = ur.generate(cell, state, first, until=small, max_steps=most)
    assert counted.tolist() == [min(n, most or n) for n in lengths]
    assert_match((outputs, counted, last), one_by_one(cell, state, first, until=small, max_steps=most), bound=0)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "nn.LSTMCell", "LSTMCell learned start"])
def test_values_and_gradients_are_those_of_a_loop_by_hand(name):
    cell = PROBLEMS[name](F64).cell
    head = nn.Linear(H, I, dtype=F64)
    first = torch.randn(6, I, dtype=F64, requires_grad=True)
    state = map_leaves(lambda x: torch.randn_like(x, requires_grad=True), cell.initial_state(6, dtype=F64))

    def until(output: Tensor) -> Tensor:
        return output[:, 0] > 0.15

    asked = [first, *leaves(state), *head.parameters(), *(p for n, p in cell.named_parameters() if "initial" not in n)]
    got = ur.generate(cell, state, first, feed=head, until=until, max_steps=9)
    want = one_by_one(cell, state, first, head, until, 9)
    assert len(set(got[1].tolist())) > 1
    assert_match(got, want)
    assert_match(
        torch.autograd.grad(uneven_loss(got[0], got[2]), asked), torch.autograd.grad(uneven_loss(*want[::2]), asked)
    )


def test_without_a_state_it_is_the_cells_own_and_learns():
    cell = ur.GRUCell(H, H, learn_initial_state=True, dtype=F64)
    outputs, _, _ = ur.generate(cell, None, torch.zeros(B, H, dtype=F64), max_steps=3)
    outputs.sum().backward()
    assert cell.initial_h.grad.abs().min() > 0


def test_every_row_keeps_its_own_context_and_gives_gradients_to_it():
    cell = AttendingCell(H, H).double()
    first, context = torch.randn(5, H, dtype=F64), torch.randn(5, S, H, dtype=F64, requires_grad=True)
    rest = {"until": lambda x: x[:, 0] > 0.1, "max_steps": 8, "context": context}
    got = ur.generate(cell, None, first, **rest)
    want = one_by_one(cell, cell.initial_state(5, dtype=F64), first, **rest)
    assert len(set(got[1].tolist())) > 1
    assert_match(got, want)
    grads = [torch.autograd.grad(uneven_loss(*found[::2]), context) for found in (got, want)]
    assert_match(*grads)


def test_tokens_are_picked_and_fed_back():
    cell = TokenCell(7, H).double()
    first, state = torch.arange(6), torch.randn(6, H, dtype=F64)
    rest = {"feed": lambda o: o.argmax(-1), "until": lambda o: o.argmax(-1) == 3, "max_steps": 6}
    assert_match(ur.generate(cell, state, first, **rest), one_by_one(cell, state, first, **rest))


def test_nested_outputs_and_states():
    cell = NestedCell(H, H).double()
    first, state = torch.randn(4, H, dtype=F64), cell.initial_state(4, dtype=F64)
    rest = {"feed": lambda o: o["both"][1] * 9, "until": lambda o: o["h"][:, 0] > 0.05, "max_steps": 7}
    assert_match(ur.generate(cell, state, first, **rest), one_by_one(cell, state, first, **rest))


def test_an_unrolled_network_gives_its_cell():
    cell, first = endings([2, 4])
    rnn = ur.unroll(cell, batch_first=True)
    assert_match(ur.generate(rnn, None, first, until=small), ur.generate(cell, None, first, until=small), bound=0)


def test_generating_is_running_on_what_was_generated():
    cell, first = ur.LSTMCell(H, H, dtype=F64), torch.randn(B, H, dtype=F64)
    outputs, lengths, state = ur.generate(cell, None, first, max_steps=9)
    assert lengths.tolist() == [9] * B
    again = ur.unroll(cell, engine="reference")(torch.cat([first.unsqueeze(0), outputs[:-1]]))
    assert_match((outputs, state), again, bound=0)


def test_a_wrappers_masks_travel_with_their_rows():
    torch.manual_seed(3)
    cell = ur.ZoneoutCell(ur.DropoutCell(ur.GRUCell(H, H, dtype=F64), p=0.4), p=0.3)
    first, state = torch.randn(6, H, dtype=F64), cell.initial_state(6, dtype=F64)
    rest = {"until": lambda o: o[:, 0] > 0.2, "max_steps": 10}
    got, want = ur.generate(cell, state, first, **rest), one_by_one(cell, state, first, **rest)
    assert len(set(got[1].tolist())) > 1
    assert_match(got, want)


# -- what it costs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch) -> list[int]:
    """How many rows each step is run on, recordings left out."""
    seen: list[int] = []

    class Noting(CheckedStep):
        def __call__(self, t: int, input: Tree, state: Tree) -> tuple[Tree, Tree]:
            seen.append(len(input))
            return super().__call__(t, input, state)

    monkeypatch.setattr("unrolled.generation.live_rows.CheckedStep", Noting)
    return seen


def test_a_row_that_has_ended_is_not_computed(ran):
    cell, first = endings([3, 1, 4])
    ur.generate(cell, None, first, until=small)
    assert ran == [3, 2, 2, 1]


def test_rows_that_see_each_other_stay_as_they_ended(ran):
    """The mean over all rows: those that have ended count with the input that they read last."""
    cell = ur.as_cell(lambda x, s: (x / 2, s + x - x.mean()))
    first = torch.tensor([0.75, 3.0], dtype=F64)
    outputs, lengths, state = ur.generate(cell, torch.zeros(2, dtype=F64), first, until=small)
    assert lengths.tolist() == [1, 3]
    assert ran == [2, 2, 2]
    assert outputs.T.tolist() == [[0.375, 0, 0], [1.5, 0.75, 0.375]]
    first, later = 0.75 - 1.875, (3 - 1.875) + (1.5 - (0.75 + 1.5) / 2) + (0.75 - 0.75)
    assert state.tolist() == [first, later]


def test_rows_that_see_each_other_give_gradients_that_are_those_of_differences():
    cell = ur.as_cell(
        lambda p, x, s: (p["by"] * x, s + x * (x - x.mean())),
        parameters={"by": torch.tensor(0.5, dtype=F64)},
        state=lambda n, dtype=None, **_: torch.zeros(n, dtype=dtype),
    )

    def run(first: Tensor) -> tuple[Tensor, Tensor]:
        outputs, _, state = ur.generate(cell, None, first, until=small)
        return outputs, state

    first = torch.tensor([0.8, 3.1, 1.7, 6.3], dtype=F64, requires_grad=True)
    assert not rows_are_independent(cell, first, torch.zeros(4, dtype=F64))
    assert torch.autograd.gradcheck(run, (first,))


def test_independent_rows_are_told_from_those_that_are_not():
    x, s = torch.randn(3, H), torch.randn(3, H)
    attending = torch.randn(3, S, H)
    assert rows_are_independent(ur.GRUCell(H, H), x, s)
    assert rows_are_independent(AttendingCell(H, H), x, s, attending)
    assert rows_are_independent(TokenCell(7, H), torch.arange(3), s)
    normed = ur.as_cell(nn.BatchNorm1d(H), step=lambda norm, x, s: (norm(x + s),) * 2)
    assert not rows_are_independent(normed, x, s)
    assert not rows_are_independent(ur.as_cell(lambda x, s: (x.flip(0), s)), x, s)
    assert not rows_are_independent(ur.as_cell(lambda x, s: (x, s + torch.rand(3, H))), x, s)
    assert not rows_are_independent(ur.as_cell(lambda x, s: (x, s.T.reshape(s.shape))), x, s)


def test_without_gradients_no_state_and_no_graph_is_kept():
    cell, kept = ur.GRUCell(H, H), []
    with torch.no_grad():
        for step in ur.stream(cell, None, torch.randn(B, H), max_steps=50):
            assert step.output.grad_fn is None
            kept.append(weakref.ref(step.state))
            assert sum(state() is not None for state in kept) <= 3


@pytest.fixture
def _heeds_sigint():
    """A process that was started in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heeds_sigint")
def test_an_endless_loop_can_be_interrupted():
    cell = ur.GRUCell(H, H)
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        for _ in ur.stream(cell, None, torch.zeros(1, H), until=lambda h: h[:, 0] > 2):
            pass
    assert time.monotonic() - begun < 10


# -- step by step ----------------------------------------------------------------------------------------------------


def test_steps_come_as_they_are_made_and_together_are_what_is_generated():
    cell, first = endings([2, 4, 1, 4])
    outputs, lengths, state = ur.generate(cell, None, first, until=small)
    counted = torch.zeros(4, dtype=torch.int64)
    for t, step in enumerate(ur.stream(cell, None, first, until=small)):
        assert step.t == t
        counted[step.rows] += 1
        assert_match(step.output, outputs[t, step.rows], bound=0)
        assert_match(step.state[step.ended], state[step.rows[step.ended]], bound=0)
    assert torch.equal(counted, lengths)


def test_a_step_is_not_computed_before_it_is_asked_for():
    seen = []
    cell = ur.as_cell(lambda x, s: (seen.append(0), (x, s))[1])
    steps = ur.stream(cell, torch.zeros(1), torch.zeros(1), max_steps=9)
    assert len(seen) == 0
    next(steps), next(steps)
    assert len(seen) == 2


def test_what_was_streamed_is_gone_on_with():
    cell, first = ur.GRUCell(H, H, dtype=F64), torch.randn(B, H, dtype=F64)
    half = list(ur.stream(cell, None, first, max_steps=4))
    rest, _, last = ur.generate(cell, half[-1].state, half[-1].output, max_steps=5)
    outputs, _, state = ur.generate(cell, None, first, max_steps=9)
    assert_match((torch.cat([torch.stack([s.output for s in half]), rest]), last), (outputs, state), bound=0)


def test_at_the_bound_all_rows_end_and_until_is_not_asked():
    asked = []
    steps = list(
        ur.stream(
            ur.GRUCell(H, H),
            None,
            torch.zeros(3, H),
            until=lambda o: (asked.append(0), torch.zeros(3, dtype=torch.bool))[1],
            max_steps=2,
        )
    )
    assert [step.ended.tolist() for step in steps] == [[False] * 3, [True] * 3]
    assert len(asked) == 1


# -- refusals --------------------------------------------------------------------------------------------------------

X = torch.zeros(3, H)


def never(output: Tensor) -> Tensor:
    return torch.zeros(len(output), dtype=torch.bool)


BEFORE: dict[str, tuple[dict[str, Any], type[ur.UnrolledError], tuple[str, ...]]] = {
    "no end": ({}, ur.OptionError, ("neither until= nor max_steps=",)),
    "no step": ({"max_steps": 0}, ur.OptionError, ("at least 1", "got 0")),
    "half a step": ({"max_steps": 1.5}, ur.OptionError, ("at least 1", "1.5")),
    "True steps": ({"max_steps": True}, ur.OptionError, ("at least 1", "True")),
    "until as a number": ({"until": 3}, ur.OptionError, ("until must be a function", "int")),
    "another batch than the state's": (
        {"state": torch.zeros(2, H), "max_steps": 1},
        ur.StateError,
        ("batch of 3", "float32[2, 4]"),
    ),
    "another batch than the context's": (
        {"cell": AttendingCell(H, H), "context": torch.zeros(2, S, H), "max_steps": 1},
        ur.InputError,
        ("context", "B = 3", "[2, 6, 4]"),
    ),
    "no context": ({"cell": AttendingCell(H, H), "max_steps": 1}, ur.InputError, ("pass context=",)),
    "a context too many": ({"context": torch.zeros(3, 2), "max_steps": 1}, ur.InputError, ("no context",)),
    "a first that is a list of numbers": ({"first": [1.0], "max_steps": 1}, ur.InputError, ("first", "as_tensor")),
    "a first that is nothing": ({"first": None, "max_steps": 1}, ur.InputError, ("at least one tensor",)),
    "a first without rows": ({"first": torch.tensor(1.0), "max_steps": 1}, ur.InputError, ("[B, ...]", "unsqueeze")),
    "a first of no row": ({"first": torch.zeros(0, H), "max_steps": 1}, ur.InputError, ("B >= 1", "float32[0, 4]")),
    "a first of two batches": ({"first": (X, X[:2]), "max_steps": 1}, ur.InputError, ("first[1]", "float32[2, 4]")),
    "a layer": ({"cell": nn.GRU(H, H), "max_steps": 1}, ur.OptionError, ("a cell", "layer")),
    "a stack": ({"cell": ur.stack([ur.GRUCell(H, H)]), "max_steps": 1}, ur.OptionError, ("one cell", "Stack")),
    "a state that all rows share": (
        {
            "cell": ur.as_cell(lambda x, s: (x, s), state=lambda *_, **__: (torch.zeros(3), torch.zeros(()))),
            "until": never,
        },
        ur.StateError,
        ("state[1]", "float32[]", "max_steps= alone"),
    ),
}


@pytest.mark.parametrize("function", [ur.generate, ur.stream])
@pytest.mark.parametrize("name", BEFORE)
def test_it_is_refused_before_any_work(name, function):
    given, error, says = BEFORE[name]
    given = {"cell": ur.GRUCell(H, H), "state": None, "first": X} | given
    with pytest.raises(error) as raised:
        function(**given)
    assert all(piece in str(raised.value) for piece in says), str(raised.value)


DURING: dict[str, tuple[dict[str, Any], type[ur.UnrolledError], tuple[str, ...]]] = {
    "until that says one thing for all": (
        {"until": lambda o: False},
        ur.OptionError,
        ("bool[3]", "step 0", "a bool", "argmax"),
    ),
    "until of numbers": ({"until": lambda o: o[:, 0]}, ur.OptionError, ("step 0", "float32[3]")),
    "until of all entries": ({"until": lambda o: o > 0}, ur.OptionError, ("step 0", "bool[3, 4]")),
    "a feed of another shape": (
        {"feed": lambda o: o[:, :2], "max_steps": 3},
        ur.InputError,
        ("feed made float32[3, 2]", "float32[3, 4]", "step 0"),
    ),
    "a feed of another dtype": ({"feed": lambda o: o.double(), "max_steps": 3}, ur.InputError, ("float64[3, 4]",)),
    "a feed of another structure": ({"feed": lambda o: (o, o), "max_steps": 3}, ur.InputError, ("step 0", "(float32")),
    "a feed of a number": ({"feed": lambda o: 3.0, "max_steps": 3}, ur.InputError, ("no pytree of tensors", "3.0")),
    "outputs that are no inputs": (
        {"cell": ur.GRUCell(H, I), "max_steps": 3},
        ur.InputError,
        ("without feed=", "float32[3, 3]", "float32[3, 4]"),
    ),
    "an output without rows": (
        {"cell": ur.as_cell(lambda x, s: (x.sum(), s)), "state": X, "max_steps": 3},
        ur.CellError,
        ("copy 0", "float32[]"),
    ),
    "an output that changes": (
        {"cell": ur.as_cell(lambda x, s: ((x, x)[: int(s[0]) + 1], s + 1)), "state": torch.zeros(3)}
        | {"feed": lambda o: o[0], "max_steps": 3},
        ur.CellError,
        ("copy 0 returned (float32[3, 4])", "copy 1, on 3 rows, (float32[3, 4], float32[3, 4])"),
    ),
    "a state that changes": (
        {"cell": ur.as_cell(lambda x, s: (x, s.double())), "state": torch.zeros(3), "max_steps": 3},
        ur.CellError,
        ("copy 0", "float64[3]"),
    ),
}


@pytest.mark.parametrize("name", DURING)
def test_it_is_refused_where_it_shows(name):
    given, error, says = DURING[name]
    given = {"cell": ur.GRUCell(H, H), "state": None, "first": X} | given
    with pytest.raises(error) as raised:
        ur.generate(**given)
    assert all(piece in str(raised.value) for piece in says), str(raised.value)


def test_the_step_of_a_fault_is_named():
    calls = itertools.count()
    with pytest.raises(ur.OptionError, match="step 2 it returned bool"):
        ur.generate(ur.GRUCell(H, H), None, X, until=lambda o: never(o)[: 3 - next(calls) // 2])
