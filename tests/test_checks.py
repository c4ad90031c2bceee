"""Steps that look at their numbers: checks that only raise stay compiled, and a branch is the reference's."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributions as D

import unrolled as ur
from matching import assert_match
from unrolled.trees import Tree, leaves

T, B, I, H = 5, 3, 4, 5
LENGTHS = torch.tensor([2, 5, 3])


class Cell(nn.Module):
    """A GRU around which a step does what is asked of it."""

    def __init__(self, step: Callable[[Cell, Tensor, Tensor], tuple[Tree, Tensor]]) -> None:
        super().__init__()
        self.gru, self.linear, self.step = nn.GRUCell(I, H), nn.Linear(H, 2 * H), step

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, H, device=device, dtype=dtype)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tree, Tensor]:
        return self.step(self, x, h)


def checking(cell: Cell, x: Tensor, h: Tensor) -> tuple[Tree, Tensor]:
    """All the ways of asking whether something is wrong."""
    assert (x.abs() < 100).all(), "an input is too large"
    if not x.max() < 100 or x.min().item() <= -100 or not torch.allclose(x, x.clone()):
        raise ValueError("an input is too large")
    if torch.isinf(x).sum() > 0 or not torch.equal(x, x.clone()) or x.min(dim=1).values.min() < -100:
        raise ValueError("an input is infinite")
    torch._assert(torch.isfinite(h).all().logical_not().logical_not(), "the state is not finite")
    h = cell.gru(x, h)
    if torch.isnan(h).any() or (h.isnan() | h.isinf()).any():
        raise ValueError("the state is not a number")
    if bool(torch.count_nonzero(h > 1)):
        raise ValueError("the state is no tanh")
    return h, h


def guarded(cell: Cell, x: Tensor, h: Tensor) -> tuple[Tree, Tensor]:
    """A check of the input and one of the state, each of which may fail."""
    if not (x < 100).all():
        raise ValueError("an input is too large")
    h = cell.gru(x, h)
    if torch.isnan(h).any():
        raise ValueError("the state is not a number")
    return h, h


def branching(cell: Cell, x: Tensor, h: Tensor) -> tuple[Tree, Tensor]:
    """What it does depends on its numbers."""
    h = cell.gru(x, h)
    if (x > 10).any():
        return h * 2, h * 0.5
    return h, h


def latent(cell: Cell, x: Tensor, h: Tensor) -> tuple[Tree, Tensor]:
    """A variational network with noise given; validation is torch's default."""
    h = cell.gru(x, h)
    mean, scale = cell.linear(h).chunk(2, -1)
    posterior = D.Independent(D.Normal(mean, F.softplus(scale)), 1)
    prior = D.Independent(D.Normal(torch.zeros_like(mean), torch.ones_like(mean)), 1)
    z = mean + F.softplus(scale) * x[:, :1]
    return (D.kl_divergence(posterior, prior), posterior.log_prob(z), D.Bernoulli(logits=h).log_prob((z > 0).to(x))), h


