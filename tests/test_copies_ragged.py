"""Copies of rows that end, start afresh or run backwards, and of layers and directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import unrolled as ur
from matching import assert_match
from problems import AttendingCell, CountingCell, H, I, NestedCell, learned, uneven_loss
from unrolled.execution import run as bptt_run
from unrolled.trees import leaves, map_leaves

F64 = torch.float64
T, B = 5, 4
LENGTHS = [3, 5, 0, 2]
RESETS = torch.tensor([[0, 0, 0, 1], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0]]).bool()

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lengths": {"lengths": LENGTHS},
    "resets": {"resets": RESETS},
    "both": {"lengths": LENGTHS, "resets": RESETS},
}


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "forwards": lambda: ur.unroll(learned()),
    "reverse": lambda: ur.unroll(learned(), reverse=True),
    "nested state": lambda: ur.unroll(NestedCell(I, H)),
    "an integer in the state, reverse": lambda: ur.unroll(CountingCell(I), reverse=True),
    "bidirectional": lambda: ur.Bidirectional(learned(), learned(ur.GRUCell)),
    "two layers": lambda: ur.stack([learned(), learned(ur.GRUCell, H)]),
    "two bidirectional layers": lambda: ur.stack([learned(), learned(ur.GRUCell, 2 * H)], bidirectional=True),
    "a stack in a stack": lambda: ur.stack([ur.stack([ur.GRUCell(I, H)]), learned(ur.RNNCell, H)]),
    "LSTM": lambda: ur.LSTM(I, H, num_layers=2, bidirectional=True),
    "LSTM with projections": lambda: ur.LSTM(I, H, num_layers=2, proj_size=2),
    "GRU, bidirectional": lambda: ur.GRU(I, H, bidirectional=True),
    "RNN": lambda: ur.RNN(I, H),
}


def inputs_of(steps: int = T, batch: int = B) -> Tensor:
    return torch.randn(steps, batch, I, dtype=F64)


def lists(copies: ur.Copies | ur.LayeredCopies) -> list[ur.Copies]:
    return [copies] if isinstance(copies, ur.Copies) else [one for part in copies for one in lists(part)]


def is_one_layer(rnn: nn.Module, copies: Any) -> bool:
    return isinstance(rnn, ur.RNN | ur.LSTM | ur.GRU) and isinstance(copies, ur.Copies)


def assert_shares_add_up(rnn: nn.Module, copies: Any) -> None:
    """Every trained parameter's `.grad` is the sum of shares in those copies that have it, and all have some."""
    sums: dict[int, Tensor] = {}
    for one in lists(copies):
        for name, weight in one.weights.items():
            shares = one.weight_grad[name]
            assert shares.shape == (len(one), *weight.shape)
            norms = torch.stack([torch.linalg.vector_norm(share) for share in shares])
            assert_match(one.weight_grad_norm[name], norms)
            sums[id(weight)] = sums.get(id(weight), 0) + shares.sum(0) + one.initial_grad[name]
    parameters = dict(rnn.named_parameters())
    assert {id(p) for p in parameters.values()} == set(sums)
    for name, parameter in parameters.items():
        assert_match(sums[id(parameter)], parameter.grad, name)
    assert any(p.grad.abs().max() > 0 for p in parameters.values())


# -- what the module returns, and shares that add up -----------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_state_and_grad_are_the_modules_own_and_shares_add_up(name, options):
    rnn, inputs = NETWORKS[name]().double(), inputs_of()
    outputs, state = rnn(inputs, **OPTIONS[options])
    copies = ur.copies(rnn, inputs, **OPTIONS[options])
    if is_one_layer(rnn, copies):
        state = map_leaves(lambda h: h.squeeze(0), state)
    assert_match(copies.outputs, outputs)
    assert_match(copies.state, state)
    parameters = list(rnn.parameters())
    want = torch.autograd.grad(uneven_loss(outputs, state), parameters, materialize_grads=True)
    copies.backward(uneven_loss(copies.outputs, copies.state))
    assert_match([p.grad for p in parameters], list(want))
    assert_shares_add_up(rnn, copies)


