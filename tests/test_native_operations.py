"""Operations that cells of the literature are made of run as C, forward and backward, with the reference's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unrolled as ur
from random_cells import assert_as_reference, decision, unrolled
from unrolled.engine.native import threads as sharing

F64, F32 = torch.float64, torch.float32
H = 6
# A compilation of some seconds each, so that `make slow` runs the second half.
DTYPES = [pytest.param(F64, id="float64"), pytest.param(F32, id="float32", marks=pytest.mark.slow)]


class ManyCell(nn.Module):
    """`h' = tanh(W (f(h) + g(h) + ...) + x)`: many functions of the state in one loop."""

    def __init__(self, functions: list[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.functions, self.linear = functions, nn.Linear(H, H)
        self.slope = nn.Parameter(torch.rand(H))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.zeros(batch_size, H, device=device, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        total = F.prelu(state, self.slope)
        for f in self.functions:
            total = total + f(state) / len(self.functions)
        hidden = torch.tanh(self.linear(total) + input)
        return hidden, hidden


def _matrix(x: Tensor) -> Tensor:
    return x.unsqueeze(2) * x.flip(-1).unsqueeze(1)


def _lines(x: Tensor) -> Tensor:
    return x.unsqueeze(1)


def _image(x: Tensor) -> Tensor:
    return x.view(-1, 1, 2, 3)


def _whole(x: Tensor) -> Tensor:
    """A place within the row for each entry."""
    return (7 * x).long().abs() % H


def _written(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, torch.arange(2) * 2] = x[:, :2] * 2
    y[:, [1]] = x[:, 1:2] * 3
    y[:, torch.arange(3, 4)[0]] = 0.5
    y[y > 0.6] = 0.1
    return y


PACKS: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "activations": [
        F.softplus,
        F.silu,
        F.gelu,
        F.elu,
        F.leaky_relu,
        F.hardtanh,
        F.hardsigmoid,
        F.hardswish,
        F.mish,
        F.selu,
        F.celu,
        F.relu6,
        F.logsigmoid,
        F.softsign,
        F.tanhshrink,
        F.hardshrink,
        F.softshrink,
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: F.threshold(x, 0.1, 0.7),
        lambda x: F.glu(torch.cat([x, x.flip(-1)], -1), -1),
        lambda x: F.softplus(x, 2.0, 1.0),
    ],
    "functions": [
        torch.sinh,
        torch.cosh,
        torch.tan,
        torch.atan,
        torch.asinh,
        torch.exp2,
        torch.erfc,
        torch.sinc,
        torch.frac,
        lambda x: torch.asin(x / 2) + torch.acos(x / 2) * torch.atanh(x / 2),
        lambda x: torch.log2(1.5 + x) + torch.log10(1.5 + x) * torch.acosh(2.5 + x),
        lambda x: torch.atan2(x, 1 + x.abs()) + torch.hypot(x, 1 + x),
        lambda x: torch.copysign(x, x.flip(-1)) + torch.logaddexp(x, x.flip(-1)),
        lambda x: torch.fmod(x, 0.3) + torch.remainder(x, 0.3) + torch.remainder(x, -0.3),
        lambda x: torch.div(x, 0.3, rounding_mode="floor") + torch.div(x, 0.3, rounding_mode="trunc") + x.trunc(),
        lambda x: torch.round(x, decimals=1) + torch.heaviside(x.detach(), x.detach()),
        lambda x: torch.where(x.isnan() | x.isinf() | ~x.isfinite() | x.signbit(), x, -x).nan_to_num(0.5),
        lambda x: ((x > 0) + (x > -1)).to(x.dtype) + x.bool().to(x.dtype) + ((x > 0) ^ (x < 0.5)).to(x.dtype),
        lambda x: torch.lerp(x, x.flip(-1), x - 1),
        lambda x: ((x > 0) / (1 + (x > 0.2).to(x.dtype))) * x,
    ],
    "reductions": [
        lambda x: x.log_softmax(-1) / H,
        lambda x: x.logsumexp(-1, keepdim=True) * x,
        lambda x: x * x.norm(dim=-1, keepdim=True) + x * x.norm(p=1, dim=-1, keepdim=True),
        lambda x: F.normalize(x, dim=-1) + x.norm(p=3, dim=-1, keepdim=True),
        lambda x: x.prod(-1, keepdim=True) * x.cumsum(-1),
        lambda x: x.view(-1, 2, 3).cumsum(1).flatten(1) - x.view(-1, 2, 3).amax((1, 2)).unsqueeze(-1),
        lambda x: (
            x * (x > 0).sum(-1, keepdim=True) + x * (x > 0).any(-1, keepdim=True) * (x > -1).all(-1, keepdim=True)
        ),
        lambda x: torch.std_mean(x, -1, keepdim=True)[0] * x + x.amin(-1, keepdim=True),
        lambda x: F.group_norm(x, 2) + F.layer_norm(x, (H,)),
    ],
    "views": [
        lambda x: x.flip(-1) + x.roll(2, -1) + x.roll(-1, -1),
        lambda x: x[:, :2].repeat(1, 3) + x.unsqueeze(1).repeat(1, 3, 1).sum(1) + x.tile(1, 2)[:, 3:9],
        lambda x: x[:, :3].repeat_interleave(2, -1) + x[:, :1].expand(-1, H),
        lambda x: torch.cat([x[:, ::2], x[:, 1::2]], -1) + torch.cat([x[:, 1::3], x[:, :4]], -1),
        lambda x: F.pad(x[:, 1:], (1, 0)) + F.pad(x, (-2, 2), value=1.0) + F.pad(x[:, 2:5], (1, 2)),
        lambda x: torch.stack(x.unbind(-1)[::-1], -1) + torch.stack([x, 2 * x], 1).flip(1, 2)[:, 0],
        lambda x: x.view(-1, 2, 3).transpose(0, 1).flip(0).transpose(0, 1).reshape(-1, H),
        lambda x: torch.stack([x, 2 * x]).mean(0) + torch.stack([x, -x], -1).flatten(1)[:, 3:9],
    ],
    "products": [
        lambda x: torch.bmm(x.unsqueeze(1), _matrix(x)).squeeze(1),
        lambda x: (_matrix(x) @ x.unsqueeze(-1)).squeeze(-1),
        lambda x: torch.einsum("bij,bj->bi", _matrix(x), x) + torch.einsum("bi,bj->bj", x, x),
        lambda x: (_matrix(x) @ _matrix(x).transpose(1, 2)).mean(1),
        lambda x: torch.baddbmm(_matrix(x), _matrix(x), _matrix(x), beta=0.5, alpha=0.2).sum(1),
        lambda x: torch.addmm(x, x, torch.ones(H, H, dtype=x.dtype), beta=0.5, alpha=0.1),
        lambda x: F.conv1d(x.view(-1, 2, 3), torch.ones(2, 2, 3, dtype=x.dtype) / 6, padding=1).flatten(1),
        lambda x: (
            F.conv1d(x.view(-1, 2, 3), torch.ones(2, 1, 2, dtype=x.dtype), None, 1, 1, 2, 2)
            .repeat(1, 1, 2)[..., :3]
            .flatten(1)
        ),
    ],
    "places": [
        lambda x: x.gather(1, _whole(x)) + x.take_along_dim(x.argsort(-1), -1) + x[:, [3, 4, 0, 1, 5, -1]],
        lambda x: x.scatter(1, _whole(x)[:, :4], x.flip(-1)[:, :4]) * x.scatter(1, _whole(x)[:, :4], 0.25),
        lambda x: x.scatter_add(1, _whole(x), x.flip(-1)) + x.scatter_reduce(1, _whole(x), x.flip(-1), "sum"),
        lambda x: torch.zeros_like(x).scatter_(1, x.argmax(-1, keepdim=True), 1.0) * x,
        lambda x: x[:, torch.arange(H).flip(0)] + x.index_select(1, torch.arange(H) // 2),
        lambda x: x.index_add(1, torch.arange(4) % 3, x[:, :4], alpha=0.5) + x.index_fill(1, torch.arange(2) - 1, 0.1),
        lambda x: x.index_copy(1, torch.arange(2, 5), x[:, :3]) + _written(x),
        lambda x: x.view(-1, 2, 3)[:, torch.arange(2), torch.arange(2)].sum(-1, keepdim=True) * x,
        lambda x: x * x[torch.arange(len(x)), x.argmin(-1)].unsqueeze(-1),
        lambda x: x[torch.arange(len(x))[:, None], _whole(x) - H],
        lambda x: torch.ones(9, H, dtype=x.dtype)[_whole(x)[:, 0] + 3] * x,
    ],
    "orders": [
        lambda x: x * x.max(-1, keepdim=True)[0] + x * x.min(-1)[0].unsqueeze(-1) * x.max(-1)[1].unsqueeze(-1),
        lambda x: x.sort(-1)[0] + x * x.sort(-1, descending=True)[0] + x.sort(-1)[1],
        lambda x: torch.sort(x.relu(), dim=-1, stable=True)[0] * torch.sort(x.relu(), dim=-1, stable=True)[1],
        lambda x: F.pad(x.topk(2, -1)[0], (0, 4)) + x.topk(3, -1, largest=False)[0].sum(-1, keepdim=True),
        lambda x: x.relu().cummax(-1)[0] * x.cummin(-1)[0] + x.cummax(-1)[1],
        lambda x: x.cumprod(-1) + x.relu().cumprod(-1) + x.logcumsumexp(-1),
        lambda x: x.median(-1, keepdim=True)[0] * x + x * torch.count_nonzero(x.relu(), -1).unsqueeze(-1),
        lambda x: x * torch.bucketize(x, torch.arange(-1, 1, 0.25, dtype=x.dtype)),
        lambda x: x * torch.searchsorted(x.detach().cummax(-1)[0], x.detach(), right=True),
        lambda x: (x.argmax(-1).unsqueeze(-1) == torch.arange(H)).to(x.dtype) * x,
    ],
    "integers": [
        lambda x: (
            x * ((3 * _whole(x) - 1) // 2 % 5 - _whole(x) // -3 + torch.div(-_whole(x), 4, rounding_mode="trunc"))
        ),
        lambda x: x * ((_whole(x) & 3) + (_whole(x) | 1) + (_whole(x) ^ 2) + ~_whole(x) + (_whole(x) >> 1)) / H,
        lambda x: x * ((_whole(x) << 2) - (-_whole(x)).abs() + torch.fmod(-_whole(x), 4) + _whole(x) ** 2) / 9,
        lambda x: x * (_whole(x).clamp(1, 3) + _whole(x).clamp(min=2) + torch.where(_whole(x) > 2, _whole(x), -1)) / H,
        lambda x: x * ((_whole(x) * 2654435761 + 2**53 + 1) % 10) + x * ((_whole(x) + 2**62) * 4 >> 1).sign(),
        lambda x: x * (_whole(x).int() * 2**30 + 1).sign() + x * (_whole(x).to(torch.int8) * 50 % 7),
        lambda x: x * ((_whole(x) * 50).to(torch.uint8) >> 9) + x * ((3 - _whole(x)).int() >> 40),
        # What an integer cannot hold.
        lambda x: x * ((x * 1e10).int() % 7) + x * ((x * 1e30).long() % 7) + x * (x / 0).to(torch.int16),
        lambda x: (
            x * _whole(x).sum(-1, keepdim=True) / 9 + x * _whole(x).cumsum(-1) / 9 + x * _whole(x).cumprod(-1) / 9
        ),
        lambda x: (
            x * (_whole(x).amax(-1, keepdim=True) - _whole(x).prod(-1, keepdim=True).clamp(max=2)) + (x > 0).cumsum(-1)
        ),
    ],
    "losses": [
        lambda x: F.mse_loss(x, x.flip(-1), reduction="none") + F.l1_loss(x, x.flip(-1), reduction="none"),
        lambda x: F.smooth_l1_loss(x, x.flip(-1), reduction="none", beta=0.3),
        lambda x: F.huber_loss(x, x.flip(-1), reduction="none", delta=0.4),
        lambda x: F.soft_margin_loss(x, x.detach().sign(), reduction="none"),
        lambda x: F.binary_cross_entropy(x.sigmoid(), x.abs() / 2, reduction="none"),
        lambda x: (
            F.binary_cross_entropy((x > 0).to(x.dtype), x.detach().sigmoid(), x.detach().abs(), reduction="none") / 99
        ),
        lambda x: F.binary_cross_entropy_with_logits(20 * x, x.flip(-1).sigmoid(), x.detach().abs(), reduction="none"),
        lambda x: F.binary_cross_entropy_with_logits(x, x.abs(), pos_weight=1 + x.detach().abs(), reduction="none"),
        lambda x: x * F.cross_entropy(x, x.flip(-1).argmax(1), reduction="none").unsqueeze(1),
        lambda x: x * F.cross_entropy(x, _whole(x)[:, 0], reduction="none", ignore_index=2).unsqueeze(1),
        lambda x: F.nll_loss(x.view(-1, 2, 3), _whole(x)[:, :3] % 2, reduction="none").repeat(1, 2) * x,
        lambda x: F.gaussian_nll_loss(x, x.flip(-1), x * x + 0.1, reduction="none"),
    ],
    "resampling": [
        lambda x: (
            F.pad(_lines(x), (2, 1), mode="reflect")[:, 0, 1:7] * F.pad(_lines(x), (5, 0), mode="reflect")[:, 0, :6]
        ),
        lambda x: F.pad(_image(x), (1, 2, 1, 0), mode="reflect").flatten(1)[:, :H],
        lambda x: (
            F.pad(_lines(x), (3, 1), mode="replicate")[:, 0, 2:8] + F.pad(_lines(x), (2, 1), mode="circular")[:, 0, 3:]
        ),
        lambda x: F.pad(_image(x), (1, 2, 0, 2), mode="replicate").flatten(1)[:, 5 : 5 + H],
        lambda x: F.avg_pool1d(_lines(x), 3, 1, 1)[:, 0] + F.avg_pool1d(_lines(x), 2).repeat(1, 1, 2)[:, 0],
        lambda x: F.avg_pool2d(_image(x), 2, 1, 1, count_include_pad=False).flatten(1)[:, :H],
        lambda x: F.avg_pool2d(_image(x), (1, 2), ceil_mode=True).flatten(1)[:, :1] * x,
        lambda x: F.avg_pool2d(_image(x), (2, 1), 1, divisor_override=3).flatten(1).repeat(1, 2),
        lambda x: F.adaptive_avg_pool1d(_lines(x), 4)[:, 0, :3].repeat(1, 2),
        lambda x: F.adaptive_avg_pool2d(_image(x), (1, 2)).flatten(1).repeat(1, 3),
        lambda x: F.interpolate(_lines(x), scale_factor=2)[:, 0, 1::2] + F.interpolate(_lines(x), size=8)[:, 0, 1:7],
        lambda x: F.interpolate(_lines(x), size=4, mode="nearest-exact")[:, 0, :1] * x,
        lambda x: F.interpolate(_lines(x), scale_factor=1.7, mode="linear")[:, 0, 3:9],
        lambda x: F.interpolate(_image(x), size=(3, 4), mode="bilinear", align_corners=True).flatten(1)[:, 2:8],
        lambda x: F.interpolate(_image(x), scale_factor=(2, 3), mode="bicubic").flatten(1)[:, 4:10],
        lambda x: F.interpolate(x.view(-1, 1, 1, 2, 3), size=(2, 3, 2), mode="trilinear").flatten(1)[:, 2:8],
    ],
    "windows": [
        lambda x: F.max_pool1d(_lines(x), 3, 1, 1)[:, 0] + F.max_pool1d(_lines(x).relu(), 2).repeat(1, 1, 2)[:, 0],
        lambda x: F.max_pool2d(_image(x), 2, 1, 1, ceil_mode=True).flatten(1)[:, 1:7],
        lambda x: F.max_pool2d(_image(x).relu(), (1, 2), 1, (0, 1), (1, 2)).flatten(1)[:, :H].repeat(1, 2)[:, :H],
        lambda x: F.max_pool3d(x.view(-1, 1, 1, 2, 3), (1, 2, 2), 1).flatten(1).repeat(1, 3),
        lambda x: x * F.max_pool2d(_image(x), 2, return_indices=True)[1].flatten(1),
        lambda x: F.adaptive_max_pool2d(_image(x), (2, 2)).flatten(1)[:, :3].repeat(1, 2),
        lambda x: F.adaptive_max_pool1d(_lines(x), 4)[:, 0, 1:].repeat(1, 2),
        lambda x: F.unfold(_image(x), 2, padding=1, stride=(1, 2)).flatten(1)[:, 6 : 6 + H],
        lambda x: F.unfold(_image(x), (1, 2), dilation=(1, 2)).flatten(1)[:, :3].repeat(1, 2),
        lambda x: F.fold(x.repeat(1, 4).view(-1, 4, 6), (3, 4), 2).flatten(1)[:, 3:9],
        lambda x: x.unfold(1, 3, 1).sum(2).repeat(1, 2)[:, :H] * x.unfold(1, 2, 2).prod(2).repeat(1, 2),
        lambda x: F.pixel_shuffle(x.repeat(1, 2)[:, :8].view(-1, 4, 1, 2), 2).flatten(1)[:, :H],
        lambda x: F.pixel_unshuffle(x.repeat(1, 2)[:, :8].view(-1, 1, 2, 4), 2).flatten(1)[:, 2:8],
        lambda x: F.channel_shuffle(x.view(-1, 6, 1, 1), 2).flatten(1),
    ],
    "special": [
        lambda x: torch.lgamma(x + 1.5) + torch.digamma(x + 1.5) + torch.polygamma(1, x + 1.6) * 0.1,
        lambda x: torch.digamma(x - 2.1) / 100 + torch.lgamma(x * x * 20 + 0.1) / 100,
        lambda x: torch.erfinv(x * 0.9) + torch.erfinv(x / 2) * torch.special.ndtr(x),
        lambda x: torch.special.i0(9 * x) / 1000 + torch.special.i0e(40 * x) + torch.special.i1(x),
        lambda x: torch.special.i1e(50 * x) + torch.special.entr(x.abs()) + torch.special.xlog1py(x, x.abs()),
        lambda x: torch.logaddexp2(x, x.flip(-1)),
    ],
    "algebra": [
        lambda x: torch.linalg.cross(x.view(-1, 2, 3), x.flip(-1).view(-1, 2, 3)).flatten(1),
        lambda x: torch.linalg.cross(x.view(-1, 3, 2), x.flip(-1)[:, :3, None] + 1, dim=1).flatten(1),
        lambda x: torch.diag_embed(x, 1)[:, 0, 1:] + torch.diag_embed(x, -1, 1, 2).sum(1)[:, :H] * x,
        lambda x: torch.diag_embed(x.view(-1, 2, 3), 0, 1, 3).sum(1).flatten(1)[:, :H],
        lambda x: _matrix(x).diagonal(1, 1, 2).sum(1, keepdim=True) * x + _matrix(x).diagonal(-2, 2, 1)[:, :1],
        lambda x: torch.aminmax(x.relu(), dim=1, keepdim=True)[0] + torch.aminmax(x, dim=-1)[1].unsqueeze(1) * x,
        lambda x: torch.cdist(x.view(-1, 2, 3), x.flip(-1).view(-1, 2, 3)).flatten(1)[:, :3].repeat(1, 2),
        lambda x: torch.cdist(x.view(-1, 3, 2), x.view(-1, 3, 2)).sum(2).repeat(1, 2),
        lambda x: torch.cdist(x.view(-1, 3, 2), x.flip(-1).view(-1, 3, 2), p=1).sum(2).repeat(1, 2),
        lambda x: torch.kthvalue(x, 2, 1, keepdim=True)[0] + x.kthvalue(4)[0].unsqueeze(1) * x,
        lambda x: F.bilinear(x, x.flip(-1)[:, :2], torch.ones(H, H, 2, dtype=x.dtype).cumsum(1) / 9),
    ],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pack", PACKS)
def test_many_operations_in_one_loop_of_c(pack, dtype):
    torch.manual_seed(2)
    cell = ManyCell(PACKS[pack]).to(dtype)
    fast = unrolled(cell, "native")
    found = decision(cell, torch.randn(4, 3, H, dtype=dtype), "native")
    assert found.engine == "native", found.why
    for B in (1, 2, 3, 5):
        x, state = torch.randn(4, B, H, dtype=dtype), 0.7 * torch.rand(B, H, dtype=dtype) - 0.4
        assert_as_reference(cell, x, state, engine="native", rnn=fast, what=f"B={B}")


def test_gradients_pass_where_a_grid_of_32_bits_has_numbers():
    torch.manual_seed(3)
    cell = ManyCell([lambda x: torch.fake_quantize_per_tensor_affine(3 * x, 0.07, 1, -3, 9)])
    x = torch.randn(5, 3, H)
    assert decision(cell, x, "native").engine == "native"
    assert_as_reference(cell, x, engine="native")


def test_a_probability_beyond_one_is_left_to_torch():
    cell = ManyCell([lambda x: F.binary_cross_entropy(x.abs(), torch.ones_like(x), reduction="none")])
    fast, x = unrolled(cell, "native"), torch.zeros(3, 2, H)
    assert decision(cell, x, "native").engine == "native"
    for wrong in (2.0, float("nan")):
        with pytest.raises(RuntimeError, match="between 0 and 1"):
            fast(x, torch.full((2, H), wrong))


# -- cells of the literature -----------------------------------------------------------------------------------------


class MatrixMemoryCell(nn.Module):
    """mLSTM: a matrix for each head, written with `v k^T` and read with q; the gates are exponential."""

    def __init__(self, heads: int = 2, size: int = 3) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv, self.gates = nn.Linear(H, 3 * heads * size), nn.Linear(H, 2 * heads)
        self.back = nn.Parameter(torch.randn(heads, size, size) / 3)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Any:
        shape = (batch_size, self.heads, self.size)
        zeros = torch.zeros(*shape, self.size, dtype=dtype), torch.zeros(shape, dtype=dtype)
        return *zeros, torch.zeros(batch_size, self.heads, dtype=dtype), torch.zeros(shape, dtype=dtype)

    def forward(self, input: Tensor, state: Any) -> tuple[Tensor, Any]:
        C, n, m, h = state
        q, k, v = self.qkv(input).view(-1, 3, self.heads, self.size).unbind(1)
        q = q + torch.einsum("bhd,hde->bhe", h, self.back)
        i, f = self.gates(input).chunk(2, -1)
        f = F.logsigmoid(f + h.mean(-1))
        stable = torch.maximum(f + m, i)
        i, f = torch.exp(i - stable).unsqueeze(-1), torch.exp(f + m - stable).unsqueeze(-1)
        C = f.unsqueeze(-1) * C + i.unsqueeze(-1) * torch.einsum("bhi,bhj->bhij", v, k)
        n = f * n + i * k
        size = (n * q).sum(-1, keepdim=True).abs().clamp(min=1.0)
        h = torch.tanh((C @ q.unsqueeze(-1)).squeeze(-1) / size)
        return h.flatten(1), (C, n, stable, h)


class SlotAttentionCell(nn.Module):
    """Attention of several heads over slots that are the state, each slot through a gated linear unit."""

    def __init__(self, heads: int = 2, slots: int = 3) -> None:
        super().__init__()
        self.heads, self.slots = heads, slots
        self.q, self.kv, self.out, self.glu = (nn.Linear(H, n * H) for n in (1, 2, 1, 2))
        self.norm = nn.LayerNorm(H)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.ones(batch_size, self.slots, H, dtype=dtype)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        batch = input.shape[0]
        seen = torch.cat([state, input.unsqueeze(1)], 1)
        q = self.q(state).view(batch, self.slots, self.heads, -1).transpose(1, 2)
        k, v = self.kv(seen).view(batch, self.slots + 1, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) / (H / self.heads) ** 0.5).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, self.slots, H)
        state = torch.tanh(self.norm(state + self.out(mixed)))
        return state.mean(1), 0.8 * state + 0.2 * F.glu(self.glu(state), -1)


class OrderedCell(nn.Module):
    """ON-LSTM: gates that are running sums of a softmax; and a learned slope for each unit."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.slope = nn.Linear(H, 6 * H), nn.Parameter(torch.rand(H))

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Any:
        return torch.zeros(batch_size, H, dtype=dtype), torch.zeros(batch_size, H, dtype=dtype)

    def forward(self, input: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, c = state
        f, i, o, g, master_f, master_i = (self.hidden(h) + input.repeat(1, 6)).chunk(6, -1)
        master_f, master_i = master_f.softmax(-1).cumsum(-1), master_i.softmax(-1).flip(-1).cumsum(-1).flip(-1)
        both = master_f * master_i
        c = (f.sigmoid() * both + master_f - both) * c + (i.sigmoid() * both + master_i - both) * g.tanh()
        h = o.sigmoid() * F.prelu(torch.tanh(c), self.slope)
        return h, (h, c)


LITERATURE = {"matrix memory": MatrixMemoryCell, "slot attention": SlotAttentionCell, "ordered neurons": OrderedCell}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LITERATURE)
def test_cells_of_the_literature_run_as_c(name, dtype):
    torch.manual_seed(4)
    cell = LITERATURE[name]().to(dtype)
    fast = unrolled(cell, "native")
    found = decision(cell, torch.randn(4, 3, H, dtype=dtype), "native")
    assert found.engine == "native", found.why
    for T, B in ((5, 1), (3, 2), (6, 5)):
        x = torch.randn(T, B, H, dtype=dtype)
        assert_as_reference(cell, x, engine="native", rnn=fast, what=f"T={T} B={B}")
        carried = unrolled(cell, "reference")(x)[1]
        assert_as_reference(cell, x, carried, engine="native", rnn=fast, what=f"carried, T={T} B={B}")


