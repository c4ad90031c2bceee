"""Random numbers in a step are the loop's own, bit for bit, on the compiled engine; so is what is left of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import unrolled as ur
from matching import assert_match

F64 = torch.float64
T, B, H = 4, 3, 5
LENGTHS = [4, 1, 2]
OUTSIDE = Generator()


class Cell(nn.Module):
    """`h' = f(h, x)`, which it also notes; for `Identity` the state is exactly what was drawn."""

    def __init__(self, f: Callable[[Cell, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(H, H).double()
        self.f, self.own, self.held = f, Generator(), {"a": [Generator()]}

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, H, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        noise = self.f(self, state, input)
        hidden = torch.tanh(self.linear(state) + input + noise)
        return (hidden, noise), hidden


class Drawing(ur.GRUCell):
    """A GRU with dropout on its way back."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs, H, dtype=F64)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(input, F.dropout(state, 0.3))


class Rounded(torch.autograd.Function):
    """Up or down at random; its gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.bernoulli(torch.sigmoid(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


# What is drawn depends on no value, and comes back as it is.
FREE: dict[str, Callable[..., Tensor]] = {
    "rand": lambda cell, h, x: torch.rand(h.shape, dtype=F64) + torch.randn_like(h) + torch.rand_like(h),
    "in place": lambda cell, h, x: (
        torch.empty_like(h).geometric_(0.4) + torch.empty_like(h).cauchy_() + torch.empty_like(h).log_normal_()
    ),
    "integers": lambda cell, h, x: torch.empty_like(h).random_(5) * torch.randint(5, (h.shape[0], 1)),
    "normal": lambda cell, h, x: torch.normal(0.0, 2.0, h.shape, dtype=F64) + torch.empty_like(h).normal_(1, 2),
    "a mixture": lambda cell, h, x: (
        F.dropout(torch.ones_like(x), 0.4)
        + torch.bernoulli(torch.empty_like(h), 0.3)
        + torch.empty_like(h).exponential_(2) * torch.empty_like(h).uniform_(2, 3)
    ),
    "transposed": lambda cell, h, x: F.dropout(torch.ones_like(h).t().contiguous(), 0.5).t() + torch.randn(H, B).T[:1],
    "of an input": lambda cell, h, x: torch.poisson(x.detach().abs()) * torch.rand_like(x),
}

# Chance meets values: what is drawn from a distribution that the state says.
BOUND: dict[str, Callable[..., Tensor]] = {
    "dropout": lambda cell, h, x: F.dropout(h, 0.4),
    "alpha dropout": lambda cell, h, x: F.alpha_dropout(h, 0.3, True),
    "bernoulli": lambda cell, h, x: torch.bernoulli(torch.sigmoid(h)) + torch.sigmoid(h),
    "bernoulli_": lambda cell, h, x: h + torch.empty_like(h).bernoulli_(torch.sigmoid(h)),
    "normal": lambda cell, h, x: torch.normal(h, h.exp()) + torch.normal(h, 0.3) + torch.normal(0.5, h.exp()),
    "multinomial": lambda cell, h, x: h * torch.multinomial(torch.softmax(h, -1), 1),
    "gumbel": lambda cell, h, x: F.gumbel_softmax(h) + F.gumbel_softmax(h, hard=True),
    "straight through": lambda cell, h, x: Rounded.apply(h),
    "Normal": lambda cell, h, x: torch.distributions.Normal(h, h.exp(), validate_args=False).rsample(),
    "attention, then noise": lambda cell, h, x: (
        F.scaled_dot_product_attention(*[torch.stack([h, x], 1).unsqueeze(1)] * 3)[:, 0, 0] + torch.rand_like(h) * h
    ),
    "masked attention, then dropout": lambda cell, h, x: F.dropout(
        F.scaled_dot_product_attention(*[torch.stack([h, x], 1).unsqueeze(1)] * 3, is_causal=True)[:, 0, 1], 0.4
    ),
    "native dropout": lambda cell, h, x: torch.native_dropout(h, 0.4, True)[0],
    "native dropout of nothing, which draws too": lambda cell, h, x: (
        torch.native_dropout(h, 0.0, True)[0] + torch.rand_like(h)
    ),
}


def numbers(cell: Cell, run: Callable[[Tensor], Any], calls: int = 1) -> Any:
    """Results, gradients, and how all generators are left."""
    torch.manual_seed(1)
    generators = (OUTSIDE, cell.own, cell.held["a"][0])
    for seed, generator in enumerate(generators):
        generator.manual_seed(seed)
    x = torch.randn(T, B, H, dtype=F64, requires_grad=True)
    for _ in range(calls):
        (hidden, noise), last = run(x)
        loss = (hidden * hidden).sum() + last.sin().sum() + (noise.sin().sum() if noise.requires_grad else 0)
        grads = torch.autograd.grad(loss, [x, *cell.parameters()])
    return hidden, noise, last, grads, torch.get_rng_state(), tuple(g.get_state() for g in generators)


def loop(cell: Cell, reverse: bool = False) -> Callable[[Tensor], Any]:
    """The loop that a user writes."""

    def run(x: Tensor) -> Any:
        state, outputs = cell.initial_state(B, dtype=F64), [None] * T
        for t in reversed(range(T)) if reverse else range(T):
            outputs[t], state = cell(x[t], state)
        return tuple(torch.stack(column) for column in zip(*outputs, strict=True)), state

    return run


@pytest.mark.parametrize("name", FREE)
def test_what_is_drawn_is_the_loops_bit_for_bit(name):
    cell = Cell(FREE[name])
    rnn = ur.unroll(cell)
    got, want = numbers(cell, rnn), numbers(cell, loop(cell))
    assert rnn.ran == "native", rnn.plan(torch.zeros(T, B, H, dtype=F64))
    assert torch.equal(got[1], want[1])
    assert_match(got, want)


@pytest.mark.parametrize("name", BOUND)
def test_a_distribution_of_the_state_is_a_fixed_draw_and_arithmetic(name):
    cell = Cell(BOUND[name])
    rnn, reference = ur.unroll(cell), ur.unroll(cell, engine="reference")
    got, want = numbers(cell, rnn), numbers(cell, loop(cell))
    assert rnn.ran == "native", rnn.plan(torch.zeros(T, B, H, dtype=F64))
    assert_match(got, want)
    got = numbers(cell, lambda x: rnn(x, lengths=LENGTHS))
    assert rnn.ran == "native", rnn.plan(torch.zeros(T, B, H, dtype=F64), lengths=LENGTHS)
    assert_match(got, numbers(cell, lambda x: reference(x, lengths=LENGTHS)))


BY_HAND: dict[str, Callable[..., Tensor]] = {
    "own": lambda cell, h, x: h * torch.rand(h.shape, generator=cell.own, dtype=F64) + F.dropout(h),
    "held": lambda cell, h, x: torch.bernoulli(torch.sigmoid(h), generator=cell.held["a"][0]) + torch.sigmoid(h),
    "outside": lambda cell, h, x: h + torch.empty_like(h).normal_(generator=OUTSIDE) * torch.rand_like(h),
    "two": lambda cell, h, x: (
        torch.normal(h, 1.0, generator=OUTSIDE) * torch.empty_like(h).uniform_(generator=cell.own)
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_generators_passed_by_hand_are_the_users_and_trials_leave_them_alone(name):
    cell = Cell(BY_HAND[name])
    rnn = ur.unroll(cell)
    left = [g.get_state() for g in (OUTSIDE, cell.own, cell.held["a"][0], torch.default_generator)]
    assert rnn.plan(torch.zeros(T, B, H, dtype=F64)).engine == "native"
    now = [g.get_state() for g in (OUTSIDE, cell.own, cell.held["a"][0], torch.default_generator)]
    assert all(map(torch.equal, left, now))
    # The second call and the fourth have a witness.
    assert_match(numbers(cell, rnn, 4), numbers(cell, loop(cell), 4))
    cell.own, cell.held["a"][0] = Generator(), Generator()
    assert_match(numbers(cell, rnn), numbers(cell, loop(cell)))
    segmented = ur.unroll(cell, checkpoint=ur.segments(T, 2))
    assert_match(numbers(cell, segmented, 2), numbers(cell, loop(cell), 2))
    assert segmented.ran == "native"


def test_reversed_networks_draw_from_the_last_step_on():
    cell = Cell(BOUND["bernoulli"])
    rnn = ur.unroll(cell, reverse=True)
    assert_match(numbers(cell, rnn), numbers(cell, loop(cell, reverse=True)))
    assert rnn.ran == "native"


def test_dropout_follows_the_mode_of_the_cell():
    cell = Cell(lambda cell, h, x: F.dropout(h, 0.5, cell.training))
    rnn = ur.unroll(cell)
    for training in (True, False, True):
        cell.train(training)
        assert_match(numbers(cell, rnn), numbers(cell, loop(cell)))
        assert rnn.ran == "native"


def test_a_draw_that_nobody_reads_uses_up_numbers_all_the_same():
    cell = Cell(lambda cell, h, x: (torch.rand(7), torch.rand_like(h))[1])
    rnn = ur.unroll(cell)
    assert_match(numbers(cell, rnn), numbers(cell, loop(cell)))
    assert rnn.ran == "native"


def test_draws_stand_in_the_plan_before_the_loop():
    plan = ur.unroll(Cell(BOUND["dropout"])).plan(torch.zeros(T, B, H, dtype=F64))
    (drawn,) = [operation for operation in plan.operations if operation.name == "aten.bernoulli_.float"]
    assert drawn.place == "before"
    assert "step by step in the order of the loop" in drawn.reason


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"checkpoint": ur.segments(64, 16)}, {"horizon": 8}])
def test_stacks_draw_layer_by_layer(options):
    def network(engine: str) -> nn.Module:
        torch.manual_seed(0)
        cells = [Drawing(H), Drawing(2 * H if "bidirectional" in options else H)]
        return ur.stack(cells, batch_first=True, engine=engine, **options)

    def results(rnn: nn.Module) -> Any:
        torch.manual_seed(1)
        x = torch.randn(B, 64, H, dtype=F64, requires_grad=True)
        outputs, last = rnn(x, lengths=[64, 2, 9])
        grads = torch.autograd.grad(outputs.sin().sum(), [x, *rnn.parameters()])
        return outputs, last, grads, torch.get_rng_state()

    rnn = network("auto")
    assert_match(results(rnn), results(network("reference")))
    assert {module.ran for module in rnn.modules() if isinstance(module, ur.Unrolled)} == {"native"}


def test_an_input_that_lies_otherwise_is_drawn_for_as_the_loop_does():
    cell = Cell(lambda cell, h, x: F.dropout(x, 0.5) + torch.rand_like(h))
    rnn, reference = ur.unroll(cell), ur.unroll(cell, engine="reference")

    def turned(run: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        return lambda x: run(x.transpose(1, 2).contiguous().transpose(1, 2))

    for way in (lambda run: run, turned, lambda run: run):
        assert_match(numbers(cell, way(rnn)), numbers(cell, way(reference)))
    assert rnn.ran == "native"


def test_a_context_or_weights_that_lie_otherwise_are_drawn_for_as_the_loop_does():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.images, self.matrix = (nn.Parameter(torch.randn(*n, dtype=F64)) for n in ((H, H, 2, 2), (2, H)))

        def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
            return torch.zeros(batch_size, H, dtype=F64)

        def forward(self, x: Tensor, h: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
            weights = (self.images * torch.rand_like(self.images)).sum((2, 3))
            noise = (F.dropout(context, 0.5) + torch.randn_like(context)).sum(1)
            h = torch.tanh(x + h @ weights + noise + (self.matrix * torch.rand_like(self.matrix)).sum(0))
            return h, h

    cell, x, context = Noisy(), torch.randn(T, B, H, dtype=F64), torch.randn(B, 2, H, dtype=F64)
    rnn, reference = ur.unroll(cell, engine="eager"), ur.unroll(cell, engine="reference")

    def compare(context: Tensor, ran: str) -> None:
        found = []
        for network in (rnn, reference):
            torch.manual_seed(0)
            found.append((network(x, context=context), torch.get_rng_state()))
        assert_match(*found)
        assert rnn.ran == ran

    for _ in range(4):  # the latest of them has a witness
        compare(context, "eager")
    with pytest.warns(UserWarning, match="how its arguments lie in memory"):
        compare(context.transpose(1, 2).contiguous().transpose(1, 2), "reference")
    cell.to(memory_format=torch.channels_last)
    compare(context, "eager")
    cell.matrix.data = cell.matrix.data.t().contiguous().t()
    compare(context, "eager")


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "poisson": (lambda cell, h, x: torch.poisson(h.detach().abs()), "whose distribution depends on the state"),
    "multinomial": (
        lambda cell, h, x: h * torch.multinomial(h.softmax(-1), 2, True).sum(-1, keepdim=True),
        "whose distribution depends on the state",
    ),
    "rrelu": (lambda cell, h, x: F.rrelu(h, training=True), "how much it draws at random depends on the numbers"),
    "seeding": (lambda cell, h, x: h + torch.rand_like(h) * bool(cell.own.manual_seed(3)), "sets a torch.Generator"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_drawn_ahead_runs_on_the_reference_and_says_why(name):
    f, why = REFUSED[name]
    cell = Cell(f)
    rnn = ur.unroll(cell)
    assert_match(numbers(cell, rnn), numbers(cell, loop(cell)))
    assert why in rnn.plan(torch.zeros(T, B, H, dtype=F64)).why
