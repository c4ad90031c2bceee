"""What a plan says, and that verification finds what is wrong."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from problems import PROBLEMS
from unrolled.execution import run as bptt_run
from unrolled.plan.sums import summable
from unrolled.recording.program import Op, Program, Ref, Value
from unrolled.train.commands import run_command

T, B, I, H = 6, 4, 3, 5


class TwoLayers(nn.Module):
    """Two layers written by hand, a head, and a skip that no state needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = ur.LSTMCell(I, H), ur.GRUCell(H, H), nn.Linear(H, 2)

    def initial_state(self, batch_size, device=None, dtype=None):
        made = {"device": device, "dtype": dtype}
        return self.first.initial_state(batch_size, **made), self.second.initial_state(batch_size, **made)

    def forward(self, input, state):
        hidden, first = self.first(input, state[0])
        hidden, second = self.second(hidden, state[1])
        return self.head(hidden), (first, second)


def places_of(plan, name):
    return [operation.place for operation in plan.operations if operation.name == name]


def test_a_two_layer_cell_has_two_loops_and_the_second_layers_projection_lies_between_them():
    plan = ur.unroll(TwoLayers(), engine="eager").plan(torch.randn(T, B, I))
    assert plan.loops == 2
    assert places_of(plan, "aten.addmm") == ["before", "through", "before", "through", "after"]
    assert places_of(plan, "aten.t") == ["once"] * 5


@pytest.mark.parametrize(
    ("batch", "hidden", "place"), [(4, H, "through"), (1, H, "through"), (1, 200, "before"), (4, 400, "before")]
)
def test_a_compiled_loop_also_does_the_projections_whose_weights_stay_in_its_cache(batch, hidden, place):
    plan = ur.unroll(ur.LSTMCell(I, hidden)).plan(torch.randn(T, batch, I))
    assert plan.engine == "native"
    assert places_of(plan, "aten.addmm") == [place, "through"]
    assert ("light enough" in str(plan)) == (place == "through")


def test_the_sums_over_rows_and_steps_of_a_compiled_loop_are_those_of_the_reference():
    cell, x = ur.LayerNormLSTMCell(I, 40).double(), torch.randn(9, 5, I, dtype=torch.float64)
    rnn = ur.unroll(cell)
    rnn(x)[0].square().sum().backward()
    ours = [p.grad.clone() for p in cell.parameters()]
    cell.zero_grad()
    ur.unroll(cell, engine="reference")(x)[0].square().sum().backward()
    assert rnn.plan(x).engine == "native"
    for grad, parameter in zip(ours, cell.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-10, atol=1e-12)


def test_flops_and_bytes_are_those_of_the_cell():
    plan = ur.unroll(ur.RNNCell(I, H), engine="eager").plan(torch.randn(T, B, I))
    flops = dict(plan.flops)
    assert flops["before"] == 2 * B * I * H
    assert flops["through"] == 2 * B * H * H + B * H + B * H  # product, sum, tanh
    assert plan.kept_bytes == 2 * B * H * 4  # the state received and the one handed on


@pytest.mark.parametrize("engine", ["auto", "eager", "native"])
def test_a_plan_prints_every_operation_with_its_place_and_a_reason(engine):
    plan = ur.unroll(TwoLayers(), engine=engine).plan(torch.randn(T, B, I))
    lines = str(plan).splitlines()
    assert "TwoLayers, 6 copies, batch 4" in lines[0]
    table = lines[3 : 3 + len(plan.operations)]
    for line, operation in zip(table, plan.operations, strict=True):
        assert line.split()[0] == operation.name
        assert line.endswith(operation.reason)
        assert operation.reason


def test_plans_of_the_same_call_are_equal_and_hold_no_tensor():
    rnn, inputs = ur.unroll(ur.GRUCell(I, H)), torch.randn(T, B, I)
    assert rnn.plan(inputs) == rnn.plan(inputs)
    assert rnn.plan(inputs) != rnn.plan(inputs[:2])


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        (lambda x, s: (x, torch.poisson(s.exp())), "random"),
        (lambda x, s: (x, s if float(x.sum()) > 0 else s + 1), "depends on the numbers"),
        (lambda x, s: (x, s + x[x > 0].sum()), "as many entries as the mask is true"),
    ],
    ids=["random", "branch", "mask"],
)
def test_what_cannot_be_recorded_runs_on_the_reference_and_the_plan_says_why(cell, told):
    rnn = ur.unroll(cell)
    plan = rnn.plan(torch.randn(T, B, I), torch.zeros(B, I))
    assert plan.engine == "reference"
    assert told in plan.why
    assert told in str(plan)


def test_an_engine_asked_for_by_name_that_cannot_run_says_so():
    with pytest.warns(UserWarning, match="eager.*reference.*random"):
        ur.unroll(lambda x, s: (x, torch.poisson(s.exp())), engine="eager")(torch.randn(T, B, I), torch.zeros(B, I))


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_every_problem_is_verified(name):
    problem = PROBLEMS[name](torch.float64)
    rnn = problem.unrolled()
    found = ur.verify(rnn, problem.inputs, context=problem.context)
    assert found, str(found)
    assert {check.engine for check in found.checks} == {"eager", "native"}


def test_verification_leaves_grad_buffers_and_random_state_untouched():
    cell = ur.LSTMCell(I, H)
    cell.weight_ih.grad = torch.ones_like(cell.weight_ih)
    torch.manual_seed(3)
    ur.verify(ur.unroll(cell), torch.ones(T, B, I))
    after = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(2))
    assert torch.equal(cell.weight_ih.grad, torch.ones_like(cell.weight_ih))
    assert cell.weight_hh.grad is None