@pytest.mark.parametrize("size", [3, 64])
def test_gradients_without_memory_are_zeros(size):
    """Autograd's zeros have no address; with the larger size the kernel of large products is given them too."""
    cell, x = ur.RNNCell(size, size).double(), torch.randn(40, 8, size, dtype=F64)
    assert decision(cell, x, "native").engine == "native"
    assert_as_reference(cell, x, engine="native", loss=lambda outputs, state: outputs.sgn().sum() + state.sgn().sum())


@pytest.mark.parametrize("size", [3, 64])
def test_inputs_that_are_negated_when_they_are_read(size):
    cell, x = ur.RNNCell(size, size).double(), torch._neg_view(torch.randn(40, 8, size, dtype=F64))
    assert_as_reference(cell, x, engine="native")


@pytest.mark.parametrize("B", [1, 2, 7])
@pytest.mark.parametrize("make", [ur.LSTMCell, ur.GRUCell, ur.LayerNormLSTMCell])
def test_threads_that_help_with_products_change_no_number(make, B, monkeypatch):
    """Few rows: one thread walks, the other takes pieces of its products; each entry is summed as before."""
    cell, x = make(H, 40).double(), torch.randn(7, B, H, dtype=torch.float64)
    found = []
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for worth in ((), ((8, 0),)):
            monkeypatch.setattr(sharing, "_WORTH_A_QUEUE", worth)
            outputs, _ = ur.unroll(cell, engine="native")(x)
            grads = torch.autograd.grad(outputs.square().sum(), list(cell.parameters()))
            found.append([outputs.detach(), *grads])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert_as_reference(cell, x, engine="native")
