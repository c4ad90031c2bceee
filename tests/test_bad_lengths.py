"""Lengths, resets, packed sequences and stacks that do not fit: one error, the same in every engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import unrolled as ur

ENGINES = ("reference", "eager", "native")
T, B, I, H = 5, 3, 3, 4
GOOD = torch.ones(T, B, I)

LENGTHS: dict[str, tuple[Any, str]] = {
    "negative": ([1, -1, 2], "from 0 to T = 5, got -1 for row 1"),
    "above T": (torch.tensor([5, 6, 1]), "from 0 to T = 5, got 6 for row 1"),
    "too few": ([1, 2], r"B = 3 integers.*got shape \[2\]"),
    "too many": (torch.tensor([1, 2, 3, 4]), r"B = 3 integers.*got shape \[4\]"),
    "a scalar": (torch.tensor(3), r"B = 3 integers.*got shape \[\]"),
    "a matrix": (torch.ones(3, 1, dtype=torch.int64), r"got shape \[3, 1\]"),
    "floats": (torch.tensor([1.0, 2.0, 3.0]), r"float32.*\.long\(\)"),
    "a float": ([1, 2.0, 3], r"2\.0 of type float"),
    "bools": (torch.tensor([True, True, False]), r"torch\.bool"),
    "a bool": ([1, True, 3], "True of type bool"),
    "a number": (3, "got 3; pass a list"),
    "words": (["1", "2", "3"], "'1' of type str"),
}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_that_are_none_are_refused(name, engine):
    lengths, says = LENGTHS[name]
    for rnn in (ur.unroll(ur.GRUCell(I, H), engine=engine), ur.stack([ur.GRUCell(I, H)], engine=engine)):
        with pytest.raises(ur.InputError, match=says):
            rnn(GOOD, lengths=lengths)
    with pytest.raises(ur.InputError, match=says):
        ur.GRU(I, H)(GOOD, lengths=lengths)


RESETS: dict[str, tuple[Any, str]] = {
    "of another T": (torch.zeros(4, B, dtype=torch.bool), r"\[T, B\] = \[5, 3\], got torch\.bool \[4, 3\]"),
    "batch first": (torch.zeros(B, T, dtype=torch.bool), r"got torch\.bool \[3, 5\]"),
    "of the batch alone": (torch.zeros(B, dtype=torch.bool), r"got torch\.bool \[3\]"),
    "integers": (torch.zeros(T, B, dtype=torch.int64), r"torch\.int64 .*resets != 0"),
    "floats": (torch.zeros(T, B), r"torch\.float32 .*resets != 0"),
    "a list": ([[False] * B] * T, "got list"),
}


@pytest.mark.parametrize("lengths", [None, [5, 0, 2], [5, 5, 5]], ids=str)
@pytest.mark.parametrize("name", RESETS)
def test_resets_that_are_none_are_refused(name, lengths, engine):
    resets, says = RESETS[name]
    for rnn in (ur.unroll(ur.GRUCell(I, H), engine=engine), ur.stack([ur.GRUCell(I, H)], engine=engine)):
        with pytest.raises(ur.InputError, match=says):
            rnn(GOOD, lengths=lengths, resets=resets)


def test_resets_are_refused_in_the_callers_layout(engine):
    rnn = ur.unroll(ur.GRUCell(I, H), engine=engine, batch_first=True)
    with pytest.raises(ur.InputError, match=r"\[B, T\] = \[5, 3\], got torch\.bool \[3, 5\]"):
        rnn(GOOD, resets=torch.zeros(3, 5, dtype=torch.bool))


def test_packed_sequences_that_are_none_are_refused(engine):
    rnn = ur.unroll(ur.GRUCell(I, H), engine=engine)
    packed = pack_sequence([torch.ones(3, I), torch.ones(1, I)])
    for sizes in ([1, 2, 1], [2, 1], [2, 2, 1], [2, 1, 0, 1], []):
        with pytest.raises(ur.InputError, match="enforce_sorted=False"):
            rnn(PackedSequence(packed.data, torch.tensor(sizes, dtype=torch.int64)))
    with pytest.raises(ur.InputError, match="its lengths in it"):
        rnn(packed, lengths=[3, 1])


def test_lengths_that_claim_to_be_sorted_and_are_not_are_torchs_own_error():
    with pytest.raises(RuntimeError, match="enforce_sorted"):
        nn.utils.rnn.pack_padded_sequence(GOOD, [1, 5, 2])


# -- cells that lengths do not go with -------------------------------------------------------------------------------


class Stepping(nn.Module):
    """`h' = tanh(f(W h + V x))`."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.inner = f, nn.Linear(I + H, H)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, H, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.f(self.inner(torch.cat([input, state], -1))))
        return hidden, hidden