def discrete(cell: Cell, x: Tensor, h: Tensor) -> tuple[Tree, Tensor]:
    """A class given as a number, straight through as one of zeros and ones."""
    place = (x[:, 0] > 0).long()
    p = cell.linear(h)[:, :2].softmax(-1)
    z = F.one_hot(place, 2).to(p.dtype)
    h = cell.gru(torch.cat([z + p - p.detach(), x[:, 2:]], -1), h)
    d = D.OneHotCategorical(logits=cell.linear(h)[:, :2])
    return (d.log_prob(z), d.entropy(), D.Categorical(probs=p).log_prob(place)), h


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(T, B, I, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(step: Any, **options: Any) -> ur.Unrolled:
    torch.manual_seed(0)
    return ur.unroll(Cell(step).double(), **options)


def run(rnn: ur.Unrolled, x: Tensor, **options: Any) -> list[Tensor]:
    """Outputs, last state, and the gradients of inputs and weights."""
    x = x.clone().requires_grad_()
    results = leaves(rnn(x, **options))
    by = [x, *rnn.parameters()]
    grads = torch.autograd.grad(sum((r * r).sum() for r in results if r.requires_grad), by, allow_unused=True)
    return [*results, *(torch.zeros_like(p) if g is None else g for p, g in zip(by, grads, strict=True))]


def compare(step: Any, x: Tensor, engine: str, ran: str, made_with: Any = None, **options: Any) -> ur.Unrolled:
    rnn = made(step, engine=engine, **(made_with or {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = run(rnn, x, **options)
    assert rnn.ran == ran
    assert_match(found, run(made(step, engine="reference"), x, **options))
    return rnn


@pytest.mark.parametrize("step", [checking, latent, discrete])
@pytest.mark.parametrize("engine", ["eager", "native"])
def test_checks_that_hold_cost_no_engine(step, engine):
    x = inputs()
    rnn = compare(step, x, engine, engine)
    compare(step, x, engine, engine, lengths=LENGTHS)
    compare(step, x, engine, engine, made_with={"checkpoint": ur.segments(T, 2)})
    truth = made(step, engine="reference")
    for network in (rnn, truth):
        optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
        for seed in range(3):
            optimiser.zero_grad()
            sum((r * r).mean() for r in leaves(network(inputs(seed))) if r.requires_grad).backward()
            optimiser.step()
    assert rnn.ran == engine
    assert_match(list(rnn.parameters()), list(truth.parameters()))
    with torch.inference_mode():
        assert_match(rnn(x), truth(x))
    assert rnn.ran == engine


def spoiled(what: str) -> Tensor:
    x = inputs()
    x[3, 1, 0] = 1000 if what == "input" else float("nan")
    return x


@pytest.mark.parametrize("options", [{}, {"lengths": LENGTHS}], ids=["whole", "lengths"])
@pytest.mark.parametrize("made_with", [{}, {"checkpoint": ur.segments(T, 2)}, {"horizon": 2}, {"reverse": True}])
@pytest.mark.parametrize("what", ["input", "state"])
def test_a_check_that_fails_raises_what_the_reference_raises_and_changes_nothing(what, made_with, options):
    errors = []
    for engine in ("reference", "eager", "native"):
        rnn = made(guarded, engine=engine, **made_with)
        before = run(rnn, inputs(), **options)
        generator = torch.get_rng_state()
        with pytest.raises(ur.CellError) as raised:
            rnn(spoiled(what), **options)
        assert raised.value.__cause__.__context__ is None
        errors.append((str(raised.value), type(raised.value.__cause__), str(raised.value.__cause__)))
        assert torch.equal(torch.get_rng_state(), generator)
        assert all(p.grad is None for p in rnn.parameters())
        assert_match(run(rnn, inputs(), **options), before)
        assert rnn.ran == engine  # a call that fails says nothing of the next one
    assert errors[0] == errors[1] == errors[2]
    assert "copy 3" in errors[0][0]


def test_a_first_call_that_fails_says_nothing_of_the_next_one():
    for step in (0, 1):
        rnn = made(guarded, engine="native")
        bad = inputs()
        bad[step, 1, 0] = 1000
        with pytest.raises(ur.CellError, match=f"copy {step}.*too large"):
            rnn(bad)
        with pytest.raises(ur.CellError, match=f"copy {step}.*too large"):
            rnn(bad, lengths=LENGTHS)
        rnn(inputs())
        assert rnn.ran == "native"


@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize(
    "made_with", [{}, {"checkpoint": ur.segments(T, 2)}, {"horizon": 2}], ids=["", "memory", "cut"]
)
def test_a_branch_is_the_references_at_every_call(engine, made_with):
    rnn, truth = made(branching, engine=engine, **made_with), made(branching, engine="reference", **made_with)
    other = inputs()
    other[3, 1, 0] = 20  # at a later step, of one row
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for number, x in enumerate([inputs(), inputs(2), other, inputs(), other, inputs(3)]):
            assert_match(run(rnn, x), run(truth, x))
            assert rnn.ran == (engine if number < 2 else "reference")
    plan = rnn.plan(inputs().requires_grad_())
    assert plan.engine == "reference"
    assert plan.why.endswith(": if (x > 10).any():) is False where it was recorded")
    assert [str(w.message).endswith(plan.why) for w in told] == [True]


def test_a_branch_that_keeps_from_an_error_is_the_cells_and_errors_are_its_own():
    class Ring(nn.Module):
        """A memory of H places, written one after the other; `turn` says what happens at the end."""

        def __init__(self, turn: bool) -> None:
            super().__init__()
            self.turn = turn

        def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            memory, at = state
            if (at >= H).any():
                if not self.turn:
                    raise OverflowError("the memory is full")
                at = torch.where(at >= H, torch.zeros_like(at), at)
            memory = memory.scatter(1, at.unsqueeze(1), x[:, :1])
            return memory.gather(1, at.unsqueeze(1)) + memory, (memory, at + 1)

    x, state = torch.randn(2 * H, B, I).double(), (torch.zeros(B, H).double(), torch.zeros(B, dtype=torch.long))
    for engine in ("eager", "native"):
        rnn = ur.unroll(Ring(turn=True), engine=engine)
        rnn(x[:3], state)
        assert rnn.ran == engine
        with pytest.warns(UserWarning, match="is False where it was recorded, and going on so raised"):
            found = rnn(x, state)
        assert_match(found, ur.unroll(Ring(turn=True), engine="reference")(x, state))
    rnn = ur.unroll(Ring(turn=False), engine="eager")
    with pytest.raises(ur.CellError, match="the memory is full") as raised:
        rnn(x, state)
    assert isinstance(raised.value.__cause__, OverflowError)
    rnn(x[:3], state)
    assert rnn.ran == "eager"


def test_a_branch_within_a_row_takes_lengths():
    def squashing(cell: Cell, x: Tensor, h: Tensor) -> tuple[Tree, Tensor]:
        if not (x.abs() < 1).all():
            x = x.where(x.abs() < 1, x.tanh())
        h = cell.gru(x, h)
        return h, h

    for x, ran in ((0.1 * inputs(), "native"), (inputs(), "reference")):
        compare(squashing, x, "native", ran, lengths=LENGTHS)


def test_layers_and_resets_leave_the_engine_alone_where_they_must():
    cells = [Cell(branching).double(), nn.LSTMCell(H, 2).double()]
    rnn, truth = ur.stack(cells, engine="native"), ur.stack(cells, engine="reference")
    other, resets = inputs(), torch.zeros(T, B, dtype=torch.bool)
    other[2, 0, 0], resets[1, 2] = 20, True
    for x in (inputs(), other):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = rnn(x), rnn(x, resets=resets)
        assert_match(found, (truth(x), truth(x, resets=resets)))
    assert [layer.ran for layer in rnn.layers] == ["reference", "native"]
    assert ur.verify(made(checking), inputs()).passed


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (lambda c, x, h: (h * float(x.sum()), h), "takes one of them out, by item"),
        (lambda c, x, h: (h * x.sum().item(), h), "computes with what item() gives"),
        (lambda c, x, h: (h * int(x.sum().item()), h), "computes with what item() gives"),
        (lambda c, x, h: (torch.full_like(h, x.sum().item()), h), "computes with what item() gives"),
        (lambda c, x, h: (h if x[0, 0] > 0 else h + len(x.tolist()), h), "tolist"),
        (lambda c, x, h: (F.one_hot((x > 0).long()).to(h), h), "pass num_classes"),
    ],
    ids=["float", "item", "int of item", "item as an argument", "tolist", "one_hot"],
)
def test_a_number_that_goes_to_python_is_refused_with_its_line(step, told):
    plan = made(step).plan(inputs())
    assert plan.engine == "reference"
    assert told in plan.why
    assert "(test_checks.py:" in plan.why


def test_a_number_that_is_kept_is_refused():
    def keeping(cell: Cell, x: Tensor, h: Tensor) -> tuple[Tree, Tensor]:
        cell.norm = x.norm().item()
        return x, h

    plan = made(keeping).plan(inputs())
    assert plan.engine == "reference"


def test_an_index_outside_of_one_hot_is_refused_as_by_torch():
    def step(cell: Cell, x: Tensor, h: Tensor) -> tuple[Tree, Tensor]:
        return F.one_hot(x[:, 0].long(), 3).to(h), cell.gru(x, h)

    rnn, x = made(step, engine="native"), inputs().abs().clamp(max=2)
    compare(step, x, "native", "native")
    rnn(x)
    x[4, 2, 0] = 3
    with pytest.raises(ur.CellError, match=r"copy 4.*Class values must be smaller than num_classes"):
        rnn(x)


@pytest.mark.parametrize("made_with", [{}, {"checkpoint": ur.segments(T, 2)}])
def test_random_numbers_are_drawn_once_whoever_makes_the_call(made_with):
    # The reference replays torch's own generator alone.
    by_hand = torch.default_generator if made_with else torch.Generator()

    def noisy(cell: Cell, x: Tensor, h: Tensor) -> tuple[Tree, Tensor]:
        noise = torch.randn(h.shape, dtype=h.dtype, generator=by_hand)
        if (x > 100).any():
            raise ValueError("an input is too large")
        h = cell.gru(F.dropout(x, 0.5), h) + 0.1 * D.Normal(h, 1 + h * h).rsample() + 0.1 * noise
        return (h * 2, h) if (x > 10).any() else (h, h)

    other = inputs()
    other[3, 1, 0] = 20
    rnn, truth = made(noisy, engine="native", **made_with), made(noisy, engine="reference", **made_with)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, x in enumerate([inputs(), spoiled("input"), other, inputs()]):
            found = []
            for network in (rnn, truth):
                torch.manual_seed(number)
                by_hand.manual_seed(number)
                results = []
                with contextlib.suppress(ur.CellError):
                    results = run(network, x)
                assert bool(results) == (number != 1)
                found.append([*results, torch.rand(3), torch.rand(3, generator=by_hand)])
            assert_match(*found)
            assert rnn.ran == ("native" if number < 2 else "reference")
