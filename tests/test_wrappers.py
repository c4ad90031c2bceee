"""Dropout over time and zoneout: masks as numbers, loops by hand, every engine, windows, and how it is planned."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import unrolled as ur
from matching import assert_match
from problems import AttendingCell, B, CountingCell, H, I, NestedCell, T, TokenCell, uneven_loss
from random_cells import assert_as_reference
from unrolled.errors import InputError, OptionError
from unrolled.networks.unroll import ENGINES
from unrolled.trees import Tree, leaves, map_leaves
from unrolled.wrappers.masks import RowDraws

F64 = torch.float64
WORD = 2**32 - 1


def mask(state: ur.SeededState, t: int | None, p: float, shape: tuple[int, ...], start: int = 0) -> Tensor:
    """What is kept in copy t (None: in all copies) of a run that began with this state."""
    now = None if t is None else state.t + t
    return RowDraws.at(state.seed, now).kept(p, shape, start)


def start_of(cell: nn.Module, rows: int = B, dtype: torch.dtype = F64) -> ur.SeededState:
    return cell.initial_state(rows, dtype=dtype)


def run(cell: nn.Module, engine: str, inputs: Tensor, state: Tree, **rest: Any) -> tuple[Tree, list[Tensor]]:
    """Outputs and last state; the gradients of the inputs, the parameters and the state."""
    inputs = inputs.detach().clone().requires_grad_(inputs.is_floating_point())
    state = map_leaves(lambda x: x.detach().clone().requires_grad_(x.is_floating_point()), state)
    outputs, last = ur.unroll(cell, engine=engine)(inputs, state, **rest)
    asked = [x for x in (inputs, *cell.parameters(), *leaves(state)) if x.requires_grad]
    found = torch.autograd.grad(uneven_loss(outputs, last), asked, allow_unused=True)
    return (outputs, last), [torch.zeros_like(x) if g is None else g for x, g in zip(asked, found, strict=True)]


# -- the masks themselves --------------------------------------------------------------------------------------------


def mixed_by_hand(word: int) -> int:
    word ^= word >> 16
    word = word * 0x7FEB352D & WORD
    word ^= word >> 15
    word = word * 0x846CA68B & WORD
    return word ^ word >> 16


def kept_by_hand(seed: int, t: int | None, p: float, entry: int) -> bool:
    low, high = seed & WORD, seed >> 32 & WORD
    factor = mixed_by_hand(low if t is None else low ^ mixed_by_hand(t & WORD))
    summand = mixed_by_hand(factor ^ high)
    return ((factor >> 1) * mixed_by_hand(entry) + summand) & WORD >= round(p * 2**32)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    t=st.none() | st.integers(0, 2**40),
    p=st.floats(0, 0.999),
    start=st.integers(0, 2**31),
)
def test_masks_are_the_integers_of_the_formula(seed, t, p, start):
    """Python's integers have no end: so nothing overflows in torch's."""
    time = None if t is None else torch.tensor([t])
    got = RowDraws.at(torch.tensor([seed]), time).kept(p, (2, 3), start)
    want = [kept_by_hand(seed, t, p, start + entry) for entry in range(6)]
    assert got.flatten().tolist() == want


@pytest.fixture(scope="module", params=["drawn seeds", "seeds 0, 1, 2, .."])
def many(request) -> Tensor:
    """Masks as +-1 at p = 0.5: `[rows, steps, entries]`, 64 of each."""
    torch.manual_seed(0)
    seed = torch.randint(2**63 - 1, (64,)) if request.param == "drawn seeds" else torch.arange(64)
    found = [RowDraws.at(seed, torch.full((64,), t)).kept(0.5, (64,)) for t in range(64)]
    return torch.stack(found, 1).to(F64) * 2 - 1


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["rows", "steps", "entries"])
def test_any_two_rows_steps_and_entries_are_independent(many, dim):
    n = 64 * 64
    apart = many.movedim(dim, 0).flatten(1)
    agreement = (apart @ apart.T / n).fill_diagonal_(0)
    assert agreement.abs().max() < 5.5 / math.sqrt(n)
    assert agreement.square().sum() / (64 * 63) == pytest.approx(1 / n, rel=0.15)


@pytest.mark.parametrize("moved", [(1, -1, 0), (1, 0, -1), (0, 1, 1), (0, 1, -1), (1, 1, 1)])
def test_rows_steps_and_entries_do_not_stand_for_one_another(many, moved):
    shifted = many.roll(moved, (0, 1, 2))
    assert abs((many * shifted).mean()) < 5 / math.sqrt(many.numel())
    assert abs((many * shifted * many.roll(1, 2)).mean()) < 5 / math.sqrt(many.numel())


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["rows", "steps", "entries"])
def test_as_many_are_kept_as_by_chance_not_more_evenly(many, dim):
    sums = many.sum(dim)
    assert sums.var() == pytest.approx(64, rel=0.1)
    assert abs(sums.mean()) < 5 * math.sqrt(64 / sums.numel())


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_kept_fraction_is_one_minus_p(p):
    seed = torch.randint(2**63 - 1, (500,))
    found = RowDraws.at(seed, torch.zeros_like(seed)).kept(p, (20, 20)).to(F64)
    assert abs(found.mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / found.numel())


def test_a_larger_p_keeps_no_more():
    draws = RowDraws.at(torch.arange(20), None)
    assert not (draws.kept(0.6, (50,)) & ~draws.kept(0.5, (50,))).any()
    assert draws.kept(0.0, (50,)).all()


# -- dropout by hand -------------------------------------------------------------------------------------------------

OF = {"input": 0.4, "output": 0.4, "state": (0.4, 0.0)}


def dropped_by_hand(cell: nn.Module, inputs: Tensor, state: ur.SeededState) -> tuple[Tensor, Tree]:
    """A plain loop over an LSTM, its masks written out."""

    def dropped(x: Tensor, t: int) -> Tensor:
        keep = mask(state, t if cell.per == "step" else None, 0.4, x.shape[1:])
        return torch.where(keep, x / 0.6, 0.0)

    (h, c), outputs = state.state, []
    for t, x in enumerate(inputs):
        x = dropped(x, t) if cell.of == "input" else x
        output, (h, c) = cell.cell(x, (dropped(h, t) if cell.of == "state" else h, c))
        outputs.append(dropped(output, t) if cell.of == "output" else output)
    return torch.stack(outputs), ur.SeededState((h, c), state.seed, state.t + len(inputs))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("per", ["step", "sequence"])
@pytest.mark.parametrize("of", OF)
def test_dropout_is_the_loop_by_hand_in_every_engine(of, per, engine):
    cell = ur.DropoutCell(ur.LSTMCell(I, H, dtype=F64), OF[of], of=of, per=per)
    inputs, state = torch.randn(T, B, I, dtype=F64), start_of(cell)
    got, grads = run(cell, engine, inputs, state)
    assert_match(got, dropped_by_hand(cell, inputs, state), "values")
    assert_match(grads, run(cell, "reference", inputs, state)[1], "gradients")


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_what_is_kept_is_divided_by_what_is_kept_on_average(dtype):
    cell = ur.DropoutCell(ur.RNNCell(I, H, dtype=dtype), p=0.25)
    found = cell.dropped(torch.ones(4000, I, dtype=dtype), start_of(cell, 4000))
    assert found.dtype == dtype
    assert set(found.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75, dtype=dtype))}
    assert found.double().mean() == pytest.approx(1, abs=0.03)


def test_a_dropped_nan_stays_nan():
    cell = ur.DropoutCell(ur.RNNCell(I, H), p=0.9)
    assert cell.dropped(torch.full((50, I), float("nan")), start_of(cell, 50)).isnan().all()


def test_the_masks_of_a_sequence_do_not_change_over_time_and_those_of_steps_do():
    delay = ur.as_cell(lambda x, s: (x, s), state=lambda n, **_: torch.zeros(n, 1))
    ones = torch.ones(20, B, 30)
    once = ur.unroll(ur.DropoutCell(delay, 0.5, per="sequence"))(ones)[0]
    anew = ur.unroll(ur.DropoutCell(delay, 0.5, per="step"))(ones)[0]
    assert (once == once[0]).all()
    assert not (once[0, 0] == once[0, 1]).all()
    assert len({tuple(step.flatten().tolist()) for step in anew}) == 20


def test_leaves_of_a_tree_have_masks_of_their_own_and_integers_pass():
    def step(x: Tree, s: Tensor) -> tuple[Tree, Tensor]:
        return x, s

    cell = ur.DropoutCell(ur.as_cell(step, state=lambda n, **_: torch.zeros(n)), p=(0.5, 0.3))
    state = start_of(cell, 3)
    tree = {"a": torch.ones(3, 4, 5), "n": torch.arange(3), "z": torch.ones(3)}
    found, _ = cell(tree, state)
    assert_match(found["a"], mask(state, 0, 0.5, (4, 5)).float() / 0.5)
    assert_match(found["n"], tree["n"])
    assert_match(found["z"], mask(state, 0, 0.3, (), start=4 * 5 + 1).float() / 0.7)


# -- zoneout by hand -------------------------------------------------------------------------------------------------


def zoned_by_hand(cell: nn.Module, inputs: Tensor, state: ur.SeededState) -> tuple[Tensor, Tree]:
    """A plain loop over an LSTM, what stays written out; in evaluation the expectation."""
    (h, c), outputs = state.state, []
    for t, x in enumerate(inputs):
        _, (h_new, c_new) = cell.cell(x, (h, c))
        new_h, new_c = mask(state, t, 0.2, (H,)), mask(state, t, 0.5, (H,), start=H)
        if not cell.training:
            new_h, new_c = 0.8, 0.5
        h, c = h_new * new_h + h * (1 - 1 * new_h), c_new * new_c + c * (1 - 1 * new_c)
        outputs.append(h)
    return torch.stack(outputs), ur.SeededState((h, c), state.seed, state.t + len(inputs))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("training", [True, False])
def test_zoneout_is_the_loop_by_hand_in_every_engine(training, engine):
    cell = ur.ZoneoutCell(ur.LSTMCell(I, H, dtype=F64), p=(0.2, 0.5)).train(training)
    inputs, state = torch.randn(T, B, I, dtype=F64), start_of(cell)
    got, grads = run(cell, engine, inputs, state)
    assert_match(got, zoned_by_hand(cell, inputs, state), "values")
    assert_match(grads, run(cell, "reference", inputs, state)[1], "gradients")


def test_what_stays_is_the_entry_it_was_and_the_output_is_the_state():
    cell = ur.ZoneoutCell(ur.GRUCell(I, H), p=0.5)
    before = start_of(cell, 50, torch.float32)._replace(state=torch.randn(50, H))
    output, after = cell(torch.randn(50, I), before)
    assert output is after.state
    assert torch.equal(after.state == before.state, ~mask(before, 0, 0.5, (H,)))


def test_an_output_that_is_no_leaf_of_the_state_is_the_cells_own():
    token = TokenCell(7, H)
    cell = ur.ZoneoutCell(token, p=0.5)
    state = start_of(cell, B, torch.float32)
    tokens = torch.randint(7, (B,))
    assert_match(cell(tokens, state)[0], token(tokens, state.state)[0])


# -- one sequence, however it is run ---------------------------------------------------------------------------------

WRAPPED: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "input": lambda dtype: ur.DropoutCell(ur.GRUCell(I, H, dtype=dtype), 0.3),
    "state per sequence": lambda dtype: ur.DropoutCell(ur.RNNCell(I, H, dtype=dtype), 0.3, of="state", per="sequence"),
    "zoneout": lambda dtype: ur.ZoneoutCell(ur.LSTMCell(I, H, dtype=dtype), (0.2, 0.4)),
    "all at once": lambda dtype: ur.ZoneoutCell(
        ur.DropoutCell(ur.DropoutCell(nn.GRUCell(I, H, dtype=dtype), 0.2, per="sequence"), 0.3, of="output"), 0.1
    ),
    "nested state": lambda dtype: ur.ZoneoutCell(NestedCell(I, H).to(dtype), p=(0.1, 0.2, 0.3)),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", WRAPPED)
def test_windows_with_the_state_carried_are_one_run(kind, engine):
    cell = WRAPPED[kind](F64)
    rnn, inputs, state = ur.unroll(cell, engine=engine), torch.randn(10, B, I, dtype=F64), start_of(cell)
    whole, last = rnn(inputs, state)
    one, between = rnn(inputs[:5], state)
    other, end = rnn(inputs[5:], between)
    two = map_leaves(lambda a, b: torch.cat([a, b]), one, other)
    # torch may round matrix products of other sizes otherwise, those of the bare cell too.
    assert_match((two, end), (whole, last), bound=1e-14)
    if engine == "reference":
        assert all(map(torch.equal, leaves((two, end)), leaves((whole, last))))


def halving() -> nn.Module:
    """A cell in which nothing is rounded: halves of halves."""

    def step(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return h + x, 0.5 * h + x

    cell = ur.as_cell(step, state=lambda n, dtype=None, **_: torch.ones(n, 9, dtype=dtype))
    inner = ur.ZoneoutCell(ur.DropoutCell(cell, 0.5, of="output", per="sequence"), 0.25)
    return ur.DropoutCell(inner, 0.5)


EXACT = {engine: ur.unroll(halving(), engine=engine) for engine in ENGINES}


@settings(max_examples=20, deadline=None)
@given(steps=st.integers(2, 12), cut=st.integers(1, 11), rows=st.integers(1, 4), seed=st.integers(0, 2**63 - 1))
@pytest.mark.parametrize("engine", ENGINES)
def test_wherever_a_sequence_is_cut_its_masks_are_the_same_to_the_last_bit(engine, steps, cut, rows, seed):
    rnn, inputs = EXACT[engine], torch.ones(steps, rows, 9)
    state = start_of(rnn.cell, rows, torch.float32)
    state = state._replace(seed=state.seed ^ seed)
    parts, following = [], state
    for part in inputs.split(min(cut, steps)):
        outputs, following = rnn(part, following)
        parts.append(outputs)
    assert_match((torch.cat(parts), following), EXACT["reference"](inputs, state), bound=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", WRAPPED)
def test_every_engine_gives_the_references_values_and_gradients(kind, engine, dtype):
    cell = WRAPPED[kind](dtype)
    inputs, state = torch.randn(T, B, I, dtype=dtype), start_of(cell, B, dtype)
    assert_match(run(cell, engine, inputs, state), run(cell, "reference", inputs, state))


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_row_has_its_own_masks_whatever_the_batch_is(kind):
    rnn, inputs = ur.unroll(WRAPPED[kind](F64)), torch.randn(T, 7, I, dtype=F64)
    state = start_of(rnn.cell, 7)
    outputs, _ = rnn(inputs, state)
    rows = torch.tensor([5, 0, 3])
    some, _ = rnn(inputs[:, rows], map_leaves(lambda x: x[rows], state))
    assert_match(some, map_leaves(lambda x: x[:, rows], outputs))


@pytest.mark.parametrize("engine", ENGINES)
def test_one_wrapper_runs_under_two_seeds(engine):
    cell = WRAPPED["input"](F64)
    rnn, inputs = ur.unroll(cell, engine=engine), torch.randn(T, B, I, dtype=F64)
    one, other = start_of(cell), start_of(cell)
    first, second = rnn(inputs, one)[0], rnn(inputs, other)[0]
    assert not torch.allclose(first, second)
    assert_match(rnn(inputs, one)[0], first, bound=0)
    assert_match(rnn(inputs, other)[0], second, bound=0)


def test_the_seed_is_drawn_from_torchs_generator_and_asking_for_a_plan_draws_none():
    rnn, inputs = ur.unroll(WRAPPED["zoneout"](F64)), torch.randn(T, B, I, dtype=F64)
    torch.manual_seed(5)
    first, second = rnn(inputs)[0], rnn(inputs)[0]
    torch.manual_seed(5)
    rnn.plan(inputs)
    assert_match(rnn(inputs)[0], first, bound=0)
    assert_match(rnn(inputs)[0], second, bound=0)
    assert not torch.allclose(first, second)


def test_the_seeds_of_the_rows_differ_and_time_starts_at_zero():
    state = start_of(WRAPPED["input"](F64), 100)
    assert len(set(state.seed.tolist())) == 100
    assert not state.t.any()
    assert state.seed.dtype == state.t.dtype == torch.int64


# -- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("of", OF)
def test_in_evaluation_dropout_is_the_bare_cell_and_nothing_is_drawn(of, engine):
    bare = ur.LSTMCell(I, H, dtype=F64)
    cell, inputs = ur.DropoutCell(bare, OF[of], of=of).eval(), torch.randn(T, B, I, dtype=F64)
    before = torch.get_rng_state()
    outputs, state = ur.unroll(cell, engine=engine)(inputs)
    assert torch.equal(torch.get_rng_state(), before)
    assert_match((outputs, state.state), ur.unroll(bare, engine=engine)(inputs), bound=0)
    assert state.t.tolist() == [T] * B


@pytest.mark.parametrize("engine", ENGINES)
def test_the_mode_may_change_after_a_recording_and_so_may_p(engine):
    cell = ur.DropoutCell(ur.LSTMCell(I, H, dtype=F64), 0.4)
    rnn, inputs, state = ur.unroll(cell, engine=engine), torch.randn(T, B, I, dtype=F64), start_of(cell)
    trained = rnn(inputs, state)
    rnn.eval()
    assert_match(rnn(inputs, state)[0], ur.unroll(cell.cell, engine="reference")(inputs, state.state)[0])
    rnn.train()
    assert_match(rnn(inputs, state), trained, bound=0)
    cell.p = 0.1
    assert_match(rnn(inputs, state), ur.unroll(cell, engine="reference")(inputs, state))
    assert not torch.allclose(rnn(inputs, state)[0], trained[0])


@pytest.mark.parametrize("make", [lambda c: ur.DropoutCell(c, 0), lambda c: ur.ZoneoutCell(c, 0)])
def test_with_p_zero_a_wrapper_is_the_bare_cell(make):
    bare, inputs = ur.LSTMCell(I, H, dtype=F64), torch.randn(T, B, I, dtype=F64)
    outputs, state = ur.unroll(make(bare))(inputs)
    assert_match((outputs, state.state), ur.unroll(bare)(inputs), bound=0)


def test_training_may_go_on_from_a_state_that_began_in_evaluation():
    cell = WRAPPED["input"](F64).eval()
    state = start_of(cell, 40)
    assert len(set(state.seed.tolist())) == 40
    found = cell.train().dropped(torch.ones(40, 64), state)
    assert len({tuple(row.tolist()) for row in found}) == 40


# -- as modules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("kind", WRAPPED)
def test_a_copy_gives_the_same_numbers(kind, duplicate):
    rnn, inputs = ur.unroll(WRAPPED[kind](F64)), torch.randn(T, B, I, dtype=F64)
    state = start_of(rnn.cell)
    want = rnn(inputs, state)
    assert_match(duplicate(rnn)(inputs, duplicate(state)), want, bound=0)


def test_a_context_goes_through_to_the_cell_that_takes_one():
    cell, context = ur.DropoutCell(AttendingCell(I, H).double(), 0.3), torch.randn(B, 4, H, dtype=F64)
    inputs, state = torch.randn(T, B, I, dtype=F64), start_of(cell)
    want = run(cell, "reference", inputs, state, context=context)
    assert_match(run(cell, "auto", inputs, state, context=context), want)
    with pytest.raises(InputError, match="takes a third argument"):
        ur.unroll(cell)(inputs)
    with pytest.raises(InputError, match="no context"):
        ur.unroll(WRAPPED["input"](F64))(inputs, context=context)


@pytest.mark.parametrize("kind", ["input", "zoneout"])
def test_copies_verify_and_draw_take_wrapped_cells(kind, capsys):
    cell = WRAPPED[kind](F64)
    rnn, inputs, state = ur.unroll(cell), torch.randn(T, B, I, dtype=F64), start_of(cell)
    assert ur.verify(rnn, inputs)
    copies = ur.copies(rnn, inputs, state)
    assert_match(copies.outputs, rnn(inputs, state)[0])
    copies.backward(uneven_loss(copies.outputs))
    assert_match(copies.weight_grad["cell.weight_hh"].sum(0), cell.cell.weight_hh.grad)
    ur.draw(rnn, inputs)
    assert "cell.weight_hh" in capsys.readouterr().out


@pytest.mark.parametrize("p", [-0.1, 1, 1.0, 2, float("nan"), float("inf"), True, "0.5", None, (0.1, 1.5), [None]])
@pytest.mark.parametrize("wrap", [ur.DropoutCell, ur.ZoneoutCell])
def test_what_is_no_probability_is_refused(wrap, p):
    with pytest.raises(OptionError, match="p must be a number from 0 up to, but not including, 1"):
        wrap(ur.GRUCell(I, H), p)


def test_other_options_are_refused_with_those_there_are():
    with pytest.raises(OptionError, match="of must be one of 'input', 'output', 'state', got 'weights'"):
        ur.DropoutCell(ur.GRUCell(I, H), 0.5, of="weights")
    with pytest.raises(OptionError, match="per must be one of 'step', 'sequence', got 'batch'"):
        ur.DropoutCell(ur.GRUCell(I, H), 0.5, per="batch")


@pytest.mark.parametrize("training", [True, False])
def test_a_p_that_does_not_fit_the_leaves_is_refused(training):
    inputs = torch.randn(T, B, I)
    for cell, message in [
        (ur.DropoutCell(ur.LSTMCell(I, H), (0.1, 0.2)), "floating leaf of the input: that of LSTMCell has 1"),
        (ur.ZoneoutCell(ur.LSTMCell(I, H), (0.1,)), "floating leaf of the state: that of LSTMCell has 2"),
        (ur.DropoutCell(ur.LSTMCell(I, H), 0.1, of="state"), "one p for each of the 2 floating leaves"),
    ]:
        with pytest.raises(OptionError, match=message):
            ur.unroll(cell.train(training))(inputs)
    with pytest.raises(OptionError, match="holds no floating numbers"):
        ur.unroll(ur.DropoutCell(TokenCell(7, H), 0.1).train(training))(torch.randint(7, (T, B)))


# -- how it is planned -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRAPPED)
def test_no_mask_is_made_inside_of_a_loop_and_the_loop_is_emitted_as_c(kind):
    plan = ur.unroll(WRAPPED[kind](F64)).plan(torch.randn(T, B, I, dtype=F64))
    assert plan.engine == "native", plan.why
    assert plan.loops == 1
    hashing = [o for o in plan.operations if "int64" in o.result or "bool" in o.result]
    assert {o.place for o in hashing} <= {"once", "before", "after"}
    assert {o.place for o in hashing if o.name.startswith("aten.ge")} <= {"before", "after"}
    assert not [o for o in plan.operations if "step by step" in o.reason], "proved to act row by row"
    assert [o.name for o in plan.operations if o.reason.startswith("only counts")][-1] == "aten.add.Tensor"


class TickingCell(nn.Module):
    """Hands on integers as themselves plus a constant, in every way there is, and a sum that they go into."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tree:
        start = torch.arange(batch_size, dtype=self.dtype)
        return (start, start.clone(), start.view(-1, 1).expand(-1, 2).clone(), torch.zeros(batch_size, dtype=dtype))

    def forward(self, input: Tensor, state: Tree) -> tuple[Tree, Tree]:
        up, down, wide, total = state
        total = torch.tanh(total * 0.5 + input + up.to(input.dtype))
        return (up, wide, total), (up + 1, -2 + down, torch.add(wide, 100), total)


