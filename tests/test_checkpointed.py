"""Checkpointed BPTT: every schedule gives the values and gradients of full storage, in the memory that it promises."""

from __future__ import annotations

import gc
import itertools
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence

import unrolled as ur
from matching import assert_match
from problems import PROBLEMS, AttendingCell, NestedCell, uneven_loss
from unrolled.bptt.allocations import Allocations
from unrolled.bptt.checkpointing import Budget, FixedSchedule
from unrolled.errors import GradientError, InputError, OptionError
from unrolled.trees import leaves, map_leaves

T, B, I, H = 11, 3, 3, 4
BOUND = 1e-12
SCHEDULES: dict[str, Callable[[int], ur.Schedule]] = {
    "store all": ur.store_all,
    "segments of 4": lambda T: ur.segments(T, min(4, T)),
    "segments of 1": lambda T: ur.segments(T, 1),
    "revolve 3": lambda T: ur.revolve(T, 3),
    "revolve 1": lambda T: ur.revolve(T, 1),
    "revolve 2 of 3": lambda T: ur.revolve(T, 2, length=min(3, T)),
}
CELLS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: ur.LSTMCell(I, H),
    "GRU": lambda: ur.GRUCell(I, H),
    "MinGRU": lambda: ur.MinGRUCell(I, H),
    "nested": lambda: NestedCell(I, H),
    "dropout over time": lambda: ur.DropoutCell(ur.GRUCell(I, H), p=0.4),
    "zoneout": lambda: ur.ZoneoutCell(ur.RNNCell(I, H), p=0.3),
}
ENGINES = ("reference", "eager", "native")


def sample(cell: nn.Module | None = None) -> tuple[Tensor, Any]:
    inputs = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    if cell is None:
        return inputs, None
    state = cell.double().initial_state(B, dtype=torch.float64)

    def noisy(leaf: Tensor) -> Tensor:
        return torch.randn_like(leaf).requires_grad_() if leaf.is_floating_point() else leaf

    return inputs, map_leaves(noisy, state)


def results(rnn: nn.Module, inputs: Any, state: Any = None, *, seed: int = 0, **options: Any) -> list[Any]:
    """Outputs, last state, and the gradients of all that has one."""
    torch.manual_seed(seed)
    context = options.get("context")
    given = [x for x in (*leaves(inputs), *leaves(state), *leaves(context), *rnn.parameters()) if x.requires_grad]
    outputs, last = rnn(inputs, state, **options)
    grads = torch.autograd.grad(uneven_loss(outputs, last), given, allow_unused=True)
    zeros = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(given, grads, strict=True)]
    return [*leaves(outputs), *leaves(last), *zeros]


def given_as(how: str) -> dict[str, Any]:
    return {
        "plain": {},
        "lengths": {"lengths": torch.tensor([4, T, 7])},
        "resets": {"resets": torch.arange(T * B).view(T, B) % 4 == 3},
        "both": {"lengths": [T - 1, 0, 5], "resets": torch.arange(T * B).view(T, B) % 3 == 1},
    }[how]


