"""Functions of complex numbers by real ones, with torch's branch cuts, and no overflow before the result has one.

A derivative is autograd's of the formula. Where that would be `0 / 0` though torch's own is not, the formula is of
another number there, and its result is replaced.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from unrolled.operations.pairs import Operand, Pair, add, mul, on_pairs, parts, reciprocal, square


def _zero(x: Pair) -> Tensor:
    a, b = x.parts
    return (a == 0) & (b == 0)


def _unless(zero: Tensor, x: Pair) -> Pair:
    """A number, and one where it is zero."""
    return Pair(torch.where(zero, 1, x.real), x.imag)


def _sign(x: Tensor) -> Tensor:
    """1 or -1, zero having a sign too."""
    return 1 - 2 * torch.signbit(x).to(x.dtype)


def _size(x: Pair) -> Tensor:
    return torch.hypot(*x.parts)


@on_pairs("abs")
def absolute(x: Pair) -> Tensor:
    """`|x|`, whose derivative at zero is zero."""
    zero = _zero(x)
    return torch.where(zero, 0, _size(_unless(zero, x)))


@on_pairs("angle")
def angle(x: Pair) -> Tensor:
    """The angle in (-pi, pi], whose derivative at zero is zero."""
    a, b = x.parts
    zero = _zero(x)
    return torch.where(zero, torch.atan2(b.detach(), a.detach()), torch.atan2(b, torch.where(zero, 1, a)))


@on_pairs("sgn")
def _sgn(x: Pair) -> Pair:
    zero = _zero(x)
    size, (a, b) = _size(_unless(zero, x)), x.parts
    return Pair(torch.where(zero, 0, a / size), torch.where(zero, 0, b / size))


@on_pairs("exp")
def exp(x: Operand) -> Pair:
    """`e^x`."""
    a, b = parts(x)
    size = torch.exp(a)
    b = torch.where(a == -math.inf, 0, b)
    sine = torch.sin(b)
    # Infinity has an angle too: that of a number without an imaginary part is none.
    return Pair(size * torch.cos(b), torch.where((sine == 0) & size.isinf(), sine, size * sine))


@on_pairs("exp2")
def _exp2(x: Pair) -> Pair:
    return exp(mul(x, math.log(2)))


@on_pairs("expm1")
def _expm1(x: Pair) -> Pair:
    a, b = x.parts
    sine = torch.sin(b / 2)
    return Pair(torch.expm1(a) * torch.cos(b) - 2 * sine * sine, torch.exp(a) * torch.sin(b))


@on_pairs("log")
def log(x: Pair) -> Pair:
    """The logarithm, with the branch cut along the negative real numbers."""
    a, b = x.parts
    return Pair(torch.log(_size(x)), torch.atan2(b, a))


@on_pairs("log2")
def _log2(x: Pair) -> Pair:
    return mul(log(x), 1 / math.log(2))


@on_pairs("log10")
def _log10(x: Pair) -> Pair:
    return mul(log(x), 1 / math.log(10))


@on_pairs("sqrt")
def sqrt(x: Pair) -> Pair:
    """The root with a real part that is not negative: half of the angle, above the cut and below."""
    a, b = x.parts
    zero = _zero(x)
    sign_a, sign_b = _sign(a), _sign(b)
    large = torch.sqrt((torch.where(zero, 1, a * sign_a) + _size(_unless(zero, x))) / 2)
    small = torch.where(b.isinf(), math.inf, b * sign_b / (2 * large))
    large = torch.where(zero, 0, torch.where(b.isinf(), math.inf, large))
    right = sign_a > 0
    return Pair(torch.where(right, large, small), torch.where(right, small, large) * sign_b)


@on_pairs("rsqrt")
def _rsqrt(x: Pair) -> Pair:
    return reciprocal(sqrt(x))


@on_pairs("pow")
def _pow(x: Operand, exponent: Operand) -> Pair:
    """`e^(exponent log x)`; small whole numbers by products."""
    if not isinstance(x, Pair | Tensor):
        return exp(mul(exponent, _log_of_number(x)))
    base = x if isinstance(x, Pair) else Pair(x, None)
    whole = _whole(exponent)
    if whole is not None:
        return _power(base, whole)
    if isinstance(exponent, int | float) and abs(exponent) == 0.5:
        return sqrt(base) if exponent > 0 else _rsqrt(base)
    zero = _zero(base)
    real, imag = exp(mul(exponent, log(_unless(zero, base)))).parts
    return Pair(torch.where(zero, _power_of_zero(exponent), real), torch.where(zero, 0, imag))


def _log_of_number(x: complex) -> complex:
    number = complex(x)
    return complex(math.log(abs(number)) if number else -math.inf, math.atan2(number.imag, number.real))


def _whole(exponent: Any) -> int | None:
    """A small whole exponent."""
    if not isinstance(exponent, int | float) or not -8 <= exponent <= 8 or exponent != int(exponent):
        return None
    return int(exponent)


def _power(x: Pair, exponent: int) -> Pair:
    if exponent < 0:
        return reciprocal(_power(x, -exponent))
    if exponent == 0:
        return Pair(torch.ones_like(x.real), None)
    half = _power(x, exponent // 2) if exponent > 1 else None
    even = square(half) if half is not None else None
    if even is None:
        return x
    return mul(even, x) if exponent % 2 else even


def _power_of_zero(exponent: Operand) -> Any:
    """Zero for an exponent with a positive real part, else NaN."""
    a, _ = parts(exponent)
    return torch.where(a > 0, torch.zeros_like(a), math.nan) if isinstance(a, Tensor) else 0.0 if a > 0 else math.nan


@on_pairs("sin")
def sin(x: Pair) -> Pair:
    """The sine."""
    a, b = x.parts
    return Pair(torch.sin(a) * torch.cosh(b), torch.cos(a) * torch.sinh(b))


@on_pairs("cos")
def cos(x: Pair) -> Pair:
    """The cosine."""
    a, b = x.parts
    return Pair(torch.cos(a) * torch.cosh(b), -torch.sin(a) * torch.sinh(b))


@on_pairs("sinh")
def _sinh(x: Pair) -> Pair:
    a, b = x.parts
    return Pair(torch.sinh(a) * torch.cos(b), torch.cosh(a) * torch.sin(b))


@on_pairs("cosh")
def _cosh(x: Pair) -> Pair:
    a, b = x.parts
    return Pair(torch.cosh(a) * torch.cos(b), torch.sinh(a) * torch.sin(b))


@on_pairs("tanh")
def tanh(x: Pair) -> Pair:
    """`(sinh 2a + i sin 2b) / (cosh 2a + cos 2b)`, both multiplied by `2 e^(-2|a|)`, which never overflows."""
    a, b = x.parts
    sign = _sign(a)
    e, less = torch.exp(-2 * sign * a), torch.expm1(-2 * sign * a)
    b = torch.where(a.isinf(), 0, b)
    sine, cosine = torch.sin(b), torch.cos(b)
    below = less * less + 4 * e * cosine * cosine
    return Pair(-sign * torch.expm1(-4 * sign * a) / below, 4 * e * sine * cosine / below)


@on_pairs("tan")
def _tan(x: Pair) -> Pair:
    a, b = x.parts
    real, imag = tanh(Pair(-b, a)).parts
    return Pair(imag, -real)


@on_pairs("sigmoid")
def sigmoid(x: Pair) -> Pair:
    """`1 / (1 + e^-x)`, as torch computes it."""
    a, b = x.parts
    return reciprocal(add(exp(Pair(-a, -b)), 1))


@on_pairs("linalg_vector_norm")
def _norm(x: Pair, *args: Any, **kwargs: Any) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(absolute(x), *args, **kwargs)
    return norm


@on_pairs("prod")
def _prod(x: Pair, dim: int, keepdim: bool = False) -> Pair:
    """The factors one after the other."""
    first, *others = [Pair(*both) for both in zip(*(part.unbind(dim) for part in x.parts), strict=True)]
    for factor in others:
        first = mul(first, factor)
    return Pair(*(part.unsqueeze(dim) for part in first.parts)) if keepdim else first
