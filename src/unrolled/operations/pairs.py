"""Complex operations by real ones: for each the formula on the real and the imaginary part.

A formula is a function under `@on_pairs(names)`, by torch's name without namespace and overload. It takes what the
operation takes, with a `Pair` for every complex tensor, and is written in plain torch operations on real tensors, so
that its derivative is autograd's: with respect to the two parts of z, which is torch's own convention for complex
gradients. What only moves entries, or is linear with real coefficients, has no formula: it acts on each part alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from unrolled.operations.operation import Linear, operation_of
from unrolled.recording.program import Op


class Pair(NamedTuple):
    """A complex tensor.

    Attributes:
        real: the real part.
        imag: the imaginary part; None where it is zero because a real tensor was made complex.
    """

    real: Tensor
    imag: Tensor | None

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """Both parts, zeros written out."""
        return self.real, torch.zeros_like(self.real) if self.imag is None else self.imag


Operand: TypeAlias = Pair | Tensor | complex
"""What arithmetic takes: a complex tensor, a real one, or a number."""

_Formula = TypeVar("_Formula", bound=Callable[..., Any])

_FORMULAS: dict[str, Callable[..., Any]] = {}

_ON_EACH_PART = frozenset(
    """mean cumsum unsafe_split chunk unbind gather index_select index embedding tril triu roll repeat diagonal unfold
    narrow movedim lift_fresh copy select_scatter slice_scatter diagonal_scatter index_put index_add rot90
    diagonal_backward unfold_backward""".split()
)


def on_pairs(names: str) -> Callable[[_Formula], _Formula]:
    """Give the operations of these names, with spaces between, a formula."""

    def decorate(formula: _Formula) -> _Formula:
        _FORMULAS.update(dict.fromkeys(names.split(), formula))
        return formula

    return decorate


def formula_of(op: Op) -> Callable[..., Any] | None:
    """The formula of an operation that reads or makes complex numbers; None if it has none."""
    if op.base in _FORMULAS:
        return _FORMULAS[op.base]
    if op.base in _ON_EACH_PART or operation_of(op).linear is Linear.JOINTLY:
        return lambda *args, **kwargs: _on_each_part(op.target, args, kwargs)
    return None


def parts(x: Operand) -> tuple[Any, Any]:
    """The real and the imaginary part of an operand: tensors, or numbers."""
    if isinstance(x, Pair):
        return x.parts
    if isinstance(x, Tensor):
        return x, torch.zeros_like(x)
    return complex(x).real, complex(x).imag


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parts of numbers of a dtype."""
    return dtype.to_real() if dtype.is_complex else dtype


