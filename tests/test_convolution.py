"""Convolutions on the path run as C, forward and back: of any stride, padding, dilation and grouping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matching import assert_match
from random_cells import assert_as_reference, decision, unrolled
from row_by_row import Batch, answers
from unrolled.engine.native.products import PackedMatrix
from unrolled.operations.nodes import Input, View, contiguous

F64 = torch.float64


class SumCell(nn.Module):
    """`h' = tanh(f(h) + g(h) + ... + x)`, of an image or a signal."""

    def __init__(self, shape: Sequence[int], parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.shape, self.parts = tuple(shape), nn.ModuleList(parts)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, *self.shape, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(sum(part(state) for part in self.parts) + input)
        return state, state


class ConvLSTMCell(nn.Module):
    """Shi et al. 2015, without peepholes."""

    def __init__(self, inner: int = 2, channels: int = 3, places: tuple[int, int] = (4, 5)) -> None:
        super().__init__()
        self.channels, self.places = channels, places
        self.gates = nn.Conv2d(inner + channels, 4 * channels, 3, padding=1)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(batch_size, self.channels, *self.places, device=device, dtype=dtype)
        return zeros, zeros

    def forward(self, input: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = state
        i, f, o, g = self.gates(torch.cat([input, h], 1)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, (h, c)


# Each gives what it is given the shape of.
PARTS: dict[str, tuple[tuple[int, ...], Callable[[], list[nn.Module]]]] = {
    "of images": (
        (4, 5, 6),
        lambda: [
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(4, 4, (3, 5), padding=(2, 2), dilation=(2, 1), groups=2, bias=False),
            nn.Conv2d(4, 4, 1),
            nn.Sequential(nn.Conv2d(4, 3, (2, 3), padding=2), nn.Conv2d(3, 4, (4, 3))),
        ],
    ),
    "by channel": (
        (4, 5, 6),
        lambda: [
            nn.Conv2d(4, 4, 3, padding=1, groups=4),
            nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), nn.ConvTranspose2d(8, 4, 1)),
        ],
    ),
    "with strides": (
        (3, 6, 7),
        lambda: [
            nn.Sequential(
                nn.Conv2d(3, 5, 3, stride=(2, 3), padding=1),
                nn.ConvTranspose2d(5, 3, (4, 3), stride=(2, 3), padding=1),
            ),
            nn.Sequential(
                nn.Conv2d(3, 4, 2, stride=3),
                nn.ConvTranspose2d(4, 3, 2, stride=(3, 3), output_padding=(1, 2), groups=1, bias=False),
            ),
        ],
    ),
    "of signals": (
        (4, 7),
        lambda: [
            nn.Conv1d(4, 4, 3, padding=2, dilation=2),
            nn.Sequential(
                nn.Conv1d(4, 8, 3, stride=2, padding=1, groups=4),
                nn.ConvTranspose1d(8, 4, 3, stride=2, padding=2, output_padding=0, dilation=2, groups=4),
                nn.ConvTranspose1d(4, 4, 2, padding=1, groups=2),
                nn.ConstantPad1d((0, 1), 0.5),
            ),
        ],
    ),
    "of volumes": ((2, 3, 2, 4), lambda: [nn.Conv3d(2, 2, (3, 1, 3), padding=(1, 0, 1))]),
}


def _made(name: str) -> tuple[SumCell, Tensor]:
    torch.manual_seed(0)
    shape, parts = PARTS[name]
    return SumCell(shape, parts()).double(), torch.randn(4, 3, *shape, dtype=F64)


@pytest.mark.parametrize("name", PARTS)
def test_convolutions_give_the_references_values_and_gradients(name):
    cell, x = _made(name)
    found = decision(cell, x, "native")
    assert found.engine == "native", found.why
    fast = unrolled(cell, "native")
    for B in (3, 1):
        assert_as_reference(cell, x[:, :B], engine="native", rnn=fast, what=f"B={B}")


def test_rows_that_end_and_segments_of_a_budget():
    torch.manual_seed(0)
    cell, x = ConvLSTMCell().double(), torch.randn(5, 3, 2, 4, 5, dtype=F64)
    net = unrolled(cell, "native")
    batch = Batch(x, (2, 5, 0))
    assert_match(answers(net, batch, "list"), answers(net, batch))
    assert net.ran == "native"
    assert_as_reference(cell, x, engine="native", rnn=unrolled(cell, "native", memory=0.8))


def test_training_takes_the_loops_way():
    found = []
    for engine in ("native", "reference"):
        torch.manual_seed(0)
        cell, x = ConvLSTMCell(), torch.randn(4, 3, 2, 4, 5)
        net, optimiser = unrolled(cell, engine), torch.optim.SGD(cell.parameters(), 0.5)
        for _ in range(5):
            optimiser.zero_grad()
            net(x)[0].square().mean().backward()
            optimiser.step()
        found.append([p.detach() for p in cell.parameters()])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_weights_that_differ_from_row_to_row_are_no_matrix():
    class Dynamic(nn.Module):
        def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            B = state.shape[0]
            mixed = torch.conv1d(state.reshape(1, 2 * B, 4), input.reshape(2 * B, 1, 4)[..., :3], None, 1, 1, 1, 2 * B)
            state = torch.tanh(mixed.view(B, 2, 4))
            return state, state

        def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
            return torch.ones(batch_size, 2, 4, dtype=dtype)

    assert_as_reference(Dynamic(), torch.randn(4, 3, 2, 4, dtype=F64), engine="auto")


@pytest.mark.parametrize("layout", [lambda w: w, lambda w: w.transpose(1, 2).contiguous().transpose(1, 2)])
def test_a_packed_view_is_that_of_the_matrix_itself(layout):
    """Weights turned around, by whatever strides the tensor has."""
    weight = layout(torch.randn(5, 4, 3, dtype=F64))
    view = View(Input(weight.shape, F64), tuple(weight.shape), contiguous(weight.shape)).flipped(1).permuted([2, 1, 0])
    plain = weight.flip(1).permute(2, 1, 0).reshape(12, 5)
    whole = PackedMatrix((12, 5), (5, 1), 0)
    assert torch.equal(PackedMatrix.of(view)(weight), whole(plain))
