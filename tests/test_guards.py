"""Whatever a step reads may change after it was recorded: the answer is always the loop's, as the cell is now."""

from __future__ import annotations

import copy
import dataclasses
import random
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matching import assert_match
from random_cells import ENGINES, assert_as_reference, decision, unrolled

F64 = torch.float64
H = 4
GAIN = 1.5
TABLE = {"gain": 1.5}
SETTINGS = SimpleNamespace(gain=1.5)


class Cell(nn.Module):
    """`h' = tanh(W h + f(self, x))` for an f that reads what may change."""

    gain = 1.5
    gains = (1.5, 2.0)

    def __init__(self, f: Callable[..., Tensor] | None = None, **attributes: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(H, H).double()
        self.register_buffer("scale", torch.full((H,), 1.5, dtype=F64))
        self.f = f or (lambda cell, x: x)
        for name, value in attributes.items():
            setattr(self, name, value)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, H, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.linear(state) + self.f(self, input))
        return hidden, hidden

    def helper(self, x: Tensor) -> Tensor:
        return GAIN * x


class HelperCell(Cell):
    """Reads a global in a method, and in its parent's forward."""

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(self.helper(input), state)


class PropertyCell(Cell):
    """Reads a global in a property."""

    @property
    def strength(self) -> float:
        return GAIN

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(self.strength * input, state)


class Holder:
    """An object that is no module."""

    def __init__(self, gain: float) -> None:
        self.gain = gain


class SlottedHolder:
    """An object without a `__dict__`."""

    __slots__ = ("gain",)

    def __init__(self, gain: float) -> None:
        self.gain = gain


def scaled(x: Tensor, by: float = 1.5) -> Tensor:
    return by * x


def by_global(x: Tensor) -> Tensor:
    return GAIN * x


def _scaled_by(by: float) -> Callable[..., Tensor]:
    return lambda x, by=by: by * x


OTHER = types.ModuleType("other")
vars(OTHER).update(calls=0, helper=lambda x: 1.5 * x, scaled=_scaled_by(1.5), act=torch.tanh)
ACT = torch.tanh


def _closing_over(box: list[float]) -> Callable[..., Tensor]:
    return lambda cell, x: box[0] * x


class Nonlocal:
    """A closure variable that a setter rebinds."""

    def __init__(self) -> None:
        gain = 1.5

        def f(cell: nn.Module, x: Tensor) -> Tensor:
            return gain * x

        def change() -> None:
            nonlocal gain
            gain = 0.5

        self.f, self.change = f, change


class Case:
    """A cell, and a change to what its step reads."""

    def __init__(self, cell: nn.Module, change: Callable[[nn.Module, pytest.MonkeyPatch], Any]) -> None:
        self.cell, self.change = cell, change


def _set(name: str, value: Any) -> Callable[[nn.Module, pytest.MonkeyPatch], None]:
    return lambda cell, patch: setattr(cell, name, value)


def _module() -> Any:
    return __import__(__name__)


def _nonlocal() -> Case:
    closure = Nonlocal()
    return Case(Cell(closure.f), lambda cell, patch: closure.change())


def _boxed() -> Case:
    box = [1.5]
    return Case(Cell(_closing_over(box)), lambda cell, patch: box.__setitem__(0, 0.5))


def _frozen() -> Case:
    return Case(Cell(), lambda cell, patch: cell.linear.weight.requires_grad_(False))


def _hooked(kind: str) -> Case:
    def hook(module: nn.Module, given: Any, *result: Any) -> Any:
        return 0.5 * result[0] if result else (0.5 * given[0],)

    return Case(Cell(), lambda cell, patch: getattr(cell.linear, kind)(hook))


def _default() -> Case:
    def f(cell: nn.Module, x: Tensor, by: float = 1.5) -> Tensor:
        return by * x

    return Case(Cell(f), lambda cell, patch: setattr(f, "__defaults__", (0.5,)))


def _function_attribute() -> Case:
    def f(cell: nn.Module, x: Tensor) -> Tensor:
        return f.gain * x

    f.gain = 1.5
    return Case(Cell(f), lambda cell, patch: setattr(f, "gain", 0.5))


