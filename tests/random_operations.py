"""What random cells do at a step: operations on two values `[B, H]`, each giving one back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributions as D

__all__ = ["OPERATIONS"]


def _roll(x: Tensor) -> Tensor:
    return torch.cat([x[:, 1:], x[:, :1]], -1)


def _swapped(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2, -1)[::-1], -1)


def _in_heads(x: Tensor, y: Tensor) -> Tensor:
    q = torch.cat([x, y], -1).view(x.shape[0], 2, x.shape[1])
    return (q.softmax(-1) * q.flip(1)).transpose(1, 2).reshape(x.shape[0], -1)[:, : x.shape[1]]


def _with_part_written(x: Tensor, y: Tensor) -> Tensor:
    made = x.clone()
    made[:, ::2] = 0.5
    made[:, -1] += y[:, 0]
    return made


def _written_unseen(x: Tensor, y: Tensor) -> Tensor:
    made = x + y
    older = made[:, 1:]
    with torch.no_grad():
        made[:, :-1].clamp_(min=-0.2)
    return made + older.sum(-1, keepdim=True) / x.shape[1]


def _outer(x: Tensor, y: Tensor) -> Tensor:
    return (x.unsqueeze(2) * y.unsqueeze(1)).mean(1)


def _matrix(x: Tensor, y: Tensor) -> Tensor:
    return x.unsqueeze(2) * y.unsqueeze(1) / x.shape[1]


def _attended(cell: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    q = F.linear(torch.stack([x, y], 1), cell.weight, cell.bias).unsqueeze(2)
    heads = torch.stack([q, 0.5 - q], 2).squeeze(3).transpose(1, 2)
    return ((heads @ heads.transpose(2, 3)).softmax(-1) @ heads).mean((1, 2))


class _Rounded(torch.autograd.Function):
    """One where a number is above zero; its gradient is that of a sigmoid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        p = torch.sigmoid(ctx.saved_tensors[0])
        return grad * p * (1 - p)


def _rows_reset(x: Tensor, y: Tensor) -> Tensor:
    made = x.clone()
    made[y[:, 0] > 0] = 0.1
    return made


def _where_written(x: Tensor, y: Tensor) -> Tensor:
    made = x + y
    made[y > 0] = 0.5
    made[:, 0].mul_(x[:, -1])
    return made


def _window(x: Tensor, y: Tensor) -> Tensor:
    kept = torch.stack([x, y, x - y], 1)
    kept[:, 1:] = kept[:, :-1].clone()
    kept.select(1, 0).copy_(y)
    return kept.sum(1) / 3


def _checked(x: Tensor, y: Tensor) -> Tensor:
    if not torch.isfinite(x).all() or (y.abs() > 1e9).any():
        raise ValueError("a value is not finite")
    return x - y


def _validated(x: Tensor, y: Tensor) -> Tensor:
    mean = D.Normal(x, 0.5 + F.softplus(y))
    return mean.log_prob(y) / 4 + D.kl_divergence(mean, D.Normal(y, torch.ones_like(y))) / 9


def _classes(x: Tensor, y: Tensor) -> Tensor:
    return F.one_hot(x.argmax(-1), x.shape[1]).to(y.dtype) * y + (x.argmin(-1, keepdim=True) / x.shape[1]).to(y.dtype)


def _straight_through(x: Tensor, y: Tensor) -> Tensor:
    p = torch.sigmoid(x)
    return (x > 0).to(y.dtype) * y + p - p.detach()


def _sampled_class(x: Tensor, y: Tensor) -> Tensor:
    drawn = F.one_hot(torch.multinomial(x.softmax(-1), 1).squeeze(1), x.shape[1]).to(y.dtype)
    return drawn + y.softmax(-1) - y.softmax(-1).detach()


def _quantized(x: Tensor, y: Tensor) -> Tensor:
    places = (3 * torch.tanh(x)).floor().long()
    return (places % 3 - (places & 1)).to(y.dtype) * y + torch.bucketize(y, torch.tensor([-0.5, 0.25, 1.0])).to(
        y.dtype
    ) / 4