def test_verification_finds_an_engine_that_is_wrong(monkeypatch):
    right = bptt_run.run_plan

    def wrong(*given, **options):
        outputs, state = right(*given, **options)
        return outputs * 1.001, state

    monkeypatch.setattr("unrolled.networks.cell_run.run_plan", wrong)
    found = ur.verify(ur.unroll(ur.GRUCell(I, H)), torch.randn(T, B, I))
    assert not found
    assert "MISMATCH" in str(found)


def test_the_command_verifies_a_run_and_ends_with_1_on_a_mismatch(monkeypatch, capsys):
    assert run_command(["verify"]) == 0
    printed = capsys.readouterr().out
    for name in ("RNNCell", "LSTMCell", "GRUCell", "SLSTMCell"):
        assert name in printed
    right = bptt_run.run_plan
    monkeypatch.setattr(
        "unrolled.networks.cell_run.run_plan", lambda *a, **o: (right(*a, **o)[0] * 2, right(*a, **o)[1])
    )
    assert run_command(["verify"]) == 1
    assert "MISMATCH" in capsys.readouterr().out


class Twins(nn.Module):
    """Two states that begin apart and become the same."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(I + 2 * H, H)

    def forward(self, input, state):
        one, other = state
        both = torch.tanh(self.linear(torch.cat([input, one, other], dim=-1)))
        return one * other, (both, both)


def test_two_states_that_become_one_value_keep_their_own_beginnings():
    state = torch.randn(B, H), torch.randn(B, H)
    assert ur.verify(ur.unroll(Twins()), torch.randn(T, B, I), state)


def test_a_plan_that_took_long_is_told(monkeypatch, caplog):
    monkeypatch.setattr("unrolled.engine.plan_cache._LONG", 0.0)
    ur.unroll(ur.GRUCell(3, 4), engine="eager")(torch.randn(5, 2, 3))
    assert "a plan for GRUCell took" in caplog.text


@pytest.mark.parametrize("engine", ["eager", "native"])
def test_planning_leaves_no_tensors_to_the_garbage_collector(engine):
    rnn, inputs = ur.unroll(ur.LSTMCell(3, 4), engine=engine), torch.randn(5, 2, 3)
    gc.collect()
    gc.disable()
    try:
        rnn(inputs)[0].sum().backward()
        tensors = [weakref.ref(found) for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]
        alive = sum(found() is not None for found in tensors)
        gc.collect()
        assert sum(found() is not None for found in tensors) == alive
    finally:
        gc.enable()


@pytest.mark.parametrize("options", [{}, {"memory": 0.9}, {"horizon": 2}])
def test_planning_leaves_what_is_said_of_the_latest_call(options: dict[str, Any]) -> None:
    rnn, inputs = ur.unroll(ur.GRUCell(I, H), engine="eager", **options), torch.randn(T, B, I)
    rnn.plan(inputs)
    ur.plan_memory(rnn, inputs)
    assert rnn.ran == "reference"
    rnn(inputs)
    assert rnn.ran == "eager"


@pytest.mark.parametrize(("fill", "early"), [((), {0, 1}), ((0.0,), {0, 1}), ((1.0,), {1})])
def test_sums_over_the_steps_are_taken_before_a_padding_only_if_it_fills_in_zeros(fill, early):
    values = tuple(Value((n,), torch.float32) for n in (3, 4))
    pad = Op(torch.ops.aten.constant_pad_nd.default, (Ref(0), (1, 0), *fill), (), (1,))
    assert summable(Program(values, (0,), (pad,), (1,)), [1], ()) == early


@pytest.mark.parametrize("lengths", [None, [3, 5]])
def test_a_plan_is_made_for_resets_as_the_call_takes_them(lengths):
    rnn, inputs = ur.unroll(ur.GRUCell(3, 4), engine="eager", batch_first=True), torch.randn(2, 5, 3)
    resets = torch.zeros(2, 5, dtype=torch.bool)
    plan = rnn.plan(inputs, lengths=lengths, resets=resets)
    assert plan.engine == "eager"
    assert "aten.where.self" in [op.name for op in plan.operations]
    rnn(inputs, lengths=lengths, resets=resets)
    assert rnn.ran == "eager"
    with pytest.raises(ur.InputError, match="resets must be a bool tensor"):
        rnn.plan(inputs, resets=resets[:, :2])


def test_a_stack_has_a_plan_for_each_of_its_networks():
    both = ur.Bidirectional(ur.GRUCell(3, 4), ur.GRUCell(3, 4), engine="eager")
    stack = ur.stack([ur.LSTMCell(3, 5), ur.GRUCell(5, 4)], engine="eager")
    resets, drawn = torch.zeros(5, 2, dtype=torch.bool), torch.get_rng_state()
    for network, names in ((both, ["GRUCell", "GRUCell"]), (stack, ["LSTMCell", "GRUCell"])):
        plans = network.plan(torch.ones(5, 2, 3), lengths=[3, 5], resets=resets)
        assert [(plan.cell, plan.engine, plan.T) for plan in plans] == [(name, "eager", 5) for name in names]
    assert torch.equal(torch.get_rng_state(), drawn)


def test_lengths_that_take_a_cell_off_its_engine_say_so_once():
    class MixedCell(nn.Module):
        """Row by row, which its recording does not prove: rows are turned around, and back."""

        def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
            return torch.zeros(batch_size, 3, dtype=dtype)

        def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            state = torch.tanh(state + input).flip(0).sin().flip(0)
            return state, state

    rnn, inputs = ur.unroll(MixedCell()), torch.randn(5, 2, 3)
    with pytest.warns(UserWarning, match="with lengths this cell runs on 'reference', without them on .*aten.flip"):
        assert rnn.plan(inputs, lengths=[3, 5]).engine == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rnn(inputs, lengths=[3, 5])
