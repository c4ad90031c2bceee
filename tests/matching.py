"""One comparison for all tests: same structure, shapes and dtypes, and close relative to the largest entry."""

from __future__ import annotations

import torch
from torch import Tensor

from unrolled.trees import Tree, flatten, paths

__all__ = ["BOUNDS", "assert_match"]

BOUNDS = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.complex128: 1e-10,
    torch.complex64: 1e-5,
    torch.bfloat16: 4 * 2.0**-8,  # four units in the last place of a number near 1
}
"""How far two answers may lie apart, relative to the largest entry of the right one. Integers must be equal."""


def assert_match(got: Tree, want: Tree, what: str = "", *, bound: float | None = None) -> None:
    """Fail unless two pytrees agree; name the leaf, the worst entry and by how much it is off."""
    got_leaves, got_structure = flatten(got)
    want_leaves, want_structure = flatten(want)
    assert got_structure == want_structure, f"{what}: got the structure {got_structure}, wanted {want_structure}"
    for path, a, b in zip(paths(want_structure), got_leaves, want_leaves, strict=True):
        _assert_leaf(a.detach(), b.detach(), what + path, bound)


def _assert_leaf(got: Tensor, want: Tensor, what: str, bound: float | None) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype), (
        f"{what}: got {got.dtype} {list(got.shape)}, wanted {want.dtype} {list(want.shape)}"
    )
    if not want.numel():
        return
    bound = BOUNDS.get(want.dtype, 0.0) if bound is None else bound
    wide = torch.promote_types(torch.float64, want.dtype) if want.dtype in BOUNDS else want.dtype
    off = (got.to(wide) - want.to(wide)).abs()
    largest = want.to(wide).abs().max().item()
    # `not <=` also catches NaN, which compares false with everything.
    if not off.max().item() <= bound * largest:
        worst = _index_of(int(torch.nan_to_num(off, nan=float("inf")).argmax()), want.shape)
        raise AssertionError(
            f"{what}: entry {worst} is {got[worst].item()!r}, wanted {want[worst].item()!r}; off by "
            f"{off.max().item():.3g}, allowed {bound:.3g} of the largest entry, {largest:.3g}"
        )


def _index_of(flat: int, shape: torch.Size) -> tuple[int, ...]:
    """The index of an entry in a tensor of this shape, from its place in memory order."""
    index: list[int] = []
    for size in reversed(shape):
        flat, place = divmod(flat, size)
        index.insert(0, place)
    return tuple(index)