@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8])
def test_a_leaf_that_counts_is_no_loop_and_exact_even_where_it_wraps_around(dtype, engine):
    cell, inputs = TickingCell(dtype), torch.randn(7, B, dtype=F64)
    rnn = ur.unroll(cell, engine=engine)
    assert (rnn.plan(inputs).engine, rnn.plan(inputs).loops) == (engine, 1)
    assert_match(rnn(inputs), ur.unroll(cell, engine="reference")(inputs))


def test_what_a_counter_computes_is_read_by_other_operations_too():
    rnn = ur.unroll(CountingCell(I))
    plan = rnn.plan(torch.randn(T, B, I))
    assert (plan.engine, plan.loops) == ("native", 1)


@pytest.mark.parametrize(
    "following",
    [
        lambda n, x: n + n,
        lambda n, x: torch.add(n, 3, alpha=2) * 2,
        lambda n, x: 1 - n,
        lambda n, x: (n + 1).remainder(3),
        lambda n, x: n + x.long(),
    ],
    ids=["twice", "alpha", "from one", "modulo", "by the input"],
)
def test_integers_that_do_not_merely_count_are_run_as_they_are(following):
    def step(x: Tensor, s: Tree) -> tuple[Tree, Tree]:
        return s[0], (following(s[0], x), s[1] + x)

    cell = ur.as_cell(step, state=lambda n, dtype=None, **_: (torch.arange(n), torch.zeros(n, dtype=dtype)))
    inputs = torch.randn(T, B, dtype=F64)
    assert_match(ur.unroll(cell)(inputs), ur.unroll(cell, engine="reference")(inputs))