@pytest.mark.parametrize("name", ["forwards", "reverse", "two bidirectional layers", "LSTM"])
def test_a_state_from_the_caller_is_no_share_but_fresh_states_of_resets_are(name):
    rnn, inputs = NETWORKS[name]().double(), inputs_of()
    state = map_leaves(lambda x: torch.randn_like(x).requires_grad_(), rnn(inputs)[1])
    outputs, last = rnn(inputs, state, **OPTIONS["both"])
    wanted = torch.autograd.grad(uneven_loss(outputs, last), leaves(state))
    copies = ur.copies(rnn, inputs, state, **OPTIONS["both"])
    assert_match(copies.outputs, outputs)
    assert_match(copies.state, last)
    copies.backward(uneven_loss(copies.outputs, copies.state))
    assert_match([leaf.grad for leaf in leaves(state)], list(wanted))
    assert_shares_add_up(rnn, copies)
    shares = [one.initial_grad[key] for one in lists(copies) for key in one.initial_grad if key.startswith("initial")]
    assert all(share.abs().max() > 0 for share in shares)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["forwards", "two bidirectional layers", "LSTM"])
def test_batch_first_is_only_a_layout(name, batch_first):
    rnn, inputs = NETWORKS[name]().double(), inputs_of()
    want = rnn(inputs, lengths=LENGTHS, resets=RESETS)[0]
    rnn.batch_first = batch_first
    given, resets = (inputs.transpose(0, 1), RESETS.T) if batch_first else (inputs, RESETS)
    copies = ur.copies(rnn, given, lengths=LENGTHS, resets=resets)
    assert_match(copies.outputs, want.transpose(0, 1) if batch_first else want)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_packed_sequence_has_copies_and_packed_outputs(name):
    rnn, lengths = NETWORKS[name]().double(), torch.tensor([3, 5, 1, 2])
    packed = pack_padded_sequence(inputs_of(), lengths, enforce_sorted=False)
    outputs, state = rnn(packed)
    copies = ur.copies(rnn, packed)
    assert_match(copies.outputs, outputs)
    assert isinstance(copies.outputs["h"] if name == "nested state" else copies.outputs, PackedSequence)
    assert_match(copies.state, map_leaves(lambda h: h.squeeze(0), state) if is_one_layer(rnn, copies) else state)
    copies.backward(uneven_loss(copies.outputs))
    assert_shares_add_up(rnn, copies)
    for one in lists(copies):
        assert [len(copy.rows) for copy in one] == packed.batch_sizes.tolist()
        assert torch.equal(one[1].rows, packed.sorted_indices[: packed.batch_sizes[1]])


@settings(max_examples=25, deadline=None)
@given(data=st.data(), reverse=st.booleans(), reset=st.booleans())
def test_any_lengths_and_resets(data, reverse, reset):
    steps, batch = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    lengths = data.draw(st.lists(st.integers(0, steps), min_size=batch, max_size=batch))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    rnn, inputs = ur.unroll(learned(ur.GRUCell), reverse=reverse).double(), inputs_of(steps, batch)
    resets = torch.rand(steps, batch) < 0.4 if reset else None
    outputs, state = rnn(inputs, lengths=lengths, resets=resets)
    copies = ur.copies(rnn, inputs, lengths=lengths, resets=resets)
    assert len(copies) == max(lengths) or min(lengths) == steps
    assert_match(copies.outputs, outputs)
    assert_match(copies.state, state)
    copies.backward(uneven_loss(copies.outputs, copies.state))
    wanted = torch.autograd.grad(uneven_loss(outputs, state), list(rnn.parameters()), materialize_grads=True)
    found = [copies.weight_grad[name].sum(0) + copies.initial_grad[name] for name in copies.weight_grad]
    assert_match(found, list(wanted))


# -- one copy --------------------------------------------------------------------------------------------------------


def test_rows_are_those_that_are_alive_and_tensors_have_them_in_that_order():
    inputs = inputs_of()
    copies = ur.copies(ur.unroll(learned()).double(), inputs, lengths=LENGTHS)
    assert [copy.rows.tolist() for copy in copies] == [[1, 0, 3], [1, 0, 3], [1, 0], [1], [1]]
    for copy in copies:
        assert torch.equal(copy.input, inputs[copy.t][copy.rows])
        assert torch.equal(copy.output, copies.outputs[copy.t][copy.rows])
    plain = ur.copies(ur.unroll(learned()).double(), inputs)
    assert all(torch.equal(copy.rows, torch.arange(B)) for copy in plain)


