"""Writes through views: for each operation that shows a tensor in another way, the one that puts a write back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unrolled.recording.events import UnrecordableError
from unrolled.recording.program import Ref

_ATEN = torch.ops.aten


class ViewStep(NamedTuple):
    """An operation that made a view.

    Attributes:
        target: the operation.
        args: its arguments after the first, which is what it shows.
        result: which of its results the view is.
        many: how many it has.
    """

    target: Any
    args: tuple[Any, ...]
    result: int = 0
    many: int = 1

    def arg(self, position: int, default: Any = None) -> Any:
        """An argument by its position behind the first."""
        return self.args[position] if position < len(self.args) else default


Operation = tuple[Any, tuple[Any, ...]]
"""A target and its arguments."""


def put_back(step: ViewStep, whole: tuple[Ref, Tensor], part: tuple[Ref, Tensor]) -> Operation:
    """What a tensor becomes as a view of it is written to.

    Args:
        step: how the view was made.
        whole: the value of what it shows, and a tensor like it.
        part: the value that was written, and a tensor like it.

    Raises:
        UnrecordableError: if the view has no counterpart that does this.
    """
    name = step.target.name().removeprefix("aten::").partition(".")[0]
    if name not in _COUNTERPARTS or (name == "expand" and whole[1].numel() != part[1].numel()):
        raise UnrecordableError(
            f"it writes in place into a view that {name} makes, which has no counterpart that writes; "
            "clone the view first"
        )
    return _COUNTERPARTS[name](step, whole, part)


def _reshaped(step: ViewStep, whole: tuple[Ref, Tensor], part: tuple[Ref, Tensor]) -> Operation:
    return _ATEN.reshape.default, (part[0], tuple(whole[1].shape))


def _permuted(step: ViewStep, whole: tuple[Ref, Tensor], part: tuple[Ref, Tensor]) -> Operation:
    order = [d % whole[1].dim() for d in step.args[0]]
    return _ATEN.permute.default, (part[0], tuple(order.index(d) for d in range(len(order))))


def _the_same(step: ViewStep, whole: tuple[Ref, Tensor], part: tuple[Ref, Tensor]) -> Operation:
    return step.target, (part[0], *step.args)


def _scattered(target: Any) -> Callable[[ViewStep, tuple[Ref, Tensor], tuple[Ref, Tensor]], Operation]:
    def counterpart(step: ViewStep, whole: tuple[Ref, Tensor], part: tuple[Ref, Tensor]) -> Operation:
        return target, (whole[0], part[0], *step.args)

    return counterpart


def within(args: tuple[Any, ...], whole: Tensor) -> tuple[Any, ...]:
    """The arguments of `slice_scatter` with None for an end beyond the last entry, which torch's vmap does not take."""
    beyond = len(args) > 4 and args[4] is not None and args[4] >= whole.shape[args[2]]
    return (*args[:4], None, *args[5:]) if beyond else args


def _sliced(step: ViewStep, whole: tuple[Ref, Tensor], part: tuple[Ref, Tensor]) -> Operation:
    return _ATEN.slice_scatter.default, within((whole[0], part[0], *step.args), whole[1])


def _split(step: ViewStep, whole: tuple[Ref, Tensor], part: tuple[Ref, Tensor]) -> Operation:
    sizes, dim = step.args[0], step.arg(1, 0)
    lengths = sizes if isinstance(sizes, tuple) else (sizes,) * step.many
    start = list(accumulate(lengths, initial=0))[step.result]
    return _ATEN.slice_scatter.default, (whole[0], part[0], dim, start, start + part[1].shape[dim], 1)


def _unbound(step: ViewStep, whole: tuple[Ref, Tensor], part: tuple[Ref, Tensor]) -> Operation:
    return _ATEN.select_scatter.default, (whole[0], part[0], step.arg(0, 0), step.result)


_COUNTERPARTS: dict[str, Callable[[ViewStep, tuple[Ref, Tensor], tuple[Ref, Tensor]], Operation]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "expand"), _reshaped),
    **dict.fromkeys(("squeeze", "unsqueeze", "alias", "detach", "lift_fresh"), _reshaped),
    "permute": _permuted,
    **dict.fromkeys(("transpose", "t", "_conj", "_neg_view"), _the_same),
    "view_as_real": lambda step, whole, part: (_ATEN.view_as_complex.default, (part[0],)),
    "view_as_complex": lambda step, whole, part: (_ATEN.view_as_real.default, (part[0],)),
    "slice": _sliced,
    "select": _scattered(_ATEN.select_scatter.default),
    "diagonal": _scattered(_ATEN.diagonal_scatter.default),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split"), _split),
    "unbind": _unbound,
}
