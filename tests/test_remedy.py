"""Remedies: what they set, of which cells, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import unrolled as ur


def bias_of(cell: Any, block: int, suffix: str = "") -> Tensor:
    both = getattr(cell, "bias_ih" + suffix).detach() + getattr(cell, "bias_hh" + suffix).detach()
    return both[block * cell.hidden_size : (block + 1) * cell.hidden_size]


@pytest.mark.parametrize(
    ("make", "keeping", "others"),
    [
        (ur.LSTMCell, 1, (0, 2, 3)),
        (ur.PeepholeLSTMCell, 1, (0, 2, 3)),
        (ur.LayerNormLSTMCell, 1, (0, 2, 3)),
        (ur.SLSTMCell, 1, (0, 2, 3)),
        (ur.GRUCell, 1, (0, 2)),
        (nn.LSTMCell, 1, (0, 2, 3)),
        (nn.GRUCell, 1, (0, 2)),
    ],
)
def test_forget_bias_sets_the_gate_that_keeps(make: Any, keeping: int, others: tuple[int, ...]) -> None:
    cell = make(3, 5)
    before = [bias_of(cell, block) for block in others]
    ur.remedy.forget_bias(ur.unroll(ur.as_cell(cell)), 1.5)
    assert torch.equal(bias_of(cell, keeping), torch.full((5,), 1.5))
    assert all(torch.equal(old, bias_of(cell, block)) for old, block in zip(before, others, strict=True))


@pytest.mark.parametrize("make", [ur.LSTMCell, ur.GRUCell, ur.MinGRUCell])
def test_forget_bias_raises_the_measured_memory(make: Any) -> None:
    rnn, inputs = ur.unroll(make(3, 8)), torch.randn(20, 4, 3)

    def memory() -> float:
        return ur.diagnose(rnn, inputs, lambda o, s: o.sum()).layers[0].units.memory[0].steps

    before = memory()
    ur.remedy.forget_bias(rnn, 3.0)
    assert memory() > 3 * before


def test_chrono_draws_from_the_reach_wanted() -> None:
    cell = ur.LSTMCell(2, 4000)
    ur.remedy.chrono(cell, 101)
    memories = bias_of(cell, 1).exp()
    assert float(memories.min()) >= 1
    assert float(memories.max()) <= 100 * (1 + 1e-5)
    assert float(memories.mean()) == pytest.approx(50.5, rel=0.05)
    assert torch.equal(bias_of(cell, 0), -bias_of(cell, 1))


def test_orthogonal_and_identity_set_each_gates_block() -> None:
    cell = ur.GRUCell(3, 6)
    ur.remedy.orthogonal(cell, gain=0.9)
    for block in cell.weight_hh.detach().chunk(3):
        assert torch.allclose(block @ block.T, 0.81 * torch.eye(6), atol=1e-6)
    ur.remedy.identity(cell, scale=0.5)
    assert torch.equal(cell.weight_hh.detach(), 0.5 * torch.eye(6).repeat(3, 1))


def test_every_layer_and_direction_is_set_and_models_are_searched() -> None:
    layers = ur.LSTM(3, 4, num_layers=2, bidirectional=True)
    ur.remedy.forget_bias(nn.Sequential(nn.Linear(3, 3), layers), 2.0)
    for suffix in layers._suffixes:
        assert torch.equal(bias_of(layers, 1, suffix), torch.full((4,), 2.0))
    stacked = ur.stack([ur.RNNCell(3, 4), ur.ZoneoutCell(ur.LSTMCell(4, 4))])
    ur.remedy.forget_bias(stacked)  # of the layers that have such a gate
    assert torch.equal(bias_of(stacked.layers[1].cell.wrapped, 1), torch.ones(4))
    ur.remedy.orthogonal(stacked)
    weight = stacked.layers[0].cell.weight_hh.detach()
    assert torch.allclose(weight @ weight.T, torch.eye(4), atol=1e-6)


@pytest.mark.parametrize(("make", "name"), [(ur.GRUCell, "weight_hh"), (ur.LSTM, "weight_hh_l0")])
def test_a_weight_that_a_parametrization_makes_is_set_by_it_or_refused(make: Any, name: str) -> None:
    rnn = parametrizations.weight_norm(make(3, 4), name)
    blocks = getattr(rnn, name).shape[0] // 4
    ur.remedy.identity(rnn, scale=0.5)
    assert torch.allclose(getattr(rnn, name), 0.5 * torch.eye(4).repeat(blocks, 1))
    ur.remedy.orthogonal(rnn)
    for block in getattr(rnn, name).chunk(blocks):
        assert torch.allclose(block @ block.T, torch.eye(4), atol=1e-5)

    refusing = [parametrizations.spectral_norm(make(3, 4), name), parametrizations.orthogonal(make(3, 4), name)]
    for number, rnn in enumerate(refusing):
        both = nn.Sequential(ur.unroll(ur.RNNCell(3, 4)), rnn if make is ur.LSTM else ur.unroll(rnn))
        before = {key: value.clone() for key, value in both.state_dict().items()}
        what = "SpectralNorm" if number == 0 else "Orthogonal"
        with pytest.raises(ur.OptionError, match=f"{name} .* is parametrised by {what}, .*remove_parametrizations"):
            ur.remedy.orthogonal(both)
        assert all(torch.equal(before[key], value) for key, value in both.state_dict().items())


def test_a_weight_that_a_hook_computes_anew_is_not_set_in_silence() -> None:
    cell = ur.RNNCell(3, 4)
    prune.random_unstructured(cell, "weight_hh", amount=0.5)
    with torch.no_grad():
        cell(torch.ones(2, 3), cell.initial_state(2))
    with pytest.raises(ur.OptionError, match="orthogonal sets square recurrent weights"):
        ur.remedy.orthogonal(cell)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(4, 4))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, 4)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(state @ self.mix + input)
        return hidden, hidden


def test_what_a_network_does_not_have_is_refused() -> None:
    with pytest.raises(ur.OptionError, match="forget_bias sets the bias of the gate that keeps the state, and RNNCell"):
        ur.remedy.forget_bias(ur.unroll(ur.RNNCell(3, 4)))
    with pytest.raises(ur.OptionError, match="chrono sets"):
        ur.remedy.chrono(ur.LSTMCell(3, 4, bias=False), 10)
    with pytest.raises(ur.OptionError, match="steps must be an integer of at least 3, got 2"):
        ur.remedy.chrono(ur.LSTMCell(3, 4), 2)
    for value in (math.nan, "a", True):
        with pytest.raises(ur.OptionError, match="value must be a finite number"):
            ur.remedy.forget_bias(ur.LSTMCell(3, 4), value)
    with pytest.raises(ur.OptionError, match="a cell or a module with unrolled networks, got a int"):
        ur.remedy.chrono(5, 20)
    with pytest.raises(ur.OptionError, match=r"torch\.nn's LSTM has none; make it one with ur\.from_torch"):
        ur.remedy.chrono(nn.LSTM(3, 4), 20)
    with pytest.raises(ur.OptionError, match="orthogonal sets square recurrent weights"):
        ur.remedy.orthogonal(ur.unroll(ur.MinGRUCell(3, 4)))
    with pytest.raises(ur.OptionError, match=r"identity sets .* and Own has none"):
        ur.remedy.identity(ur.unroll(Own()))


def test_the_remedies_of_a_finding_act_on_the_network_that_was_diagnosed() -> None:
    rnn = ur.unroll(ur.LSTMCell(2, 16))
    (finding,) = ur.diagnose(rnn, torch.randn(200, 4, 2), lambda o, s: o[-1].sum()).verdict.findings
    by_name = {remedy.text.split(":")[0]: remedy.apply for remedy in finding.remedies}
    apply = by_name["forget-gate bias"]
    assert apply is not None
    apply()
    assert math.isclose(float(bias_of(rnn.cell, 1).mean()), 1.0)
    assert by_name["a shorter horizon costs less memory"] is None


class ForgetfulCell(nn.Module):
    """A cell of a user's own that tells where its gates are; they are not computed in the order of their blocks."""

    state_names = ("memory",)
    gate_layout = ur.GateLayout(
        blocks=("write", "erase"),
        computed=("erase", "write"),
        keeps="erase",
        keeps_at="low",
        takes="write",
        biases=("shift",),
        recurrent=("mix",),
    )

    def __init__(self, input_size: int, size: int) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, size
        self.read = nn.Parameter(torch.randn(2 * size, input_size) / 4)
        self.mix = nn.Parameter(torch.randn(2 * size, size) / 4)
        self.shift = nn.Parameter(torch.zeros(2 * size))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, self.output_size, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        write, erase = (input @ self.read.T + state @ self.mix.T + self.shift).chunk(2, -1)
        erase = torch.sigmoid(erase)
        state = (1 - erase) * state + torch.sigmoid(write)
        return state, state