class Walked(NamedTuple):
    """What one step of a hand-written loop saw, as tensors of their own: so gradients by them can be told apart."""

    handed: Tensor
    saw: Tensor
    used: Tensor
    handed_on: Tensor


def by_hand(cell: nn.Module, inputs: Tensor, start: Tensor, lengths: Sequence[int], resets: Tensor, reverse: bool):
    """For each row alone: the loop over its steps; `(t, row) -> Walked`, outputs and last states."""
    fresh = cell.initial_state(1, dtype=F64)
    walked, outputs = {}, torch.zeros(T, B, H, dtype=F64).unbind()
    outputs = [list(step.unbind()) for step in outputs]
    last = [start[row : row + 1] for row in range(B)]
    for row, length in enumerate(lengths):
        state = start[row : row + 1]
        for t in reversed(range(length)) if reverse else range(length):
            # `resets` at t: afresh just before step t; walked backwards, that is on the way from t to t - 1.
            cut = bool(resets[t, row]) if not reverse else t + 1 < length and bool(resets[t + 1, row])
            handed = state * 1
            saw = (fresh if cut else handed) * 1
            used = saw * 1
            output, state = cell(inputs[t, row : row + 1], used)
            state = state * 1
            walked[t, row] = Walked(handed, saw, used, state)
            outputs[t][row] = output[0]
        last[row] = state
    return walked, torch.stack([torch.stack(step) for step in outputs]), torch.cat(last)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_states_and_their_gradients_are_those_of_a_loop_over_each_row(options, reverse):
    cell, inputs = learned(ur.GRUCell).double(), inputs_of()
    start = torch.randn(B, H, dtype=F64).requires_grad_()
    lengths = OPTIONS[options].get("lengths", [T] * B)
    resets = OPTIONS[options].get("resets", torch.zeros(T, B, dtype=torch.bool))
    walked, outputs, last = by_hand(cell, inputs, start, lengths, resets, reverse)
    copies = ur.copies(ur.unroll(cell, reverse=reverse), inputs, start, **OPTIONS[options])
    assert_match(copies.outputs, outputs)
    assert_match(copies.state, last)
    loss = uneven_loss(outputs, last) + sum(uneven_loss(walked[key].saw) for key in sorted(walked))
    saws = [copy.state[(copy.rows == row).nonzero()[0]] for row in range(B) for copy in copies if row in copy.rows]
    order = [(copy.t, row) for row in range(B) for copy in copies if row in copy.rows]
    assert sorted(order) == sorted(walked)
    places = dict(zip(order, saws, strict=True))
    copies.backward(uneven_loss(copies.outputs, copies.state) + sum(uneven_loss(places[key]) for key in sorted(places)))

    def by(tensor: Tensor) -> Tensor:
        return torch.autograd.grad(loss, tensor, retain_graph=True, materialize_grads=True)[0]

    for copy in copies:
        for place, row in enumerate(copy.rows.tolist()):
            step, what = walked[copy.t, row], f"copy {copy.t}, row {row}"
            assert_match(copy.state[place], step.saw[0], what)
            assert_match(copy.next_state[place], step.handed_on[0], what)
            assert_match(copy.state_grad[place], by(step.used)[0], what)
            assert_match(copy.total_state_grad[place], by(step.handed)[0], what)


def test_a_reversed_row_is_reset_on_its_way_down_and_padding_has_no_say():
    """`resets` at t cuts between t - 1 and t, whichever way the state goes; a row begins with the caller's state."""
    cell, inputs, start = learned(ur.GRUCell).double(), inputs_of(), torch.randn(B, H, dtype=F64)
    copies = ur.copies(ur.unroll(cell, reverse=True), inputs, start, lengths=LENGTHS, resets=RESETS)
    for row, length in enumerate(LENGTHS):
        alone = (
            ur.copies(
                ur.unroll(cell, reverse=True), inputs[:length, [row]], start[[row]], resets=RESETS[:length, [row]]
            )
            if length
            else []
        )
        for copy in alone:
            place = copies[copy.t].rows.tolist().index(row)
            assert_match(copies[copy.t].state[place], copy.state[0])


