"""Bad input gets a named exception that says the rule, the value and the remedy, before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import unrolled as ur
from matching import assert_match
from problems import AttendingCell, B, CountingCell, H, I, NestedCell, T
from unrolled.trees import Tree, leaves

GOOD = torch.ones(T, B, I)


class Refusal(NamedTuple):
    """What is called on what, the exception's class, and pieces of its message: value and remedy among them."""

    cell: Callable[[], nn.Module]
    inputs: Any
    state: Any
    error: type[ur.UnrolledError]
    says: tuple[str, ...]
    context: Any = None


def gru() -> nn.Module:
    return ur.GRUCell(I, H)


def lstm() -> nn.Module:
    return ur.LSTMCell(I, H)


def without_state() -> nn.Module:
    return ur.as_cell(lambda x, s: (s, s + x))


INPUTS = {
    "a number per step": Refusal(gru, torch.ones(T), None, ur.InputError, ("[T, B, ...]", "[5]", "unsqueeze")),
    "a scalar": Refusal(gru, torch.tensor(1.0), None, ur.InputError, ("[T, B, ...]", "[]")),
    "no time": Refusal(gru, torch.ones(0, B, I), None, ur.InputError, ("T >= 1", "T = 0", "[0, 2, 3]")),
    "no batch": Refusal(gru, torch.ones(T, 0, I), None, ur.InputError, ("B >= 1", "B = 0", "[5, 0, 3]")),
    "leaves of another T": Refusal(
        gru,
        {"a": GOOD, "b": torch.ones(4, B, I)},
        None,
        ur.InputError,
        ("['b']", "[5, 2, 3]", "[4, 2, 3]", "pad or cut"),
    ),
    "leaves of another B": Refusal(
        gru, (GOOD, torch.ones(T, 7, I)), None, ur.InputError, ("inputs[1]", "[5, 2, 3]", "[5, 7, 3]")
    ),
    "a list of numbers": Refusal(gru, [[1.0]], None, ur.InputError, ("float", "as_tensor")),
    "an array": Refusal(gru, GOOD.numpy(), None, ur.InputError, ("ndarray", "as_tensor")),
    "nothing": Refusal(gru, None, None, ur.InputError, ("at least one tensor",)),
    "an empty tree": Refusal(gru, {"a": ()}, None, ur.InputError, ("at least one tensor",)),
    "integers": Refusal(gru, GOOD.long(), None, ur.InputError, ("copy 0", "int64[2, 3]", ".float()", "embed")),
    "booleans": Refusal(lstm, GOOD.bool(), None, ur.InputError, ("copy 0", "bool[2, 3]", ".float()")),
    "one sequence without a batch, RNN": Refusal(
        lambda: ur.RNNCell(I, H), torch.ones(T, I), None, ur.InputError, ("got [3]", "unsqueeze")
    ),
    "one sequence without a batch, LSTM": Refusal(
        lstm, torch.ones(T, I), None, ur.InputError, ("got [3]", "unsqueeze")
    ),
    "one sequence without a batch, GRU": Refusal(gru, torch.ones(T, I), None, ur.InputError, ("got [3]", "unsqueeze")),
    "a packed sequence whose rows are not sorted": Refusal(
        gru,
        PackedSequence(torch.ones(3, I), torch.tensor([1, 2])),
        None,
        ur.InputError,
        ("PackedSequence", "got [1, 2]", "enforce_sorted=False"),
    ),
    "context for a cell without": Refusal(
        gru, GOOD, None, ur.InputError, ("GRUCell", "no context", "leave context= out"), torch.ones(B, 4, H)
    ),
    "no context for a cell with": Refusal(
        lambda: AttendingCell(I, H), GOOD, None, ur.InputError, ("AttendingCell", "pass context=")
    ),
}