def _on_each_part(target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    kwargs = {name: real_dtype(arg) if isinstance(arg, torch.dtype) else arg for name, arg in kwargs.items()}
    real, imag = (target(*_part(args, n), **_part(kwargs, n)) for n in (0, 1))
    if isinstance(real, Tensor):
        return Pair(real, imag)
    return [Pair(*both) for both in zip(real, imag, strict=True)]


def _part(tree: Any, number: int) -> Any:
    """One part of all complex tensors among some arguments. Real ones beside them are complex, but not an index."""
    if isinstance(tree, Pair) or (isinstance(tree, Tensor) and tree.is_floating_point()):
        return parts(tree)[number]
    if isinstance(tree, dict):
        return {name: _part(child, number) for name, child in tree.items()}
    return [_part(child, number) for child in tree] if isinstance(tree, list | tuple) else tree


# -- to and from real numbers


@on_pairs("complex")
def _complex(real: Tensor, imag: Tensor) -> Pair:
    return Pair(*torch.broadcast_tensors(real, imag))


@on_pairs("polar")
def _polar(size: Tensor, angle: Tensor) -> Pair:
    # Torch's derivative is that of a size that is not negative: it has the sign of the size.
    size = torch.where(size < 0, 2 * size.detach() - size, size.abs())
    return Pair(size * torch.cos(angle), size * torch.sin(angle))


@on_pairs("view_as_complex")
def _view_as_complex(x: Tensor) -> Pair:
    return Pair(x.select(-1, 0), x.select(-1, 1))


@on_pairs("view_as_real")
def _view_as_real(x: Pair) -> Tensor:
    return torch.stack(x.parts, -1)


@on_pairs("_to_copy to")
def _to_copy(x: Operand, dtype: torch.dtype | None = None, **_: Any) -> Pair | Tensor:
    wanted = None if dtype is None else real_dtype(dtype)
    if isinstance(x, Tensor):
        return Pair(x.to(wanted), None)
    assert isinstance(x, Pair)
    if dtype is not None and not dtype.is_complex:
        return x.real.to(wanted)
    return Pair(x.real.to(wanted), None if x.imag is None else x.imag.to(wanted))


@on_pairs("full")
def _full(shape: list[int], number: complex, dtype: torch.dtype, device: torch.device, **_: Any) -> Pair:
    real, imag = (torch.full(shape, part, dtype=real_dtype(dtype), device=device) for part in parts(number))
    return Pair(real, imag)


@on_pairs("scalar_tensor")
def _scalar_tensor(number: complex, dtype: torch.dtype, device: torch.device | None = None, **_: Any) -> Pair:
    return _full([], number, dtype, device or torch.device("cpu"))


# -- arithmetic


@on_pairs("conj _conj _conj_physical")
def _conj(x: Pair) -> Pair:
    return Pair(x.real, None if x.imag is None else -x.imag)


@on_pairs("resolve_conj resolve_neg positive")
def _same(x: Pair) -> Pair:
    return x


@on_pairs("_neg_view")
def _neg_view(x: Pair | Tensor) -> Pair | Tensor:
    return Pair(*(-part for part in x.parts)) if isinstance(x, Pair) else -x


@on_pairs("add")
def add(x: Operand, y: Operand, alpha: complex = 1) -> Pair:
    """`x + alpha y`."""
    (a, b), (c, d) = parts(x), parts(y if alpha == 1 else mul(y, alpha))
    return Pair(a + c, b + d)


@on_pairs("sub")
def sub(x: Operand, y: Operand, alpha: complex = 1) -> Pair:
    """`x - alpha y`."""
    (a, b), (c, d) = parts(x), parts(y if alpha == 1 else mul(y, alpha))
    return Pair(a - c, b - d)


@on_pairs("rsub")
def _rsub(x: Operand, y: Operand, alpha: complex = 1) -> Pair:
    return sub(y, x, alpha)


@on_pairs("mul")
def mul(x: Operand, y: Operand) -> Pair:
    """`x y`. A real factor is a complex one, as it is for torch: beside infinity its zero matters."""
    (a, b), (c, d) = parts(x), parts(y)
    return Pair(a * c - b * d, a * d + b * c)


@on_pairs("square")
def square(x: Pair) -> Pair:
    """`x x`."""
    return mul(x, x)


@on_pairs("div true_divide")
def div(x: Operand, y: Operand) -> Pair:
    """`x / y` by R. Smith's algorithm (CACM 5, 1962), as torch has it: nothing overflows before the result does."""
    if not isinstance(y, Pair | Tensor):
        assert isinstance(x, Pair | Tensor)
        number, like = complex(y), x.real
        return mul(x, 1 / number) if number else div(x, Pair(torch.zeros_like(like), torch.zeros_like(like)))
    (a, b), (c, d) = parts(x), parts(y)
    upright = c.abs() >= d.abs()
    large, small = torch.where(upright, c, d), torch.where(upright, d, c)
    ratio = small / torch.where(large == 0, 1, large)
    scale = 1 / (large.where(large != 0, 0) + small * ratio)
    real = torch.where(upright, a + b * ratio, a * ratio + b)
    imag = torch.where(upright, b - a * ratio, b * ratio - a)
    return Pair(real * scale, imag * scale)


@on_pairs("reciprocal")
def reciprocal(x: Pair) -> Pair:
    """`1 / x`."""
    return div(1, x)


@on_pairs("addcmul")
def _addcmul(x: Operand, y: Operand, z: Operand, value: complex = 1) -> Pair:
    return add(x, mul(y, z), value)


@on_pairs("addcdiv")
def _addcdiv(x: Operand, y: Operand, z: Operand, value: complex = 1) -> Pair:
    return add(x, div(y, z), value)


@on_pairs("lerp")
def _lerp(start: Operand, end: Operand, weight: Operand) -> Pair:
    return add(start, mul(weight, sub(end, start)))


# -- products


def _bilinear(product: Callable[[Tensor, Tensor], Tensor], x: Operand, y: Operand) -> Pair:
    """A product of two factors that are linear in each: those with zeros are left out."""
    (a, b), (c, d) = [f if isinstance(f, Pair) else Pair(f, None) for f in (x, y)]
    if b is None or d is None:
        imag = product(a, d) if d is not None else product(b, c) if b is not None else None
        return Pair(product(a, c), imag)
    return Pair(product(a, c) - product(b, d), product(a, d) + product(b, c))


@on_pairs("mm bmm mv dot")
def _product(x: Operand, y: Operand) -> Pair:
    return _bilinear(torch.matmul, x, y)


@on_pairs("vdot")
def _vdot(x: Pair, y: Pair) -> Pair:
    return _bilinear(torch.dot, _conj(x), y)


@on_pairs("addmm baddbmm addmv")
def _added_product(x: Operand, y: Operand, z: Operand, beta: complex = 1, alpha: complex = 1) -> Pair:
    product = _bilinear(torch.matmul, y, z)
    product = product if alpha == 1 else mul(product, alpha)
    if beta == 0:  # which hides even NaN
        return product
    return add(x if beta == 1 else mul(x, beta), product)


# -- choices


@on_pairs("where")
def _where(condition: Tensor, x: Operand, y: Operand) -> Pair:
    (a, b), (c, d) = parts(x), parts(y)
    return Pair(torch.where(condition, a, c), torch.where(condition, b, d))


@on_pairs("masked_fill")
def _masked_fill(x: Pair, mask: Tensor, value: Operand) -> Pair:
    return _where(mask, value, x)


@on_pairs("fill")
def _fill(x: Pair, value: Operand) -> Pair:
    return _where(torch.ones_like(x.real, dtype=torch.bool), value, x)


@on_pairs("constant_pad_nd")
def _constant_pad_nd(x: Pair, pad: list[int], value: complex = 0) -> Pair:
    real, imag = (torch.constant_pad_nd(part, pad, fill) for part, fill in zip(x.parts, parts(value), strict=True))
    return Pair(real, imag)


@on_pairs("eq")
def _eq(x: Operand, y: Operand) -> Tensor:
    (a, b), (c, d) = parts(x), parts(y)
    equal: Tensor = (a == c) & (b == d)
    return equal


@on_pairs("ne")
def _ne(x: Operand, y: Operand) -> Tensor:
    return ~_eq(x, y)


@on_pairs("isnan")
def _isnan(x: Pair) -> Tensor:
    return ~_eq(x, x)


@on_pairs("isfinite")
def _isfinite(x: Pair) -> Tensor:
    a, b = x.parts
    return a.isfinite() & b.isfinite()


@on_pairs("isinf")
def _isinf(x: Pair) -> Tensor:
    a, b = x.parts
    return a.isinf() | b.isinf()
