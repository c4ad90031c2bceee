"""Writes in place, and gradients turned off, inside of a step: values and gradients are those of the plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
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
    return torch.where(h > 0.1, h, torch.tensor(0.0, dtype=h.dtype)) * torch.tensor([[2.0], [1.0], [0.5]])[1]


EMITTED: dict[str, Write] = {
    "slice": _assigned(((slice(None), slice(2)), lambda h, x: x[:, 2:4])),
    "slice in steps": _assigned(((slice(None), slice(None, None, 2)), lambda h, x: x[:, 3:])),
    "ellipsis": _assigned(((..., slice(-3, None)), lambda h, x: h[:, :3] + x[:, :3])),
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