STATES = {
    "another batch": Refusal(
        gru, GOOD, torch.ones(3, H), ur.StateError, ("state must", "float32[2, 4]", "[3, 4]", "batch of 2")
    ),
    "another batch, own state unknown": Refusal(
        without_state, GOOD, torch.ones(3, I), ur.StateError, ("B = 2", "[3, 3]", "this batch")
    ),
    "another width": Refusal(gru, GOOD, torch.ones(B, 9), ur.StateError, ("[2, 4]", "[2, 9]")),
    "one of a pair wrong": Refusal(
        lstm, GOOD, (torch.ones(B, H), torch.ones(1, H)), ur.StateError, ("state[1]", "[2, 4]", "[1, 4]")
    ),
    "a tensor for a pair": Refusal(
        lstm, GOOD, torch.ones(B, H), ur.StateError, ("tuple(tensor, tensor)", "got tensor")
    ),
    "a pair for a tensor": Refusal(gru, GOOD, (torch.ones(B, H),) * 2, ur.StateError, ("like tensor", "tuple(")),
    "a dict with another key": Refusal(
        lambda: NestedCell(I, H),
        GOOD,
        {"fast": {"h": torch.ones(B, H)}, "slow": (torch.ones(B, H),)},
        ur.StateError,
        ("fast=dict(c=tensor, h=tensor)", "fast=dict(h=tensor)"),
    ),
    "another dtype": Refusal(gru, GOOD, torch.ones(B, H).double(), ur.StateError, ("float32[2, 4]", "float64[2, 4]")),
    "floats for an integer leaf": Refusal(
        lambda: CountingCell(I),
        GOOD,
        (torch.ones(B), torch.ones(B, I)),
        ur.StateError,
        ("CountingState", "tuple(tensor, tensor)"),
    ),
    "another device": Refusal(gru, GOOD, torch.ones(B, H, device="meta"), ur.StateError, ("on cpu", "on meta")),
    "another device, own state unknown": Refusal(
        without_state, GOOD, torch.ones(B, I, device="meta"), ur.StateError, ("on meta", "on cpu", "move")
    ),
    "a number": Refusal(gru, GOOD, 0.0, ur.StateError, ("float", "as_tensor")),
    "a list of numbers, own state unknown": Refusal(without_state, GOOD, [0.0], ur.StateError, ("float", "as_tensor")),
    "none, and the cell makes none": Refusal(without_state, GOOD, None, ur.StateError, ("state=",)),
}


class Misbehaving(nn.Module):
    """Keeps the contract for some steps and then does `act(input, state)`."""

    def __init__(self, act: Callable[[Tensor, Tree], Any], step: int, start: Tree = None) -> None:
        super().__init__()
        self.act, self.step, self.start = act, step, start
        self.weight = nn.Parameter(torch.ones(I))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tree:
        self.t = 0
        return torch.zeros(batch_size, I, device=device, dtype=dtype) if self.start is None else self.start

    def forward(self, input: Tensor, state: Tree) -> Any:
        self.t += 1
        return self.act(input * self.weight, state) if self.t == self.step + 1 else (input * self.weight, state)


def raising(error: Exception) -> Callable[[Tensor, Tree], Any]:
    def act(input: Tensor, state: Tree) -> Any:
        raise error

    return act