CHANGES: dict[str, Callable[[], Case]] = {
    "attribute": lambda: Case(Cell(lambda cell, x: cell.beta * x, beta=1.5), _set("beta", 0.5)),
    "attribute of the same value and another type": lambda: Case(
        Cell(lambda cell, x: x if cell.beta is True else 2 * x, beta=1), _set("beta", True)
    ),
    "sign of a zero": lambda: Case(
        Cell(lambda cell, x: torch.atan2(torch.full_like(x, cell.beta), -x.abs() - 1), beta=0.0), _set("beta", -0.0)
    ),
    "attribute in a list": lambda: Case(
        Cell(lambda cell, x: cell.betas[0] * x, betas=[1.5]), lambda cell, patch: cell.betas.__setitem__(0, 0.5)
    ),
    "attribute in a nested dict": lambda: Case(
        Cell(lambda cell, x: cell.betas["a"]["b"][0] * x, betas={"a": {"b": [1.5]}}),
        lambda cell, patch: cell.betas["a"]["b"].__setitem__(0, 0.5),
    ),
    "attribute of an object": lambda: Case(
        Cell(lambda cell, x: cell.holder.gain * x, holder=Holder(1.5)),
        lambda cell, patch: setattr(cell.holder, "gain", 0.5),
    ),
    "attribute of an object with slots": lambda: Case(
        Cell(lambda cell, x: cell.holder.gain * x, holder=SlottedHolder(1.5)),
        lambda cell, patch: setattr(cell.holder, "gain", 0.5),
    ),
    "attribute of two shared objects": lambda: _shared(),
    "attribute that is a set": lambda: Case(
        Cell(lambda cell, x: x * (1 + ("a" in cell.flags)), flags={"a"}), lambda cell, patch: cell.flags.clear()
    ),
    "attribute of a submodule": lambda: Case(
        Cell(lambda cell, x: cell.linear.beta * x), lambda cell, patch: setattr(cell.linear, "beta", 0.5)
    ),
    "function": lambda: Case(Cell(lambda cell, x: x), _set("f", lambda cell, x: 2 * x)),
    "default argument": _default,
    "attribute of a function": _function_attribute,
    "closure variable": _nonlocal,
    "list in a closure": _boxed,
    "global constant": lambda: Case(
        Cell(lambda cell, x: GAIN * x), lambda cell, patch: patch.setattr(_module(), "GAIN", 0.5)
    ),
    "global constant of a function that it calls": lambda: Case(
        Cell(lambda cell, x: by_global(x)), lambda cell, patch: patch.setattr(_module(), "GAIN", 0.5)
    ),
    "global dict": lambda: Case(
        Cell(lambda cell, x: TABLE["gain"] * x), lambda cell, patch: patch.setitem(TABLE, "gain", 0.5)
    ),
    "global object": lambda: Case(
        Cell(lambda cell, x: SETTINGS.gain * x), lambda cell, patch: patch.setattr(SETTINGS, "gain", 0.5)
    ),
    "constant of another module": lambda: Case(
        Cell(lambda cell, x: random.NV_MAGICCONST * x),
        lambda cell, patch: patch.setattr(random, "NV_MAGICCONST", 0.5),
    ),
    "global class": lambda: Case(
        Cell(lambda cell, x: Settings.gain * x), lambda cell, patch: patch.setattr(Settings, "gain", 0.5)
    ),
    "global in a method and the parent's forward": lambda: Case(
        HelperCell(), lambda cell, patch: patch.setattr(_module(), "GAIN", 0.5)
    ),
    "global in a property": lambda: Case(PropertyCell(), lambda cell, patch: patch.setattr(_module(), "GAIN", 0.5)),
    "global function replaced": lambda: Case(
        Cell(lambda cell, x: scaled(x)), lambda cell, patch: patch.setattr(_module(), "scaled", lambda x: 2 * x)
    ),
    "default of a global function": lambda: Case(
        Cell(lambda cell, x: scaled(x)), lambda cell, patch: patch.setattr(scaled, "__defaults__", (0.5,))
    ),
    "class attribute": lambda: Case(
        Cell(lambda cell, x: cell.gain * x), lambda cell, patch: patch.setattr(Cell, "gain", 0.5)
    ),
    "class attribute that is a tuple": lambda: Case(
        Cell(lambda cell, x: cell.gains[0] * x), lambda cell, patch: patch.setattr(Cell, "gains", (0.5,))
    ),
    "method of the class": lambda: Case(
        HelperCell(), lambda cell, patch: patch.setattr(Cell, "helper", lambda self, x: 3 * x)
    ),
    "forward of the class": lambda: Case(Cell(), lambda cell, patch: patch.setattr(Cell, "forward", _other_forward)),
    "forward of the instance": lambda: Case(
        Cell(), lambda cell, patch: setattr(cell, "forward", lambda x, h: (x + h, x + h))
    ),
    "buffer's numbers": lambda: Case(Cell(lambda cell, x: cell.scale * x), lambda cell, patch: cell.scale.fill_(0.5)),
    "buffer replaced": lambda: Case(
        Cell(lambda cell, x: cell.scale * x), _set("scale", torch.full((H,), 0.5, dtype=F64))
    ),
    "buffer of another shape": lambda: Case(
        Cell(lambda cell, x: cell.scale * x), _set("scale", torch.full((1,), 0.5, dtype=F64))
    ),
    "plain tensor replaced": lambda: Case(
        Cell(lambda cell, x: cell.plain * x, plain=torch.full((H,), 1.5, dtype=F64)),
        _set("plain", torch.full((H,), 0.5, dtype=F64)),
    ),
    "plain tensor of another shape": lambda: Case(
        Cell(lambda cell, x: cell.plain * x, plain=torch.full((H,), 1.5, dtype=F64)),
        _set("plain", torch.full((1, 1), 0.5, dtype=F64)),
    ),
    "plain tensor in the loop, of another shape": lambda: Case(
        LoopReader(plain=torch.full((H,), 0.7, dtype=F64)), _set("plain", torch.full((1,), 0.5, dtype=F64))
    ),
    "plain tensor in the loop, of another dtype": lambda: Case(
        LoopReader(plain=torch.full((H,), 0.7, dtype=F64)), _set("plain", torch.full((H,), 0.5))
    ),
    "plain tensor that comes to need a gradient": lambda: Case(
        LoopReader(plain=torch.full((H,), 0.7, dtype=F64)),
        _set("plain", torch.full((H,), 0.5, dtype=F64, requires_grad=True)),
    ),
    "plain tensor replaced by a number": lambda: Case(
        LoopReader(plain=torch.full((H,), 0.7, dtype=F64)), _set("plain", 0.5)
    ),
    "plain tensor in a list": lambda: Case(
        Cell(lambda cell, x: cell.plain[0] * x, plain=[torch.full((H,), 1.5, dtype=F64)]),
        lambda cell, patch: cell.plain.__setitem__(0, torch.full((H,), 0.5, dtype=F64)),
    ),
    "parameter's numbers": lambda: Case(Cell(), lambda cell, patch: cell.linear.weight.data.mul_(0.5)),
    "parameter replaced": lambda: Case(
        Cell(),
        lambda cell, patch: setattr(cell.linear, "weight", nn.Parameter(torch.eye(H, dtype=F64))),
    ),
    "parameter frozen": _frozen,
    "parameter removed": lambda: Case(Cell(), lambda cell, patch: setattr(cell.linear, "bias", None)),
    "parameters tied": lambda: Case(
        Cell(lambda cell, x: cell.other(x), other=nn.Linear(H, H).double()),
        lambda cell, patch: setattr(cell.other, "weight", cell.linear.weight),
    ),
    "submodule swapped": lambda: Case(
        Cell(lambda cell, x: cell.act(x), act=nn.Tanh()), lambda cell, patch: setattr(cell, "act", nn.ReLU())
    ),
    "submodule of the same kind swapped": lambda: Case(
        Cell(), lambda cell, patch: setattr(cell, "linear", nn.Linear(H, H).double())
    ),
    "submodule added": lambda: Case(
        Cell(lambda cell, x: cell.acts(x), acts=nn.Sequential(nn.Tanh())),
        lambda cell, patch: cell.acts.append(nn.ReLU()),
    ),
    "eval()": lambda: Case(Cell(lambda cell, x: 2 * x if cell.training else x), lambda cell, patch: cell.eval()),
    "eval() of a submodule": lambda: Case(
        Cell(lambda cell, x: 2 * x if cell.linear.training else x), lambda cell, patch: cell.linear.eval()
    ),
    **{kind: lambda kind=kind: _hooked(kind) for kind in ("register_forward_hook", "register_forward_pre_hook")},
    "global forward hook": lambda: Case(Cell(), _global_hook),
    "function of another module": lambda: Case(
        Cell(lambda cell, x: OTHER.helper(x)), lambda cell, patch: patch.setattr(OTHER, "helper", lambda x: 0.5 * x)
    ),
    "the same function with another default": lambda: Case(
        Cell(lambda cell, x: OTHER.scaled(x)), lambda cell, patch: patch.setattr(OTHER, "scaled", _scaled_by(0.5))
    ),
    "builtin of another module": lambda: Case(
        Cell(lambda cell, x: OTHER.act(x)), lambda cell, patch: patch.setattr(OTHER, "act", torch.sigmoid)
    ),
    "builtin that is a global": lambda: Case(
        Cell(lambda cell, x: ACT(x)), lambda cell, patch: patch.setitem(globals(), "ACT", torch.sigmoid)
    ),
    "wrapped by weight norm": lambda: Case(
        Cell(), lambda cell, patch: nn.utils.parametrizations.weight_norm(cell.linear)
    ),
}