def test_a_reset_row_hands_no_gradient_back():
    copies = ur.copies(ur.unroll(learned()).double(), inputs_of(), resets=RESETS)
    copies.backward(uneven_loss(copies.outputs[-1]))
    for copy in copies:
        reset = RESETS[copy.t]
        for part, total in zip(copy.state_grad, copy.total_state_grad, strict=True):
            assert (total[reset] == 0).all()
            assert_match(part[~reset], total[~reset])
    assert all((part[RESETS[-1]] != 0).any() for part in copies[-1].state_grad)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_context_goes_to_the_rows_that_are_alive(reverse):
    rnn = ur.unroll(AttendingCell(I, H).double(), reverse=reverse)
    inputs, context = inputs_of(), torch.randn(B, 3, H, dtype=F64).requires_grad_()
    outputs, state = rnn(inputs, lengths=LENGTHS, context=context)
    (want,) = torch.autograd.grad(uneven_loss(outputs, state), context)
    copies = ur.copies(rnn, inputs, lengths=LENGTHS, context=context)
    assert_match(copies.outputs, outputs)
    copies.backward(uneven_loss(copies.outputs, copies.state))
    assert_match(context.grad, want)
    assert_shares_add_up(rnn, copies)


# -- slices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_a_slice_of_ragged_copies_is_padded_and_has_each_rows_state_after_it(reverse):
    rnn, inputs = ur.unroll(learned(ur.GRUCell), reverse=reverse).double(), inputs_of()
    copies = ur.copies(rnn, inputs, lengths=LENGTHS)
    for part in (copies[1:4], copies[3:], copies[3:0:-2]):
        want = torch.stack([copies.outputs[copy.t] for copy in part])
        assert_match(part.outputs, want, bound=0)
    lengths = torch.tensor(LENGTHS)
    for t in range(1, T):
        if reverse:  # from t on, as if the steps below were not there
            alone = rnn(inputs[t:], lengths=(lengths - t).clamp(min=0))[1]
        else:
            alone = rnn(inputs[:t], lengths=lengths.clamp(max=t))[1]
        part = copies[t:] if reverse else copies[:t]
        assert_match(part.state, alone, f"state of {part}")


def test_copies_of_rows_without_any_step():
    rnn = ur.unroll(learned(ur.GRUCell)).double()
    outputs, state = rnn(inputs_of(), lengths=[0] * B)
    copies = ur.copies(rnn, inputs_of(), lengths=[0] * B)
    assert len(copies) == 0
    assert_match(copies.outputs, outputs, bound=0)
    assert_match(copies.state, state, bound=0)
    copies.backward(uneven_loss(copies.state))
    assert_match(copies.initial_grad["initial_h"], rnn.cell.initial_h.grad)
    assert copies.weight_grad["weight_hh"].shape == (0, 3 * H, H)


# -- layers and directions -------------------------------------------------------------------------------------------


def test_layers_and_directions_are_pointed_at_by_number_and_name():
    rnn = ur.LSTM(I, H, num_layers=2, bidirectional=True).double()
    copies = ur.copies(rnn, inputs_of(), lengths=LENGTHS)
    assert (len(copies), len(copies[0]), len(copies[1].forwards)) == (2, 2, 5)
    assert copies[1][1] is copies[1].backwards
    assert copies[-1:] == (copies[1],)
    copies.backward(uneven_loss(copies.outputs))
    suffixes = [next(iter(one.weight_grad)).removeprefix("weight_ih") for one in lists(copies)]
    assert suffixes == ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    assert all(len(one.weight_grad) == 4 for one in lists(copies))
    below = torch.cat([copies[0].forwards.outputs, copies[0].backwards.outputs], -1)
    assert_match(copies[1].forwards[2].input, below[2][copies[1].forwards[2].rows], bound=0)
    assert all(word in repr(copies) for word in ("2", "[1] Copies(LSTM, 5", "weight_ih_l1_reverse", "there"))
    with pytest.raises(IndexError, match="2 parts, got index 2"):
        copies[2]
    with pytest.raises(AttributeError, match="forwards"):
        copies.forwards  # noqa: B018


