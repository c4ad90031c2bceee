"""Fourier transforms of complex numbers by real ones: products with the matrix of sines and cosines.

That takes n^2 operations where the fast transform takes n log n; at the sizes of a state it is the faster one, as a
product that stands in the loop. A longer transform has no formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unrolled.operations.pairs import Pair, on_pairs
from unrolled.recording.events import UnrecordableError

LONGEST = 256
"""The longest transform that is done by a product."""

_FACTORS: dict[int, Callable[[int], float]] = {0: lambda n: 1.0, 1: lambda n: n**-0.5, 2: lambda n: 1.0 / n}
"""By torch's number of a normalisation what each dimension of n entries is multiplied by."""


@on_pairs("_fft_c2c")
def _c2c(x: Pair, dims: Sequence[int], normalisation: int, forward: bool) -> Pair:
    for dim in dims:
        x = _transformed(x, dim, normalisation, forward)
    return x


@on_pairs("_fft_r2c")
def _r2c(x: Tensor, dims: Sequence[int], normalisation: int, onesided: bool) -> Pair:
    *others, last = dims
    kept = x.shape[last] // 2 + 1 if onesided else None
    return _c2c(_transformed(Pair(x, None), last, normalisation, True, kept), others, normalisation, True)


@on_pairs("_fft_c2r")
def _c2r(x: Pair, dims: Sequence[int], normalisation: int, size: int) -> Tensor:
    *others, last = dims
    x = _c2c(x, others, normalisation, False)
    real, imag = (part.movedim(last, -1) for part in x.parts)
    cosine, sine = _matrix(real.shape[-1], size, size, real)
    # What is not there is the conjugate of what is: it counts twice, but for the ends.
    number = torch.arange(real.shape[-1], device=real.device).unsqueeze(1)
    twice = (2 - ((number == 0) | (2 * number == size)).to(torch.float64)) * _FACTORS[normalisation](size)
    cosine, sine = ((matrix * twice).to(real.dtype) for matrix in (cosine, sine))
    return (real @ cosine - imag @ sine).movedim(-1, last)


def _transformed(x: Pair, dim: int, normalisation: int, forward: bool, kept: int | None = None) -> Pair:
    """The transform along one dimension, of which so many entries are kept."""
    size = x.real.shape[dim]
    factor = _FACTORS[normalisation](size)
    cosine, sine = ((matrix * factor).to(x.real.dtype) for matrix in _matrix(size, kept or size, size, x.real))
    a = x.real.movedim(dim, -1)
    real, imag = a @ cosine, a @ sine
    if x.imag is not None:
        b = x.imag.movedim(dim, -1)
        real, imag = (real + b @ sine, b @ cosine - imag) if forward else (real - b @ sine, imag + b @ cosine)
    elif forward:
        imag = -imag
    return Pair(real.movedim(-1, dim), imag.movedim(-1, dim))


def _matrix(rows: int, columns: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """`cos(2 pi j k / n)` and the sine, in double precision; angles below one turn are exact enough for any n."""
    if size > LONGEST:
        raise UnrecordableError(f"it transforms {size} numbers by FFT; up to {LONGEST} are done by a product")
    j, k = (torch.arange(n, device=like.device) for n in (rows, columns))
    angle = (j.unsqueeze(1) * k).remainder(size).to(torch.float64) * (2 * math.pi / size)
    return torch.cos(angle), torch.sin(angle)
