"""Stateful modules: called with an input alone, they keep their state in attributes; unrolled, they are cells."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from matching import assert_match

F64 = torch.float64
T, B, I, H = 4, 3, 4, 5
Linear = nn.Linear


class Neuron(nn.Module):
    """A number at first, a tensor after a step."""

    def __init__(self) -> None:
        super().__init__()
        self.v: Any = 0.0

    def reset(self) -> None:
        self.v = 0.0

    def forward(self, current: Tensor) -> Tensor:
        self.v = 0.9 * self.v + current
        fired = torch.sigmoid(4 * (self.v - 1))
        self.v = self.v * (1 - fired)
        return fired


class InPlace(Neuron):
    """A buffer without rows at first, written into from the second step on."""

    def __init__(self) -> None:
        super().__init__()
        del self.v
        self.register_buffer("v", torch.zeros(0, dtype=F64))

    def reset(self) -> None:
        self.v = torch.zeros(0, dtype=F64)

    def forward(self, current: Tensor) -> Tensor:
        if self.v.shape != current.shape:
            self.v = torch.zeros_like(current)
        self.v += current
        self.scratch = torch.sigmoid(self.v)
        return self.scratch


class Memories(nn.Module):
    """Keeps its states in a dict of its own and makes attributes of them; both are shifted by a step."""

    def __init__(self) -> None:
        super().__init__()
        self._memories = {"now": None, "before": 0.5}

    def reset(self) -> None:
        self._memories.update(now=None, before=0.5)

    def __getattr__(self, name: str) -> Any:
        memories = self.__dict__.get("_memories", {})
        return memories[name] if name in memories else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        memories = self.__dict__.get("_memories", {})
        if name in memories:
            memories[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        now = torch.zeros_like(x) if self.now is None else self.now
        output = torch.tanh(x + now - self.before)
        self.before, self.now = now, output
        return output


class Pair(nn.Module):
    """A tuple in one attribute."""

    hidden: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(H, H, dtype=F64)

    def reset(self) -> None:
        self.hidden = None

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.cell(x, self.hidden)
        return self.hidden[0]


KINDS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "number": (Neuron, ("1.v", "3.v")),
    "in place": (InPlace, ("1.v", "3.v")),
    "dict": (Memories, ("1.before", "1.now", "3.before", "3.now")),
    "tuple": (Pair, ("1.hidden", "3.hidden")),
}


def net_of(kind: type[nn.Module]) -> nn.Module:
    return nn.Sequential(Linear(I, H, dtype=F64), kind(), Linear(H, H, dtype=F64), kind())


def by_hand(net: nn.Module, x: Tensor) -> Tensor:
    for part in net.modules():
        getattr(part, "reset", lambda: None)()
    return torch.stack([net(step) for step in x])


def numbers(net: nn.Module, outputs: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(0.5, 1.5, outputs.numel(), dtype=F64).view(outputs.shape)
    return (outputs, *torch.autograd.grad((outputs * weights).sum(), [x, *net.parameters()]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_found_in_the_attributes_and_the_loop_is_the_modules_own(kind):
    made, names = KINDS[kind]
    net, x = net_of(made), torch.randn(T, B, I, dtype=F64, requires_grad=True)
    own, rnn = copy.deepcopy(net), ur.unroll(net)
    outputs, state = rnn(x)
    assert rnn.ran == "native"
    assert tuple(state) == names
    assert_match(numbers(net, outputs, x), numbers(own, by_hand(own, x), x))
    by_hand(net, torch.randn(2, 2, I, dtype=F64))  # a run of its own, of another batch
    assert_match(rnn(x)[0], outputs)
    first, state = rnn(x[:2])
    assert_match(torch.cat([first, rnn(x[2:], state)[0]]), outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_named_attributes_with_lengths_resets_and_a_memory_budget(kind):
    made, names = KINDS[kind]
    net, x = net_of(made), torch.randn(T, B, I, dtype=F64, requires_grad=True)
    fast, slow = (ur.unroll(ur.as_cell(net, state_attributes=names), engine=e) for e in ("eager", "reference"))
    kept = [getattr(net.get_submodule(path[0]), path[2:]) for path in names]
    resets = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    for options in ({"lengths": [4, 0, 2]}, {"resets": resets}):
        got, wanted = (rnn(x, **options)[0] for rnn in (fast, slow))
        assert_match(numbers(net, got, x), numbers(net, wanted, x))
    bounded = ur.unroll(ur.as_cell(net, state_attributes=names), engine="reference", checkpoint=ur.segments(T, 2))
    assert_match(numbers(net, bounded(x)[0], x), numbers(net, slow(x)[0], x))
    # Runs left nothing behind.
    now = [getattr(net.get_submodule(path[0]), path[2:]) for path in names]
    assert all(a is b or a == b or a.numel() == 0 for a, b in zip(now, kept, strict=True))


def test_five_steps_of_an_optimiser():
    net, x = net_of(Neuron), torch.randn(T, B, I, dtype=F64)
    own, rnn = copy.deepcopy(net), ur.unroll(net)
    optimisers = [torch.optim.Adam(one.parameters(), 0.05) for one in (net, own)]
    for _ in range(5):
        for optimiser, outputs in zip(optimisers, (rnn(x)[0], by_hand(own, x)), strict=True):
            optimiser.zero_grad()
            outputs.square().sum().backward()
            optimiser.step()
        assert_match(tuple(net.parameters()), tuple(own.parameters()))
    assert rnn.ran == "native"


class Twice(nn.Module):
    """Returns a pair, so that nobody can tell whether the second is its state."""

    v: Any = 0.0

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        self.v = self.v + scale * x
        return self.v, self.v * 2


class FromOnes(nn.Module):
    """Starts from ones where nothing is there."""

    v: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.v = (torch.ones_like(x) if self.v is None else self.v) * x
        return self.v


class Counter(nn.Module):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


REFUSED = {
    Twice: "as_cell(module, state_attributes=('v',))",
    FromOnes: "what FromOnes starts from in v is not known: its first step is another one from zeros of that shape",
    Counter: "which they are could not be proved: what its step does depends on count, which the step before it left",
    nn.Tanh: "Tanh has no initial_state and none was given",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_proved_is_not_guessed(kind):
    with pytest.raises(ur.StateError) as refused:
        ur.unroll(kind())(torch.randn(T, B, I))
    assert REFUSED[kind] in str(refused.value)


def test_what_was_found_can_be_named_or_the_state_be_given():
    x = torch.randn(T, B, I, dtype=F64)
    (v, double), _ = ur.unroll(ur.as_cell(Twice(), state_attributes=("v",)))(x)
    assert_match((v, double), (x.cumsum(0), 2 * x.cumsum(0)))
    outputs, _ = ur.unroll(ur.as_cell(FromOnes(), state_attributes=["v"]))(x, {"v": torch.ones(B, I, dtype=F64)})
    assert_match(outputs, x.cumprod(0))

    def ones(batch_size: int, device: Any = None, dtype: Any = None) -> dict[str, Tensor]:
        return {"v": torch.ones(batch_size, I, dtype=F64)}

    cell = ur.as_cell(FromOnes(), state_attributes=("v",), state=ones)
    assert_match(ur.unroll(ur.DropoutCell(cell, 0.0))(x)[0], x.cumprod(0))


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (Neuron(), {"state_attributes": "v"}, "takes the paths of attributes"),
        (Neuron(), {"state_attributes": ("inner.v",)}, "has no part 'inner'"),
        (nn.Linear(2, 2), {"state_attributes": ("weight",)}, "names weight, a Parameter"),
        (Neuron(), {"state_attributes": ("v",), "step": lambda m, x, s: (x, s)}, "leave step= out"),
        (lambda x, s: (x, s), {"state_attributes": ("v",)}, "goes with a module"),
    ],
)
def test_attributes_that_cannot_be_a_state_are_refused(module, options, words):
    with pytest.raises(ur.OptionError, match=words):
        ur.as_cell(module, **options)


def test_an_attribute_without_tensors_is_no_state():
    with pytest.raises(ur.UnrolledError, match="holds 1, which is no state"):
        ur.unroll(ur.as_cell(Counter(), state_attributes=("count",)))(torch.randn(T, B, I))


def test_inside_of_a_wrapper_the_shape_is_not_known():
    with pytest.raises(ur.StateError, match="has the shape that its input gives it"):
        ur.unroll(ur.DropoutCell(ur.as_cell(Neuron(), state_attributes=("v",)), 0.5))(torch.randn(T, B, I))


class Held(nn.Module):
    """Starts from a buffer, which a reset, if it has one, computes from another one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("v", torch.zeros(1, H, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        self.v = 0.5 * self.v + x
        return torch.tanh(self.v)


class Reset(Held):
    def __init__(self) -> None:
        super().__init__()
        self.start = torch.zeros(1, H, dtype=F64)

    def reset(self) -> None:
        self.v = 2 * self.start


class Listed(Reset):
    """Starts from a number in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.start = [torch.zeros(1, H, dtype=F64)]

    def reset(self) -> None:
        self.v = self.start[0] - 1


@pytest.mark.parametrize("kind", [Held, Reset, Listed])
def test_what_a_fresh_module_has_is_read_at_every_call(kind):
    net, x = kind(), torch.randn(T, B, H, dtype=F64)
    rnn = ur.unroll(net, engine="eager")
    for _ in range(4):
        rnn(x)
    for tensor in [net.v] if kind is Held else net.start if kind is Listed else [net.start]:
        tensor.fill_(0.7)
    assert_match(rnn(x)[0], by_hand(copy.deepcopy(net), x))
    assert rnn.ran == "eager"


def test_another_setting_may_keep_its_state_elsewhere():
    class Double(Neuron):
        w: Any = 0.0
        twice = False

        def reset(self) -> None:
            self.v = self.w = 0.0

        def forward(self, current: Tensor) -> Tensor:
            self.v = 0.5 * self.v + current
            if self.twice:
                self.w = 0.3 * self.w + self.v
            return torch.tanh(self.w if self.twice else self.v)

    net, x = Double(), torch.randn(T, B, H, dtype=F64)
    rnn = ur.unroll(net, engine="eager")
    for net.twice, names in ((False, ["v"]), (True, ["v", "w"]), (False, ["v"])):
        for _ in range(2):
            outputs, state = rnn(x)
            assert_match(outputs, by_hand(copy.deepcopy(net), x))
        assert (list(state), rnn.ran) == (names, "eager")


def test_a_start_that_is_trained_is_no_number():
    class Learned(Held):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Parameter(torch.ones(1, H, dtype=F64))

        def reset(self) -> None:
            self.v = self.start * 1

    net, x = Learned(), torch.randn(T, B, H, dtype=F64)
    with pytest.raises(ur.StateError, match="its reset computes it from parameters, to which no gradient would flow"):
        ur.unroll(net)(x)
    x.requires_grad_()
    outputs, _ = ur.unroll(ur.as_cell(net, state_attributes=("v",)), engine="eager")(x, {"v": net.start.expand(B, H)})
    assert_match(numbers(net, outputs, x), numbers(net, by_hand(net, x), x))
