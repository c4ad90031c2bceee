"""Draws: what a step draws at random, written down so that it depends on as little of the step as possible.

Where torch draws from a distribution that values say, by drawing from a fixed one and computing with that, so does the
recording: then only the arithmetic depends on the values, and the draws can be made before any of them is known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from unrolled.internals import broadcast_shape

_ATEN = torch.ops.aten


def fills(func: Any) -> bool:
    """Whether an operation that draws reads of its first argument only what the result is to look like."""
    if func is _ATEN.rrelu_with_noise_.default:
        return False
    return func._schema.name.endswith(("_", "_like")) or func in (_ATEN.bernoulli.p, _ATEN.native_dropout.default)


def _zero_of(*values: Any) -> Tensor | float:
    """Zero, with the gradient that torch gives to what says a distribution: zeros."""
    total: Tensor | float = 0.0
    for value in values:
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            total = torch.where(torch.zeros_like(value, dtype=torch.bool), value, 0.0) + total
    return total


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


# Called as operations: torch's functions of Python's side would be seen to do more.
_blank, _blank_like = _ATEN.empty.memory_format, _ATEN.empty_strided.default


def _chosen(p: Tensor, like: Tensor, generator: Any) -> Tensor:
    """Where a number from 0 to 1 is below a probability; torch draws it in double precision for such, else single."""
    dtype = torch.float64 if p.dtype is torch.float64 else torch.float32
    noise = _blank_like(like.shape, like.stride(), dtype=dtype, device=like.device)
    return cast(Tensor, noise.uniform_(0, 1, generator=generator) < p)


def _bernoulli(p: Tensor, *, generator: Any = None) -> Tensor:
    like = _blank(p.shape, dtype=p.dtype, device=p.device)
    return _with_zero(_chosen(p, like, generator).to(p.dtype), p)


def _bernoulli_into(result: Tensor, p: Tensor, *, generator: Any = None) -> Tensor:
    return _with_zero(_chosen(p, result, generator).to(result.dtype), p)


def _normal(mean: Any, std: Any = 1.0, *, generator: Any = None) -> Tensor:
    """As torch does it: of one scale all numbers are drawn with it, of many each is scaled after it is drawn."""
    tensors = [x for x in (mean, std) if isinstance(x, Tensor)]
    shape = broadcast_shape(*(x.shape for x in tensors))
    noise = _blank(shape, dtype=tensors[0].dtype, device=tensors[0].device)
    if isinstance(std, Tensor):
        noise = noise.normal_(0, 1, generator=generator) * _detached(std)
    else:
        noise = noise.normal_(0, std, generator=generator)
    return _with_zero(noise + _detached(mean), mean, std)


def _with_zero(result: Tensor, *values: Any) -> Tensor:
    zero = _zero_of(*values)
    return result + zero if isinstance(zero, Tensor) else result


def _multinomial(p: Tensor, many: int, replacement: bool = False, *, generator: Any = None) -> Tensor:
    """The first to come of waiting times with these rates."""
    noise = _blank_like(p.shape, p.stride(), dtype=p.dtype, device=p.device)
    waiting = p.detach() / noise.exponential_(1, generator=generator)
    return waiting.argmax(-1, keepdim=True) if many == 1 else waiting.topk(many, -1)[1]


def _native_dropout(x: Tensor, p: float, train: Any) -> tuple[Tensor, Tensor]:
    mask = _ATEN.native_dropout.default(_blank_like(x.shape, x.stride(), dtype=x.dtype, device=x.device), p, train)[1]
    return x * mask * (0.0 if p == 1 else 1 / (1 - p)), mask


_FORMULAS: dict[Any, Callable[..., Any]] = {
    _ATEN.bernoulli.default: _bernoulli,
    _ATEN.bernoulli_.Tensor: _bernoulli_into,
    _ATEN.normal.Tensor_float: _normal,
    _ATEN.normal.Tensor_Tensor: _normal,
    _ATEN.normal.float_Tensor: _normal,
    _ATEN.multinomial.default: _multinomial,
    _ATEN.native_dropout.default: _native_dropout,
}


def formula(func: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """What draws the very numbers of an operation from a distribution that no value says; None if nothing does."""
    if func is _ATEN.multinomial.default and args[1] > 1 and len(args) > 2 and args[2]:
        return None  # many draws with replacement search through a sum
    return _FORMULAS.get(func)