def test_one_sequence_without_a_batch_has_outputs_and_state_without_one():
    rnn, inputs = ur.GRU(I, H, num_layers=2).double(), torch.randn(T, I, dtype=F64)
    copies = ur.copies(rnn, inputs)
    assert_match((copies.outputs, copies.state), rnn(inputs))
    assert copies[0][0].input.shape == (1, I)


@pytest.mark.parametrize("name", ["torch.nn's", "stack"])
def test_dropout_between_layers_is_drawn_as_in_the_call(name):
    rnn = (
        ur.GRU(I, H, 3, dropout=0.5) if name != "stack" else ur.stack([ur.GRUCell(I, H), ur.GRUCell(H, H)], dropout=0.5)
    )
    rnn, inputs = rnn.double(), inputs_of()
    torch.manual_seed(1)
    want = rnn(inputs, lengths=LENGTHS)
    torch.manual_seed(1)
    copies = ur.copies(rnn, inputs, lengths=LENGTHS)
    assert_match((copies.outputs, copies.state), want)
    copies.backward(uneven_loss(copies.outputs))
    assert_shares_add_up(rnn, copies)
    assert (copies[1][0].input == 0).any()


def test_a_cell_in_two_layers_has_a_share_in_each():
    cell = ur.GRUCell(H, H).double()
    rnn = ur.stack([cell, cell])
    copies = ur.copies(rnn, torch.randn(T, B, H, dtype=F64))
    copies.backward(uneven_loss(copies.outputs))
    assert_shares_add_up(rnn, copies)


def test_a_parametrized_layer_has_the_shares_of_its_own_suffix():
    rnn = ur.GRU(I, H, 2).double()
    parametrizations.weight_norm(rnn, "weight_hh_l1")
    copies = ur.copies(rnn, inputs_of())
    copies.backward(uneven_loss(copies.outputs))
    assert "parametrizations.weight_hh_l1.original0" in copies[1].weight_grad
    assert not [name for name in copies[0].weight_grad if "l1" in name]
    assert_shares_add_up(rnn, copies)


def test_a_layer_that_reads_another_layers_weight_is_refused():
    class Tied(ur.RNN):
        def step(self, suffix, input, state):
            output, state = super().step(suffix, input, state)
            return output + self.bias_hh_l0.sum(), state

    with pytest.raises(ur.CellError, match=r"copy 0 of Tied reads layer\.bias_hh_l0"):
        ur.copies(Tied(I, H, 2).double(), inputs_of())


def test_a_loss_of_one_copy_in_one_layer_reaches_what_is_below_it_alone():
    rnn = ur.stack([ur.GRUCell(I, H), ur.GRUCell(H, H), ur.GRUCell(H, H)]).double()
    copies = ur.copies(rnn, inputs_of())
    copies.backward(copies[1][2].output.sum())
    assert (copies[1].weight_grad_norm["weight_ih"] > 0).tolist() == [True, True, True, False, False]
    assert (copies[0].weight_grad_norm["weight_ih"] > 0).tolist() == [True, True, True, False, False]
    assert copies[2].weight_grad_norm["weight_ih"].count_nonzero() == 0
    assert all(p.grad is None for p in rnn.layers[2].parameters())
    before = copies[0][0].state_grad.clone()
    copies.backward(copies[1][2].output.sum())
    assert_match(copies[0][0].state_grad, 2 * before)


def test_before_backward_and_with_a_foreign_loss_layered_copies_refuse():
    rnn = ur.stack([ur.GRUCell(I, H), ur.GRUCell(H, H)]).double()
    copies, other = ur.copies(rnn, inputs_of()), ur.copies(rnn, inputs_of())
    with pytest.raises(ur.GradientError, match=r"copies\.backward\(loss\)"):
        copies[1][0].state_grad  # noqa: B018
    with pytest.raises(ur.GradientError, match="not of another run"):
        copies.backward(other.outputs.sum())
    with pytest.raises(ur.GradientError, match="scalar"):
        copies.backward(copies.outputs)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [ur.copies, ur.verify])
