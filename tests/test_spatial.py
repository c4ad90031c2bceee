"""Images and signals in a step: convolution, pooling, resampling and their like are folded over time, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matching import assert_match
from random_cells import assert_as_reference, unrolled
from row_by_row import Batch, answers
from unrolled.operations.spatial import convolution_backward

F64 = torch.float64
CHANNELS, PLACES, T, B = 4, 6, 4, 3
LENGTHS = (2, 4, 0)


def _grid(x: Tensor) -> Tensor:
    return torch.tanh(x[:, :2, :, None] + x[:, 2:, None, :]).permute(0, 2, 3, 1)


def _image(x: Tensor) -> Tensor:
    return x.unsqueeze(2) * x.flip(1).unsqueeze(3)


def _signal(x: Tensor) -> Tensor:
    return x.mean(2)


# Each takes signals `[B, CHANNELS, PLACES]` and gives such back.
FUNCTIONS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "convolutions": lambda cell, x: cell.conv(x) + cell.depthwise(x) + cell.turned(x) + _signal(cell.image(_image(x))),
    "pooling": lambda cell, x: (
        F.max_pool1d(x, 3, 1, 1)
        + F.avg_pool1d(x, 3, 1, 1)
        + F.adaptive_avg_pool1d(x, PLACES)
        + F.adaptive_max_pool1d(x, 3).repeat(1, 1, 2)
        + F.pad(F.lp_pool1d(x.abs() + 1, 2, 3, 1), (1, 1))
        + _signal(F.max_pool2d(_image(x), 3, 1, 1) + F.avg_pool2d(_image(x), 3, 1, 1))
    ),
    "resampling": lambda cell, x: (
        F.interpolate(x, scale_factor=2)[..., ::2]
        + F.interpolate(x, scale_factor=2, mode="linear")[..., ::2]
        + sum(
            _signal(F.interpolate(_image(x), scale_factor=2, mode=mode)[..., ::2, ::2])
            for mode in ("nearest", "bilinear", "bicubic", "area", "nearest-exact")
        )
        + _signal(F.pixel_unshuffle(F.pixel_shuffle(_image(x), 2), 2))
        + _signal(F.grid_sample(_image(x), _grid(x), align_corners=False))
    ),
    "padding": lambda cell, x: (
        F.pad(x, (1, 1), mode="reflect")[..., 2:]
        + F.pad(x, (2, 0), mode="replicate")[..., :-2]
        + _signal(F.pad(_image(x), (1, 1, 1, 1), mode="replicate")[..., 1:-1, 1:-1])
        + F.unfold(_image(x), 3).mean(2).view(-1, CHANNELS, 9)[..., :PLACES]
    ),
    "normalisation": lambda cell, x: (
        cell.batch_norm(x)
        + F.group_norm(x, 2)
        + F.instance_norm(x)
        + cell.instance_norm(x)
        + cell.features(x[:, 0])[:, None]
    ),
    "distances": lambda cell, x: (
        torch.cdist(x, x.flip(2) + 1, p=1.0).sum(2, keepdim=True)
        + F.pairwise_distance(x, 2 * x.flip(1) + 1).unsqueeze(2)
        + torch.einsum("bcp,bdp,de->bcep", x, x, cell.features.weight[:CHANNELS, None].expand(-1, 2)).mean(2)
    ),
}


class SignalCell(nn.Module):
    """A function of a signal that is the state, and of one that comes in."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1)
        self.depthwise = nn.Conv1d(CHANNELS, CHANNELS, 2, groups=CHANNELS, padding=1, dilation=2)
        self.turned = nn.ConvTranspose1d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.image = nn.Conv2d(CHANNELS, CHANNELS, (3, 1), padding=(1, 0), stride=(2, 1))
        self.batch_norm, self.features = nn.BatchNorm1d(CHANNELS), nn.BatchNorm1d(PLACES)
        self.instance_norm = nn.InstanceNorm1d(CHANNELS, affine=True)
        for norm in (self.batch_norm, self.features):
            nn.init.uniform_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
        self.eval()

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.linspace(-1, 1, CHANNELS * PLACES, dtype=dtype).view(1, CHANNELS, PLACES).repeat(batch_size, 1, 1)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(self.function(self, state) + self.function(self, input))
        return state.flatten(1), state


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_of_any_length_keep_the_plan_and_the_numbers_of_each_row_alone(name):
    torch.manual_seed(0)
    cell, inputs = SignalCell(FUNCTIONS[name]).double(), torch.randn(T, B, CHANNELS, PLACES, dtype=F64)
    net = unrolled(cell, "eager")
    assert_as_reference(cell, inputs, engine="eager", rnn=net)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[1, 0] = resets[3, 1] = True
    for given in (None, resets):
        batch = Batch(inputs, LENGTHS, None, given)
        assert_match(answers(net, batch, "list"), answers(net, batch))
        assert net.ran == "eager", net.plan(inputs, lengths=LENGTHS).why


def test_group_norm_of_images_on_the_path_runs_as_c_with_lengths():
    torch.manual_seed(1)
    cell = SignalCell(lambda cell, x: cell.group_norm(cell.conv(x))).double()
    cell.group_norm = nn.GroupNorm(1, CHANNELS).double()
    nn.init.uniform_(cell.group_norm.weight, 0.5, 2.0)
    inputs = torch.randn(T, B, CHANNELS, PLACES, dtype=F64)
    net = unrolled(cell, "native")
    assert_as_reference(cell, inputs, engine="native", rnn=net)
    batch = Batch(inputs, LENGTHS, None, None)
    assert_match(answers(net, batch, "list"), answers(net, batch))
    assert net.ran == "native", net.plan(inputs, lengths=LENGTHS).why


def test_gradients_of_weights_alone_where_rows_are_coupled():
    """The second of three results, which is done for each step by itself, is the only one that is read."""
    torch.manual_seed(1)
    cell = SignalCell(lambda cell, x: cell.conv(x - x.mean(0))).double()
    cell.conv.bias = None
    inputs = torch.randn(T, B, CHANNELS, PLACES, dtype=F64)
    net = unrolled(cell, "eager")
    assert_as_reference(cell, inputs, engine="eager", rnn=net)
    assert net.ran == "eager", net.plan(inputs).why


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("options", [((1, 1), (0, 0), (1, 1), 1), ((2, 3), (1, 2), (2, 1), 2)])
def test_the_gradient_of_a_convolution_in_parts_is_torchs(options, transposed, bias):
    torch.manual_seed(1)
    stride, padding, dilation, groups = options
    input, weight = torch.randn(2, 4, 9, 8, dtype=F64), torch.randn(4, 4 // groups, 3, 2, dtype=F64)
    rest = stride, padding, dilation, transposed, (0, 0), groups
    grad = torch.randn_like(torch.ops.aten.convolution(input, weight, None, *rest))
    given = grad, input, weight, [4] if bias else None, *rest, [True, True, bias]
    want = torch.ops.aten.convolution_backward(*given)
    got = convolution_backward(*given)
    assert_match(tuple(x for x in got if x is not None), tuple(x for x in want if x is not None))