def test_a_cell_of_ones_own_that_describes_its_gates_is_treated_as_ours_are() -> None:
    cell = ForgetfulCell(3, 4)
    assert isinstance(cell, ur.DescribedCell)
    assert not isinstance(Own(), ur.DescribedCell)
    rnn = ur.unroll(ur.ZoneoutCell(cell, 0.0))
    ur.remedy.forget_bias(rnn, 3.0)
    assert torch.equal(cell.shift.detach(), torch.tensor([0.0] * 4 + [-3.0] * 4))
    ur.remedy.chrono(rnn, 20)
    assert torch.equal(cell.shift.detach()[:4], -cell.shift.detach()[4:])
    ur.remedy.identity(rnn)
    assert torch.equal(cell.mix.detach(), torch.eye(4).repeat(2, 1))
    found = ur.diagnose(ur.unroll(cell), torch.randn(9, 2, 3), lambda outputs, state: outputs.sum())
    units = found.layers[0].units
    assert [(gate.name, gate.operation) for gate in units.gates] == [("erase", "sigmoid"), ("write", "sigmoid")]
    assert [memory.gate for memory in units.memory] == ["erase"]
    assert [radius.name for radius in units.radii] == ["mix (write)", "mix (erase)"]
    assert [state.name for state in units.states] == ["memory"]
    assert not found.layers[0].missing
    with pytest.raises(ur.OptionError, match="layer 1, ForgetfulCell, reads inputs of size 3, but layer 0, Forgetful"):
        ur.stack([cell, ForgetfulCell(3, 4)])