def _images(cell: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    image = _matrix(x, y).unsqueeze(1)
    pooled = F.avg_pool2d(F.max_pool2d(image, 3, 1, 1), 3, 1, 1)
    made = F.conv2d(pooled + image, cell.heads[:, :3, :3].unsqueeze(1), padding="same")
    return F.interpolate(made, scale_factor=2)[..., ::2, ::2].mean((1, 2))


def _filtered(cell: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    signal = F.conv1d(x.unsqueeze(1), cell.wide.flatten()[:3].view(1, 1, -1), padding="same")
    turned = F.conv_transpose1d(y.unsqueeze(1), cell.tall.flatten()[:2].view(1, 1, -1))
    return (signal + turned[..., :-1]).squeeze(1)


def _pooled(x: Tensor, y: Tensor) -> Tensor:
    return (F.max_pool1d(x.unsqueeze(1), 3, 1, 1) + F.avg_pool1d(y.unsqueeze(1), 3, 1, 1)).squeeze(1)


def _losses(x: Tensor, y: Tensor) -> Tensor:
    per_unit = F.smooth_l1_loss(x, y, reduction="none") + F.huber_loss(y, x, reduction="none", delta=0.5)
    per_row = F.cross_entropy(x, y.argmax(-1), reduction="none") + F.kl_div(x, y.softmax(-1), reduction="none").sum(-1)
    return per_unit + (per_row / 4).unsqueeze(-1)


def _special(x: Tensor, y: Tensor) -> Tensor:
    return torch.lgamma(1.5 + x.abs()) + torch.erfinv(0.9 * torch.tanh(y)) + torch.xlogy(y, 1 + x * x)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "weighted": lambda cell, x, y: F.linear(x, cell.shared) + y,
    "weighted with bias": lambda cell, x, y: F.linear(x, cell.weight, cell.bias) * y,
    "weighted turned": lambda cell, x, y: x @ cell.shared - y,
    "scaled": lambda cell, x, y: cell.bias * x + y,
    "gated": lambda cell, x, y: torch.sigmoid(cell.gate) * x + (1 - torch.sigmoid(cell.gate)) * y,
    "add": lambda cell, x, y: x + y,
    "sub": lambda cell, x, y: 0.5 - x - y,
    "mul": lambda cell, x, y: x * y,
    "div": lambda cell, x, y: x / (1 + y.abs()),
    "lerp": lambda cell, x, y: torch.lerp(x, y, 0.3),
    "maximum": lambda cell, x, y: torch.maximum(x, y),
    "minimum": lambda cell, x, y: torch.minimum(x, y),
    "where": lambda cell, x, y: torch.where(x > y, x, 0.5 * y),
    "where not": lambda cell, x, y: torch.where(~(x > 0.1) & (y < 0.2), y, x),
    "masked": lambda cell, x, y: x.masked_fill(y <= 0, 0.25),
    "step": lambda cell, x, y: (x >= y).to(x.dtype) * x,
    "tanh": lambda cell, x, y: torch.tanh(x + y),
    "sigmoid": lambda cell, x, y: torch.sigmoid(x),
    "relu": lambda cell, x, y: torch.relu(x),
    "exp": lambda cell, x, y: torch.exp(-x * x),
    "softplus": lambda cell, x, y: F.softplus(x),
    "silu": lambda cell, x, y: F.silu(x),
    "gelu": lambda cell, x, y: F.gelu(x),
    "elu": lambda cell, x, y: F.elu(x),
    "leaky": lambda cell, x, y: F.leaky_relu(x, 0.1),
    "log1p": lambda cell, x, y: torch.log1p(x.abs()),
    "sqrt": lambda cell, x, y: torch.sqrt(1 + x * x),
    "rsqrt": lambda cell, x, y: torch.rsqrt(1 + x**2) * y,
    "sin": lambda cell, x, y: torch.sin(x) + torch.cos(y),
    "erf": lambda cell, x, y: torch.erf(x),
    "clamp": lambda cell, x, y: x.clamp(-0.3, 0.4),
    "cube": lambda cell, x, y: x**3,
    "softmax": lambda cell, x, y: x.softmax(-1),
    "log softmax": lambda cell, x, y: x.log_softmax(-1) / 4,
    "layer norm": lambda cell, x, y: F.layer_norm(x + y, x.shape[1:], cell.bias, cell.gate, eps=0.1),
    "mean": lambda cell, x, y: x - y.mean(-1, keepdim=True),
    "sum": lambda cell, x, y: x * y.sum(-1, keepdim=True) / x.shape[1],
    "sum without dim": lambda cell, x, y: x + (x * y).sum(-1).unsqueeze(-1) / x.shape[1],
    "amax": lambda cell, x, y: x - y.amax(-1, keepdim=True),
    "amin": lambda cell, x, y: x + y.amin(-1, keepdim=True),
    "var": lambda cell, x, y: x * y.var(-1, unbiased=False, keepdim=True),
    "norm": lambda cell, x, y: x / (1 + y.norm(dim=-1, keepdim=True)),
    "roll": lambda cell, x, y: _roll(x) + y,
    "swap": lambda cell, x, y: _swapped(x),
    "heads": lambda cell, x, y: _in_heads(x, y),
    "outer": lambda cell, x, y: _outer(x, y),
    "stack": lambda cell, x, y: torch.stack([x, y, x * y], 1).mean(1),
    "join": lambda cell, x, y: torch.cat([x, y], -1)[:, ::2],
    "pad": lambda cell, x, y: F.pad(x[:, 1:], (1, 0)) + y,
    "select": lambda cell, x, y: x[:, :1] * y,
    "select last": lambda cell, x, y: x[:, -1].unsqueeze(1).expand_as(y) - y,
    "detach": lambda cell, x, y: x.detach() * y,
    "in place": lambda cell, x, y: (x * y).add_(x).mul_(0.5),
    "part written": lambda cell, x, y: _with_part_written(x, y),
    "written unseen": lambda cell, x, y: _written_unseen(x, y),
    "zeros": lambda cell, x, y: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], -1) + y,
    "product": lambda cell, x, y: F.linear(torch.cat([x, y], -1), cell.wide),
    "gates": lambda cell, x, y: torch.prod(
        torch.stack(F.linear(x, cell.tall, cell.tall[:, 0]).sigmoid().chunk(2, -1)), 0
    ),
    "mish": lambda cell, x, y: F.mish(x) + F.hardtanh(y, -0.5, 0.5),
    "hard": lambda cell, x, y: F.hardsigmoid(x) * F.softshrink(y, 0.1) + F.hardshrink(x, 0.2),
    "prelu": lambda cell, x, y: F.prelu(x, cell.gate) + F.prelu(y, cell.gate[:1]),
    "glu": lambda cell, x, y: F.glu(torch.cat([x, y], -1), -1),
    "logsumexp": lambda cell, x, y: x - y.logsumexp(-1, keepdim=True) / 4,
    "arcs": lambda cell, x, y: torch.atan(x) + torch.asinh(y) + torch.sinh(0.3 * torch.tanh(x)),
    "atan2": lambda cell, x, y: torch.atan2(x, 1 + y.abs()) + torch.hypot(y, 1 + x) / 4,
    "logarithms": lambda cell, x, y: torch.log2(1 + x.abs()) - torch.log10(2 + y * y) + torch.exp2(-x * x),
    "bools": lambda cell, x, y: torch.where((x > 0) ^ x.isfinite() | y.isnan(), x, y) * ((x > 0) + (y > 0)),
    "count": lambda cell, x, y: x * (y > 0).sum(-1, keepdim=True) / x.shape[1] + y * (x > 0).any(-1, keepdim=True),
    "cumsum": lambda cell, x, y: x.cumsum(-1) / x.shape[1] + y,
    "flip": lambda cell, x, y: x.flip(-1) + y,
    "rolled back": lambda cell, x, y: x.roll(1, -1) - y.roll(-2, -1),
    "repeat": lambda cell, x, y: x[:, :1].repeat(1, x.shape[1]) * y.repeat(1, 2)[:, 1 : 1 + x.shape[1]],
    "every second": lambda cell, x, y: torch.cat([x[:, ::2], y[:, 1::2]], -1),
    "gathered": lambda cell, x, y: x.gather(1, torch.arange(x.shape[1]).flip(0).expand(len(x), -1)) + y,
    "scattered": lambda cell, x, y: y.scatter_add(1, (torch.arange(x.shape[1]) // 2).expand(len(x), -1), x) / 2,
    "permuted": lambda cell, x, y: x[:, torch.arange(x.shape[1]) * 2 % x.shape[1]] - y,
    "written": lambda cell, x, y: y.index_add(1, torch.arange(x.shape[1]) // 3, x) / 3,
    "first": lambda cell, x, y: y.index_copy(1, torch.arange(1), x[:, -1:]).index_fill(1, torch.arange(1) - 1, 0.1),
    "ordered": lambda cell, x, y: x.sort(-1)[0] - y.sort(-1, descending=True)[0],
    "largest": lambda cell, x, y: x.topk((x.shape[1] + 1) // 2, -1)[0].sum(-1, keepdim=True) * y / x.shape[1],
    "running": lambda cell, x, y: x.cummax(-1)[0] + y.tanh().cumprod(-1) + (x.tanh() + y.tanh()).logcumsumexp(-1) / 4,
    # Of an expanded tensor torch's median is whatever stands behind its memory.
    "middle": lambda cell, x, y: x - y.contiguous().median(-1, keepdim=True)[0] + x.max(-1, keepdim=True)[0],
    "counted": lambda cell, x, y: x * (torch.count_nonzero(y > 0, -1).unsqueeze(-1) // 2 % 3).to(x.dtype) + y,
    "pad both": lambda cell, x, y: F.pad(x[:, 1:], (0, 1), value=0.5) + F.pad(y, (1, -1)),
    "unbound": lambda cell, x, y: torch.stack(torch.cat([x, y], -1).unbind(-1)[::2], -1),
    "rows stacked": lambda cell, x, y: torch.stack([x, y]).prod(0),
    "diagonal": lambda cell, x, y: _matrix(x, y).diagonal(dim1=1, dim2=2) * x.shape[1],
    "matrix read": lambda cell, x, y: (_matrix(x, y) @ x.unsqueeze(-1)).squeeze(-1),
    "matrix written": lambda cell, x, y: (
        torch.bmm(_matrix(x, y), _matrix(y, x)).mean(2) + torch.einsum("bi,bj->bi", x, y) / 9
    ),
    "every row of a row": lambda cell, x, y: F.linear(torch.stack([x, y], 1), cell.weight, cell.bias).prod(1),
    "weights of heads": lambda cell, x, y: torch.einsum("bhd,hde->bhe", torch.stack([x, y], 1), cell.heads).sum(1),
    "attended": _attended,
    "attended by torch": lambda cell, x, y: F.scaled_dot_product_attention(
        *torch.stack([x, y, x * y, 0.5 - x, y, x], 1).view(len(x), 3, 1, 2, -1).unbind(1)
    ).mean((1, 2)),
    "batch norm in eval": lambda cell, x, y: F.batch_norm(
        x + y, cell.bias.detach(), cell.gate.detach().square() + 0.5, cell.gate, cell.bias
    ),
    "row by vector": lambda cell, x, y: (x @ cell.gate).unsqueeze(-1) * y,
    "turned": lambda cell, x, y: (torch.complex(x, y) * torch.exp(1j * cell.gate)).real + torch.polar(x.abs(), y).imag,
    "complex": lambda cell, x, y: (
        torch.tanh(torch.complex(x, y) @ torch.complex(cell.shared, cell.weight)) / torch.complex(2 + x * x, y)
    ).abs(),
    "convolved": lambda cell, x, y: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(cell.bias).conj(), n=x.shape[1]),
    "root": lambda cell, x, y: torch.sqrt(torch.complex(1 + x * x, y)).imag,
    "heads of weights": lambda cell, x, y: torch.tanh(F.linear(y, cell.tall).view(len(x), 2, -1)).sum(1) * x,
}

CHANCE: dict[str, Callable[..., Tensor]] = {
    "dropout": lambda cell, x, y: F.dropout(x, 0.3) + y,
    "dropout of channels": lambda cell, x, y: F.dropout1d(torch.stack([x, y], 1), 0.4).sum(1),
    "noise": lambda cell, x, y: x + 0.1 * torch.randn_like(y),
    "noise for all rows": lambda cell, x, y: x + 0.1 * torch.randn(x.shape[1], dtype=x.dtype) * y,
    "zoneout": lambda cell, x, y: torch.where(torch.rand_like(x) < 0.2, x, y),
    "bernoulli": lambda cell, x, y: torch.bernoulli(torch.sigmoid(x)) * y,
    "exponential": lambda cell, x, y: x - torch.empty_like(y).exponential_(2).log1p() * y,
    "gumbel": lambda cell, x, y: F.gumbel_softmax(x, hard=True) + y,
    "reparametrised": lambda cell, x, y: D.Normal(x, 0.1 + F.softplus(y)).rsample(),
    "class drawn": lambda cell, x, y: _sampled_class(x, y),
    "attended by chance": lambda cell, x, y: F.scaled_dot_product_attention(
        *torch.stack([x, y, x * y], 1).unsqueeze(1).chunk(3, 2), dropout_p=0.3
    ).mean((1, 2)),
}
"""Random numbers: the loop's own, whichever engine runs the step."""

WRITES: dict[str, Callable[..., Tensor]] = {
    "rows reset": lambda cell, x, y: _rows_reset(x, y),
    "where written": lambda cell, x, y: _where_written(x, y),
    "window": lambda cell, x, y: _window(x, y),
}

CHECKS: dict[str, Callable[..., Tensor]] = {
    "checked": lambda cell, x, y: _checked(x, y),
    "validated": lambda cell, x, y: _validated(x, y),
    "classes": lambda cell, x, y: _classes(x, y),
    "straight through": lambda cell, x, y: _straight_through(x, y),
    "rounded": lambda cell, x, y: _Rounded.apply(x) * y,
    "alike": lambda cell, x, y: F.cosine_similarity(x, y, -1, 0.1).unsqueeze(-1) * y,
}
"""What looks at numbers, or turns gradients off, inside of a step."""

SIGNALS: dict[str, Callable[..., Tensor]] = {
    "filtered": _filtered,
    "images": _images,
    "pooled": lambda cell, x, y: _pooled(x, y),
    "losses": lambda cell, x, y: _losses(x, y),
    "special": lambda cell, x, y: _special(x, y),
    "quantized": lambda cell, x, y: _quantized(x, y),
    "in order of": lambda cell, x, y: x.gather(1, y.argsort(-1)) + y.sort(-1)[0],
    "diagonal made": lambda cell, x, y: (torch.diag_embed(x) @ y.unsqueeze(-1)).squeeze(-1),
}

OPERATIONS |= CHANCE | WRITES | CHECKS | SIGNALS