COUPLING: dict[str, Callable[[], Any]] = {
    "batch norm in training": lambda: nn.BatchNorm1d(H),
    "mean over rows": lambda: lambda x: x - x.mean(0),
    "softmax over rows": lambda: lambda x: x.softmax(0),
    "rows turned": lambda: lambda x: x.flip(0),
    "the first row": lambda: lambda x: x + x[:1],
    "a row in the middle": lambda: lambda x: x + x[1:2],
    "the largest row": lambda: lambda x: x / x.abs().amax(),
}


@pytest.mark.parametrize("name", COUPLING)
def test_lengths_are_refused_for_cells_that_couple_rows(name, engine):
    rnn = ur.Unrolled(Stepping(COUPLING[name]()), engine=engine, quiet=True)
    x = torch.randn(T, B, I)
    for lengths in ([5, 2, 1], [T] * B):  # whether a batch is refused does not depend on its numbers
        with pytest.raises(ur.InputError, match=r"acts row by row.*Stepping.*leave lengths= out"):
            rnn(x, lengths=lengths)
    rnn(x)


@pytest.mark.parametrize("options", [{}, {"memory": "1MB"}, {"checkpoint": ur.segments(T, 2)}, {"horizon": 2}], ids=str)
def test_lengths_are_refused_for_stacks_with_a_cell_that_couples_rows(options, engine):
    coupled = Stepping(lambda x: x - x.mean(0))
    for cells in ([coupled, ur.GRUCell(H, H)], [ur.GRUCell(I, I), coupled]):
        layers = [ur.Unrolled(cell, engine=engine, quiet=True) for cell in cells]
        rnn, x = ur.Stack(layers, **options), torch.randn(T, B, I)
        with pytest.raises(ur.InputError, match=r"acts row by row.*Stepping.*leave lengths= out"):
            rnn(x, lengths=[5, 2, 1])
        rnn(x)


ROWWISE: dict[str, Callable[[], Any]] = {
    "dropout": lambda: nn.Dropout(0.5),
    "batch norm in evaluation": lambda: nn.BatchNorm1d(H).eval(),
    "layer norm": lambda: nn.LayerNorm(H),
    "softmax over features": lambda: lambda x: x.softmax(-1),
}


@pytest.mark.parametrize("name", ROWWISE)
def test_what_couples_no_rows_takes_lengths(name, engine):
    rnn = ur.Unrolled(Stepping(ROWWISE[name]()), engine=engine, quiet=True)
    outputs, _ = rnn(torch.randn(T, B, I), lengths=[5, 0, 1])
    assert outputs[:, 0].abs().sum() > 0
    assert (outputs[1:, 1:] == 0).all()


class Averaging(Stepping):
    """One leaf of its state is a number for all rows."""

    def __init__(self) -> None:
        super().__init__(lambda x: x)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Any:
        return super().initial_state(batch_size, device, dtype), torch.zeros((), dtype=dtype)

    def forward(self, input: Tensor, state: Any) -> tuple[Tensor, Any]:
        hidden, _ = super().forward(input, state[0])
        return hidden, (hidden, state[1] + 1)


def test_lengths_are_refused_for_a_state_without_rows(engine):
    rnn = ur.Unrolled(Averaging(), engine=engine, quiet=True)
    with pytest.raises(ur.InputError, match=r"B = 3; state\[1\] of Averaging is float32\[\]"):
        rnn(GOOD, lengths=[5, 2, 1])


# -- stacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (lambda: [ur.GRUCell(I, H), ur.LSTMCell(I, H)], "layer 1, LSTMCell.*size 3.*layer 0, GRUCell.*out 4"),
        (lambda: [(ur.GRUCell(I, H), ur.GRUCell(I, H)), ur.GRUCell(H, H)], "size 4.*layer 0, Bidirectional.*out 8"),
        (lambda: [], "at least one layer"),
        (lambda: [(ur.GRUCell(I, H),) * 3], "pair of cells.*got 3"),
        (lambda: [ur.unroll(ur.GRUCell(I, H), batch_first=True)], "time-first.*pass it to stack"),
        (lambda: [ur.stack([ur.GRUCell(I, H)], batch_first=True)], "time-first.*pass it to stack"),
        (lambda: [ur.GRU(I, H)], "whole layer"),
    ],
    ids=["sizes", "two directions", "none", "three", "batch first", "stack batch first", "layer"],
)
def test_layers_that_make_no_stack_are_refused(layers, says):
    with pytest.raises(ur.OptionError, match=says):
        ur.stack(layers())


