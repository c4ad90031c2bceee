"""The first bad number: which copy, which row and which operation of the cell made a NaN or an infinity, and of what.

A run that went wrong is run again by the reference, copy by copy; the copy that is the first to give out what is not
finite is run once more, with an eye on every operation.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unrolled.cells.adapted import parameter_names
from unrolled.cells.contract import name_of
from unrolled.errors import NonFiniteError
from unrolled.internals import DispatchMode
from unrolled.introspection.copies import Copies, Copy
from unrolled.introspection.layered import LayeredCopies
from unrolled.trees import Tree, leaves

_ATEN = torch.ops.aten
_SUMMED_AS = {torch.float16: torch.float32}
"""The sum of many float16 is beyond its range where they are not."""

_FILLS = frozenset([_ATEN.full, _ATEN.fill, _ATEN.fill_, _ATEN.masked_fill, _ATEN.masked_fill_, _ATEN.full_like])
"""What writes infinities on purpose: a mask before a softmax."""

_PRODUCTS = frozenset([_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN.mv, _ATEN.dot, _ATEN.linear])
"""What makes every entry of whole rows and columns."""


def is_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers of some tensors are finite: by one sum over each, and a closer look only if that is not."""
    floating = [x.detach() for x in tensors if x.is_floating_point() or x.is_complex()]
    if not floating:
        return True
    total = functools.reduce(operator.add, [x.sum(dtype=_SUMMED_AS.get(x.dtype)) for x in floating]).item()
    return math.isfinite(abs(total)) or all(bool(x.isfinite().all()) for x in floating)


class _Bad(NamedTuple):
    """An operation that made what is not finite.

    Attributes:
        operation: its name.
        at: where in its result.
        value: what it made there.
        given: what it was given, in words.
        rows: how many entries its result's first dimension has.
    """

    operation: str
    at: tuple[int, ...]
    value: float
    given: tuple[str, ...]
    rows: int


class _FirstBad(DispatchMode):
    """Notes the first operation that makes something that is not finite of what is."""

    def __init__(self) -> None:
        super().__init__()
        self.found: _Bad | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [] if self.found else [x for x in _flat(args) if isinstance(x, Tensor)]
        before = [x.detach().clone() if func._schema.is_mutable else x for x in tensors]
        result = func(*args, **(kwargs or {}))
        if self.found is None and func.overloadpacket not in _FILLS:
            for made in _flat((result,)):
                if isinstance(made, Tensor) and _is_bad(made) and not any(map(_is_bad, before)):
                    self.found = _seen(func, made, args, before)
                    break
        return result


def _flat(tree: Any) -> Iterator[Any]:
    for item in tree:
        if isinstance(item, tuple | list):
            yield from _flat(item)
        else:
            yield item


