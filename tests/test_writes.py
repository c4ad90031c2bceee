"""Writes in place, and gradients turned off, inside of a step: values and gradients are those of the plain loop."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from random_cells import assert_as_reference, decision

T, B, H = 4, 3, 6
Write = Callable[[nn.Module, Tensor, Tensor], Tensor]


class WritingCell(nn.Module):
    """`h' = tanh(W (h + write(h, x)))`, by a function that writes into tensors of its own."""

    def __init__(self, *writes: Write) -> None:
        super().__init__()
        self.writes, self.linear = writes, nn.Linear(H, H)
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.7, H))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.linspace(-1, 1, H, device=device, dtype=dtype).expand(batch_size, H)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        total = state
        for write in self.writes:
            total = total + write(self, state * 0.9, input) / len(self.writes)
        hidden = torch.tanh(self.linear(total))
        return hidden, hidden


def _assigned(*assignments: tuple[Any, Callable[[Tensor, Tensor], Any]]) -> Write:
    def write(cell: nn.Module, h: Tensor, x: Tensor) -> Tensor:
        for index, made in assignments:
            h[index] = made(h, x)
        return h

    return write


def _of(function: Callable[[Tensor, Tensor], Tensor]) -> Write:
    return lambda cell, h, x: function(h, x)


def _grid(h: Tensor) -> Tensor:
    return h.view(len(h), 2, 3)


def _reshaped_then_written(h: Tensor, x: Tensor) -> Tensor:
    _grid(h)[:, 1] *= _grid(x)[:, 0]
    return h


def _turned_then_written(h: Tensor, x: Tensor) -> Tensor:
    _grid(h).transpose(1, 2)[:, 0] = x[:, :2]
    return h


def _narrowed_then_written(h: Tensor, x: Tensor) -> Tensor:
    i, g = h.narrow(1, 0, 2), h.narrow(1, 2, 2)
    i.add_(0.5)
    g.mul_(-2)
    h[:, 4:] = x[:, :2]
    return h + torch.cat([x[:, :2], g, i], -1)


def _read_by_an_older_view(h: Tensor, x: Tensor) -> Tensor:
    older, middle = h[:, 1:], h[:, 2:4]
    h[:, :3] = x[:, :3]
    return older.sum(-1, keepdim=True) * middle.mean(-1, keepdim=True) * x


def _shifted_by_rolling(h: Tensor, x: Tensor) -> Tensor:
    kept = h.clone()
    kept.copy_(torch.roll(h, -1, -1))
    kept[:, -1] = x[:, 0]
    return kept


def _written_in_a_view_of_a_view(h: Tensor, x: Tensor) -> Tensor:
    part = h[:, 1:][:, ::2]
    part[:, -1:] += x[:, :1]
    part *= 2
    return h


def _filled_by_pieces(h: Tensor, x: Tensor) -> Tensor:
    made = torch.empty(len(h), H, dtype=h.dtype)
    made[:, :2] = x[:, :2]
    made[:, 2:].copy_(h[:, 2:])
    return made


def _diagonal_written(h: Tensor, x: Tensor) -> Tensor:
    square = (h[:, :3].unsqueeze(1) * x[:, 3:].unsqueeze(2)).contiguous()
    square.diagonal(dim1=1, dim2=2).mul_(0.5)
    return square.reshape(len(h), 9)[:, :6]


def _cast_on_the_way(h: Tensor, x: Tensor) -> Tensor:
    h[:, 0] = x[:, 0] > 0
    h[:, 1].add_(x[:, 1].to(torch.float64))
    h[:, 2].gt_(0.1)
    return h


def _constants_made(h: Tensor, x: Tensor) -> Tensor:
    h[:, :2] = torch.tensor([0.25, -0.5], dtype=h.dtype)
    return (
        torch.where(h > 0.1, h, torch.tensor(0.0, dtype=h.dtype))
        * torch.tensor([[2.0], [1.0], [0.5]], dtype=h.dtype)[1]
    )


EMITTED: dict[str, Write] = {
    "slice": _assigned(((slice(None), slice(2)), lambda h, x: x[:, 2:4])),
    "slice in steps": _assigned(((slice(None), slice(None, None, 2)), lambda h, x: x[:, 3:])),
    "ellipsis": _assigned(((..., slice(-3, None)), lambda h, x: h[:, :3] + x[:, :3])),
    "slice beyond the end": _assigned(((slice(None), slice(4, 9, 2)), lambda h, x: h[:, :1] * 0.5)),
    "slice from the end": _assigned(((slice(None), slice(-4, 2**60, 3)), lambda h, x: x[:, :2] + h[:, :2])),
    "slice scattered": lambda cell, h, x: torch.slice_scatter(h, x[:, ::2] * 0.5, 1, 0, 99, 2),
    "column": _assigned(((slice(None), -1), lambda h, x: x[:, 0] - h[:, 0])),
    "number": _assigned(((slice(None), slice(1, 3)), lambda h, x: 0.5), ((slice(None), 0), lambda h, x: 1)),
    "broadcast": _assigned(((slice(None), slice(1, 3)), lambda h, x: x[:, :1])),
    "two writes": _assigned(
        ((slice(None), slice(4)), lambda h, x: h[:, 2:]), ((slice(None), slice(3, None)), lambda h, x: x[:, :3])
    ),
    "in place": lambda cell, h, x: h.mul_(x).add_(cell.weight),
    "parameter": lambda cell, h, x: _assigned(((slice(None), slice(2)), lambda h, x: cell.weight[:2]))(cell, h, x),
    "reshaped": _of(_reshaped_then_written),
    "turned": _of(_turned_then_written),
    "narrowed": _of(_narrowed_then_written),
    "older view": _of(_read_by_an_older_view),
    "rolling": _of(_shifted_by_rolling),
    "view of a view": _of(_written_in_a_view_of_a_view),
    "pieces": _of(_filled_by_pieces),
    "cast": _of(_cast_on_the_way),
    "constants": _of(_constants_made),
}
RUN_BY_TORCH: dict[str, Write] = {"diagonal": _of(_diagonal_written)}


def _inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(T, B, H, generator=torch.Generator().manual_seed(7), dtype=dtype)


@pytest.mark.parametrize("name", [*EMITTED, *RUN_BY_TORCH])
def test_a_write_is_recorded(name: str) -> None:
    cell = WritingCell((EMITTED | RUN_BY_TORCH)[name]).double()
    assert decision(cell, _inputs(), "eager").plan is not None, decision(cell, _inputs(), "eager").why
    assert_as_reference(cell, _inputs(), engine="eager", what=name)


def _clamped_norm(h: Tensor, x: Tensor) -> Tensor:
    norm = h.norm(dim=-1, keepdim=True).clone()
    with torch.no_grad():
        norm.clamp_(min=0.8)
    return h * x / norm


def _straight_through(h: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        offset = (h + x > 0).to(h.dtype) - h
    return h + offset


def _part_overwritten(h: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        h[:, :3] = 0.5 * x[:, 3:]
    return h * 1.5


def _written_through_data(h: Tensor, x: Tensor) -> Tensor:
    middle = h[:, 2:5]
    h.data[:, 1:].mul_(2)
    return torch.cat([h[:, :3] * x[:, :3], middle], -1)


def _split_without_gradients(h: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        i, g, o = h.chunk(3, -1)
        i.sigmoid_()
        g.copy_(i * o)
        h.unbind(1)[-1].fill_(0.25)
    return h + x


def _scaled_by_the_largest(h: Tensor, x: Tensor) -> Tensor:
    largest = (x + h).detach().abs().amax(-1, keepdim=True)
    largest.clamp_(min=0.5)
    return h / largest


def _detached_and_overwritten(h: Tensor, x: Tensor) -> Tensor:
    made = (h * 2).detach()
    made[:, :3] = h[:, 3:] * x[:, 3:]
    return made


def _cut_in_place(h: Tensor, x: Tensor) -> Tensor:
    cut = h * x
    cut.detach_()
    return cut + h


def _written_twice_unseen(h: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        h.mul_(x)
        h[:, ::2].add_(1)
    return torch.sin(h) + h[:, 1:2]


@torch.no_grad()
def _target(h: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(h * x)


UNSEEN: dict[str, Write] = {
    "cosine": lambda cell, h, x: x * F.cosine_similarity(h, x, dim=-1).unsqueeze(-1),
    "weight": lambda cell, h, x: h * _normalised(cell.weight),
    "target": lambda cell, h, x: h - _target(h, x),
    **{
        function.__name__.strip("_"): _of(function)
        for function in (
            _clamped_norm,
            _straight_through,
            _part_overwritten,
            _written_through_data,
            _split_without_gradients,
            _scaled_by_the_largest,
            _detached_and_overwritten,
            _written_twice_unseen,
        )
    },
}


def _normalised(weight: Tensor) -> Tensor:
    with torch.no_grad():
        size = weight.norm()
    return weight / size


@pytest.mark.parametrize("name", UNSEEN)
def test_what_autograd_does_not_see_is_recorded(name: str) -> None:
    cell = WritingCell(UNSEEN[name]).double()
    found = decision(cell, _inputs(), "eager")
    assert found.plan is not None, found.why
    assert_as_reference(cell, _inputs(), engine="eager", what=name)


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -0.5 * grad


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        spikes = torch.zeros_like(x)
        spikes[:, :3] = (x[:, :3] > 0).to(x.dtype)
        spikes[:, 3:] += 0.25
        return spikes

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        surrogate = grad / (1 + x.abs())
        surrogate[:, 0] *= 2
        return surrogate


def _reversed_and_read(h: Tensor, x: Tensor) -> Tensor:
    turned = _Reversed.apply(h)
    return turned * x + h.sin()


def _spike_then_overwritten(h: Tensor, x: Tensor) -> Tensor:
    spikes = _Spike.apply(h + x)
    with torch.no_grad():
        spikes.mul_(0.5)
    return spikes + h


@pytest.mark.parametrize("write", [_reversed_and_read, _spike_then_overwritten])
def test_writes_around_functions_of_autograd(write: Callable[[Tensor, Tensor], Tensor]) -> None:
    cell = WritingCell(_of(write)).double()
    found = decision(cell, _inputs(), "eager")
    assert found.plan is not None, found.why
    assert_as_reference(cell, _inputs(), engine="eager", what=write.__name__)


def test_writes_are_compiled() -> None:
    cell = WritingCell(*EMITTED.values(), *UNSEEN.values()).double()
    assert decision(cell, _inputs(), "native").engine == "native", decision(cell, _inputs(), "native").why
    assert_as_reference(cell, _inputs(), engine="native")


def _into_an_argument(h: Tensor, x: Tensor) -> Tensor:
    x[:, 0] = 1
    return h


def _into_windows(h: Tensor, x: Tensor) -> Tensor:
    h.unfold(1, 2, 2)[:, 0] *= 2
    return h


def _into_out(h: Tensor, x: Tensor) -> Tensor:
    made = torch.empty_like(h)
    with torch.no_grad():
        torch.add(h, x, out=made)
    return made


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (
            _into_an_argument,
            r"in place into an argument .* x = x.clone\(\) \(test_writes.py:\d+: x\[:, 0\] = 1\)",
        ),
        (_cut_in_place, r"out of its graph in place; write x = x.detach\(\) \(test_writes.py:\d+: cut.detach_\(\)\)"),
        (_into_windows, r"a view that unfold makes, .* \(test_writes.py:\d+: h.unfold\(1, 2, 2\)\[:, 0\] \*= 2\)"),
        (_into_out, r"aten.add.out writes into its `out=`; .* \(test_writes.py:\d+: torch.add\(h, x, out=made\)\)"),
    ],
)
def test_a_refusal_names_the_line_and_the_remedy(write: Callable[[Tensor, Tensor], Tensor], why: str) -> None:
    found = decision(WritingCell(_of(write)).double(), _inputs(), "eager")
    assert found.engine == "reference"
    assert re.search(why, found.why), found.why


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("training", [True, False])
def test_hooks_of_torch_that_make_a_weight_are_recorded(wrap: Callable[..., nn.Module], training: bool) -> None:
    cell = WritingCell(_of(torch.mul))
    wrap(cell.linear)
    cell.double().train(training)
    found = decision(cell, _inputs(), "eager")
    if training and wrap is nn.utils.spectral_norm:
        assert (found.engine, "spectral_norm that changes its buffers" in found.why) == ("reference", True)
    else:
        assert found.plan is not None, found.why
        assert_as_reference(cell, _inputs(), engine="eager")