@pytest.mark.parametrize("make", [ur.unroll, lambda cell, batch_first: ur.stack([cell], batch_first=batch_first)])
def test_a_stack_takes_no_layer_that_is_batch_first_however_it_is_made(make):
    with pytest.raises(ur.OptionError, match="time-first"):
        ur.Stack([make(ur.GRUCell(I, H), batch_first=True)])


@pytest.mark.parametrize("lengths", [None, [5, 2, 1]], ids=str)
def test_states_of_a_stack_are_one_for_each_layer(lengths, engine):
    h = torch.zeros(B, H)
    rnn = ur.stack([ur.GRUCell(I, H), ur.GRUCell(H, H)], engine=engine)
    for state, got in (((h,), "1 of them"), ((h,) * 3, "3 of them"), (h, r"float32\[3, 4\]"), ({}, "a dict")):
        with pytest.raises(ur.StateError, match=rf"each of its 2 parts \(GRUCell, GRUCell\), got {got}"):
            rnn(GOOD, state, lengths=lengths)
    with pytest.raises(ur.StateError, match=r"layer 1.*\[3, 4\].*\[2, 4\]"):
        rnn(GOOD, (h, torch.zeros(2, H)), lengths=lengths)
    both = ur.stack([ur.GRUCell(I, H)], engine=engine, bidirectional=True)
    with pytest.raises(ur.StateError, match="each of its 2 parts"):
        both(GOOD, ((h,),), lengths=lengths)


class Centred(torch.autograd.Function):
    """Leaves its input as it is, and takes from a gradient a part of the mean over the rows."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad - 0.5 * grad.mean(0, keepdim=True)


class CentredCell(Stepping):
    """A step that acts row by row, with a gradient that does not."""

    def __init__(self) -> None:
        super().__init__(lambda x: Centred.apply(x) + x)


@pytest.mark.parametrize("T_of_others", [1, 3])
def test_a_backward_that_is_not_proved_to_act_row_by_row_runs_on_the_reference(T_of_others):
    torch.manual_seed(0)
    cell = CentredCell().double()
    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths = [T, T_of_others, 2]
    found = []
    for engine in ("reference", "eager", "native"):
        rnn = ur.Unrolled(cell, engine=engine, quiet=True)
        outputs, _ = rnn(x, lengths=lengths)
        found.append(torch.autograd.grad(outputs.square().sum(), list(cell.parameters())))
        assert rnn.ran == "reference"
        assert rnn.plan(x).engine == ("reference" if engine == "reference" else "eager")
    for grads in zip(*found, strict=True):
        assert all(torch.equal(grads[0], other) for other in grads[1:])


def test_sorted_indices_of_a_packed_sequence_name_each_row_once():
    packed = pack_padded_sequence(torch.randn(T, B, I), [1, T, 2], enforce_sorted=False)
    wrong = PackedSequence(packed.data, packed.batch_sizes, torch.tensor([0, 0, 1]), packed.unsorted_indices)
    with pytest.raises(ur.InputError, match=r"sorted_indices.*\[0, 0, 1\]"):
        ur.unroll(ur.GRUCell(I, H))(wrong)


def test_a_packed_sequence_among_others_is_refused():
    packed = pack_padded_sequence(torch.randn(T, B, I), [1, T, 2], enforce_sorted=False)
    with pytest.raises(ur.InputError, match="PackedSequence among others"):
        ur.unroll(ur.GRUCell(I, H))({"a": packed})


def test_the_engine_can_be_set_and_is_checked():
    rnn, x = ur.unroll(ur.GRUCell(I, H)), torch.randn(T, B, I)
    rnn(x)
    rnn.engine = "eager"
    rnn(x)
    assert (rnn.engine, rnn.ran) == ("eager", "eager")
    with pytest.raises(ur.OptionError, match="engine must be one of"):
        rnn.engine = "fast"
    assert rnn.engine == "eager"


def test_a_float_state_that_counts_runs_as_any_other():
    """Its step backward needs no value at all."""

    def step(input: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hidden, count = state
        hidden = torch.tanh(input + hidden)
        return hidden, (hidden, count * 0.5 + 1)

    x = torch.randn(T, B, I, requires_grad=True)
    rnn = ur.Unrolled(ur.as_cell(step), engine="eager", quiet=True)
    rnn(x, (torch.zeros(B, I), torch.zeros(B)))
    assert rnn.ran == "eager"