RETURNS: dict[str, tuple[Callable[[Tensor, Tree], Any], tuple[str, ...]]] = {
    "one tensor": (lambda x, s: x, ("(output, state)", "a Tensor", "step=")),
    "nothing": (lambda x, s: None, ("(output, state)", "a NoneType", "step=")),
    "three things": (lambda x, s: (x, s, s), ("(output, state)", "a tuple of 3")),
    "one thing in a tuple": (lambda x, s: (x,), ("(output, state)", "a tuple of 1")),
    "a list of two": (lambda x, s: [x, s], ("(output, state)", "a list")),
    "a dict": (lambda x, s: {"output": x, "state": s}, ("(output, state)", "a dict")),
    "a state of another shape": (lambda x, s: (x, s[:, :2]), ("hand on", "float32[2, 3]", "float32[2, 2]")),
    "a state of another batch": (lambda x, s: (x, s[:1]), ("hand on", "float32[2, 3]", "float32[1, 3]")),
    "a state of another structure": (lambda x, s: (x, (s, s)), ("hand on", "tuple(tensor, tensor)")),
    "no state": (lambda x, s: (x, None), ("hand on", "received tensor", "returned None")),
    "a state of another dtype": (lambda x, s: (x, s.double()), ("hand on", "float32[2, 3]", "float64[2, 3]")),
    "a state on another device": (lambda x, s: (x, s.to("meta")), ("hand on", "meta")),
    "a state that is no tensor": (lambda x, s: (x, 3.0), ("state", "float")),
    "an output that is no tensor": (lambda x, s: ("x", s), ("output", "str")),
    "a wrong product": (lambda x, s: (x @ x, s), ("RuntimeError", "input float32[2, 3]", "state float32[2, 3]")),
}


def assert_refused(refusal: Refusal, run: Callable[..., Any]) -> None:
    """The call raises as it must, and parameters, inputs and state are what they were."""
    cell = refusal.cell()
    held = [*cell.parameters(), *tensors_in((refusal.inputs, refusal.state))]
    before = [(tensor._version, None if tensor.is_meta else tensor.detach().clone()) for tensor in held]
    with pytest.raises(refusal.error) as caught:
        run(ur.unroll(cell), refusal.inputs, refusal.state, context=refusal.context)
    missing = [piece for piece in refusal.says if piece not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    for tensor, (version, copy) in zip(held, before, strict=True):
        assert tensor.grad is None
        assert tensor._version == version
        assert copy is None or torch.equal(tensor, copy)


def tensors_in(tree: Tree) -> list[Tensor]:
    try:
        return leaves(tree)
    except TypeError:
        return []


def call(rnn: ur.Unrolled, inputs: Any, state: Any, context: Any) -> Any:
    return rnn(inputs, state, context=context)


BOTH = pytest.mark.parametrize("run", [call, ur.copies], ids=["call", "copies"])


@BOTH
@pytest.mark.parametrize("name", INPUTS)
def test_bad_inputs_are_refused(name, run):
    assert_refused(INPUTS[name], run)


@BOTH
@pytest.mark.parametrize("name", STATES)
def test_bad_states_are_refused(name, run):
    assert_refused(STATES[name], run)


@BOTH
@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("name", RETURNS)
def test_a_cell_that_breaks_the_contract_is_refused_and_the_step_named(name, step, run):
    act, says = RETURNS[name]
    cell = Misbehaving(act, step)
    assert_refused(Refusal(lambda: cell, GOOD, None, ur.CellError, (f"copy {step}", *says)), run)


@BOTH
@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("error", [RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError])
def test_whatever_a_cell_raises_the_step_is_named_and_the_cause_kept(error, step, run):
    with pytest.raises(ur.CellError, match=f"copy {step}.*{error.__name__}.*no gate") as caught:
        run(ur.unroll(Misbehaving(raising(error("no gate")), step)), GOOD, None, context=None)
    assert type(caught.value.__cause__) is error


@BOTH
@pytest.mark.parametrize(
    "act", [lambda x, s: (x[:, :2], s), lambda x, s: ((x, x), s), lambda x, s: (x.double(), s), lambda x, s: (None, s)]
)
def test_outputs_that_change_from_one_step_to_the_next_are_refused_and_the_step_named(act, run):
    rnn = ur.unroll(Misbehaving(act, 3))
    with pytest.raises(ur.CellError, match=r"copy 3 returned"):
        run(rnn, GOOD, None, context=None).outputs  # noqa: B018


@BOTH
def test_bad_inputs_are_seen_in_the_callers_layout(run):
    rnn = ur.unroll(gru(), batch_first=True)
    with pytest.raises(ur.InputError, match=r"\[B, T, ...\].*T = 0, B = 2"):
        run(rnn, torch.ones(B, 0, I), None, context=None)


def test_a_dict_is_the_same_state_in_whatever_order_its_keys_were_inserted():
    def act(input: Tensor, state: dict[str, Tensor]) -> Any:
        return input, {"b": state["b"] + input, "a": state["a"]}

    cell = ur.as_cell(act, state=lambda n, device=None, dtype=None: {"a": torch.ones(n, I), "b": torch.zeros(n, I)})
    _, state = ur.unroll(cell)(GOOD)
    assert torch.equal(state["b"], GOOD.sum(0))
    _, again = ur.unroll(cell)(GOOD, {"b": torch.zeros(B, I), "a": torch.ones(B, I)})
    assert torch.equal(again["a"], torch.ones(B, I))


def test_a_token_out_of_range_is_not_answered_with_the_advice_to_use_floats():
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, I)

        def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return self.table(input), state

    with pytest.raises(ur.UnrolledError, match="index out of range") as caught:
        ur.unroll(Embedding())(torch.full((T, B), 10), torch.zeros(B, I))
    assert ".float()" not in str(caught.value)


