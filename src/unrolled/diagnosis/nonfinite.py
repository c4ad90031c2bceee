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

from unrolled.autograd_graph import differentiable
from unrolled.cells.adapted import parameter_names
from unrolled.cells.contract import name_of
from unrolled.errors import NonFiniteError
from unrolled.internals import DispatchMode
from unrolled.introspection.copies import Copies
from unrolled.introspection.layered import LayeredCopies
from unrolled.introspection.single_copy import Copy
from unrolled.trees import leaves

_ATEN = torch.ops.aten
_FILLS = frozenset([_ATEN.full, _ATEN.fill, _ATEN.fill_, _ATEN.masked_fill, _ATEN.masked_fill_, _ATEN.full_like])
"""What writes infinities on purpose: a mask before a softmax."""

_PRODUCTS = frozenset([_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN.mv, _ATEN.dot, _ATEN.linear])
"""What makes every entry of whole rows and columns."""


def is_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers of some tensors are finite: by one sum over each, and a closer look only if that is not."""
    floating = [x.detach() for x in tensors if differentiable(x)]
    if not floating:
        return True
    # The sum of many float16 is beyond its range where they are not.
    sums = [x.sum(dtype=torch.float32 if x.dtype == torch.float16 else None) for x in floating]
    return math.isfinite(abs(functools.reduce(operator.add, sums).item())) or not any(map(_is_bad, floating))


def _is_bad(tensor: Tensor) -> bool:
    return differentiable(tensor) and not bool(tensor.isfinite().all())


def _first_bad_index(tensor: Tensor) -> tuple[int, ...]:
    return tuple((~tensor.isfinite()).nonzero()[0].tolist())


class _Culprit(NamedTuple):
    """An operation that made what is not finite.

    Attributes:
        operation: its name.
        at: where in its result.
        value: what it made there.
        arguments: what it was called with, in words.
        rows: how many entries its result's first dimension has.
    """

    operation: str
    at: tuple[int, ...]
    value: float
    arguments: tuple[str, ...]
    rows: int

    @classmethod
    def of(cls, func: Any, made: Tensor, args: Sequence[Any], tensors: Sequence[Tensor]) -> _Culprit:
        """An operation, what it made, its arguments, and the tensors among them as they were before."""
        at, before = _first_bad_index(made), iter(tensors)
        words = [_entry(func, next(before), made, at) if isinstance(x, Tensor) else repr(x) for x in args]
        name, rows = str(func).removesuffix(".default"), made.shape[0] if made.dim() else 0
        return cls(name, at, made[at].item(), tuple(words), rows)


def _entry(func: Any, tensor: Tensor, made: Tensor, at: tuple[int, ...]) -> str:
    """What one argument had where the result is bad; where that is of the whole of it, its range."""
    try:
        by_entry = func.overloadpacket not in _PRODUCTS and tensor.dim() <= made.dim()
        if by_entry and torch.broadcast_shapes(tensor.shape, made.shape) == made.shape:
            return f"{tensor.expand(made.shape)[at].item():.6g}"
    except RuntimeError:  # shapes of another kind of operation
        pass
    shape = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    return f"{shape} from {tensor.min().item():.6g} to {tensor.max().item():.6g}" if tensor.numel() else shape


class _CulpritMode(DispatchMode):
    """Notes the first operation that makes something that is not finite of what is."""

    def __init__(self) -> None:
        super().__init__()
        self.found: _Culprit | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        flat = [] if self.found else list(_flat(args))
        tensors = [x for x in flat if isinstance(x, Tensor)]
        before = [x.detach().clone() if func._schema.is_mutable else x for x in tensors]
        result = func(*args, **(kwargs or {}))
        if self.found is None and func.overloadpacket not in _FILLS:
            bad = [made for made in _flat((result,)) if isinstance(made, Tensor) and _is_bad(made)]
            if bad and not any(map(_is_bad, before)):
                self.found = _Culprit.of(func, bad[0], flat, before)
        return result


def _flat(tree: Any) -> Iterator[Any]:
    for item in tree:
        if isinstance(item, tuple | list):
            yield from _flat(item)
        else:
            yield item


def first_bad_value(run: Copies | LayeredCopies) -> NonFiniteError | None:
    """What made the first bad output or state of a run; None if all are finite.

    Args:
        run: copies of the run that went wrong.
    """
    for layer, copies in run.named_networks():
        broken = _broken_weight(layer, copies)
        if broken is not None:
            return broken
        for copy in copies.in_order:
            suspect = _Suspect(layer, copies, copy)
            found = suspect.received() or suspect.made_forwards()
            if found is not None:
                return found
    return None


def first_bad_gradient(run: Copies | LayeredCopies) -> NonFiniteError | None:
    """What made the first bad gradient on the way back through a run; None if all are finite.

    Args:
        run: copies after a backward pass, from the same gradients by outputs and state that went wrong.
    """
    for layer, copies in reversed(run.named_networks()):
        for copy in reversed(copies.in_order):
            found = _Suspect(layer, copies, copy).made_backwards()
            if found is not None:
                return found
    return None


def _name_in(layer: str, copies: Copies) -> str:
    name = name_of(copies.cell)
    return f"{name} ({layer})" if layer else name


def _broken_weight(layer: str, copies: Copies) -> NonFiniteError | None:
    weights = dict(copies.cell.named_parameters())
    for name, path in parameter_names(copies.cell).items():
        weight = weights[path].detach()
        if not is_finite([weight]):
            value = weight[~weight.isfinite()][0].item()
            return NonFiniteError(
                f"parameter {name} of {_name_in(layer, copies)} holds {value} already before "
                "the first copy: an update of the weights made it; clip the gradients, or lower the learning rate",
                operation="parameter",
                layer=layer,
            )
    return None


class _Suspect:
    """A copy that may have made what is not finite.

    Args:
        layer: the layer and direction; empty for a network of one cell.
        copies: the copies of its network.
        copy: the copy.
    """

    def __init__(self, layer: str, copies: Copies, copy: Copy) -> None:
        self.layer, self.copies, self.copy = layer, copies, copy

    def received(self) -> NonFiniteError | None:
        """An error if its input or state was bad already."""
        copy = self.copy
        for what, tree in (("input", copy.input), ("state", copy.state)):
            if not is_finite(leaves(tree)):
                bad = next(x.detach() for x in leaves(tree) if _is_bad(x))
                at = _first_bad_index(bad)
                row = int(copy.rows[at[0]]) if bad.dim() and len(bad) == len(copy.rows) else 0
                return NonFiniteError(
                    f"the {what} of copy {copy.t} of {_name_in(self.layer, self.copies)} holds {bad[at].item()} in row "
                    f"{row} before the cell is run; look at the data, or at what is computed ahead of the network",
                    t=copy.t,
                    row=row,
                    operation=what,
                    values=(str(bad[at].item()),),
                    layer=self.layer,
                )
        return None

    def made_forwards(self) -> NonFiniteError | None:
        """An error if its output or next state is bad: the cell is run again with an eye on every operation."""
        results = leaves((self.copy.output, self.copy.next_state))
        if is_finite(results):
            return None
        with torch.no_grad(), torch.random.fork_rng(), _CulpritMode() as mode:
            self.copies.cell(*self.copies.arguments(self.copy))
        return self._error(mode.found, next(x.detach() for x in results if _is_bad(x)), "gave")

    def made_backwards(self) -> NonFiniteError | None:
        """An error if a gradient is bad that came to it, that it sent on, or that is its share of a weight's."""
        taps = self.copy.taps
        came, went = (
            [grad for tapped in trees for grad in tapped.grads if grad is not None]
            for trees in ((taps.output, taps.next_state), (taps.input, taps.state))
        )
        if not is_finite(came):
            return self._error(None, next(filter(_is_bad, came)), "received, on the way back,")
        if is_finite(went) and is_finite(list(self.copy.shares(list(self.copies.weights)).values())):
            return None
        by = [x for entered in (taps.input, taps.state, taps.weights) for x in entered.passed if x.requires_grad]
        of, grads = zip(*taps.output.flowed, *taps.next_state.flowed, strict=True)
        with _CulpritMode() as mode:
            found = torch.autograd.grad(of, by, grads, retain_graph=True, allow_unused=True)
        bad = next(grad for grad in found if grad is not None and _is_bad(grad))
        return self._error(mode.found, bad, "gave, on the way back,")

    def _error(self, culprit: _Culprit | None, bad: Tensor, verb: str) -> NonFiniteError:
        copy, rows = self.copy, len(self.copy.rows)
        by_row = culprit is not None and culprit.rows == rows
        at = culprit.at if culprit is not None and by_row else _first_bad_index(bad)
        has_rows = by_row or (bad.dim() > 0 and len(bad) == rows)
        row = int(copy.rows[at[0]]) if has_rows and at else None
        value = bad[_first_bad_index(bad)].item() if culprit is None else culprit.value
        where = f"copy {copy.t} of {_name_in(self.layer, self.copies)} {verb} {value}"
        where += "" if row is None else f" in row {row}"
        if culprit is None:
            how, remedy = (
                "what came to it was so already",
                "look at the loss and at what lies between it and the network",
            )
        else:
            call = f"{culprit.operation}({', '.join(culprit.arguments)})"
            how = f"the first operation to make it was {call} at {list(culprit.at)}"
            remedy = "clip the gradients, lower the learning rate, or keep that operation's arguments in its range"
        return NonFiniteError(
            f"{where}; {how}; {remedy}",
            t=copy.t,
            row=row,
            operation="" if culprit is None else culprit.operation,
            values=() if culprit is None else culprit.arguments,
            layer=self.layer,
        )
