"""The guard: which copy, row and operation made the first bad number, forwards and backwards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur

ENGINES = ["reference", "eager", "native"]


class Root(nn.Module):
    """A cell whose value is not finite below zero, and whose derivative is not at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, 1, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.sqrt(self.weight * input) + 0.5 * state
        return hidden, hidden


def raised(call: Any) -> ur.NonFiniteError:
    with pytest.raises(ur.NonFiniteError) as info:
        call()
    return info.value


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, [5, 6, 4]])
def test_the_operation_that_made_it_is_named(engine: str, reverse: bool, lengths: Any) -> None:
    rnn, inputs = ur.unroll(Root(), engine=engine, reverse=reverse), torch.ones(6, 3, 1)
    inputs[3, 2] = -4.0
    with ur.guard(rnn):
        error = raised(lambda: rnn(inputs, lengths=lengths))
    assert (error.t, error.row, error.operation, error.values) == (3, 2, "aten.sqrt", ("-4",))
    assert "copy 3 of Root gave nan in row 2; the first operation to make it was aten.sqrt(-4)" in str(error)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("lengths", [None, [5, 6, 4]])
def test_so_it_is_on_the_way_back(engine: str, lengths: Any) -> None:
    rnn, inputs = ur.unroll(Root(), engine=engine), torch.ones(6, 3, 1)
    inputs[3, 2] = 0.0  # the root is 0, its slope is not
    with ur.guard(rnn):
        outputs, _ = rnn(inputs, lengths=lengths)
        error = raised(outputs.sum().backward)
    assert (error.t, error.row) == (3, 2)
    assert error.operation.startswith("aten.div")
    assert "on the way back" in str(error)


def test_what_came_so_from_outside_is_said() -> None:
    rnn = ur.unroll(ur.GRUCell(3, 4))
    inputs = torch.randn(5, 2, 3)
    with ur.guard(rnn):
        inputs[2, 1, 0] = math.nan
        error = raised(lambda: rnn(inputs))
        assert (error.t, error.row, error.operation) == (2, 1, "input")
        error = raised(lambda: rnn(inputs.nan_to_num(), torch.full((2, 4), math.inf)))
        assert (error.t, error.row, error.operation) == (0, 0, "state")
        outputs, _ = rnn(inputs.nan_to_num())
        error = raised((outputs - outputs.detach()).abs().sqrt().mul(0).sum().backward)
        assert "look at the loss" in str(error)
        rnn.cell.weight_hh.data[0, 0] = math.inf  # type: ignore[union-attr, index]
        error = raised(lambda: rnn(inputs.nan_to_num()))
        assert "parameter weight_hh of GRUCell holds inf already" in str(error)


def test_inputs_by_name_and_infinite_ones_that_only_the_way_back_meets() -> None:
    layers, inputs = ur.LSTM(3, 4), torch.randn(5, 2, 3)
    inputs[2, 1, 0] = math.inf
    with ur.guard(layers):
        outputs, _ = layers(input=inputs)  # the gates take it: they are 0 and 1
        error = raised(outputs.sum().backward)
        assert (error.t, error.row, error.operation, error.values) == (2, 1, "input", ("inf",))
        inputs[2, 1, 0] = math.nan
        assert raised(lambda: layers(input=inputs)).t == 2
    rnn = ur.unroll(ur.GRUCell(3, 4))
    with ur.guard(rnn):
        assert raised(lambda: rnn(inputs=inputs)).row == 1


def test_the_losss_gradients_are_let_go_and_a_second_backward_pass_is_watched_as_well() -> None:
    rnn, inputs = ur.unroll(Root()), torch.ones(6, 3, 1)
    with ur.guard(rnn) as guard:
        first, _ = rnn(inputs)
        second, _ = rnn(inputs)
        (first.sum() + second.sum()).backward(retain_graph=True)
        assert guard._returned == []
        assert guard._call.grads == [None, None]
        error = raised((second * math.inf).sum().backward)
        assert "received, on the way back, inf" in str(error)