def test_a_cell_that_writes_into_its_state_is_refused_by_copies_and_the_state_kept():
    def act(input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return input, state.add_(input)

    rnn, state = ur.unroll(ur.as_cell(act)), torch.zeros(B, I)
    with pytest.raises(ur.CellError, match="copy 0"):
        ur.copies(rnn, GOOD, state)
    assert torch.equal(state, torch.zeros(B, I))


# -- torch.nn's layers -----------------------------------------------------------------------------------------------

LAYERS = {"RNN": ur.RNN, "LSTM": ur.LSTM, "GRU": ur.GRU}


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (torch.ones(T, B, 7), r"I = 3.*\[5, 2, 7\]"),
        (torch.ones(T), r"\[T, B, I\].*\[5\]"),
        (torch.ones(T, B, 2, I), r"\[5, 2, 2, 3\]"),
        (torch.ones(0, B, I), r"T = 0"),
        (torch.ones(T, 0, I), r"B = 0"),
        (torch.ones(0, I), r"T = 0"),
        ([1.0], "list"),
        (torch.ones(T, B, I, dtype=torch.int64), r"copy 0.*int64\[2, 3\].*float\(\)"),
    ],
    ids=["features", "1-D", "4-D", "T=0", "B=0", "T=0 without batch", "list", "integers"],
)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_refuse_bad_inputs(name, inputs, says):
    layer = LAYERS[name](I, H)
    with pytest.raises(ur.InputError, match=says):
        layer(inputs)
    assert all(p.grad is None for p in layer.parameters())


def pair(layer: nn.Module, *shape: int, **options: Any) -> Tree:
    h = torch.ones(shape, **options)
    return (h, h) if isinstance(layer, ur.LSTM) else h


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (lambda layer: pair(layer, B, H), r"\[1, B, H\].*\[2, 4\].*unsqueeze"),
        (lambda layer: pair(layer, 2, B, H), r"\[1, B, H\].*\[2, 2, 4\]"),
        (lambda layer: pair(layer, 1, 3, H), r"\[2, 4\].*\[3, 4\]"),
        (lambda layer: pair(layer, 1, B, 9), r"\[2, 4\].*\[2, 9\]"),
        (lambda layer: pair(layer, 1, B, H, dtype=torch.float64), "float32.*float64"),
        (lambda layer: pair(layer, 1, B, H, device="meta"), "cpu.*meta"),
        (lambda layer: "zeros", "str"),
        (lambda layer: (torch.ones(1, B, H),) * 3, r"\[1, B, H\]"),
        (
            lambda layer: torch.ones(1, B, H) if isinstance(layer, ur.LSTM) else (torch.ones(1, B, H),) * 2,
            r"\[1, B, H\]",
        ),
    ],
    ids=["no layer", "two layers", "batch", "width", "dtype", "device", "string", "three", "pair or not"],
)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_refuse_bad_states(name, state, says):
    layer = LAYERS[name](I, H)
    with pytest.raises(ur.StateError, match=says):
        layer(GOOD, state(layer))
    with pytest.raises(ur.StateError, match=says):
        ur.copies(layer, GOOD, state(layer))


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (lambda layer: pair(layer, H), r"\[4\]"),
        (lambda layer: pair(layer), r"\[\]"),
        (lambda layer: pair(layer, 1, 1, H), r"\[1, 1, 4\]"),
        (lambda layer: "zeros", "str"),
        (lambda layer: (torch.ones(1, H),) * 3, r"\[1, 4\]|tuple"),
    ],
    ids=["1-D", "0-D", "3-D", "string", "three"],
)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_refuse_bad_states_for_one_sequence_and_say_the_shape_they_got(name, state, says):
    layer = LAYERS[name](I, H)
    with pytest.raises(ur.StateError, match=says) as caught:
        layer(torch.ones(T, I), state(layer))
    assert "[1, 1, 1, 4]" not in str(caught.value)