@pytest.mark.parametrize("name", ["forwards", "reverse", "two bidirectional layers", "LSTM", "RNN"])
def test_what_the_call_refuses_is_refused(name, call):
    rnn, inputs = NETWORKS[name]().double(), inputs_of()
    for error, said, arguments in [
        (ur.InputError, "lengths", {"lengths": [1, 2]}),
        (ur.InputError, "resets", {"resets": RESETS.float()}),
        (ur.InputError, "context", {"context": torch.ones(B, 1, dtype=F64)}),
        (ur.StateError, "state", {"state": torch.ones(1, 1, dtype=F64)}),
    ]:
        with pytest.raises(error, match=said):
            call(rnn, inputs, **arguments)
    with pytest.raises(ur.InputError, match="leave lengths= out"):
        call(rnn, pack_padded_sequence(inputs, torch.tensor([5, 4, 2, 1])), lengths=[5, 4, 2, 1])


@pytest.mark.parametrize("call", [ur.copies, ur.verify])
def test_a_cell_that_couples_rows_is_refused_with_lengths(call):
    class Coupled(nn.Module):
        def forward(self, input, state):
            state = torch.tanh(input + state.mean(0))
            return state, state

    with pytest.raises(ur.InputError, match="row by row"):
        call(ur.unroll(Coupled()), torch.randn(T, B, I), torch.zeros(B, I), lengths=LENGTHS)


@pytest.mark.parametrize("option", ["lengths", "resets"])
@pytest.mark.parametrize("call", [ur.copies, ur.verify, lambda rnn, inputs, **given: rnn(inputs, **given)])
def test_a_state_without_rows_is_refused_with_lengths_and_with_resets(call, option):
    def counting(input, state):
        clock, hidden = state
        return input + hidden, (clock + 1, hidden + input)

    cell = ur.as_cell(counting, state=lambda batch, **_: (torch.zeros(()), torch.zeros(batch, I)))
    with pytest.raises(ur.InputError, match=rf"{option} need a state.*state\[0\] of counting is float32\[\]"):
        call(ur.unroll(cell), torch.randn(T, B, I), **{option: OPTIONS["both"][option]})


def test_an_error_in_a_layer_says_which():
    rnn = ur.stack([ur.GRUCell(I, H), lambda x, h: (x + h.expand(B + 1, H), h)])
    with pytest.raises(ur.CellError, match=r"layer 1.*layer 0"):
        ur.copies(rnn, torch.randn(T, B, I), (None, torch.zeros(B, H)))


# -- verification ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["plain", "both"])
@pytest.mark.parametrize("name", ["reverse", "two bidirectional layers", "LSTM"])
def test_every_engine_gives_the_references_numbers(name, options):
    found = ur.verify(NETWORKS[name](), inputs_of(), **OPTIONS[options])
    assert found, str(found)
    assert [(check.engine, check.ran) for check in found.checks] == 2 * [("eager", "eager"), ("native", "native")]


def test_verification_names_all_engines_that_ran_and_takes_packed_sequences_and_dropout():
    rnn = ur.stack([ur.GRUCell(I, H), ur.ZoneoutCell(ur.GRUCell(H, H), p=0.1), Unrecordable()], dropout=0.5)
    packed = pack_padded_sequence(inputs_of(), torch.tensor([5, 4, 2, 1]))
    random = torch.get_rng_state()
    found = ur.verify(rnn, packed)
    assert found, str(found)
    assert {check.ran for check in found.checks} == {"eager, reference", "native, reference"}
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in rnn.parameters())


class Unrecordable(nn.Module):
    """Decides by a number that it computes."""

    def initial_state(self, batch_size, device=None, dtype=None):
        return torch.zeros(batch_size, H, device=device, dtype=dtype)

    def forward(self, input, state):
        state = torch.tanh(input + state)
        return (state if float(state.detach().sum()) == float("inf") else 2 * state), state


def test_verification_of_a_stack_finds_an_engine_that_is_wrong_in_one_layer(monkeypatch):
    right, rnn = bptt_run.run_plan, ur.stack([ur.GRUCell(I, H), ur.RNNCell(H, H)])

    def wrong(plan, cell, *given, **options):
        outputs, state = right(plan, cell, *given, **options)
        return (outputs * 1.001 if isinstance(cell, ur.RNNCell) else outputs), state

    monkeypatch.setattr("unrolled.networks.cell_run.run_plan", wrong)
    assert not ur.verify(rnn, inputs_of())