@pytest.mark.parametrize("how", ["plain", "lengths", "resets", "both"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CELLS)
def test_every_schedule_gives_the_gradients_of_full_storage(name: str, engine: str, how: str) -> None:
    cell = CELLS[name]()
    inputs, state = sample(cell)
    rnn = ur.Unrolled(cell, engine=engine, quiet=True)
    for reverse in (False, True):
        rnn.reverse, rnn.checkpointing = reverse, None
        wanted = results(rnn, inputs, state, **given_as(how))
        for label, schedule in SCHEDULES.items():
            rnn.checkpointing = FixedSchedule(schedule)
            assert_match(results(rnn, inputs, state, **given_as(how)), wanted, f"{label}, {reverse=}: ", bound=BOUND)


@pytest.mark.parametrize("schedule", ["segments of 4", "revolve 3"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_cells_of_every_kind(name: str, schedule: str) -> None:
    torch.manual_seed(0)
    problem = PROBLEMS[name](torch.float64)
    for engine in ENGINES:
        full, some = (
            ur.Unrolled(problem.cell, engine=engine, quiet=True, checkpoint=way) for way in (None, SCHEDULES[schedule])
        )
        wanted = results(full, problem.inputs, context=problem.context)
        assert_match(results(some, problem.inputs, context=problem.context), wanted, engine, bound=BOUND)


@settings(max_examples=25)
@given(
    steps=st.integers(1, 30),
    length=st.integers(1, 9),
    slots=st.integers(1, 9),
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=4),
)
def test_drawn_schedules(steps: int, length: int, slots: int, lengths: list[int]) -> None:
    cell = ur.LSTMCell(I, H).double()
    inputs = torch.randn(steps, len(lengths), I, dtype=torch.float64, requires_grad=True)
    ends = [min(n, steps) for n in lengths]
    ends[0] = max(ends[0], 1)
    schedule = ur.revolve(steps, slots, length=min(length, steps))
    full, some = (ur.unroll(cell, engine="eager", checkpoint=way) for way in (None, schedule))
    assert_match(results(some, inputs, lengths=ends), results(full, inputs, lengths=ends), bound=BOUND)


@pytest.mark.parametrize("how", ["plain", "lengths", "resets"])
@pytest.mark.parametrize("engine", ENGINES)
def test_all_layers_of_a_stack_run_within_a_segment(engine: str, how: str) -> None:
    cells = [ur.LSTMCell(I, H), ur.DropoutCell(ur.GRUCell(H, H), p=0.3), ur.RNNCell(H, 2)]
    full = ur.stack([ur.Unrolled(cell, engine=engine, quiet=True) for cell in cells]).double()
    inputs, _ = sample()
    wanted = results(full, inputs, **given_as(how))
    for label, schedule in SCHEDULES.items():
        some = ur.Stack(list(full.layers), checkpoint=schedule)
        assert_match(results(some, inputs, **given_as(how)), wanted, label, bound=BOUND)


def test_dropout_between_layers_is_drawn_again_as_it_was() -> None:
    cells = [ur.GRUCell(I, H).double(), ur.GRUCell(H, H).double()]
    inputs, _ = sample()
    rnn = ur.stack(cells, dropout=0.5, checkpoint=SCHEDULES["segments of 4"])
    torch.manual_seed(3)
    outputs, _ = rnn(inputs)
    state = torch.get_rng_state()
    grad = torch.autograd.grad(outputs.sum(), cells[0].weight_hh, retain_graph=True)[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    by_hand = [torch.zeros(B, H, dtype=torch.float64)] * 2
    whole = []
    for begin in range(0, T, 4):
        below = []
        for x in inputs[begin : begin + 4]:
            by_hand[0] = cells[0](x, by_hand[0])[1]
            below.append(by_hand[0])
        for x in nn.functional.dropout(torch.stack(below), 0.5):
            by_hand[1] = cells[1](x, by_hand[1])[1]
            whole.append(by_hand[1])
    assert_match(outputs, torch.stack(whole), bound=BOUND)
    wanted = torch.autograd.grad(torch.stack(whole).sum(), cells[0].weight_hh)[0]
    assert_match(grad, wanted, bound=BOUND)


class NoisyCell(nn.Module):
    """Draws from torch's own generator at every step."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.generator = generator

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, I, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.rand(state.shape, dtype=state.dtype, generator=self.generator)
        state = torch.tanh(self.weight * state + noise * input)
        return state, state


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_random_numbers_are_the_same_when_steps_run_again(schedule: str) -> None:
    cell = NoisyCell()
    inputs, _ = sample()
    full, some = ur.unroll(cell), ur.unroll(cell, checkpoint=SCHEDULES[schedule])
    assert_match(results(some, inputs), results(full, inputs), bound=BOUND)


def test_a_step_that_gives_other_numbers_is_refused() -> None:
    inputs, _ = sample()
    for cell in (_NumpyNoise(), _Forgetful()):
        outputs, _ = ur.unroll(cell, checkpoint=SCHEDULES["segments of 4"])(inputs)
        with pytest.raises(
            GradientError,
            match=r"steps 4 to 7 gave other outputs, or handed on another state, when they were run again",
        ):
            outputs.sum().backward()
        assert cell.weight.grad is None


class _NumpyNoise(NoisyCell):
    """Its noise is numpy's, whose generator nobody puts back for it."""

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(self.weight * state + input + float(np.random.standard_normal()))
        return state, state


class _Forgetful(NoisyCell):
    """Its mode changes after every sequence."""

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.calls = getattr(self, "calls", 0) + 1
        state = torch.tanh(self.weight * state + (1 if self.calls <= T else -1) * input)
        return state, state


class OwnMask(nn.Module):
    """Its output, and no state, depends on chance and on the mode."""

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        self.inner, self.generator = ur.GRUCell(I, H).double(), generator
        self.initial_state = self.inner.initial_state

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        output, state = self.inner(input, state)
        mask = torch.rand(output.shape, generator=self.generator, dtype=output.dtype)
        return output * mask if self.training else output, state


def test_outputs_that_are_others_when_steps_run_again_are_refused() -> None:
    inputs, _ = sample()
    rnn = ur.unroll(OwnMask(None), checkpoint=SCHEDULES["segments of 4"])
    outputs, _ = rnn(inputs)
    rnn.eval()
    with pytest.raises(GradientError, match="steps 4 to 7 gave other outputs"):
        outputs.sum().backward()


def test_a_generator_passed_by_hand_is_put_back_when_steps_run_again() -> None:
    inputs, _ = sample()
    cell, generator = OwnMask(None), torch.Generator()
    cell.generator, found = generator, []
    for schedule in (None, SCHEDULES["segments of 4"]):
        generator.manual_seed(1)
        found.append([*results(ur.unroll(cell, checkpoint=schedule), inputs), generator.get_state()])
    assert_match(found[1], found[0], bound=BOUND)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_that_end_early_share_a_context_and_a_start_that_is_learned(engine: str) -> None:
    def found(schedule: Any) -> list[Any]:
        torch.manual_seed(0)
        context = torch.randn(B, 5, H, dtype=torch.float64, requires_grad=True)
        attending = ur.Unrolled(AttendingCell(I, H).double(), engine=engine, quiet=True, checkpoint=schedule)
        learned = ur.GRUCell(I, H, learn_initial_state=True).double()
        starting = ur.Unrolled(learned, engine=engine, quiet=True, checkpoint=schedule)
        inputs, _ = sample()
        return [
            *results(attending, inputs, context=context, lengths=[4, T, 1]),
            *results(starting, inputs, **given_as("both")),
        ]

    assert_match(found(SCHEDULES["segments of 4"]), found(None), bound=BOUND)


def test_threads_that_train_one_network_find_its_own_parameters() -> None:
    cell = ur.GRUCell(I, H).double()
    rnn, (inputs, _) = ur.unroll(cell, checkpoint=lambda T: ur.segments(T, 1)), sample()
    wanted = torch.autograd.grad(rnn(inputs)[0].sum(), list(cell.parameters()))
    before, interval = [id(x) for x in cell.parameters()], sys.getswitchinterval()

    def trained(_: int) -> list[Tensor]:
        return list(torch.autograd.grad(rnn(inputs)[0].sum(), [*parameters]))

    parameters = list(cell.parameters())
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(trained, range(24)))
    finally:
        sys.setswitchinterval(interval)
    assert [id(x) for x in cell.parameters()] == before
    for grads in found:
        assert_match(grads, list(wanted), bound=BOUND)


@pytest.mark.parametrize("engine", ["eager", "native"])
def test_constants_that_were_written_into_are_refused(engine: str) -> None:
    cell, (inputs, _) = ur.LSTMCell(I, H).double(), sample()
    cell.bias_ih.requires_grad_(False)
    outputs, _ = ur.unroll(cell, engine=engine, checkpoint=SCHEDULES["segments of 4"])(inputs)
    cell.bias_ih.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()


def test_hooks_on_saved_tensors_are_refused_by_name() -> None:
    inputs, _ = sample()
    for options in ({"checkpoint": SCHEDULES["segments of 4"]}, {"horizon": 6, "stride": 3}):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().numpy(), torch.from_numpy):
            outputs, _ = ur.unroll(ur.GRUCell(I, H).double(), **options)(inputs)
        with pytest.raises(GradientError, match="saved_tensors_hooks"):
            outputs.sum().backward()


def test_buffers_are_written_once() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(I)
            self.inner = ur.RNNCell(I, H)
            self.initial_state = self.inner.initial_state

        def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(self.norm(input), state)

    torch.manual_seed(0)
    inputs, _ = sample()
    found = []
    for schedule in (None, SCHEDULES["segments of 4"], SCHEDULES["revolve 1"]):
        torch.manual_seed(1)
        cell = Normed().double()
        found.append([*results(ur.unroll(cell, checkpoint=schedule), inputs), *cell.norm.buffers()])
    assert found[0][-1] == T
    for some in found[1:]:
        assert_match(some, found[0], bound=BOUND)


@pytest.mark.parametrize("options", [{"checkpoint": lambda T: ur.segments(T, 4)}, {"horizon": 6, "stride": 2}])
def test_hooks_of_a_weight_see_its_gradient_once_and_whole(options: dict[str, Any]) -> None:
    cell = ur.GRUCell(I, H).double()
    inputs, _ = sample()
    rnn, seen = ur.unroll(cell, **options), []
    rnn(inputs)[0].sum().backward()
    whole = cell.weight_hh.grad.clone()
    cell.weight_hh.grad = None
    cell.weight_hh.register_hook(lambda grad: seen.append(grad) or grad.clamp(-0.01, 0.01))
    rnn(inputs)[0].sum().backward()
    assert len(seen) == 1
    assert_match(cell.weight_hh.grad, whole.clamp(-0.01, 0.01), bound=BOUND)


def test_weights_of_a_functional_call_are_those_that_run_again() -> None:
    cell = ur.LSTMCell(I, H).double()
    inputs, _ = sample()
    others = {f"cell.{name}": (2 * p).detach().requires_grad_() for name, p in cell.named_parameters()}
    found = []
    for schedule in (None, SCHEDULES["segments of 4"]):
        outputs, _ = torch.func.functional_call(ur.unroll(cell, checkpoint=schedule), others, (inputs,))
        found.append(torch.autograd.grad(outputs.square().sum(), [*others.values(), inputs]))
    assert_match(list(found[1]), list(found[0]), bound=BOUND)


def test_tensors_that_a_cell_reads_from_elsewhere_get_their_gradient() -> None:
    source = torch.randn(I, I, dtype=torch.float64, requires_grad=True)

    def step(input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(state @ made + input)
        return state, state

    inputs, found = sample()[0], []
    for schedule in (None, SCHEDULES["segments of 4"]):
        made = source * 2
        cell = ur.as_cell(step, state=ur.RNNCell(I, I).initial_state)
        outputs, _ = ur.unroll(cell, engine="reference", checkpoint=schedule)(inputs)
        found.append(torch.autograd.grad(outputs.square().sum(), [source, inputs]))
    assert_match(list(found[1]), list(found[0]), bound=BOUND)


def test_a_second_backward_pass_begins_again() -> None:
    cell = ur.GRUCell(I, H).double()
    inputs, _ = sample()
    outputs, _ = ur.unroll(cell, checkpoint=SCHEDULES["revolve 3"])(inputs)
    first, second = (torch.autograd.grad(outputs.square().sum(), cell.weight_hh, retain_graph=keep) for keep in (1, 0))
    assert_match(second[0], first[0], bound=0.0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(outputs.sum(), cell.weight_hh)


def test_an_interrupted_backward_pass_leaves_nothing_behind() -> None:
    cell = AttendingCell(I, H).double()
    inputs, _ = sample()
    context = torch.randn(B, 2, H, dtype=torch.float64, requires_grad=True)
    outputs, _ = ur.unroll(cell, engine="reference", checkpoint=SCHEDULES["segments of 4"])(inputs, context=context)
    calls: list[int] = []

    def interrupt(module: nn.Module, given: Any) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    hook = cell.inner.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        outputs.sum().backward(retain_graph=True)
    assert [x.grad for x in (inputs, context, *cell.parameters())] == [None] * (2 + len(list(cell.parameters())))
    hook.remove()
    outputs.sum().backward()
    wanted, _ = ur.unroll(cell, engine="reference")(inputs, context=context)
    grads = torch.autograd.grad(wanted.sum(), [inputs, context, *cell.parameters()])
    assert_match([x.grad for x in (inputs, context, *cell.parameters())], list(grads), bound=BOUND)


def test_what_was_changed_in_place_is_refused() -> None:
    cell = ur.GRUCell(I, H).double()
    inputs, state = sample(cell)
    for changed in (cell.weight_hh, inputs, state):
        outputs, _ = ur.unroll(cell, checkpoint=SCHEDULES["segments of 4"])(inputs, state)
        with torch.no_grad():
            changed.mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outputs.sum().backward()


def test_second_derivatives_are_refused() -> None:
    cell = ur.GRUCell(I, H).double()
    inputs, _ = sample()
    outputs, _ = ur.unroll(cell, checkpoint=SCHEDULES["segments of 4"])(inputs)
    with pytest.raises(GradientError, match="leave create_graph out"):
        torch.autograd.grad(outputs.sum(), cell.weight_hh, create_graph=True)
    with pytest.raises(OptionError, match=r"inside of torch\.func's"):
        torch.func.grad(lambda x: ur.unroll(cell, memory=0.5)(x)[0].sum())(inputs)
    for options in ({"memory": 0.5}, {"horizon": 6, "stride": 3}):
        with forward_ad.dual_level(), pytest.raises(OptionError, match="inside of forward-mode derivatives"):
            ur.unroll(cell, **options)(forward_ad.make_dual(inputs.detach(), torch.ones_like(inputs)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{"checkpoint": SCHEDULES["segments of 4"]}, {"memory": 0.8}])
def test_without_gradients_nothing_is_kept(options: dict[str, Any], mode: Any) -> None:
    cell = ur.LSTMCell(I, H).double()
    inputs, _ = sample()
    rnn = ur.unroll(cell, **options)
    with mode():
        outputs, last = rnn(inputs)
        wanted, end = ur.unroll(cell)(inputs)
    assert not outputs.requires_grad
    assert_match([outputs, *last], [wanted, *end], bound=BOUND)


def test_a_state_is_carried_from_call_to_call() -> None:
    cell = ur.LSTMCell(I, H).double()
    inputs, _ = sample()
    some, full = ur.unroll(cell, checkpoint=lambda T: ur.segments(T, 2)), ur.unroll(cell)

    def both(rnn: nn.Module) -> list[Tensor]:
        first, state = rnn(inputs[:6])
        second, last = rnn(inputs[6:], state)
        return [*torch.autograd.grad(uneven_loss(first, second, last), [inputs, *cell.parameters()])]

    assert_match(both(some), both(full), bound=BOUND)


# -- memory


def peak(rnn: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor] = torch.sum, **options: Any) -> int:
    """The most that a training step holds, but for outputs and the inputs' gradient."""
    rnn.zero_grad()
    inputs.grad = None
    gc.collect()
    with Allocations() as noted:
        outputs = rnn(inputs, **options)[0]
        loss(outputs).backward()
    return noted.peak(without=[outputs, *([] if inputs.grad is None else [inputs.grad])])


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
@pytest.mark.parametrize("engine", ENGINES)
def test_allocations_are_those_that_the_allocator_reports(engine: str) -> None:
    """In the profiler's trace every allocation of torch's on the CPU is an event, also those inside of an operation."""
    rnn, inputs = ur.unroll(ur.LSTMCell(24, 32), engine=engine), torch.randn(100, 8, 24)

    def step() -> Tensor:
        outputs = rnn(inputs)[0]
        torch.autograd.grad(outputs.sum(), rnn.cell.weight_hh)
        return outputs

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    with Allocations() as noted:
        step()
    assert noted.peak() == pytest.approx(max(now), rel=0.01)


@pytest.mark.parametrize(
    ("kind", "engine", "needed"),
    [
        *((ur.LSTMCell, engine, False) for engine in ENGINES),
        (ur.LSTMCell, "native", True),
        (ur.GRUCell, "eager", True),
        (ur.LayerNormLSTMCell, "native", False),
    ],
)
def test_what_is_promised_is_what_is_taken(kind: Any, engine: str, needed: bool) -> None:
    rnn = ur.unroll(kind(24, 32), engine=engine)
    inputs = torch.randn(300, 8, 24, requires_grad=needed)
    full = peak(rnn, inputs)
    for share in (0.5, 0.2, 0.1):
        rnn.checkpointing = Budget.parsed(share)
        promised = ur.plan_memory(rnn, inputs).chosen.bytes
        taken = peak(rnn, inputs)
        assert 0.8 * promised <= taken <= 1.05 * promised, (share, taken, promised)
        assert taken <= share * full * 1.05


@pytest.mark.parametrize("length", [3, 7, 9, 11, 19, 37])
def test_a_promise_is_kept_between_the_lengths_at_which_memory_bends(length: int) -> None:
    """From which size on a product takes room of its own depends on the processor; so the very length is measured."""
    cell, inputs = ur.LSTMCell(24, 32), torch.randn(300, 8, 24)
    rnn = ur.unroll(cell, engine="native", checkpoint=lambda T: ur.segments(T, length))
    promised = ur.plan_memory(rnn, inputs).chosen.bytes
    assert 0.8 * promised <= peak(rnn, inputs) <= 1.02 * promised


def test_a_stack_keeps_its_promise() -> None:
    rnn = ur.stack([ur.LSTMCell(24, 32), ur.GRUCell(32, 16)], memory="700kB")
    inputs = torch.randn(300, 8, 24)
    promised = ur.plan_memory(rnn, inputs).chosen.bytes
    assert 0.8 * promised <= peak(rnn, inputs) <= 1.05 * promised <= 1.05 * 700_000


def test_rows_that_end_early_take_what_is_promised_at_most() -> None:
    rnn = ur.unroll(ur.LSTMCell(24, 32), memory=0.4)
    packed = pack_padded_sequence(torch.randn(300, 8, 24), torch.tensor([300, 200, 100, 50, 40, 30, 20, 10]))
    promised = ur.plan_memory(rnn, packed).chosen.bytes
    rnn(packed)
    with Allocations() as noted:
        outputs = rnn(packed)[0].data
        outputs.sum().backward()
    assert noted.peak(without=[outputs]) <= 1.05 * promised


@pytest.mark.parametrize("engine", ["reference", "eager"])
def test_a_budget_can_be_planned_for_rows_that_end_early_and_start_afresh(engine: str) -> None:
    rnn = ur.unroll(ur.GRUCell(3, 4), engine=engine, memory=1.0)
    resets = torch.arange(16).view(8, 2) % 5 == 3
    plan = ur.plan_memory(rnn, torch.randn(8, 2, 3), lengths=[8, 5], resets=resets)
    assert plan.options[0].bytes > 0
    assert rnn(torch.randn(8, 2, 3), lengths=[8, 5], resets=resets)[0].shape == (8, 2, 4)


def test_an_expanded_gradient_is_not_made_for_all_steps() -> None:
    rnn = ur.unroll(ur.RNNCell(2, 64), checkpoint=lambda T: ur.segments(T, 50))
    inputs = torch.randn(2000, 4, 2)
    summed = peak(rnn, inputs)
    dense = peak(rnn, inputs, lambda outputs: (outputs * torch.ones_like(outputs)).sum())
    outputs = 2000 * 4 * 64 * 4
    assert summed < outputs / 4 < dense


def test_a_plan_says_what_there_is_to_choose_from() -> None:
    inputs = torch.randn(1000, 4, 8)
    plan = ur.plan_memory(ur.unroll(ur.LSTMCell(8, 16), memory=0.1), inputs)
    shown = str(plan)
    assert [option.bytes for option in plan.options] == sorted((o.bytes for o in plan.options), reverse=True)
    assert [option.ratio for option in plan.options] == sorted(option.ratio for option in plan.options)
    assert plan.options[0].name == "store_all"
    assert plan.chosen.bytes <= 0.1 * plan.options[0].bytes
    assert shown.count("\n>") == shown.count("●") == 1
    assert f"> {plan.chosen.name}" in shown
    told = json.loads(json.dumps(plan.to_dict()))
    assert [option["chosen"] for option in told["options"]].count(True) == 1
    assert told["apart"] == {"inputs": inputs.nbytes, "outputs": 1000 * 4 * 16 * 4}
    assert ur.plan_memory(ur.unroll(ur.LSTMCell(8, 16)), inputs).chosen.name == "store_all"


@pytest.mark.parametrize("engine", ENGINES)
def test_the_plan_of_a_call_says_what_it_goes_by(engine: str) -> None:
    rnn, inputs = ur.unroll(ur.LSTMCell(8, 16), engine=engine, memory=0.2), torch.randn(400, 4, 8)
    chosen = ur.plan_memory(rnn, inputs).chosen
    told = rnn.plan(inputs).schedule
    assert told.startswith(f"checkpoints by {chosen.name}: ")
    assert f" {chosen.schedule.extra_advances:,} steps run once more, {chosen.ratio:.2f} times" in told
    assert told in str(rnn.plan(inputs))
    assert not ur.unroll(ur.LSTMCell(8, 16), engine=engine).plan(inputs).schedule


def test_planning_leaves_the_network_as_it_was() -> None:
    cell = _Forgetful()
    inputs = torch.randn(40, B, I, dtype=torch.float64)
    before = torch.get_rng_state()
    ur.plan_memory(ur.unroll(cell, memory=0.5), inputs)
    assert not hasattr(cell, "calls")
    assert cell.weight.grad is None
    assert torch.equal(torch.get_rng_state(), before)


def test_another_engine_is_measured_anew() -> None:
    rnn, inputs = ur.unroll(ur.LSTMCell(8, 16), memory=0.2), torch.randn(400, 4, 8)
    first = ur.plan_memory(rnn, inputs).options[0].bytes
    rnn.engine = "reference"
    assert ur.plan_memory(rnn, inputs).options[0].bytes != first


def test_a_cell_that_cannot_be_copied_is_planned_for_too() -> None:
    class Stubborn(NoisyCell):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("there is one of me")

    inputs = torch.randn(400, B, I, dtype=torch.float64)
    plan = ur.plan_memory(ur.unroll(Stubborn(), memory=0.2), inputs)
    assert plan.chosen.bytes <= 0.2 * plan.options[0].bytes


@pytest.mark.parametrize(("memory", "same"), [("12.5%", 0.125), ("1.5 kB", 1500), ("2KiB", 2048), ("0.001GB", 10**6)])
def test_a_budget_as_text(memory: str, same: float) -> None:
    said, meant = (ur.unroll(ur.GRUCell(I, H), memory=given).checkpointing for given in (memory, same))
    assert (said.bytes, said.share) == (meant.bytes, meant.share)


def test_a_budget_of_all_is_full_storage() -> None:
    cell = ur.GRUCell(I, H).double()
    inputs, _ = sample()
    outputs, _ = ur.unroll(cell, memory=1.0)(inputs)
    (grad,) = torch.autograd.grad(outputs.sum(), cell.weight_hh, create_graph=True)
    assert grad.requires_grad


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "512"}, r"memory must be bytes .* got '512'"),
        ({"memory": 0.0}, r"got 0\.0"),
        ({"memory": 1.5}, r"got 1\.5"),
        ({"memory": True}, "got True"),
        ({"memory": -3}, "got -3"),
        ({"memory": "-1GB"}, "got '-1GB'"),
        ({"memory": "0%"}, "got '0%'"),
        ({"memory": "101%"}, "got '101%'"),
        ({"checkpoint": 5}, "checkpoint must be a schedule"),
        ({"memory": "1GB", "checkpoint": ur.segments(4, 2)}, "got both"),
        ({"memory": "1GB", "horizon": 5}, "not both"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ur.unroll(ur.GRUCell(I, H), **options)
    with pytest.raises(OptionError, match=message):
        ur.stack([ur.GRUCell(I, H)], **options)


def test_a_schedule_for_another_sequence_is_refused() -> None:
    rnn = ur.unroll(ur.GRUCell(I, H), checkpoint=ur.segments(12, 4))
    with pytest.raises(OptionError, match=r"for T = 12, but these inputs have 11 steps.*lambda T"):
        rnn(torch.randn(11, B, I))
    assert rnn(torch.randn(12, B, I), lengths=[5, 3, 1])[0].shape == (12, B, H)
    with pytest.raises(OptionError, match="must give a schedule"):
        ur.unroll(ur.GRUCell(I, H), checkpoint=lambda T: T)(torch.randn(11, B, I))


def test_a_budget_below_the_least_says_what_fits() -> None:
    cell, inputs = ur.LSTMCell(24, 32), torch.randn(500, 8, 24)
    least = ur.plan_memory(ur.unroll(cell), inputs).options[-1].bytes
    for memory, remedy in ((int(least * 0.95), r"horizon=\d+ would fit"), (1000, "not even one step would fit")):
        with pytest.raises(OptionError, match=rf"kB, but 500 steps of 8 rows take at least .*, by .*; {remedy}"):
            ur.unroll(cell, memory=memory)(inputs)
    ur.unroll(cell, memory=int(least * 1.01))(inputs)[0].sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_without_gradients_no_budget_is_too_small(mode: Any, steps: int) -> None:
    cell, inputs = ur.LSTMCell(I, H), torch.randn(steps, B, I)
    with mode():
        outputs, last = ur.unroll(cell, memory="1%")(inputs)
        wanted, end = ur.unroll(cell, engine="reference")(inputs)
    assert_match([outputs, *last], [wanted, *end])


def test_layers_that_cannot_be_cut_together_are_refused() -> None:
    with pytest.raises(OptionError, match="a stack with a memory budget walks forwards"):
        ur.stack([ur.GRUCell(I, H)], bidirectional=True, memory=0.5)
    with pytest.raises(OptionError, match="a memory budget of its own"):
        ur.stack([ur.unroll(ur.GRUCell(I, H), memory=0.5)], memory=0.5)
    with pytest.raises(OptionError, match=r"what ur\.unroll and ur\.stack make, got LSTM"):
        ur.plan_memory(nn.LSTM(3, 4), torch.randn(5, 2, 3))
    with pytest.raises(OptionError, match="a stack with a memory budget walks forwards"):
        ur.plan_memory(ur.stack([ur.GRUCell(I, H)], bidirectional=True), torch.randn(5, B, I))
    with pytest.raises(InputError, match="a row with at least one step"):
        ur.plan_memory(ur.unroll(ur.GRUCell(I, H)), torch.randn(5, B, I), lengths=[0, 0, 0])


class PassesItsInputOn(nn.Module):
    """A cell whose next state depends on its input alone."""

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return state, 2 * input

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, 3, dtype=dtype)


def test_segments_that_no_gradient_reaches_have_zeros():
    x = torch.randn(6, 2, 3, requires_grad=True)
    _, last = ur.unroll(PassesItsInputOn(), checkpoint=ur.segments(6, 2))(x)
    (found,) = torch.autograd.grad(last.sum(), x)
    assert torch.equal(found, torch.cat([torch.zeros(5, 2, 3), torch.full((1, 2, 3), 2.0)]))