@pytest.mark.parametrize("name", LAYERS)
def test_copies_of_a_layer_never_take_one_sequence_for_a_batch(name):
    layer = LAYERS[name](I, H)
    inputs = torch.ones(T, I)
    assert_match(ur.copies(layer, inputs).outputs.squeeze(1), layer(inputs)[0])


def test_every_exception_belongs_to_the_family_and_to_a_builtin_a_caller_may_know():
    family = [getattr(ur, name) for name in ur.__all__ if name.endswith("Error")]
    assert len(family) >= 9
    assert all(issubclass(error, ur.UnrolledError) for error in family)
    builtins = (ValueError, RuntimeError, OSError, ArithmeticError)
    assert all(issubclass(error, builtins) for error in family if error is not ur.UnrolledError)


@pytest.mark.parametrize("layer", [torch.nn.LSTM(I, H), torch.nn.GRU(I, H, 2), ur.LSTM(I, H)], ids=lambda m: repr(m))
def test_a_whole_layer_is_no_cell(layer):
    with pytest.raises(ur.OptionError, match="whole layer"):
        ur.unroll(layer)


def test_a_passed_state_uses_up_no_random_numbers():
    class Random(torch.nn.Module):
        def initial_state(self, batch_size, device=None, dtype=None):
            return torch.rand(batch_size, I)

        def forward(self, input, state):
            return input, state

    torch.manual_seed(1)
    ur.unroll(Random())(GOOD, torch.zeros(B, I))
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda self, batch_size: torch.zeros(batch_size, I), "device"),
        (lambda self, batch_size, device=None, dtype=None: 1 / 0, "ZeroDivisionError"),
        (lambda self, batch_size, device=None, dtype=None: 3, "pytree"),
    ],
    ids=["signature", "raises", "number"],
)
def test_an_initial_state_that_cannot_be_made_is_a_state_error(make, says):
    cell = type("Faulty", (torch.nn.Module,), {"initial_state": make, "forward": lambda self, x, s: (x, s)})()
    with pytest.raises(ur.StateError, match=says):
        ur.unroll(cell)(GOOD)


def test_an_initial_state_of_another_dtype_is_told_at_copy_0():
    cell = type(
        "Stubborn",
        (torch.nn.Module,),
        {
            "initial_state": lambda self, b, device=None, dtype=None: torch.zeros(b, I),
            "forward": lambda self, x, s: (x, s + x),
        },
    )()
    with pytest.raises(ur.CellError, match=r"copy 0 .*initial state with the batch size and dtype"):
        ur.unroll(cell)(GOOD.double())


@pytest.mark.parametrize("make", [ur.LSTM, lambda i, h: ur.unroll(ur.LSTMCell(i, h))], ids=["layer", "unrolled"])
def test_inputs_of_another_dtype_than_the_weights_are_an_input_error(make):
    with pytest.raises(ur.InputError, match="one dtype"):
        make(I, H)(GOOD.double())