def test_exploding_states_name_the_product() -> None:
    rnn = ur.unroll(ur.RNNCell(1, 1, bias=False, nonlinearity="relu"))
    for weight in rnn.parameters():
        weight.data.fill_(1e20)
    with ur.guard(rnn):
        error = raised(lambda: rnn(torch.ones(5, 2, 1)))
    assert (error.t, error.row, error.operation) == (1, 0, "aten.mm")
    assert error.values == ("float32[2, 1] from 1e+20 to 1e+20", "float32[1, 1] from 1e+20 to 1e+20")


def test_the_layer_is_named() -> None:
    rnn = ur.stack([ur.GRUCell(2, 1), Root(), ur.RNNCell(1, 2)])
    with ur.guard(rnn):
        error = raised(lambda: rnn(torch.randn(30, 4, 2)))  # a GRU's output is below zero somewhere
    assert (error.layer, error.operation) == ("layer 1", "aten.sqrt")
    assert "Root (layer 1)" in str(error)


class Masked(nn.Module):
    """A cell that writes infinities on purpose, and divides by its input."""

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, 3, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.zeros_like(state).bool()
        mask[:, 0] = True
        chances = torch.softmax(state.masked_fill(mask, -math.inf), -1)
        hidden = chances / input
        return hidden, hidden


def test_infinities_written_on_purpose_are_not_blamed() -> None:
    rnn, inputs = ur.unroll(Masked(), engine="reference"), torch.ones(4, 2, 1)
    with ur.guard(rnn):
        rnn(inputs)
        inputs[2, 1] = 0
        error = raised(lambda: rnn(inputs))
    assert (error.t, error.row, error.operation) == (2, 1, "aten.div.Tensor")


def test_it_is_run_again_with_the_same_masks() -> None:
    layers = ur.LSTM(3, 8, num_layers=2, dropout=0.5)
    with ur.guard(layers) as guard:
        outputs, _ = layers(torch.randn(5, 4, 3))
        again = guard._call.copies_of(layers)
        assert torch.allclose(outputs, again.outputs, atol=1e-6)
        other, _ = layers(torch.randn(5, 4, 3))
        assert not torch.allclose(outputs, other, atol=1e-3)


def test_training_is_not_changed_and_the_guard_ends() -> None:
    def trained(guarded: bool) -> list[Tensor]:
        torch.manual_seed(3)
        rnn = ur.LSTM(3, 4, num_layers=2, dropout=0.3)
        guard = ur.guard(rnn) if guarded else None
        optimizer = torch.optim.SGD(rnn.parameters(), 0.1)
        for _ in range(3):
            outputs, _ = rnn(torch.randn(6, 2, 3))
            optimizer.zero_grad()
            outputs.square().mean().backward()
            optimizer.step()
        if guard is not None:
            guard.remove()
            rnn(torch.full((6, 2, 3), math.nan))  # nobody watches any more
            outputs, _ = rnn(torch.randn(6, 2, 3))
            (outputs.sum() * math.nan).backward()
        return [parameter.detach() for parameter in rnn.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(False), trained(True), strict=True))


def test_large_finite_numbers_are_no_alarm() -> None:
    rnn = ur.unroll(ur.RNNCell(1, 1, bias=False, nonlinearity="relu"))
    for weight in rnn.parameters():
        weight.data.fill_(1.0)
    with ur.guard(rnn):
        outputs, _ = rnn(torch.tensor([[3e38], [0.0], [0.0]]).unsqueeze(1))  # whose sum is beyond float32
    assert bool(outputs.isfinite().all())


def test_what_it_cannot_watch_is_refused() -> None:
    with pytest.raises(ur.OptionError, match="guard takes what unroll or stack made, got a Linear"):
        ur.guard(nn.Linear(3, 3))