def test_a_floating_clock_is_added_up_as_the_cell_does_it():
    cell = ur.as_cell(lambda x, s: (s + x, s + 0.1), state=lambda n, dtype=None, **_: torch.zeros(n, dtype=dtype))
    inputs = torch.zeros(100, B)
    assert_match(ur.unroll(cell)(inputs), ur.unroll(cell, engine="reference")(inputs), bound=0)


OUTPUT_WRAPPERS = {
    "residual": lambda: ur.ResidualCell(ur.GRUCell(H, H)),
    "projected": lambda: ur.ProjectedCell(ur.GRUCell(H, H), H, 2, bias=True),
    "residual around projected": lambda: ur.ResidualCell(ur.ProjectedCell(ur.GRUCell(H, 2 * H), 2 * H, H)),
}


@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("name", OUTPUT_WRAPPERS)
def test_what_changes_outputs_runs_on_every_engine(name, engine):
    cell = OUTPUT_WRAPPERS[name]().double()
    assert_as_reference(cell, torch.randn(5, 3, H, dtype=torch.float64), engine=engine)


def test_residual_adds_the_input_and_projection_is_the_linear_layers():
    cell, x = ur.GRUCell(H, H), torch.randn(5, 3, H)
    plain, state = ur.unroll(cell)(x)
    outputs, last = ur.unroll(ur.ResidualCell(cell))(x)
    torch.testing.assert_close(outputs, plain + x)
    assert torch.equal(last, state)
    projected = ur.ProjectedCell(cell, H, 2)
    torch.testing.assert_close(ur.unroll(projected)(x)[0], plain @ projected.projection.weight.t())


def test_a_residual_connection_needs_outputs_like_its_inputs():
    with pytest.raises(ur.CellError, match=r"GRUCell reads \[2, 3\] and gives out \[2, 5\]"):
        ur.unroll(ur.ResidualCell(ur.GRUCell(3, 5)))(torch.randn(4, 2, 3))