class Settings:
    gain = 1.5


class LoopReader(Cell):
    """Reads a plain tensor inside of the loop."""

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.linear(state) * self.plain + input)
        return hidden, hidden


def _other_forward(self: nn.Module, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return input - state, input - state


def _shared() -> Case:
    one = Holder(1.5)
    return Case(
        Cell(lambda cell, x: cell.a.gain * x + cell.b.gain, a=one, b=one),
        lambda cell, patch: setattr(cell, "b", Holder(1.5)) or setattr(cell.a, "gain", 0.5),
    )


def _global_hook(cell: nn.Module, patch: pytest.MonkeyPatch) -> None:
    hooks = nn.modules.module._global_forward_hooks
    patch.setitem(hooks, 12345, lambda module, given, result: 0.5 * result if isinstance(result, Tensor) else None)


def _default_dtype(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "full", _full_in_double)


def _full_in_double(*args: Any, **kwargs: Any) -> Tensor:
    return torch.ops.aten.full(*args, **{"dtype": F64, **kwargs})


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_a_recording_changes_the_answer_as_in_the_loop(change, engine, monkeypatch):
    case = CHANGES[change]()
    if change == "attribute of a submodule":
        case.cell.linear.beta = 1.5
    x = torch.randn(5, 2, H, dtype=F64)
    fast = unrolled(case.cell, engine)
    fast(x)
    fast(x)[0].sum().backward()
    case.change(case.cell, monkeypatch)
    assert_as_reference(case.cell, x, engine=engine, rnn=fast, what=change)


@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_entered_and_left(engine):
    cell, x = Cell().float(), torch.randn(5, 2, H)
    fast, slow = unrolled(cell, engine), unrolled(cell, "reference")
    fast(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_match(fast(x), slow(x))
    assert_match(fast(x), slow(x))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_copy_and_a_moved_cell_are_recorded_anew(engine):
    cell, x = Cell(lambda cell, x: cell.beta * x, beta=1.5), torch.randn(5, 2, H, dtype=F64)
    fast = unrolled(cell, engine)
    fast(x)
    again = copy.deepcopy(fast)
    again.cell.beta = 0.5
    assert_match(again(x), unrolled(again.cell, "reference")(x))
    assert_match(fast.float()(x.float()), unrolled(cell, "reference")(x.float()))


# -- what bars recording ---------------------------------------------------------------------------------------------


class CounterCell(Cell):
    """Behaves differently from its third step on."""

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.count = getattr(self, "count", 0) + 1
        return super().forward(input if self.count < 3 else 2 * input, state)


class DictCounterCell(Cell):
    """Counts in a dict."""

    def __init__(self) -> None:
        super().__init__(counts={"n": 0})

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.counts["n"] += 1
        return super().forward(input if self.counts["n"] < 7 else 2 * input, state)


class ObjectCounterCell(Cell):
    """Counts in an object that is no module."""

    def __init__(self) -> None:
        super().__init__(holder=Holder(0))

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.holder.gain += 1
        return super().forward(input if self.holder.gain < 7 else 2 * input, state)


class AppendingCell(Cell):
    """Keeps every hidden state in a list."""

    def __init__(self) -> None:
        super().__init__(log=[])

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden, state = super().forward(input, state)
        self.log.append(1)
        return hidden, state


class TensorLogCell(AppendingCell):
    """Keeps every hidden state itself in a list."""

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden, state = Cell.forward(self, input, state)
        self.log.append(hidden.detach())
        return hidden, state


class ReadBackCell(Cell):
    """Reads at every step the tensor that the step before it left."""

    def __init__(self) -> None:
        super().__init__(trace=torch.zeros(1, H, dtype=F64))

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden, state = super().forward(input + 0.5 * self.trace, state)
        self.trace = hidden.detach()
        return hidden, state


class BufferCounterCell(Cell):
    """Counts in a buffer, in place."""

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.scale += 0.1
        return super().forward(self.scale * input, state)


class BufferReplacingCell(Cell):
    """Counts in a buffer, which it replaces."""

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.scale = self.scale + 0.1
        return super().forward(self.scale * input, state)


GLOBAL_COUNT = {"n": 0}


class GlobalCounterCell(Cell):
    """Counts in a global."""

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        GLOBAL_COUNT["n"] += 1
        return super().forward(input if GLOBAL_COUNT["n"] < 7 else 2 * input, state)


CALLS = 0


class GlobalNumberCell(Cell):
    """Counts in a global that it binds anew."""

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        global CALLS
        CALLS += 1
        return super().forward(input if CALLS < 7 else 2 * input, state)


class OtherModuleCell(Cell):
    """Counts in another module."""

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        OTHER.calls += 1
        return super().forward(input if OTHER.calls < 7 else 2 * input, state)


class ClassCounterCell(Cell):
    """Counts in its class."""

    seen = 0

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        ClassCounterCell.seen += 1
        return super().forward(input if ClassCounterCell.seen < 7 else 2 * input, state)


def _counting_in_a_closure() -> nn.Module:
    box, count = [0], 0

    def f(cell: nn.Module, x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        box[0] += 1
        return x if count + box[0] < 14 else 2 * x

    cell = Cell(f)
    cell.reset = lambda: (
        f.__closure__[0].cell_contents.__setitem__(0, 0) or setattr(f.__closure__[1], "cell_contents", 0)
    )
    cell.counts = lambda: [held.cell_contents for held in f.__closure__]
    return cell


OUTSIDE: dict[str, Callable[[], nn.Module]] = {
    "global in a dict": GlobalCounterCell,
    "global number": GlobalNumberCell,
    "number of another module": OtherModuleCell,
    "number of the class": ClassCounterCell,
    "closure": _counting_in_a_closure,
}


def _reset(cell: nn.Module) -> None:
    global CALLS
    CALLS = GLOBAL_COUNT["n"] = OTHER.calls = ClassCounterCell.seen = 0
    if hasattr(cell, "reset"):
        cell.reset()


def _counts(cell: nn.Module) -> Any:
    return CALLS, GLOBAL_COUNT["n"], OTHER.calls, ClassCounterCell.seen, getattr(cell, "counts", int)()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", OUTSIDE)
def test_what_a_step_counts_outside_of_the_cell_is_counted_as_in_the_loop(name, engine):
    cell, x = OUTSIDE[name](), torch.randn(9, 2, H, dtype=F64)
    _reset(cell)
    before = str(_counts(cell))
    found = decision(cell, x, engine)
    assert (found.plan, found.engine) == (None, "reference")
    assert "outside of the cell" in found.why
    assert str(_counts(cell)) == before, "planning counted"
    fast = unrolled(cell, engine)
    for _ in range(2):
        _reset(cell)
        got, counted = fast(x), str(_counts(cell))
        _reset(cell)
        assert_match(got, unrolled(cell, "reference")(x))
        assert counted == str(_counts(cell)) != before


ASKED: dict[str, Callable[[Tensor], Tensor]] = {
    "gradients": lambda x: 2 * x if torch.is_grad_enabled() else x,
    "inference": lambda x: 2 * x if torch.is_inference_mode_enabled() else x,
    "dtype": lambda x: 2 * x if torch.get_default_dtype() == F64 else x,
    "threads": lambda x: x * torch.get_num_threads(),
    "gradients, in a function that it calls": lambda x: 2 * x if _asks_deeper() else x,
}


def _asks_deeper() -> bool:
    return torch.is_grad_enabled()


@pytest.fixture
def other_modes():
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.mark.usefixtures("other_modes")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("asked", ASKED)
def test_a_mode_that_a_step_asks_for_is_that_of_the_call(asked, engine):
    cell, x = Cell(lambda cell, x: ASKED[asked](x)), torch.randn(5, 2, H, dtype=F64)
    assert decision(cell, x, engine).plan is not None
    fast, slow = unrolled(cell, engine), unrolled(cell, "reference")
    assert_match(fast(x), slow(x))
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert_match(fast(x), slow(x))
    torch.set_num_threads(3)
    assert_match(fast(x), slow(x))
    torch.set_default_dtype(F64)
    assert_match(fast(x), slow(x))


LEAVING: dict[str, Callable[[], nn.Module]] = {
    "counter": CounterCell,
    "counter in a dict": DictCounterCell,
    "counter in an object": ObjectCounterCell,
    "counter in a buffer": BufferCounterCell,
    "counter in a replaced buffer": BufferReplacingCell,
    "list that grows": AppendingCell,
    "list of tensors that grows": TensorLogCell,
    "tensor read back": ReadBackCell,
}


def _left_behind(cell: nn.Module) -> Any:
    plain = {key: value for key, value in vars(cell).items() if key in ("count", "counts", "log", "trace")}
    plain |= {"holder": vars(cell.holder)} if hasattr(cell, "holder") else {}
    return {**plain, "scale": cell.scale, "global": dict(GLOBAL_COUNT)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LEAVING)
def test_what_a_step_leaves_for_the_next_is_left_as_in_the_loop(name, engine):
    x = torch.randn(6, 1, H, dtype=F64)
    torch.manual_seed(5)
    cell = LEAVING[name]()
    twin = copy.deepcopy(cell)
    fast, slow = unrolled(cell, engine), unrolled(twin, "reference")
    for _ in range(2):
        GLOBAL_COUNT["n"] = 0
        got, left = fast(x), _left_behind(cell)
        GLOBAL_COUNT["n"] = 0
        assert_match(got, slow(x))
        assert str(left) == str(_left_behind(twin))


BRANCHES: dict[str, Callable[[Tensor], bool]] = {
    "bool()": lambda x: bool(x.sum() > 0),
    "item()": lambda x: x.sum().item() > 0,
    "float()": lambda x: float(x.sum()) > 0,
    "tolist()": lambda x: sum(map(sum, x.tolist())) > 0,
    "numpy()": lambda x: x.detach().numpy().sum() > 0,
    "__array__": lambda x: __import__("numpy").asarray(x.detach()).sum() > 0,
    "equal": lambda x: torch.equal(x, x.abs()),
    "allclose": lambda x: torch.allclose(x, x.abs()),
    "nonzero": lambda x: len((x > 0).nonzero()) > 3,
    "any": lambda x: bool((x > 1).any()),
    "repr": lambda x: "-" not in repr(x),
    "untyped_storage": lambda x: x.detach().contiguous().untyped_storage()[7] < 128,
    "batch size": lambda x: x.shape[0] == 1,
    "small batch": lambda x: min(x.shape[0], 3) < 3,
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_branch_on_numbers_or_sizes_is_taken_anew_at_every_step(branch, engine):
    cell = Cell(lambda cell, x: 2 * x if BRANCHES[branch](x) else x)
    fast = unrolled(cell, engine)
    fast(torch.ones(2, 4, H, dtype=F64))
    for B in (1, 4):
        assert_as_reference(cell, torch.randn(6, B, H, dtype=F64), engine=engine, rnn=fast)
        assert_as_reference(cell, -torch.rand(6, B, H, dtype=F64), engine=engine, rnn=fast)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("draw", ["torch", "dropout", "python", "generator"])
def test_random_numbers_drawn_in_a_step_are_those_of_the_loop(draw, engine):
    generator = torch.Generator().manual_seed(1)
    draws: dict[str, Callable[..., Tensor]] = {
        "torch": lambda cell, x: x * torch.rand_like(x),
        "dropout": lambda cell, x: nn.functional.dropout(x, 0.5, cell.training),
        "python": lambda cell, x: x * random.random(),
        "generator": lambda cell, x: x * torch.rand(H, generator=generator, dtype=F64),
    }
    cell, x = Cell(draws[draw]), torch.randn(5, 2, H, dtype=F64)

    def ran(engine: str) -> Any:
        generator.manual_seed(1)
        torch.manual_seed(7)
        random.seed(7)
        return unrolled(cell, engine)(x)

    assert_match(ran(engine), ran("reference"))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_region_without_gradients_has_none(engine):
    """The first call is on zeros, where the gradient of the region would be zero anyway."""

    def f(cell: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            size = cell.linear(x).abs().sum(-1, keepdim=True)
        return x / (1 + size)

    cell = Cell(f)
    nn.init.zeros_(cell.linear.bias)
    fast = unrolled(cell, engine)
    fast(torch.zeros(2, 2, H, dtype=F64))
    assert_as_reference(cell, torch.randn(5, 2, H, dtype=F64), engine=engine, rnn=fast)


class ScratchCell(Cell):
    """Writes an attribute before it reads it, as spiking libraries do."""

    def __init__(self) -> None:
        super().__init__(mem=None)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.mem = self.linear(state) + input
        hidden = torch.tanh(self.mem)
        return hidden, hidden


@pytest.mark.parametrize("engine", ENGINES)
def test_an_attribute_that_is_only_scratch_does_not_bar_recording(engine):
    cell, x = ScratchCell(), torch.randn(5, 2, H, dtype=F64)
    assert decision(cell, x, engine).plan is not None
    assert_as_reference(cell, x, engine=engine)
    unrolled(cell, "reference")(x)
    assert decision(cell, x, engine).plan is not None


@pytest.mark.parametrize("name", ["counter", "counter in a buffer", "tensor read back"])
def test_the_decision_says_why_a_cell_is_not_recorded(name):
    found = decision(LEAVING[name](), torch.randn(5, 2, H, dtype=F64), "native")
    assert (found.plan, found.engine) == (None, "reference")
    assert found.why


@dataclasses.dataclass
class Endless:
    """Holds itself."""

    me: Any = None


@pytest.mark.parametrize("engine", ENGINES)
def test_an_attribute_that_holds_itself(engine):
    for held in ([], {}):
        cell = Cell(held=held)
        held.append(held) if isinstance(held, list) else held.update(me=held)
        assert_as_reference(cell, torch.randn(5, 2, H, dtype=F64), engine=engine)
    endless = Endless()
    endless.me = endless
    assert_as_reference(Cell(held=endless), torch.randn(5, 2, H, dtype=F64), engine=engine)