def _is_bad(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and not bool(tensor.isfinite().all())


def _seen(func: Any, made: Tensor, args: tuple[Any, ...], before: Sequence[Tensor]) -> _Bad:
    index = tuple((~made.isfinite()).nonzero()[0].tolist())
    numbers, name = iter(before), str(func).removesuffix(".default")
    whole = func.overloadpacket in _PRODUCTS
    given = [_entry(next(numbers), made, index, whole) if isinstance(x, Tensor) else repr(x) for x in _flat(args)]
    return _Bad(name, index, made[index].item(), tuple(given), made.shape[0] if made.dim() else 0)


def _entry(tensor: Tensor, made: Tensor, index: tuple[int, ...], whole: bool) -> str:
    """What one argument had where the result is bad; where that is of the whole of it, its range."""
    try:
        if not whole and tensor.dim() <= made.dim() and torch.broadcast_shapes(tensor.shape, made.shape) == made.shape:
            return f"{tensor.expand(made.shape)[index].item():.6g}"
    except RuntimeError:  # shapes of another kind of operation
        pass
    shape = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    return f"{shape} from {tensor.min().item():.6g} to {tensor.max().item():.6g}" if tensor.numel() else shape


def first_bad_value(run: Copies | LayeredCopies) -> NonFiniteError | None:
    """What made the first bad output or state of a run; None if all are finite.

    Args:
        run: copies of the run that went wrong.
    """
    for place, copies in run.named_networks():
        broken = _broken_weight(place, copies)
        if broken is not None:
            return broken
        for copy in copies.in_order:
            for what, tree in (("input", copy.input), ("state", copy.state)):
                if not is_finite(leaves(tree)):
                    return _received(place, copies, copy, what, tree)
            if not is_finite(leaves((copy.output, copy.next_state))):
                return _made_by(place, copies, copy)
    return None


def _broken_weight(place: str, copies: Copies) -> NonFiniteError | None:
    weights = dict(copies.cell.named_parameters())
    for name, path in parameter_names(copies.cell).items():
        weight = weights[path].detach()
        if not is_finite([weight]):
            value = weight[~weight.isfinite()][0].item()
            return NonFiniteError(
                f"parameter {name} of {_named(place, copies)} holds {value} already before "
                "the first copy: an update of the weights made it; clip the gradients, or lower the learning rate",
                operation="parameter",
                layer=place,
            )
    return None


def _received(place: str, copies: Copies, copy: Copy, what: str, tree: Tree) -> NonFiniteError:
    bad = next(x.detach() for x in leaves(tree) if _is_bad(x))
    index = (~bad.isfinite()).nonzero()[0].tolist()
    row = int(copy.rows[index[0]]) if bad.dim() and len(bad) == len(copy.rows) else 0
    value = bad[tuple(index)].item()
    return NonFiniteError(
        f"the {what} of copy {copy.t} of {_named(place, copies)} holds {value} in row {row} before the cell is run; "
        "look at the data, or at what is computed ahead of the network",
        t=copy.t,
        row=row,
        operation=what,
        values=(str(value),),
        layer=place,
    )


def _made_by(place: str, copies: Copies, copy: Copy) -> NonFiniteError:
    with torch.no_grad(), torch.random.fork_rng(), _FirstBad() as watch:
        copies.cell(*copies.arguments(copy))
    bad = next(x.detach() for x in leaves((copy.output, copy.next_state)) if _is_bad(x))
    return _told(place, copies, copy, watch.found, bad, "gave")


def first_bad_gradient(run: Copies | LayeredCopies) -> NonFiniteError | None:
    """What made the first bad gradient on the way back through a run; None if all are finite.

    Args:
        run: copies after a backward pass, from the same gradients by outputs and state that went wrong.
    """
    for place, copies in reversed(run.named_networks()):
        for copy in reversed(copies.in_order):
            came = _gradients(copy.taps.output.grads, copy.taps.next_state.grads)
            if not is_finite(came):
                bad = next(filter(_is_bad, came))
                return _told(place, copies, copy, None, bad, "received, on the way back,")
            if not is_finite(_gradients(copy.taps.input.grads, copy.taps.state.grads)) or _share_is_bad(copy):
                return _made_on_the_way_back(place, copies, copy)
    return None


def _gradients(*grads: Sequence[Tensor | None]) -> list[Tensor]:
    return [grad for some in grads for grad in some if grad is not None]


def _share_is_bad(copy: Copy) -> bool:
    names = list(copy.aliases)
    return bool(names) and not is_finite(list(copy.shares(names).values()))


def _made_on_the_way_back(place: str, copies: Copies, copy: Copy) -> NonFiniteError:
    taps = copy.taps
    by = [x for entered in (taps.input, taps.state, taps.weights) for x in entered.passed if x.requires_grad]
    flowed = taps.output.flowed + taps.next_state.flowed
    of, grads = zip(*flowed, strict=True)
    with _FirstBad() as watch:
        found = torch.autograd.grad(of, by, grads, retain_graph=True, allow_unused=True)
    bad = next(grad for grad in found if grad is not None and _is_bad(grad))
    return _told(place, copies, copy, watch.found, bad, "gave, on the way back,")


def _told(place: str, copies: Copies, copy: Copy, made: _Bad | None, bad: Tensor, verb: str) -> NonFiniteError:
    rows = len(copy.rows)
    index = made.at if made is not None and made.rows == rows else tuple((~bad.isfinite()).nonzero()[0].tolist())
    by_row = (made is not None and made.rows == rows) or (bad.dim() > 0 and len(bad) == rows)
    row = int(copy.rows[index[0]]) if by_row and index else None
    value = made.value if made is not None else bad[tuple((~bad.isfinite()).nonzero()[0].tolist())].item()
    where = f"copy {copy.t} of {_named(place, copies)} {verb} {value}" + ("" if row is None else f" in row {row}")
    if made is None:
        how, remedy = "what came to it was so already", "look at the loss and at what lies between it and the network"
    else:
        how = f"the first operation to make it was {made.operation}({', '.join(made.given)}) at {list(made.at)}"
        remedy = "clip the gradients, lower the learning rate, or keep that operation's arguments in its range"
    return NonFiniteError(
        f"{where}; {how}; {remedy}",
        t=copy.t,
        row=row,
        operation="" if made is None else made.operation,
        values=() if made is None else made.given,
        layer=place,
    )


def _named(place: str, copies: Copies) -> str:
    name = name_of(copies.cell)
    return f"{name} ({place})" if place else name
